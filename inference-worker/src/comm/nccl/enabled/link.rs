//! A [`Link`] whose ranks also exchange tensors between their CUDA devices.
#![allow(unsafe_code, reason = "NCCL takes addresses of device memory")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, DType, Tensor};
use llama_model::device::TensorCollective;
use llama_model::{Collective, CollectiveError, Layout, StepError};

use super::communicator::{Communicator, Fault, Progress, Span, UniqueId};
use super::memory;
use super::patience::{Ended, wait};
use crate::comm::board::Board;
use crate::comm::{HEARTBEAT_PERIOD, Link, SILENCE_LIMIT, STEP_DEADLINE};

/// How long a rank whose device failed waits to hear what really happened: others
/// notice a dead or silent peer by then.
const BLAME: Duration = SILENCE_LIMIT.saturating_add(HEARTBEAT_PERIOD.saturating_mul(5));
/// Pause between looks at the board.
const LOOK: Duration = Duration::from_millis(5);

/// NCCL beside another link.
pub(super) struct NcclLink {
    control: Box<dyn Link>,
    board: Board,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    deadline: Duration,
    /// All ranks.
    group: Communicator,
    /// The ranks of this stage, where there are several stages.
    stage: Option<Communicator>,
}

impl std::fmt::Debug for NcclLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NcclLink")
            .field("rank", &self.control.rank())
            .field("layout", &self.control.layout())
            .finish_non_exhaustive()
    }
}

