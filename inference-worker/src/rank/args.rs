//! How the supervisor starts one rank: `llama-worker rank <flags>`.

use std::net::IpAddr;

use clap::Args;
use llama_contract::{KvCacheDtype, LaunchArgs};
use llama_model::Layout;
use llama_model::blocks::KvCapacity;
use llama_model::memory::KvFormat;

use crate::comm::placement::Placement;

/// The form that keys and values of `dtype` have in the cache.
pub fn kv_format(dtype: KvCacheDtype) -> KvFormat {
    match dtype {
        KvCacheDtype::F16 => KvFormat::F16,
        KvCacheDtype::Int8 => KvFormat::Int8,
    }
}

/// Flags of one rank. The supervisor has checked everything in `launch` and
/// filled `max_tokens` and `threads_per_rank`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct RankArgs {
    /// What the pod was started with.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// This rank, over all pods.
    #[arg(long)]
    pub rank: u32,
    /// Process id of the supervisor; the rank ends when it does.
    #[arg(long)]
    pub supervisor: i32,
    /// Descriptor of the pod's shared memory.
    #[arg(long)]
    pub shared_memory: i32,
    /// Sequences that the pod has memory for at a time.
    #[arg(long)]
    pub slots: u32,
    /// Blocks of the KV cache, of layers that attend to all tokens.
    #[arg(long)]
    pub blocks: u32,
    /// Likewise, of layers that attend within chunks.
    #[arg(long)]
    pub chunk_blocks: u32,
    /// Requests that may wait for a slot.
    #[arg(long)]
    pub queue: usize,
    /// Tokens of the prompts that may wait.
    #[arg(long)]
    pub queue_tokens: usize,
    /// Whether no blocks are shared.
    #[arg(long)]
    pub no_prefix_caching: bool,
    /// Tokens that are guessed ahead of an answer at most.
    #[arg(long)]
    pub speculative_tokens: u32,
    /// Whether every rank's threads have cores of their own.
    #[arg(long)]
    pub own_cores: bool,
    /// Whether weights must have the digests that the checkpoint holds of them.
    #[arg(long)]
    pub verify_digests: bool,
    /// Hash of the model's headers.
    #[arg(long)]
    pub digest: String,
    /// Name of the node.
    #[arg(long)]
    pub node: String,
    /// Address on which other pods reach this rank.
    #[arg(long)]
    pub ip: IpAddr,
}

impl RankArgs {
    /// The flags that parse back to this value.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = self.launch.to_args();
        args.extend([
            format!("--rank={}", self.rank),
            format!("--supervisor={}", self.supervisor),
            format!("--shared-memory={}", self.shared_memory),
            format!("--slots={}", self.slots),
            format!("--blocks={}", self.blocks),
            format!("--chunk-blocks={}", self.chunk_blocks),
            format!("--queue={}", self.queue),
            format!("--queue-tokens={}", self.queue_tokens),
            format!("--speculative-tokens={}", self.speculative_tokens),
            format!("--digest={}", self.digest),
            format!("--node={}", self.node),
            format!("--ip={}", self.ip),
        ]);
        if self.own_cores {
            args.push("--own-cores".to_owned());
        }
        if self.no_prefix_caching {
            args.push("--no-prefix-caching".to_owned());
        }
        if self.verify_digests {
            args.push("--verify-digests".to_owned());
        }
        args
    }

    /// Where the ranks of the group are; `None` when this one is outside it or the
    /// ranks cannot be shared out evenly.
    pub fn placement(&self) -> Option<Placement> {
        let layout = Layout {
            tensor: self.launch.tensor_parallel as usize,
            pipeline: self.launch.pipeline_parallel as usize,
        };
        let placement = Placement::new(layout, self.launch.nodes as usize)?;
        ((self.rank as usize) < placement.world()).then_some(placement)
    }

    /// What the pod has memory for.
    pub fn capacity(&self) -> KvCapacity {
        KvCapacity {
            slots: self.slots,
            blocks: self.blocks,
            chunk_blocks: self.chunk_blocks,
        }
    }

    /// Ranks in this pod.
    pub fn ranks_here(&self) -> usize {
        self.launch.ranks_per_node().unwrap_or(1) as usize
    }

    /// This rank's place in its pod.
    pub fn local(&self) -> usize {
        self.rank as usize % self.ranks_here()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        rank: RankArgs,
    }

    #[test]
    fn what_the_supervisor_writes_the_rank_reads() {
        let launch = [
            "--model=/m.gguf",
            "--served-name=m",
            "--tensor-parallel=4",
            "--pipeline-parallel=2",
            "--nodes=4",
            "--rendezvous=first:29500",
        ];
        let rank = [
            "--rank=3",
            "--supervisor=1",
            "--shared-memory=5",
            "--slots=2",
            "--blocks=90",
            "--chunk-blocks=4",
            "--queue=7",
            "--queue-tokens=800",
            "--no-prefix-caching",
            "--speculative-tokens=3",
            "--digest=d",
            "--node=n",
            "--ip=::1",
            "--own-cores",
            "--kv-cache-dtype=int8",
            "--max-loras=3",
            "--max-lora-rank=64",
        ];
        let argv = ["rank"].iter().chain(&launch).chain(&rank);
        let parsed = Cli::try_parse_from(argv).unwrap().rank;
        assert_eq!((parsed.ranks_here(), parsed.local()), (2, 1));
        let placement = parsed.placement().unwrap();
        assert_eq!((placement.world(), placement.pod(3)), (8, 1));
        let mut outside = parsed.clone();
        outside.rank = 8;
        assert_eq!(outside.placement(), None);
        let argv = ["rank".to_owned()].into_iter().chain(parsed.to_args());
        assert_eq!(Cli::try_parse_from(argv).unwrap().rank, parsed);
    }
}
