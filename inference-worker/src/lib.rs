//! Inference worker.
pub mod comm;
pub mod failure;
pub mod scheduler;
