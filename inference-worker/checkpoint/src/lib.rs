//! What a Llama checkpoint holds, from its headers alone: the model's shape, which
//! bytes each rank reads into which matrix, and the memory that takes.
//!
//! Reads GGUF and safetensors headers and `config.json`; never weights.

pub mod adapter;
pub mod advice;
pub mod blocks;
pub mod checkpoint;
pub mod config;
pub mod embedding;
pub mod error;
pub mod fit;
#[doc(hidden)]
pub mod fixture;
mod foreign;
pub mod format;
pub mod gguf;
pub mod layout;
mod map;
pub mod memory;
pub mod names;
pub mod order;
mod safetensors;
pub mod shard;
pub mod slices;
pub mod stored;

pub use checkpoint::Checkpoint;
pub use config::LlamaConfig;
pub use embedding::EmbeddingCheckpoint;
pub use error::{ModelError, ModelErrorCategory};
pub use format::{BLOCK, Format};
pub use gguf::Gguf;
pub use layout::Layout;
pub use memory::{MemoryPlan, MemoryRequest};
pub use safetensors::WeightFile;
pub use shard::Shard;
