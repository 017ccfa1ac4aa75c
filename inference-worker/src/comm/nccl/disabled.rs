//! A build without NCCL.

use llama_model::device::Device;

use super::NcclError;
use crate::comm::Link;
use crate::comm::board::Board;

/// Whether this build has NCCL.
pub const BUILT: bool = false;

/// Connects the devices of the ranks that `control` connects.
///
/// # Errors
/// Always [`NcclError::NotBuilt`].
pub fn connect(
    _control: Box<dyn Link>,
    _board: Board,
    _device: &Device,
) -> Result<Box<dyn Link>, NcclError> {
    Err(NcclError::NotBuilt)
}
