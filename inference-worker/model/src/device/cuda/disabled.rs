//! A build without CUDA.

use candle_core::Device;

use super::{CudaError, Survey};

/// What the driver tells of its devices, without taking memory on them.
///
/// # Errors
/// Always [`CudaError::NotBuilt`].
pub fn survey() -> Result<Survey, CudaError> {
    Err(CudaError::NotBuilt)
}

/// Opens the `ordinal`-th device that this process sees.
///
/// # Errors
/// Always [`CudaError::NotBuilt`].
pub fn open(_ordinal: usize) -> Result<Device, CudaError> {
    Err(CudaError::NotBuilt)
}
