//! The model's operations as custom operations of candle.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{
    CpuStorage, CustomOp2, Device, InplaceOp1, InplaceOp2, Layout, Result, Shape, Tensor,
};

use crate::collective::{Collective, CollectiveError};
use crate::kernels::{self, Isa};
use crate::step::{StepError, join_columns};

/// The values of a contiguous f32 tensor.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a tensor of {:?} is not contiguous", layout.shape());
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Likewise, to be written.
pub(crate) fn values_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [f32]> {
    let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        candle_core::bail!("a tensor of {:?} is not contiguous f32", layout.shape());
    };
    Ok(&mut data[start..end])
}

/// `RMSNorm` (Zhang and Sennrich 2019): each row divided by its root mean square,
/// times a weight a column.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    weight: Tensor,
    epsilon: f32,
}

impl RmsNorm {
    /// With `weight` of shape `[columns]`.
    pub(crate) fn new(weight: Tensor, epsilon: f32) -> Self {
        Self { weight, epsilon }
    }

    /// Normalizes `[m, columns]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op2_no_bwd(&self.weight, self)
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut out = values(x, x_layout)?.to_vec();
        let weight = values(weight, weight_layout)?;
        for row in out.chunks_exact_mut(weight.len()) {
            let scale = 1.0 / (kernels::mean_square(row) + self.epsilon).sqrt();
            for (value, weight) in row.iter_mut().zip(weight) {
                *value = *value * scale * weight;
            }
        }
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

/// `silu(gate) · up` of two tensors of one shape.
#[derive(Debug)]
pub(crate) struct SiluMul(pub(crate) Isa);

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut out = values(gate, gate_layout)?.to_vec();
        kernels::silu_mul(self.0, &mut out, values(up, up_layout)?);
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }
}

/// Adds a tensor to another of the same shape, in place. candle's own addition
/// would start a pool of spinning threads.
#[derive(Debug)]
pub(crate) struct AddTo;

impl InplaceOp2 for AddTo {
    fn name(&self) -> &'static str {
        "add-to"
    }

    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        part: &CpuStorage,
        part_layout: &Layout,
    ) -> Result<()> {
        let part = values(part, part_layout)?;
        for (sum, part) in values_mut(sum, sum_layout)?.iter_mut().zip(part) {
            *sum += part;
        }
        Ok(())
    }
}

/// The group's collectives during one step, as operations on tensors.
pub(crate) struct Reduce<'a> {
    collective: RefCell<&'a mut dyn Collective>,
    failure: RefCell<Option<CollectiveError>>,
}

impl<'a> Reduce<'a> {
    /// For one step.
    pub(crate) fn new(collective: &'a mut dyn Collective) -> Self {
        Self {
            collective: RefCell::new(collective),
            failure: RefCell::new(None),
        }
    }

    /// Replaces `partial` by its sum over all ranks.
    pub(crate) fn sum(&self, partial: &Tensor) -> std::result::Result<(), StepError> {
        partial
            .inplace_op1(self)
            .map_err(|error| match self.failure.take() {
                Some(failure) => StepError::Collective(failure),
                None => StepError::Compute(error),
            })
    }

    /// Hands rows to the next stage.
    pub(crate) fn send(&self, rows: &Tensor) -> std::result::Result<(), StepError> {
        let rows: Vec<f32> = rows
            .flatten_all()
            .and_then(|rows| rows.to_vec1())
            .map_err(StepError::Compute)?;
        self.collective.borrow_mut().send_next(&rows)?;
        Ok(())
    }

    /// Takes `shape` rows from the previous stage.
    pub(crate) fn receive(&self, shape: (usize, usize)) -> std::result::Result<Tensor, StepError> {
        let mut rows = vec![0.0; shape.0 * shape.1];
        self.collective.borrow_mut().receive_previous(&mut rows)?;
        Tensor::from_vec(rows, shape, &Device::Cpu).map_err(StepError::Compute)
    }

    /// `rows` rows whose columns are spread over ranks as whole rows; rank r has the
    /// columns `ranges[r]`, `part` is ours.
    pub(crate) fn gather_rows(
        &self,
        rows: usize,
        part: Option<&Tensor>,
        ranges: &[Range<usize>],
    ) -> std::result::Result<Vec<Vec<f32>>, StepError> {
        let part: Vec<f32> = match part {
            None => Vec::new(),
            Some(part) => part
                .flatten_all()
                .and_then(|part| part.to_vec1())
                .map_err(StepError::Compute)?,
        };
        let lens: Vec<usize> = ranges.iter().map(|range| range.len() * rows).collect();
        let columns = ranges.last().map_or(0, |range| range.end);
        let mut all = vec![0.0; columns * rows];
        self.collective
            .borrow_mut()
            .all_gather(&part, &lens, &mut all)?;
        Ok(join_columns(&all, ranges, rows))
    }
}

impl InplaceOp1 for Reduce<'_> {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let sum = self
            .collective
            .borrow_mut()
            .all_reduce_sum(values_mut(storage, layout)?);
        sum.map_err(|failure| {
            let error = candle_core::Error::msg(failure.clone());
            self.failure.replace(Some(failure));
            error
        })
    }
}
