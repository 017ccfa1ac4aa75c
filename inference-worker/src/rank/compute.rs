//! What a rank computes with: this crate's kernels on CPU cores, or a CUDA device.

use std::time::Duration;

use llama_contract::{Device as Kind, FailureCategory};
use llama_model::device::{Device, Precision, cuda};
use llama_model::{Checkpoint, DeviceLlama, Llama, LoadOptions, ModelError, StepModel};

use super::RankError;
use crate::comm::Link;
use crate::comm::board::Board;
use crate::comm::nccl::{self, NcclError};
use crate::failure::Failure;

/// Time between two looks at the memory of a device.
const MEMORY_PERIOD: Duration = Duration::from_secs(5);

/// One rank's means to compute.
#[derive(Debug)]
pub(super) enum Compute {
    Cores,
    Device(Device),
}

impl Compute {
    /// Opens what the pod's `local`-th rank computes with.
    pub(super) fn open(kind: Kind, local: usize) -> Result<Self, Failure> {
        match kind {
            Kind::Cpu => Ok(Self::Cores),
            Kind::Cuda => cuda::open(local).map(Self::Device).map_err(|error| {
                Failure::from_error(FailureCategory::InvalidConfiguration, &error)
            }),
        }
    }

    /// Has a thread tell `board` again and again what is used of the device.
    pub(super) fn watch_memory(&self, board: &Board, local: usize) -> std::io::Result<()> {
        let Self::Device(device) = self else {
            return Ok(());
        };
        let (device, board) = (device.clone(), board.clone());
        let watch = move || {
            while let Some(bytes) = cuda::used(&device) {
                board.set_device_bytes(local, bytes);
                std::thread::sleep(MEMORY_PERIOD);
            }
        };
        let thread = std::thread::Builder::new().name("memory".to_owned());
        thread.spawn(watch).map(drop)
    }

    /// Type of the activations, on which ranks must agree.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Cores => "f32",
            Self::Device(_) => "as the weights",
        }
    }

    /// The link by which ranks exchange their sums: `link` itself, or one that also
    /// connects their devices.
    pub(super) fn connect(
        &self,
        link: Box<dyn Link>,
        board: &Board,
    ) -> Result<Box<dyn Link>, RankError> {
        let Self::Device(device) = self else {
            return Ok(link);
        };
        if link.layout().world() == 1 {
            return Ok(link);
        }
        nccl::connect(link, board.clone(), device).map_err(|error| match &error {
            NcclError::Collective(error) => match Failure::of_collective(error) {
                Some(failure) => RankError::Failed(failure),
                None => RankError::Aborted,
            },
            NcclError::NotBuilt | NcclError::WrongDevice { .. } => RankError::Failed(
                Failure::from_error(FailureCategory::InvalidConfiguration, &error),
            ),
        })
    }

    /// Loads a rank's part of a model.
    pub(super) fn load(
        &self,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Box<dyn StepModel>, ModelError> {
        Ok(match self {
            Self::Cores => Box::new(Llama::load(checkpoint, options, progress)?),
            Self::Device(device) => {
                let place = (device, Precision::Stored);
                Box::new(DeviceLlama::load(checkpoint, options, place, progress)?)
            }
        })
    }
}
