//! Collectives between CUDA devices, by NVIDIA's NCCL. Builds without it say so.
//!
//! NCCL carries tensors only. Plans, headers and the signs of life go over the link
//! that the ranks have anyway, which also brings them together: rank 0 makes NCCL's
//! identifier and broadcasts it there.

#[cfg(not(feature = "nccl"))]
mod disabled;
#[cfg(feature = "nccl")]
mod enabled;

#[cfg(not(feature = "nccl"))]
pub use disabled::{BUILT, connect};
#[cfg(feature = "nccl")]
pub use enabled::{BUILT, connect};

use llama_model::CollectiveError;

/// Ranks could not be connected by NCCL.
#[derive(Debug, thiserror::Error)]
pub enum NcclError {
    /// This build has no NCCL.
    #[error(
        "this worker is built without NCCL, by which ranks on CUDA devices exchange their sums; use a worker image with NCCL"
    )]
    NotBuilt,
    /// The device is not one that NCCL serves.
    #[error("rank {rank} computes on {device}, NCCL connects CUDA devices")]
    WrongDevice {
        /// The rank.
        rank: usize,
        /// Its device.
        device: String,
    },
    /// A peer or the transport failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}
