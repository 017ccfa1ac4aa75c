//! Adapters on the rows of a step, by this crate's kernels.

use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor};
use llama_checkpoint::adapter::Target;

use super::{Adapters, Changes, Thin, rows_by_adapter};
use crate::linear::{Linear, Matrix};
use crate::ops::{Reduce, values, values_mut};
use crate::step::{Segment, StepError};

/// The rows that one adapter changes.
struct Group<'a> {
    adapter: &'a [Changes<Linear>],
    rows: Vec<u32>,
    /// The same, to select by.
    index: Tensor,
}

/// The adapters of a step.
pub(crate) struct StepAdapters<'a>(Vec<Group<'a>>);

impl<'a> StepAdapters<'a> {
    /// Those that `segments` name, all of which are among `adapters`.
    pub(crate) fn new(adapters: &'a Adapters<Linear>, segments: &[Segment]) -> Result<Self> {
        let groups = rows_by_adapter(segments).into_iter();
        let groups = groups.filter_map(|(place, rows)| Some((adapters.get(&place)?, rows)));
        let groups = groups.map(|(adapter, rows)| {
            Ok(Group {
                adapter,
                index: Tensor::from_slice(&rows, rows.len(), &Device::Cpu)?,
                rows,
            })
        });
        groups.collect::<Result<_>>().map(Self)
    }

    /// What they change of the layer `number` of this rank.
    pub(crate) fn of_layer(&self, number: usize) -> LayerAdapters<'_> {
        LayerAdapters {
            groups: &self.0,
            number,
        }
    }
}

/// The adapters of a step, for one layer.
#[derive(Clone, Copy)]
pub(crate) struct LayerAdapters<'a> {
    groups: &'a [Group<'a>],
    number: usize,
}

/// This rank's part of the product of a matrix that ranks have columns of, and of what
/// adapters' A matrices make of their rows.
pub(crate) struct Parts {
    pub(crate) product: Tensor,
    thin: Vec<Tensor>,
}

impl LayerAdapters<'_> {
    fn changes(&self, target: Target) -> impl Iterator<Item = (&Group<'_>, &Thin<Linear>)> {
        self.groups
            .iter()
            .filter_map(move |group| Some((group, group.adapter[self.number].get(&target)?)))
    }

    /// What `linear`, the matrix `target`, makes of `x`, changed. For matrices that ranks
    /// have rows of.
    pub(crate) fn forward(&self, target: Target, linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let product = linear.forward(x)?;
        for (group, thin) in self.changes(target) {
            let inner = thin.a.forward(&x.index_select(&group.index, 0)?)?;
            group.add(thin, &inner, &product)?;
        }
        Ok(product)
    }

    /// Likewise for matrices that ranks have columns of; [`LayerAdapters::sum`] takes
    /// the parts of all ranks.
    pub(crate) fn parts(&self, target: Target, linear: &Linear, x: &Tensor) -> Result<Parts> {
        let inner = |(group, thin): (&Group<'_>, &Thin<Linear>)| {
            thin.a.forward(&x.index_select(&group.index, 0)?)
        };
        Ok(Parts {
            product: linear.forward(x)?,
            thin: self.changes(target).map(inner).collect::<Result<_>>()?,
        })
    }

    /// The sum of all ranks' `parts`, changed. The product may have more rows than the
    /// step; the first ones are changed.
    pub(crate) fn sum(
        &self,
        target: Target,
        parts: Parts,
        reduce: &Reduce<'_>,
    ) -> std::result::Result<Tensor, StepError> {
        let Parts { product, thin } = parts;
        if thin.is_empty() {
            reduce.sum(&product)?;
            return Ok(product);
        }
        let mut all = vec![product.flatten_all().map_err(StepError::Compute)?];
        for inner in &thin {
            all.push(inner.flatten_all().map_err(StepError::Compute)?);
        }
        let all = Tensor::cat(&all, 0).map_err(StepError::Compute)?;
        reduce.sum(&all)?;
        let change = || {
            let mut start = product.elem_count();
            let sum = all.narrow(0, 0, start)?.reshape(product.shape())?;
            for ((group, change), part) in self.changes(target).zip(&thin) {
                let inner = all.narrow(0, start, part.elem_count())?;
                group.add(change, &inner.reshape(part.shape())?, &sum)?;
                start += part.elem_count();
            }
            Ok(sum)
        };
        change().map_err(StepError::Compute)
    }
}

impl Group<'_> {
    /// Adds what B makes of `inner`, one row for each of the group's, to its rows of
    /// `product`.
    fn add(&self, thin: &Thin<Linear>, inner: &Tensor, product: &Tensor) -> Result<()> {
        let missing = thin.width - inner.dim(1)?;
        let inner = match missing {
            0 => inner.clone(),
            _ => inner.pad_with_zeros(1, 0, missing)?,
        };
        product.inplace_op2(&thin.b.forward(&inner)?, &AddRows(&self.rows))
    }
}

/// Adds the rows of a tensor to some rows of another, in place.
struct AddRows<'a>(&'a [u32]);

impl InplaceOp2 for AddRows<'_> {
    fn name(&self) -> &'static str {
        "add-rows"
    }

    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        part: &CpuStorage,
        part_layout: &Layout,
    ) -> Result<()> {
        let (_, columns) = sum_layout.shape().dims2()?;
        let part = values(part, part_layout)?;
        let sum = values_mut(sum, sum_layout)?;
        for (row, part) in self.0.iter().zip(part.chunks_exact(columns)) {
            let start = *row as usize * columns;
            for (sum, part) in sum[start..start + columns].iter_mut().zip(part) {
                *sum += part;
            }
        }
        Ok(())
    }
}

/// The adapter with matrices that multiply.
pub(crate) fn multiplying(
    adapter: super::Adapter<Matrix>,
    linear: impl Fn(Matrix) -> Linear,
) -> super::Adapter<Linear> {
    let layers = adapter.into_iter().map(|changes| {
        let changes = changes.into_iter().map(|(target, thin)| {
            let thin = Thin {
                a: linear(thin.a),
                b: linear(thin.b),
                width: thin.width,
            };
            (target, thin)
        });
        changes.collect()
    });
    layers.collect()
}
