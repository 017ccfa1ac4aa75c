//! Adapters on the rows of a step, over [`Operations`].

use candle_core::{Result, Tensor};
use llama_checkpoint::adapter::Target;

use super::collective::TensorCollective;
use super::operations::Operations;
use crate::lora::{Adapters, Changes, Thin, rows_by_adapter};
use crate::step::{Segment, StepError};

/// The rows that one adapter changes.
struct Group<'a, M> {
    adapter: &'a [Changes<M>],
    rows: Vec<u32>,
    /// A factor of one for each row.
    ones: Vec<f32>,
}

/// The adapters of a step.
pub(super) struct StepAdapters<'a, M>(Vec<Group<'a, M>>);

/// This rank's part of the product of a matrix that ranks have columns of, and of what
/// adapters' A matrices make of their rows.
pub(super) struct Parts {
    product: Tensor,
    thin: Vec<Tensor>,
}

impl Parts {
    /// With another product of as many rows.
    pub(super) fn with(self, product: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            product: product(self.product)?,
            thin: self.thin,
        })
    }
}

impl<'a, M> StepAdapters<'a, M> {
    /// Those that `segments` name, all of which are among `adapters`.
    pub(super) fn new(adapters: &'a Adapters<M>, segments: &[Segment]) -> Self {
        let groups = rows_by_adapter(segments).into_iter();
        let groups = groups.filter_map(|(place, rows)| {
            Some(Group {
                adapter: adapters.get(&place)?,
                ones: vec![1.0; rows.len()],
                rows,
            })
        });
        Self(groups.collect())
    }

    fn changes(&self, layer: usize, target: Target) -> Vec<(&Group<'a, M>, &Thin<M>)> {
        let changes =
            |group: &'_ Group<'a, M>| -> Option<&'a Thin<M>> { group.adapter[layer].get(&target) };
        let groups = self.0.iter();
        groups
            .filter_map(|group| Some((group, changes(group)?)))
            .collect()
    }

    /// What `matrix`, the `target` of a layer of this rank, makes of `x`, changed. For
    /// matrices that ranks have rows of.
    pub(super) fn linear<O: Operations<Matrix = M>>(
        &self,
        operations: &O,
        (layer, target): (usize, Target),
        (x, matrix): (&Tensor, &M),
    ) -> Result<Tensor> {
        let mut product = operations.linear(x, matrix)?;
        for (group, thin) in self.changes(layer, target) {
            let inner = group.inner(operations, thin, x)?;
            product = group.add(operations, thin, &inner, &product)?;
        }
        Ok(product)
    }

    /// Likewise for matrices that ranks have columns of; [`StepAdapters::sum`] takes the
    /// parts of all ranks.
    pub(super) fn parts<O: Operations<Matrix = M>>(
        &self,
        operations: &O,
        (layer, target): (usize, Target),
        (x, matrix): (&Tensor, &M),
    ) -> Result<Parts> {
        let changes = self.changes(layer, target).into_iter();
        Ok(Parts {
            product: operations.linear(x, matrix)?,
            thin: changes
                .map(|(group, thin)| group.inner(operations, thin, x))
                .collect::<Result<_>>()?,
        })
    }

    /// The sum of all ranks' `parts`, changed.
    pub(super) fn sum<O: Operations<Matrix = M>>(
        &self,
        operations: &O,
        (layer, target): (usize, Target),
        parts: Parts,
        collective: &mut dyn TensorCollective,
    ) -> std::result::Result<Tensor, StepError> {
        let Parts { product, thin } = parts;
        if thin.is_empty() {
            collective.all_reduce_sum(&product)?;
            return Ok(product);
        }
        let flat = std::iter::once(&product).chain(&thin);
        let flat = flat
            .map(Tensor::flatten_all)
            .collect::<Result<Vec<_>>>()
            .and_then(|flat| Tensor::cat(&flat, 0))
            .map_err(StepError::Compute)?;
        collective.all_reduce_sum(&flat)?;
        let change = || {
            let mut start = product.elem_count();
            let mut sum = flat.narrow(0, 0, start)?.reshape(product.shape())?;
            for ((group, change), part) in self.changes(layer, target).into_iter().zip(&thin) {
                let inner = flat.narrow(0, start, part.elem_count())?;
                let inner = inner.reshape(part.shape())?;
                sum = group.add(operations, change, &inner, &sum)?;
                start += part.elem_count();
            }
            Ok(sum)
        };
        change().map_err(StepError::Compute)
    }
}

impl<M> Group<'_, M> {
    /// What A makes of the group's rows of `x`.
    fn inner<O: Operations<Matrix = M>>(
        &self,
        operations: &O,
        thin: &Thin<M>,
        x: &Tensor,
    ) -> Result<Tensor> {
        let x = operations.take_rows(x, &self.rows, &self.ones)?;
        operations.linear(&x, &thin.a)
    }

    /// `product` with what B makes of `inner` added to the group's rows.
    fn add<O: Operations<Matrix = M>>(
        &self,
        operations: &O,
        thin: &Thin<M>,
        inner: &Tensor,
        product: &Tensor,
    ) -> Result<Tensor> {
        let missing = thin.width - inner.dim(1)?;
        let inner = match missing {
            0 => inner.clone(),
            _ => inner.pad_with_zeros(1, 0, missing)?,
        };
        let change = operations.linear(&inner, &thin.b)?;
        operations.add_rows(product, &self.rows, &change)
    }
}
