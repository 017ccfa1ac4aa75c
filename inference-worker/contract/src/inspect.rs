//! What the operator asks of a model before any group exists, and the answer:
//! `llama-worker inspect <flags>` reads headers only and leaves an [`InspectionReport`]
//! as the container's termination message.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::adapters::AdapterArgs;
use crate::launch::{Device, KvCacheDtype};

/// How a model is inspected: `llama-worker inspect <flags>`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct InspectArgs {
    /// Model file (GGUF), or a folder with config.json and safetensors.
    #[arg(long)]
    pub model: PathBuf,
    /// Ranks that share each layer.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tensor_parallel: u32,
    /// Stages of consecutive layers, each of `tensor_parallel` ranks.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub pipeline_parallel: u32,
    /// Pods of a group.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub nodes: u32,
    /// Longest sequence in tokens; the model's own limit when absent.
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Longest sequences that must have room at the same time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub sequences: u32,
    /// Precision of cached keys and values.
    #[arg(long, value_enum, default_value_t)]
    pub kv_cache_dtype: KvCacheDtype,
    /// Where the ranks compute.
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Compute threads of each rank.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads_per_rank: u32,
    /// Bytes of memory of each pod on CPU cores, of each device with CUDA. Without it
    /// nothing is said about what fits.
    #[arg(long)]
    pub memory_bytes: Option<u64>,
    /// Room for adapters.
    #[command(flatten)]
    pub adapters: AdapterArgs,
}

impl InspectArgs {
    /// The flags that parse back to this value, in one fixed order.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![
            format!("--model={}", self.model.display()),
            format!("--tensor-parallel={}", self.tensor_parallel),
            format!("--pipeline-parallel={}", self.pipeline_parallel),
            format!("--nodes={}", self.nodes),
            format!("--sequences={}", self.sequences),
            format!("--device={}", self.device.as_str()),
            format!("--threads-per-rank={}", self.threads_per_rank),
        ];
        if self.kv_cache_dtype != KvCacheDtype::default() {
            args.push(format!("--kv-cache-dtype={}", self.kv_cache_dtype.as_str()));
        }
        if let Some(tokens) = self.max_tokens {
            args.push(format!("--max-tokens={tokens}"));
        }
        if let Some(bytes) = self.memory_bytes {
            args.push(format!("--memory-bytes={bytes}"));
        }
        args.extend(self.adapters.to_args());
        args
    }
}

/// What a model is, from its headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelFacts {
    /// `llama`, `llama4` or `bert`.
    pub architecture: String,
    /// Layers.
    pub layers: u32,
    /// Attention heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Bytes of the weights in its files.
    pub weight_bytes: u64,
    /// Longest sequence that it was trained for, in tokens.
    pub max_tokens: u32,
}

/// What something holds with the wanted sequences. Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryShare {
    /// Weights.
    pub weight_bytes: u64,
    /// Processes, tokenizer, activations, logits.
    pub reserve_bytes: u64,
    /// Room for adapters.
    pub adapter_bytes: u64,
    /// KV cache of one longest sequence.
    pub kv_cache_bytes: u64,
}

/// What fits the memory that was named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Room {
    /// Bytes that each pod, or each device, has.
    pub memory_bytes: u64,
    /// Longest sequences that have room at the same time.
    pub sequences: u32,
    /// Tokens that the KV cache holds, over all sequences.
    pub total_tokens: u64,
    /// Whether a worker would start, with room for the wanted sequences.
    pub fits: bool,
}

/// Something that would fit. What is absent stays as it was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FittingChange {
    /// Another layout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<GroupShape>,
    /// Shorter sequences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// More memory for each pod, in whole MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Longest sequences that have room then.
    pub sequences: u32,
}

/// The ranks and pods of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupShape {
    /// Ranks that share each layer.
    pub tensor: u32,
    /// Stages of consecutive layers.
    pub pipeline: u32,
    /// Pods.
    pub nodes: u32,
}

/// Answer of `llama-worker inspect`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectionReport {
    /// What the model is.
    pub model: ModelFacts,
    /// Longest sequence that was planned, in tokens.
    pub max_tokens: u32,
    /// The rank that holds most.
    pub rank: MemoryShare,
    /// The pod that holds most.
    pub pod: MemoryShare,
    /// KV cache of a token over all ranks, in layers that attend to all tokens and in
    /// those that attend in chunks.
    pub kv_bytes_per_token: u64,
    /// Ranks of a stage that hold the same key/value head.
    pub kv_head_replication: u32,
    /// Bytes in whole MiB that each pod, or each device, needs for the wanted sequences.
    pub needed_bytes: u64,
    /// What fits the memory that was named, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<Room>,
    /// What would fit, where it does not; at most three.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<FittingChange>,
}

