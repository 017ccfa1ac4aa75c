//! Collectives on tensors that stay on their device.

use candle_core::{DType, Tensor};

use crate::collective::Collective;
use crate::step::StepError;

/// What ranks do together with tensors on their devices, beside what
/// [`Collective`] does with numbers in main memory.
///
/// The order of calls is that of [`Collective`]. An operation may only be under
/// way when its call returns; operations on the same device that follow wait for
/// it there. Before the host waits for the device, it calls
/// [`TensorCollective::settle`], which has the deadline that waiting for a device
/// has not.
pub trait TensorCollective {
    /// Replaces `tensor`, which is contiguous, by the sum over the ranks of this
    /// stage; all ranks hold bitwise equal results.
    ///
    /// # Errors
    /// When a peer ended, fell silent, or is out of step, or the device refuses.
    fn all_reduce_sum(&mut self, tensor: &Tensor) -> Result<(), StepError>;

    /// The values of every rank's `part` in main memory, in rank order. Parts may
    /// differ in length, and `None` is an empty one: `lens[r]` is the length of rank
    /// r's, the same `lens` on every rank.
    ///
    /// # Errors
    /// As [`TensorCollective::all_reduce_sum`].
    fn all_gather(&mut self, part: Option<&Tensor>, lens: &[usize]) -> Result<Vec<f32>, StepError>;

    /// Hands `tensor`, which is contiguous, to the rank at the same place of the
    /// next stage.
    ///
    /// # Errors
    /// As [`TensorCollective::all_reduce_sum`].
    fn send_next(&mut self, tensor: &Tensor) -> Result<(), StepError>;

    /// Fills `tensor`, which is contiguous, with what the rank at the same place
    /// of the previous stage sends.
    ///
    /// # Errors
    /// As [`TensorCollective::all_reduce_sum`].
    fn receive_previous(&mut self, tensor: &Tensor) -> Result<(), StepError>;

    /// Waits until all operations so far are done.
    ///
    /// # Errors
    /// As [`TensorCollective::all_reduce_sum`].
    fn settle(&mut self) -> Result<(), StepError>;
}

/// A [`Collective`] in main memory, to which tensors are copied and back: for
/// groups that have no transport between their devices.
pub struct Staged<'a>(pub &'a mut dyn Collective);

impl std::fmt::Debug for Staged<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Staged").field(&self.0.rank()).finish()
    }
}

/// The values of a tensor in main memory.
fn fetch(tensor: &Tensor) -> Result<Vec<f32>, StepError> {
    tensor
        .flatten_all()
        .and_then(|tensor| tensor.to_dtype(DType::F32)?.to_vec1())
        .map_err(StepError::Compute)
}

/// Writes values over those of a tensor.
fn store(tensor: &Tensor, values: Vec<f32>) -> Result<(), StepError> {
    Tensor::from_vec(values, tensor.shape(), tensor.device())
        .and_then(|values| tensor.slice_set(&values.to_dtype(tensor.dtype())?, 0, 0))
        .map_err(StepError::Compute)
}

impl TensorCollective for Staged<'_> {
    fn all_reduce_sum(&mut self, tensor: &Tensor) -> Result<(), StepError> {
        if self.0.layout().tensor == 1 {
            return Ok(());
        }
        let mut values = fetch(tensor)?;
        self.0.all_reduce_sum(&mut values)?;
        store(tensor, values)
    }

    fn all_gather(&mut self, part: Option<&Tensor>, lens: &[usize]) -> Result<Vec<f32>, StepError> {
        let mut all = vec![0.0; lens.iter().sum()];
        let part = part.map_or_else(|| Ok(Vec::new()), fetch)?;
        self.0.all_gather(&part, lens, &mut all)?;
        Ok(all)
    }

    fn send_next(&mut self, tensor: &Tensor) -> Result<(), StepError> {
        Ok(self.0.send_next(&fetch(tensor)?)?)
    }

    fn receive_previous(&mut self, tensor: &Tensor) -> Result<(), StepError> {
        let mut values = vec![0.0; tensor.elem_count()];
        self.0.receive_previous(&mut values)?;
        store(tensor, values)
    }

    fn settle(&mut self) -> Result<(), StepError> {
        // Every operation above has waited already.
        Ok(())
    }
}
