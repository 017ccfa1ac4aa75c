//! How the ranks of a group divide a model.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// `pipeline` stages of consecutive layers, each stage's matrices spread over
/// `tensor` ranks. Ranks are numbered stage by stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Ranks that share each layer.
    pub tensor: usize,
    /// Stages.
    pub pipeline: usize,
}

impl Layout {
    /// One stage of `tensor` ranks.
    pub fn tensor(tensor: usize) -> Self {
        Self {
            tensor,
            pipeline: 1,
        }
    }

    /// Ranks of the group.
    pub fn world(self) -> usize {
        self.tensor.saturating_mul(self.pipeline)
    }

    /// The stage of `rank`, from 0.
    pub fn stage(self, rank: usize) -> usize {
        rank / self.tensor
    }

    /// The place of `rank` in its stage, from 0.
    pub fn tensor_rank(self, rank: usize) -> usize {
        rank % self.tensor
    }

    /// The ranks of `stage`.
    pub fn ranks_of(self, stage: usize) -> Range<usize> {
        stage * self.tensor..(stage + 1) * self.tensor
    }
}
