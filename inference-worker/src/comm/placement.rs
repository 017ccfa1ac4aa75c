//! Which rank runs in which pod, and what follows for the way they talk.
//! Arithmetic only.

use std::ops::Range;

use llama_model::{Layout, order};
use serde::{Deserialize, Serialize};

/// How a group's ranks reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// There is one rank.
    Local,
    /// All ranks are in one pod.
    SharedMemory,
    /// Shared memory inside each pod, and the pods' first ranks by TCP.
    Hierarchical,
    /// Every rank with every other by TCP.
    Tcp,
}

/// The ranks of a group, in rank order over its pods, the same number in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// How the ranks divide the model.
    pub layout: Layout,
    /// Ranks of each pod.
    pub ranks_per_pod: usize,
}

impl Placement {
    /// The ranks of `layout` over `pods`; `None` when they cannot be shared out
    /// evenly.
    pub fn new(layout: Layout, pods: usize) -> Option<Self> {
        let world = layout.world();
        (pods > 0 && world > 0 && world.is_multiple_of(pods)).then(|| Self {
            layout,
            ranks_per_pod: world / pods,
        })
    }

    /// Ranks of the group.
    pub fn world(self) -> usize {
        self.layout.world()
    }

    /// Pods of the group.
    pub fn pods(self) -> usize {
        self.world() / self.ranks_per_pod
    }

    /// The pod that runs `rank`.
    pub fn pod(self, rank: usize) -> usize {
        rank / self.ranks_per_pod
    }

    /// The place of `rank` in its pod.
    pub fn local(self, rank: usize) -> usize {
        rank % self.ranks_per_pod
    }

    /// The ranks of `pod`.
    pub fn ranks_of(self, pod: usize) -> Range<usize> {
        pod * self.ranks_per_pod..(pod + 1) * self.ranks_per_pod
    }

    /// The ranks that share the layers of `rank` and its pod.
    pub fn stage_here(self, rank: usize) -> Range<usize> {
        let stage = self.layout.ranks_of(self.layout.stage(rank));
        let here = self.ranks_of(self.pod(rank));
        stage.start.max(here.start)..stage.end.min(here.end)
    }

    /// The first rank of every pod, which speaks for the pod.
    pub fn speakers(self) -> Vec<usize> {
        (0..self.world()).step_by(self.ranks_per_pod).collect()
    }

    /// Those of [`Placement::speakers`] whose pods share the layers of `rank`, when
    /// its stage takes several pods; otherwise none.
    pub fn stage_speakers(self, rank: usize) -> Vec<usize> {
        let stage = self.layout.ranks_of(self.layout.stage(rank));
        if stage.len() <= self.ranks_per_pod {
            return Vec::new();
        }
        stage.step_by(self.ranks_per_pod).collect()
    }

    /// How the ranks reach each other. Pods sum their own ranks' parts before they
    /// sum among themselves only where that is how the order of sums goes anyway.
    pub fn backend(self) -> Backend {
        let (tensor, here) = (self.layout.tensor, self.ranks_per_pod);
        if self.world() == 1 {
            Backend::Local
        } else if self.pods() == 1 {
            Backend::SharedMemory
        } else if here > 1
            && (here.is_multiple_of(tensor)
                || tensor.is_multiple_of(here) && order::agrees(tensor, tensor / here))
        {
            Backend::Hierarchical
        } else {
            Backend::Tcp
        }
    }

    /// Whether ranks `a` and `b` need a connection of their own.
    pub fn connects(self, a: usize, b: usize) -> bool {
        match self.backend() {
            Backend::Local | Backend::SharedMemory => false,
            Backend::Tcp => a != b,
            Backend::Hierarchical => {
                let speak = self.local(a) == 0 && self.local(b) == 0;
                let follow = a.abs_diff(b) == self.layout.tensor;
                self.pod(a) != self.pod(b) && (speak || follow)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(tensor: usize, pipeline: usize, pods: usize) -> Placement {
        Placement::new(Layout { tensor, pipeline }, pods).unwrap()
    }

    #[test]
    fn ranks_are_shared_out_evenly_or_not_at_all() {
        let layout = Layout {
            tensor: 4,
            pipeline: 2,
        };
        assert_eq!(Placement::new(layout, 3), None);
        assert_eq!(Placement::new(layout, 0), None);
        let placement = placement(4, 2, 4);
        assert_eq!((placement.pods(), placement.ranks_per_pod), (4, 2));
        assert_eq!((placement.pod(5), placement.local(5)), (2, 1));
        assert_eq!(placement.ranks_of(2), 4..6);
        assert_eq!(placement.stage_here(5), 4..6);
        assert_eq!(placement.speakers(), [0, 2, 4, 6]);
        assert_eq!(placement.stage_speakers(5), [4, 6]);
    }

    #[test]
    fn pods_sum_first_only_where_the_order_of_sums_does() {
        for (tensor, pipeline, pods, backend) in [
            (1, 1, 1, Backend::Local),
            (1, 3, 1, Backend::SharedMemory),
            (4, 1, 4, Backend::Tcp),
            (1, 2, 2, Backend::Tcp),
            (4, 1, 2, Backend::Hierarchical),
            (8, 2, 4, Backend::Hierarchical),
            (2, 2, 2, Backend::Hierarchical),
            (2, 4, 2, Backend::Hierarchical),
            (1, 4, 2, Backend::Hierarchical),
            (9, 1, 3, Backend::Hierarchical),
            // Six are added as (0+1+2)+(3+4+5): two pods do that, three would not.
            (6, 1, 2, Backend::Hierarchical),
            (6, 1, 3, Backend::Tcp),
            // A pod would hold ranks of two stages, but not all of either.
            (3, 2, 3, Backend::Tcp),
        ] {
            assert_eq!(
                placement(tensor, pipeline, pods).backend(),
                backend,
                "{tensor} x {pipeline} over {pods}"
            );
        }
    }

    #[test]
    fn only_the_first_of_a_pod_and_neighbours_in_the_pipeline_connect() {
        let pairs = |placement: Placement| -> Vec<(usize, usize)> {
            let world = placement.world();
            let all = (0..world).flat_map(|a| (a + 1..world).map(move |b| (a, b)));
            all.filter(|(a, b)| placement.connects(*a, *b)).collect()
        };
        assert_eq!(pairs(placement(4, 1, 2)), [(0, 2)]);
        assert_eq!(pairs(placement(2, 2, 2)), [(0, 2), (1, 3)]);
        assert_eq!(pairs(placement(2, 4, 2)), [(0, 4), (2, 4), (3, 5)]);
        assert_eq!(pairs(placement(3, 1, 3)), [(0, 1), (0, 2), (1, 2)]);
        assert_eq!(pairs(placement(3, 1, 1)), []);
    }
}
