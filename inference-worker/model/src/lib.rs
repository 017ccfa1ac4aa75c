//! Llama models on candle: loading one rank's part of a checkpoint, computing
//! steps, and the text around it (tokenizer, chat template, sampling).
//!
//! This crate knows nothing of processes, sockets or requests. Ranks talk
//! through [`Collective`], whose backends live in the worker.

mod attention;
mod buffer;
pub mod collective;
pub mod cut;
pub mod device;
pub mod embed;
mod experts;
#[doc(hidden)]
pub mod fixture;
pub mod kernels;
mod kv;
mod layer;
mod linear;
pub mod llama;
mod load;
pub mod lora;
mod ops;
mod rope;
pub mod sample;
pub mod step;
mod tables;
pub mod text;
mod threads;

pub use llama_checkpoint::{
    Checkpoint, EmbeddingCheckpoint, Gguf, Layout, LlamaConfig, MemoryPlan, MemoryRequest,
    ModelError, ModelErrorCategory, Shard, adapter, advice, blocks, checkpoint, config, embedding,
    error, fit, gguf, memory, order, shard, slices,
};

pub use collective::{Collective, CollectiveError, LocalCollective};
pub use device::DeviceLlama;
pub use linear::Linear;
pub use llama::{Llama, LoadOptions};
pub use step::{Segment, StepError, StepModel, TableChange, Wanted};
