//! Inference worker.
