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

/// Bytes that are used on `device`, by whomever; `None` where it does not say.
pub fn used(_device: &Device) -> Option<u64> {
    None
}

/// Opens the `ordinal`-th device that this process sees.
///
/// # Errors
/// Always [`CudaError::NotBuilt`].
pub fn open(_ordinal: usize) -> Result<Device, CudaError> {
    Err(CudaError::NotBuilt)
}
