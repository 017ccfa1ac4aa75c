//! CUDA devices of this machine. Builds without CUDA say so.

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(feature = "cuda")]
mod enabled;

#[cfg(not(feature = "cuda"))]
pub use disabled::{open, survey, used};
#[cfg(feature = "cuda")]
pub use enabled::{open, survey, used};

/// What the driver tells of its devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Bytes of memory of each device.
    pub memory: Vec<u64>,
}

/// CUDA devices cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// This build has no CUDA.
    #[error("this worker is built without CUDA")]
    NotBuilt,
    /// The driver has no device, or does not work.
    #[error("no CUDA device: the driver libcuda.so.1 says \"{0}\"")]
    NoDevice(String),
    /// A device could not be opened.
    #[error("open CUDA device {ordinal}: {reason}")]
    Open {
        /// Its number in this process.
        ordinal: usize,
        /// What candle said.
        reason: String,
    },
}
