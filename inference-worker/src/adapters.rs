//! What serving `LoRA` adapters is started with, and what the front and the ranks tell
//! each other of them.

use std::path::PathBuf;

pub use llama_contract::{AdapterArgs, AdapterModule};
use llama_model::adapter::AdapterRoom;
use serde::{Deserialize, Serialize};

/// The room that `args` ask for.
pub fn room(args: AdapterArgs) -> AdapterRoom {
    AdapterRoom {
        count: args.max_loras.into(),
        rank: args.max_lora_rank.into(),
    }
}

/// What ranks do about an adapter before a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdapterOrder {
    /// Begin to load it.
    Load {
        /// Where segments will find it.
        place: u32,
        /// Where its files are, on every node.
        folder: PathBuf,
    },
    /// Forget it; no segment names it any more.
    Drop {
        /// Its place.
        place: u32,
    },
}

impl AdapterOrder {
    /// The adapter's place.
    pub fn place(&self) -> u32 {
        match self {
            Self::Load { place, .. } | Self::Drop { place } => *place,
        }
    }
}

/// What became of an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdapterOutcome {
    /// All ranks have it.
    Loaded {
        /// Rank of its changes.
        rank: usize,
    },
    /// Not all ranks could load it, so none has it.
    Refused {
        /// Why.
        message: String,
    },
    /// No rank has it any more.
    Dropped,
}

/// The adapter of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterUse {
    /// Its place.
    pub place: u32,
    /// Which one it is of all that were ever loaded: places are used again.
    pub load: u64,
}

/// Places of adapters: as many as [`llama_contract::MOST_ADAPTERS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceSet(u64);

impl PlaceSet {
    /// Whether `place` is among them.
    pub fn contains(self, place: u32) -> bool {
        self.0.checked_shr(place).is_some_and(|bits| bits & 1 == 1)
    }
}

impl FromIterator<u32> for PlaceSet {
    fn from_iter<I: IntoIterator<Item = u32>>(places: I) -> Self {
        let bits = places
            .into_iter()
            .filter_map(|place| 1_u64.checked_shl(place));
        Self(bits.fold(0, |set, bit| set | bit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_its_places() {
        let set: PlaceSet = [0, 5, 63].into_iter().collect();
        let found: Vec<u32> = (0..70).filter(|place| set.contains(*place)).collect();
        assert_eq!(found, [0, 5, 63]);
    }
}
