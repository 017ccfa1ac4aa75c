//! Llama models on candle: reading a GGUF, slicing it for one tensor-parallel
//! rank, computing steps, and the text around it (tokenizer, chat template,
//! sampling).
//!
//! This crate knows nothing of processes, sockets or requests. Ranks talk
//! through [`Collective`], whose backends live in the worker.

pub mod collective;
pub mod step;

pub use collective::{Collective, CollectiveError, LocalCollective};
pub use step::{Segment, StepError, StepModel};
