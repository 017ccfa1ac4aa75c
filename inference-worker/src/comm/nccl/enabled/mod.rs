//! A build with NCCL.

mod communicator;
mod link;
mod memory;
mod patience;

use std::time::Duration;

use llama_model::device::Device;

use self::communicator::UniqueId;
use self::link::NcclLink;
use super::NcclError;
use crate::comm::Link;
use crate::comm::board::Board;

/// How long ranks wait for each other to connect their devices.
const CONNECT_DEADLINE: Duration = Duration::from_mins(2);

/// Whether this build has NCCL.
pub const BUILT: bool = true;

/// Connects the devices of the ranks that `control` connects.
///
/// # Errors
/// When this rank computes on another device, a peer ends or does not come in
/// time, or NCCL fails.
pub fn connect(
    mut control: Box<dyn Link>,
    board: Board,
    device: &Device,
) -> Result<Box<dyn Link>, NcclError> {
    let Device::Cuda(device) = device else {
        return Err(NcclError::WrongDevice {
            rank: control.rank(),
            device: format!("{:?}", device.location()),
        });
    };
    let mut id = Vec::new();
    if control.rank() == 0 {
        id = UniqueId::new()
            .map_err(|fault| fault.of("make an identifier"))?
            .to_bytes();
    }
    control.broadcast(&mut id)?;
    let id = UniqueId::from_bytes(&id).ok_or_else(|| llama_model::CollectiveError::OutOfStep {
        rank: 0,
        reason: format!("it sent {} bytes for NCCL's identifier", id.len()),
    })?;
    let link = NcclLink::connect(control, board, device, id, CONNECT_DEADLINE)?;
    Ok(Box::new(link))
}
