//! A Llama model on any device of candle, in candle's own tensor operations.
//!
//! [`Llama`](crate::Llama) computes with this crate's kernels and in main memory
//! only. This is its twin for CUDA devices: a layer is written over the
//! operations that it needs ([`Operations`]), and [`TensorOperations`] gives them
//! in plain tensors. The same code runs on candle's CPU device, where it is tested.

mod adapters;
mod attention;
mod cache;
mod collective;
pub mod cuda;
mod layer;
mod load;
mod matrix;
mod model;
mod operations;
mod rotary;
mod tensors;

pub use candle_core::{DType, Device};

pub use attention::TensorRows;
pub use cache::{CacheShape, TensorCache};
pub use collective::{Staged, TensorCollective};
pub use layer::{Experts, FeedForward, Gated, Layer};
pub use matrix::{Matrix, Precision};
pub use model::DeviceLlama;
pub use operations::{AttentionRules, Choice, Operations, Sequence};
pub use tensors::TensorOperations;