impl InspectionReport {
    /// The report as a termination message. It has numbers only and one short name, so
    /// that it stays far below [`TERMINATION_LOG_LIMIT`](crate::TERMINATION_LOG_LIMIT).
    pub fn to_termination_message(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a termination message; `None` when it is not one of ours.
    pub fn from_termination_message(text: &str) -> Option<Self> {
        serde_json::from_str(text.trim()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FailureCategory, FailureReport, TERMINATION_LOG_LIMIT};
    use clap::Parser;
    use proptest::prelude::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        inspect: InspectArgs,
    }

    proptest! {
        #[test]
        fn what_the_operator_writes_the_worker_reads(
            model in "/[a-z0-9./_-]{1,40}",
            (tensor_parallel, pipeline_parallel, nodes) in (1_u32..=64, 1_u32..=64, 1_u32..=64),
            max_tokens in proptest::option::of(1_u32..=1_048_576),
            sequences in 1_u32..=1024,
            (cuda, int8) in any::<(bool, bool)>(),
            threads_per_rank in 1_u32..=1024,
            memory_bytes in proptest::option::of(any::<u64>()),
            (max_loras, max_lora_rank) in (0_u8..=64, 1_u16..=512),
        ) {
            let inspect = InspectArgs {
                model: model.into(),
                tensor_parallel,
                pipeline_parallel,
                nodes,
                max_tokens,
                sequences,
                kv_cache_dtype: if int8 { KvCacheDtype::Int8 } else { KvCacheDtype::F16 },
                device: if cuda { Device::Cuda } else { Device::Cpu },
                threads_per_rank,
                memory_bytes,
                adapters: AdapterArgs { max_loras, max_lora_rank },
            };
            let argv = std::iter::once("llama-worker".to_owned()).chain(inspect.to_args());
            let parsed = Cli::try_parse_from(argv).expect("parses");
            prop_assert_eq!(parsed.inspect, inspect);
        }
    }

    #[test]
    fn the_largest_report_is_a_termination_message() {
        let share = MemoryShare {
            weight_bytes: u64::MAX,
            reserve_bytes: u64::MAX,
            adapter_bytes: u64::MAX,
            kv_cache_bytes: u64::MAX,
        };
        let layout = GroupShape {
            tensor: u32::MAX,
            pipeline: u32::MAX,
            nodes: u32::MAX,
        };
        let change = FittingChange {
            layout: Some(layout),
            max_tokens: Some(u32::MAX),
            memory_bytes: Some(u64::MAX),
            sequences: u32::MAX,
        };
        let report = InspectionReport {
            model: ModelFacts {
                architecture: "a".repeat(64),
                layers: u32::MAX,
                heads: u32::MAX,
                kv_heads: u32::MAX,
                weight_bytes: u64::MAX,
                max_tokens: u32::MAX,
            },
            max_tokens: u32::MAX,
            rank: share,
            pod: share,
            kv_bytes_per_token: u64::MAX,
            kv_head_replication: u32::MAX,
            needed_bytes: u64::MAX,
            room: Some(Room {
                memory_bytes: u64::MAX,
                sequences: u32::MAX,
                total_tokens: u64::MAX,
                fits: false,
            }),
            alternatives: vec![change; 3],
        };
        let text = report.to_termination_message();
        assert!(text.len() <= TERMINATION_LOG_LIMIT / 2, "{}", text.len());
        assert_eq!(
            InspectionReport::from_termination_message(&text),
            Some(report)
        );
    }

    #[test]
    fn a_failure_is_no_report_and_a_report_no_failure() {
        let failure = FailureReport {
            category: FailureCategory::ModelNotFound,
            message: "no".to_owned(),
            rank: None,
            node: None,
            step: None,
            epoch: 0,
        };
        let text = failure.to_termination_message();
        assert_eq!(InspectionReport::from_termination_message(&text), None);
        let text = InspectionReport::default().to_termination_message();
        assert_eq!(FailureReport::from_termination_message(&text), None);
    }
}
