//! What every rank is told before a step.

use std::io;

use llama_model::Segment;
use serde::{Deserialize, Serialize};

/// One step of the whole group. Ranks compare epoch, step and [`StepPlan::hash`]
/// before the first collective, so that no rank computes something else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepPlan {
    /// Incarnation of the group.
    pub epoch: u64,
    /// Number of the step, from 1.
    pub step: u64,
    /// What to compute; empty ends the ranks.
    pub segments: Vec<Segment>,
}

impl StepPlan {
    /// The plan's bytes on the wire.
    ///
    /// # Errors
    /// When the plan cannot be written as JSON.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// When `bytes` are not a plan.
    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        Ok(serde_json::from_slice(bytes)?)
    }

    /// A digest of encoded plan bytes (FNV-1a, 64 bits): it finds disagreement
    /// between ranks that trust each other, not forgery.
    pub fn hash(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_read_back_and_differ_by_hash() {
        let plan = StepPlan {
            epoch: 1,
            step: 2,
            segments: vec![Segment {
                slot: 0,
                start: 3,
                tokens: vec![4, 5],
                wants_logits: true,
            }],
        };
        let bytes = plan.encode().expect("encodes");
        assert_eq!(StepPlan::decode(&bytes).expect("decodes"), plan);
        let mut other = plan;
        other.segments[0].tokens[1] = 6;
        let other = other.encode().expect("encodes");
        assert_ne!(StepPlan::hash(&bytes), StepPlan::hash(&other));
        assert_eq!(StepPlan::hash(b""), 0xCBF2_9CE4_8422_2325);
    }
}