/// NCCL numbers ranks and their count with this.
fn number(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

impl NcclLink {
    /// Connects the devices of all ranks of `control`.
    pub(super) fn connect(
        control: Box<dyn Link>,
        board: Board,
        device: &CudaDevice,
        id: UniqueId,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        let (rank, layout) = (control.rank(), control.layout());
        let stream = device.cuda_stream();
        stream
            .context()
            .bind_to_thread()
            .map_err(|error| driver_fault(error).of("use the device"))?;
        let ranks = (number(rank), number(layout.world()));
        let group = Communicator::begin(id, ranks, Arc::clone(&stream))
            .map_err(|fault| fault.of("connect devices"))?;
        let mut link = Self {
            control,
            board,
            device: device.clone(),
            stream,
            deadline,
            group,
            stage: None,
        };
        link.finish("connect devices")?;
        if layout.pipeline > 1 {
            let (color, key) = (layout.stage(rank), layout.tensor_rank(rank));
            let splitting = link
                .group
                .begin_split(number(color), number(key))
                .map_err(|fault| fault.of("connect the devices of a stage"))?;
            link.finish("connect the devices of a stage")?;
            link.stage = Some(splitting.finish());
            link.finish("connect the devices of a stage")?;
        }
        link.deadline = STEP_DEADLINE;
        Ok(link)
    }

    /// Waits until NCCL has taken what was last asked of it.
    fn finish(&mut self, operation: &str) -> Result<(), CollectiveError> {
        let progress = || match (self.group.progress()?, &self.stage) {
            (Progress::Done, Some(stage)) => stage.progress(),
            (progress, _) => Ok(progress),
        };
        let waited = wait(&self.board, self.deadline, progress);
        waited.map_err(|ended| self.end(operation, ended))
    }

    /// Ends what is under way, and says why.
    fn end(&mut self, operation: &str, ended: Ended) -> CollectiveError {
        // At once: what one waits for may stand on the stream behind the other's.
        std::thread::scope(|scope| {
            if let Some(stage) = &mut self.stage {
                scope.spawn(|| stage.abort());
            }
            self.group.abort();
        });
        let error = match ended {
            Ended::GroupOver => None,
            Ended::Late(waited) => Some(CollectiveError::Transport {
                operation: format!("NCCL: {operation}"),
                reason: format!("it is not done after {} ms", waited.as_millis()),
            }),
            Ended::Fault(fault) if fault.concerns_peers && self.is_blamed_elsewhere() => None,
            Ended::Fault(fault) => Some(fault.of(operation)),
        };
        error.unwrap_or_else(|| {
            let cause = self.board.cause();
            CollectiveError::Aborted {
                reason: cause.map_or_else(|| "no cause is told".to_owned(), |cause| cause.message),
            }
        })
    }

    /// Waits a little for somebody who knows which peer failed.
    fn is_blamed_elsewhere(&self) -> bool {
        let begun = Instant::now();
        while !self.board.is_over() && begun.elapsed() < BLAME {
            std::thread::sleep(LOOK);
        }
        self.board.is_over()
    }

    /// Judges an operation that was put on the stream, and waits until NCCL has
    /// taken it.
    fn taken(
        &mut self,
        operation: &str,
        result: candle_core::Result<Result<Progress, Fault>>,
    ) -> Result<(), StepError> {
        match result.map_err(StepError::Compute)? {
            Ok(Progress::Done) => Ok(()),
            Ok(Progress::UnderWay) => Ok(self.finish(operation)?),
            Err(fault) => Err(self.end(operation, Ended::Fault(fault)).into()),
        }
    }

    /// Checks that `lens` has one length for each rank, this one's among them.
    fn check_gather(&self, own: usize, lens: &[usize]) -> Result<(), CollectiveError> {
        let (rank, world) = (self.control.rank(), self.control.layout().world());
        if lens.len() == world && lens.get(rank) == Some(&own) {
            return Ok(());
        }
        Err(CollectiveError::OutOfStep {
            rank,
            reason: format!("a part of {own} values, lengths {lens:?} over {world} ranks"),
        })
    }

    /// The rank at the same place of the stage that is `step` further.
    fn neighbour(&self, step: isize) -> Result<i32, CollectiveError> {
        let (rank, layout) = (self.control.rank(), self.control.layout());
        let stage = layout.stage(rank).checked_add_signed(step);
        match stage.filter(|stage| *stage < layout.pipeline) {
            Some(stage) => Ok(number(stage * layout.tensor + layout.tensor_rank(rank))),
            None => Err(CollectiveError::OutOfStep {
                rank,
                reason: format!(
                    "it is in stage {} of {} and has no neighbour there",
                    layout.stage(rank),
                    layout.pipeline
                ),
            }),
        }
    }
}

fn driver_fault(error: candle_core::cuda_backend::cudarc::driver::DriverError) -> Fault {
    Fault {
        concerns_peers: false,
        reason: error.to_string(),
    }
}

impl TensorCollective for NcclLink {
    fn all_reduce_sum(&mut self, tensor: &Tensor) -> Result<(), StepError> {
        if self.control.layout().tensor == 1 {
            return Ok(());
        }
        let ranks = self.stage.as_ref().unwrap_or(&self.group);
        let sum = |span: Span| {
            // SAFETY: the span is the tensor's own memory. It is used on one stream
            // only, where freeing it also waits for its turn.
            unsafe { ranks.all_reduce_sum(span) }
        };
        let result = memory::writing(tensor, &self.stream, sum);
        self.taken("sum", result)
    }

    fn all_gather(&mut self, part: Option<&Tensor>, lens: &[usize]) -> Result<Vec<f32>, StepError> {
        let rank = self.control.rank();
        self.check_gather(part.map_or(0, Tensor::elem_count), lens)?;
        let total: usize = lens.iter().sum();
        if total == 0 {
            return Ok(Vec::new());
        }
        let device = candle_core::Device::Cuda(self.device.clone());
        let all = Tensor::zeros(total, DType::F32, &device).map_err(StepError::Compute)?;
        let gather = |part: Span| {
            memory::writing(&all, &self.stream, |all| {
                // SAFETY: the spans are the tensors' own memory, of the checked
                // lengths. It is used on one stream only, where freeing it also
                // waits for its turn.
                unsafe { self.group.all_gather(rank, (part, all), lens) }
            })
        };
        let gathered = match part {
            None => gather(Span::EMPTY),
            Some(part) => part
                .to_dtype(DType::F32)
                .and_then(|part| memory::reading(&part.contiguous()?, &self.stream, gather))
                .and_then(|gathered| gathered),
        };
        self.taken("gather", gathered)?;
        self.settle()?;
        all.to_vec1().map_err(StepError::Compute)
    }

    fn send_next(&mut self, tensor: &Tensor) -> Result<(), StepError> {
        let peer = self.neighbour(1)?;
        let result = memory::reading(tensor, &self.stream, |span| {
            // SAFETY: as for the sum.
            unsafe { self.group.send(span, peer) }
        });
        self.taken("send to the next stage", result)
    }

    fn receive_previous(&mut self, tensor: &Tensor) -> Result<(), StepError> {
        let peer = self.neighbour(-1)?;
        let result = memory::writing(tensor, &self.stream, |span| {
            // SAFETY: as for the sum.
            unsafe { self.group.receive(span, peer) }
        });
        self.taken("receive from the previous stage", result)
    }

    fn settle(&mut self) -> Result<(), StepError> {
        let event = self
            .stream
            .record_event(None)
            .map_err(|error| driver_fault(error).of("mark the stream"))?;
        let progress = || {
            if event.try_is_complete().map_err(driver_fault)? {
                return Ok(Progress::Done);
            }
            self.group.progress()?;
            if let Some(stage) = &self.stage {
                stage.progress()?;
            }
            Ok(Progress::UnderWay)
        };
        let waited = wait(&self.board, self.deadline, progress);
        waited.map_err(|ended| self.end("wait for the step", ended).into())
    }
}

impl Collective for NcclLink {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn layout(&self) -> Layout {
        self.control.layout()
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.control.all_reduce_sum(data)
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.control.all_gather(part, lens, out)
    }

    fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        self.control.send_next(data)
    }

    fn receive_previous(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.control.receive_previous(data)
    }

    fn on_device(&mut self) -> Option<&mut dyn TensorCollective> {
        Some(self)
    }
}

impl Link for NcclLink {
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.control.broadcast(payload)
    }

    fn gather_words(&mut self, mine: [u64; 3]) -> Result<Vec<[u64; 3]>, CollectiveError> {
        self.control.gather_words(mine)
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
        self.control.set_deadline(deadline);
    }

    fn expect_close(&mut self) {
        self.control.expect_close();
    }
}
