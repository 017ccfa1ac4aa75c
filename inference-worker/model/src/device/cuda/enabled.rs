//! A build with CUDA.
#![allow(
    unsafe_code,
    reason = "the driver's memory query has no safe interface"
)]

use candle_core::cuda_backend::cudarc::driver::{DriverError, result};
use candle_core::{CudaDevice, Device};

use super::{CudaError, Survey};

/// What the driver tells of its devices, without taking memory on them.
///
/// # Errors
/// [`CudaError::NoDevice`] with the driver's words.
pub fn survey() -> Result<Survey, CudaError> {
    let said = |error: DriverError| CudaError::NoDevice(words(error));
    result::init().map_err(said)?;
    let count = result::device::get_count().map_err(said)?;
    let memory = (0..count)
        .map(|ordinal| {
            let device = result::device::get(ordinal)?;
            // SAFETY: the driver has just given this device.
            unsafe { result::device::total_mem(device) }.map(|bytes| bytes as u64)
        })
        .collect::<Result<_, _>>()
        .map_err(said)?;
    Ok(Survey { memory })
}

/// Opens the `ordinal`-th device that this process sees.
///
/// # Errors
/// [`CudaError::Open`] with candle's words.
pub fn open(ordinal: usize) -> Result<Device, CudaError> {
    // A stream of its own: that of candle's default depends on the calling thread.
    let device = CudaDevice::new_with_stream(ordinal).map_err(|error| CudaError::Open {
        ordinal,
        reason: error.to_string(),
    })?;
    // SAFETY: this process puts all work of a device on that one stream, where it
    // runs in order; memory is also freed there.
    unsafe { device.disable_event_tracking() };
    Ok(Device::Cuda(device))
}

/// Bytes that are used on `device`, by whomever; `None` where it does not say.
pub fn used(device: &Device) -> Option<u64> {
    let stream = device.as_cuda_device().ok()?.cuda_stream();
    let (free, total) = stream.context().mem_get_info().ok()?;
    Some(total.saturating_sub(free) as u64)
}

/// A driver error's own sentence, where the driver has one for it.
fn words(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{:?}", error.0),
    }
}
