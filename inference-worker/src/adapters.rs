//! What serving `LoRA` adapters is started with, and what the front and the ranks tell
//! each other of them.

use std::path::PathBuf;

use clap::Args;
use llama_model::adapter::AdapterRoom;
use serde::{Deserialize, Serialize};

/// Adapters that may be loaded at a time at most: as many as a [`PlaceSet`] tells apart.
const MOST: u8 = 64;

/// Room that every rank keeps for adapters. The names of the flags are vLLM's.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterArgs {
    /// `LoRA` adapters that may be loaded at a time; memory is kept for them.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=i64::from(MOST)))]
    pub max_loras: u8,
    /// Highest rank of an adapter.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub max_lora_rank: u16,
}

impl AdapterArgs {
    /// The room.
    pub fn room(self) -> AdapterRoom {
        AdapterRoom {
            count: self.max_loras.into(),
            rank: self.max_lora_rank.into(),
        }
    }

    /// The flags that parse back to this value.
    pub fn to_args(self) -> [String; 2] {
        [
            format!("--max-loras={}", self.max_loras),
            format!("--max-lora-rank={}", self.max_lora_rank),
        ]
    }
}

/// An adapter to load before requests are taken: `NAME=FOLDER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterModule {
    /// What clients send as `model`.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
}

impl std::str::FromStr for AdapterModule {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok(Self {
                name: name.to_owned(),
                folder: folder.into(),
            }),
            _ => Err("expected NAME=FOLDER"),
        }
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

/// Places of adapters.
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
    fn modules_are_a_name_and_a_folder() {
        let module = AdapterModule {
            name: "legal".to_owned(),
            folder: "/adapters/legal=2".into(),
        };
        assert_eq!("legal=/adapters/legal=2".parse(), Ok(module));
        for text in ["legal", "=/x", "legal="] {
            assert!(text.parse::<AdapterModule>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_set_holds_its_places() {
        let set: PlaceSet = [0, 5, 63].into_iter().collect();
        let found: Vec<u32> = (0..70).filter(|place| set.contains(*place)).collect();
        assert_eq!(found, [0, 5, 63]);
    }
}
