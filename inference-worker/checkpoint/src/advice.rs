//! Whether a model fits the memory of its ranks, and what would fit instead.

use serde::Serialize;

use crate::blocks::BLOCK_TOKENS;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::layout::Layout;
use crate::memory::{MemoryPlan, MemoryRequest};
use crate::shard::possible_tensor_sizes;

/// Numbers of stages that are tried.
const STAGES: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Largest group that is tried.
const LARGEST_GROUP: usize = 256;

/// Memory that ranks may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Of all planned ranks together, as in a pod.
    Together(u64),
    /// Of each rank, as on a device.
    Each(u64),
}

impl Limit {
    /// Sequences of `tokens` that fit.
    pub fn sequences(self, plan: &MemoryPlan, tokens: usize) -> usize {
        match self {
            Self::Together(limit) => plan.sequences_within(limit, tokens),
            Self::Each(limit) => plan.sequences_within_each(limit, tokens),
        }
    }

    /// The longest sequence of which one fits, in whole pages, up to `most`.
    pub fn longest(self, plan: &MemoryPlan, most: usize) -> usize {
        let (mut fitting, mut over) = (0, most / BLOCK_TOKENS + 1);
        while over - fitting > 1 {
            let middle = usize::midpoint(fitting, over);
            if self.sequences(plan, middle * BLOCK_TOKENS) > 0 {
                fitting = middle;
            } else {
                over = middle;
            }
        }
        fitting * BLOCK_TOKENS
    }
}

/// What would fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// The longest sequence that fits the layout as it is, in tokens.
    pub max_tokens: Option<usize>,
    /// The smallest group that has room for one sequence of the wanted length.
    pub layout: Option<Layout>,
    /// Sequences of that length that it has room for.
    pub sequences: Option<usize>,
}

/// What would fit in place of `request`, whose `plan` does not. Layouts are only
/// tried where each rank has memory of its own: more ranks in one memory need more
/// of it.
///
/// # Errors
/// When the checkpoint cannot be planned at all.
pub fn advise(
    checkpoint: &Checkpoint,
    request: &MemoryRequest,
    plan: &MemoryPlan,
    limit: Limit,
) -> Result<Advice, ModelError> {
    let shorter = limit.longest(plan, request.max_tokens);
    let mut advice = Advice {
        max_tokens: (shorter > 0).then_some(shorter),
        ..Advice::default()
    };
    if let Limit::Each(_) = limit {
        for layout in layouts(checkpoint) {
            let request = MemoryRequest {
                layout,
                ranks: 0..layout.world(),
                ..request.clone()
            };
            let plan = MemoryPlan::new(checkpoint, &request)?;
            let sequences = limit.sequences(&plan, request.max_tokens);
            if sequences > 0 {
                advice.layout = Some(layout);
                advice.sequences = Some(sequences);
                break;
            }
        }
    }
    Ok(advice)
}

/// Layouts of the checkpoint, the smallest groups first and, of equal ones, those
/// with fewer stages. Files that were cut for one layout have only that.
pub(crate) fn layouts(checkpoint: &Checkpoint) -> Vec<Layout> {
    if let Some(layout) = checkpoint.cut_for() {
        return vec![layout];
    }
    let config = checkpoint.config();
    let mut layouts: Vec<Layout> = possible_tensor_sizes(config)
        .into_iter()
        .flat_map(|tensor| STAGES.map(|pipeline| Layout { tensor, pipeline }))
        .filter(|layout| layout.world() <= LARGEST_GROUP && layout.pipeline <= config.layers.len())
        .collect();
    layouts.sort_by_key(|layout| (layout.world(), layout.pipeline));
    layouts
}
