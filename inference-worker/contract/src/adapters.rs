//! `LoRA` adapters of a group: the room that it keeps for them, and which it should have.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

/// Adapters that a group can have at a time at most.
pub const MOST_ADAPTERS: u8 = 64;
/// Highest rank of an adapter that a group can keep room for.
pub const MOST_ADAPTER_RANK: u16 = 512;

/// Room that every rank keeps for adapters. The names of the flags are vLLM's.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterArgs {
    /// `LoRA` adapters that may be loaded at a time; memory is kept for them.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=i64::from(MOST_ADAPTERS)))]
    pub max_loras: u8,
    /// Highest rank of an adapter.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST_ADAPTER_RANK)))]
    pub max_lora_rank: u16,
}

impl Default for AdapterArgs {
    fn default() -> Self {
        Self {
            max_loras: 0,
            max_lora_rank: 16,
        }
    }
}

impl AdapterArgs {
    /// The flags that parse back to this value; none where no room is kept.
    pub fn to_args(self) -> Vec<String> {
        if self == Self::default() {
            return Vec::new();
        }
        vec![
            format!("--max-loras={}", self.max_loras),
            format!("--max-lora-rank={}", self.max_lora_rank),
        ]
    }
}

/// An adapter and where it is: `NAME=FOLDER` as a flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// Body of a `PUT` to [`ADAPTERS_PATH`](crate::ADAPTERS_PATH): the adapters that the group
/// should have, and no others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterList {
    /// By name, each once.
    pub adapters: Vec<AdapterModule>,
}

/// What became of an adapter that the group should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdapterPhase {
    /// The ranks read it, or others have to go first.
    Loading,
    /// Requests may name it.
    Loaded,
    /// It cannot be loaded.
    Refused,
}

/// An adapter as its group sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterReport {
    /// Which one.
    #[serde(flatten)]
    pub module: AdapterModule,
    /// What became of it.
    pub phase: AdapterPhase,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
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
}
