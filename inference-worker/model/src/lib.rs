//! Llama models on candle: reading a GGUF, slicing it for one tensor-parallel
//! rank, computing steps, and the text around it (tokenizer, chat template,
//! sampling).
//!
//! This crate knows nothing of processes, sockets or requests. Ranks talk
//! through [`Collective`], whose backends live in the worker.

mod attention;
pub mod buffer;
pub mod collective;
pub mod config;
pub mod error;
#[doc(hidden)]
pub mod fixture;
pub mod gguf;
pub mod kernels;
mod kv;
mod linear;
pub mod llama;
pub mod memory;
mod ops;
pub mod order;
pub mod sample;
pub mod shard;
pub mod step;
pub mod text;
mod threads;
mod weights;

pub use buffer::{Buffer, BufferError, WeightBytes};
pub use collective::{Collective, CollectiveError, Layout, LocalCollective};
pub use config::LlamaConfig;
pub use error::{ModelError, ModelErrorCategory};
pub use gguf::Gguf;
pub use kv::CHUNK_TOKENS;
pub use linear::{Linear, Matrix, MatrixError, MatrixForm};
pub use llama::{Llama, LoadOptions};
pub use memory::{MemoryPlan, MemoryRequest};
pub use step::{Segment, StepError, StepModel};
