//! How a worker pod is started: `llama-worker serve <flags>`.

use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;

use clap::Args;
use llama_contract::{
    API_PORT, INTERNAL_PORT, LaunchArgs, NODE_NAME_ENV, POD_IP_ENV, TERMINATION_LOG,
};

use crate::server::Loading;

/// Sequences that a worker computes at a time, unless a flag says otherwise.
pub(crate) const MAX_SEQUENCES: u16 = 64;

/// Flags of a pod's supervisor. The operator sets what is in `launch`; the rest
/// has defaults that fit a pod.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// What operator and worker agree on.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// Requests that may wait for a place in the KV cache; more get 429.
    #[arg(long, default_value_t = 64)]
    pub max_waiting: u16,
    /// Tokens of the prompts that may wait; more get 429.
    #[arg(long, default_value_t = 1 << 20)]
    pub max_waiting_tokens: u32,
    /// Sequences computed at a time, where memory allows.
    #[arg(long, default_value_t = MAX_SEQUENCES, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub max_sequences: u16,
    /// Computes every prompt anew, also where one that began alike is still in the KV
    /// cache.
    #[arg(long)]
    pub no_prefix_caching: bool,
    /// Tokens that are guessed ahead of an answer from what it has in common with text
    /// before; they are checked together. Never changes an answer.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=32))]
    pub speculative_tokens: u16,
    /// Refuses weights that do not have the digests which `llama-worker shard` wrote
    /// beside them.
    #[arg(long)]
    pub verify_digests: bool,
    /// Folder below which clients of the API may name adapters to load; without it they
    /// may name none. It must be the same on every node of the group.
    #[arg(long, conflicts_with = "managed_lora_folder")]
    pub lora_folder: Option<PathBuf>,
    /// Name of the node, for reports.
    #[arg(long, env = NODE_NAME_ENV, default_value = "localhost")]
    pub node_name: String,
    /// Address on which the other pods of the group reach this one.
    #[arg(long, env = POD_IP_ENV, default_value_t = Ipv6Addr::LOCALHOST.into())]
    pub pod_ip: IpAddr,
    /// Address to listen on; all when absent.
    #[arg(long, hide = true)]
    pub bind: Option<IpAddr>,
    /// Port of the OpenAI API.
    #[arg(long, hide = true, default_value_t = API_PORT)]
    pub api_port: u16,
    /// Port of state, metrics and probes.
    #[arg(long, hide = true, default_value_t = INTERNAL_PORT)]
    pub internal_port: u16,
    /// File for the failure report; written only where it exists, as it does in a pod.
    #[arg(long, hide = true, default_value = TERMINATION_LOG)]
    pub termination_log: PathBuf,
    /// Memory limit in bytes, in place of the container's.
    #[arg(long, hide = true)]
    pub memory_limit_bytes: Option<u64>,
}

impl ServeArgs {
    /// Who says which adapters the group has.
    pub fn loading(&self) -> Loading {
        match (&self.launch.managed_lora_folder, &self.lora_folder) {
            (Some(folder), _) => Loading::ByList(folder.clone()),
            (None, Some(folder)) => Loading::ByClients(folder.clone()),
            (None, None) => Loading::Fixed,
        }
    }
}
