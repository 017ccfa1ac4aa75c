//! The plan of one step, and how ranks make sure they all have the same one.

use llama_model::{CollectiveError, Segment, StepError, StepModel};
use serde::{Deserialize, Serialize};

use super::adapters::AdapterDesk;
use crate::adapters::{AdapterOrder, AdapterOutcome};
use crate::comm::Link;
use crate::comm::board::Board;

/// What every rank computes next. Rank 0 makes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepPlan {
    /// Incarnation of the group.
    pub epoch: u64,
    /// Number of the step, from 1.
    pub step: u64,
    /// What to compute; empty for a sign of life while nothing is asked.
    pub segments: Vec<Segment>,
    /// What to do about adapters before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterOrder>,
    /// Whether ranks tell each other, behind the step, how far the adapter is that they
    /// read.
    #[serde(default, skip_serializing_if = "is_false")]
    pub settles: bool,
    /// Whether ranks compare the logits that they have.
    #[serde(default, skip_serializing_if = "is_false")]
    pub compares: bool,
    /// Whether the ranks end after this one.
    pub last: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What rank 0 wants of the next step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NextStep {
    /// See [`StepPlan::segments`].
    pub segments: Vec<Segment>,
    /// See [`StepPlan::adapters`].
    pub adapters: Vec<AdapterOrder>,
    /// See [`StepPlan::settles`].
    pub settles: bool,
    /// See [`StepPlan::compares`].
    pub compares: bool,
    /// See [`StepPlan::last`].
    pub last: bool,
}

/// One rank's part in the sequence of steps.
pub struct Stepper<'a> {
    /// The rank's shard.
    pub model: &'a mut dyn StepModel,
    /// The rank's end of the group.
    pub link: &'a mut dyn Link,
    /// Where finished steps are noted.
    pub board: &'a Board,
    /// The rank's place in its pod.
    pub local: usize,
    /// Incarnation of the group.
    pub epoch: u64,
    /// The last finished step.
    pub step: u64,
    /// Adapters on their way.
    pub desk: AdapterDesk,
    /// What became of the last one.
    pub settled: Option<(u32, AdapterOutcome)>,
}

impl std::fmt::Debug for Stepper<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stepper")
            .field("rank", &self.link.rank())
            .field("epoch", &self.epoch)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

impl Stepper<'_> {
    /// Rank 0: has every rank compute `next`; returns the rows of logits.
    ///
    /// # Errors
    /// When a peer fails or the step cannot be computed.
    pub fn lead(&mut self, next: NextStep) -> Result<Vec<Vec<f32>>, StepError> {
        let plan = StepPlan {
            epoch: self.epoch,
            step: self.step + 1,
            segments: next.segments,
            adapters: next.adapters,
            settles: next.settles,
            compares: next.compares,
            last: next.last,
        };
        let mut payload = serde_json::to_vec(&plan)
            .map_err(|error| StepError::Invalid(format!("plan of step {}: {error}", plan.step)))?;
        self.link.broadcast(&mut payload)?;
        self.compute(&plan, &payload)
    }

    /// Every other rank: computes what rank 0 plans. Returns whether that was
    /// the last step.
    ///
    /// # Errors
    /// As [`Stepper::lead`].
    pub fn follow(&mut self) -> Result<bool, StepError> {
        let mut payload = Vec::new();
        self.link.broadcast(&mut payload)?;
        let plan: StepPlan = serde_json::from_slice(&payload).map_err(|error| {
            StepError::Invalid(format!("plan of step {}: {error}", self.step + 1))
        })?;
        self.compute(&plan, &payload)?;
        Ok(plan.last)
    }

    fn compute(&mut self, plan: &StepPlan, payload: &[u8]) -> Result<Vec<Vec<f32>>, StepError> {
        if plan.last {
            self.link.expect_close();
        }
        let header = [self.epoch, self.step + 1, fingerprint(payload)];
        let headers = self.link.gather_words(header)?;
        agree(self.link.rank(), header, &headers)?;
        for order in &plan.adapters {
            self.desk.obey(order, self.model)?;
        }
        let rows = if plan.segments.is_empty() {
            Vec::new()
        } else {
            self.model.step(&plan.segments, self.link)?
        };
        if plan.compares {
            let words = self.link.gather_words([digest_of(&rows), 0, 0])?;
            compare(&words)?;
        }
        if plan.settles {
            self.settled = self.desk.settle(self.link, self.model)?;
        }
        self.step += 1;
        self.board.set_step(self.local, self.step);
        let kept = self.model.kv_cache_bytes();
        self.board.set_kv_cache_bytes(self.local, kept);
        Ok(rows)
    }
}

/// The first eight bytes of the plan's hash.
fn fingerprint(payload: &[u8]) -> u64 {
    first_word(&blake3::hash(payload))
}

/// The first eight bytes of a hash.
fn first_word(hash: &blake3::Hash) -> u64 {
    let bytes = hash.as_bytes().first_chunk();
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The first eight bytes of the hash of logits, bit by bit.
fn digest_of(rows: &[Vec<f32>]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for value in rows.iter().flatten() {
        hasher.update(&value.to_le_bytes());
    }
    first_word(&hasher.finalize())
}

/// Whether all ranks have the digest of rank 0.
fn compare(words: &[[u64; 3]]) -> Result<(), StepError> {
    let reference = words.first();
    match words.iter().position(|word| Some(word) != reference) {
        None => Ok(()),
        Some(rank) => Err(StepError::Disagreement { rank }),
    }
}

/// Whether all ranks entered the step with the same epoch, number and plan. Of
/// two ranks that differ the higher one is named, rank 0 being the planner.
fn agree(rank: usize, own: [u64; 3], headers: &[[u64; 3]]) -> Result<(), CollectiveError> {
    let reference = headers.first().copied().unwrap_or(own);
    let differing = headers.iter().position(|header| *header != reference);
    let Some(peer) = differing else {
        return Ok(());
    };
    let [epoch, step, plan] = headers[peer];
    let [epoch0, step0, plan0] = reference;
    Err(CollectiveError::OutOfStep {
        rank: peer,
        reason: format!(
            "it is at epoch {epoch} step {step} with plan {plan:016x}, rank 0 at epoch {epoch0} \
             step {step0} with plan {plan0:016x} (told by rank {rank})"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_with_another_bit_is_named() {
        let rows = vec![vec![1.0, 2.0], vec![3.0]];
        let word = |rows: &[Vec<f32>]| [digest_of(rows), 0, 0];
        assert!(compare(&[word(&rows), word(&rows)]).is_ok());
        let mut other = rows.clone();
        other[1][0] = f32::from_bits(3.0_f32.to_bits() + 1);
        let error = compare(&[word(&rows), word(&rows), word(&other)]);
        assert!(matches!(error, Err(StepError::Disagreement { rank: 2 })));
    }

    #[test]
    fn ranks_that_differ_are_named() {
        let own = [1, 2, 3];
        assert_eq!(agree(0, own, &[own, own, own]), Ok(()));
        for wrong in [[0, 2, 3], [1, 1, 3], [1, 2, 4]] {
            let error = agree(0, own, &[own, own, wrong]).unwrap_err();
            assert!(
                matches!(error, CollectiveError::OutOfStep { rank: 2, .. }),
                "{error:?}"
            );
            // The rank that differs says the same of itself.
            assert!(agree(2, wrong, &[own, own, wrong]).is_err());
        }
    }
}
