//! The command line that starts one worker pod.

use std::net::Ipv6Addr;
use std::path::PathBuf;

use clap::builder::{StringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};

use crate::adapters::{AdapterArgs, AdapterModule};
use crate::{LWS_GROUP_SIZE_ENV, LWS_LEADER_ADDRESS_ENV, LWS_WORKER_INDEX_ENV, RENDEZVOUS_PORT};

/// Seconds of rest after which ranks give the golden answer again, unless a flag says
/// otherwise.
pub const SELF_TEST_INTERVAL_SECONDS: u32 = 600;

/// Seconds that one rank may keep the others waiting in a step, unless a flag says otherwise.
pub const HANG_TIMEOUT_SECONDS: u32 = 60;

/// Where the ranks compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// CPU cores.
    Cpu,
    /// CUDA devices, one a rank.
    Cuda,
}

impl Device {
    /// The flag's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// Precision of cached keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    /// Half precision.
    #[default]
    F16,
    /// 8-bit integers with a scale for every 32 of them: room for nearly twice the
    /// tokens. On CPU cores only.
    Int8,
}

impl KvCacheDtype {
    /// The flag's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

/// How one pod of a group is started: `llama-worker serve <flags>`.
///
/// A group is `nodes` pods with `tensor_parallel * pipeline_parallel / nodes`
/// ranks each. The pod with node index 0 holds rank 0, the scheduler and the
/// OpenAI API. Where a pod is one of a LeaderWorkerSet, what that says of the
/// group stands in for flags that are not given.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct LaunchArgs {
    /// Model: a GGUF file, or the folder of a checkpoint.
    #[arg(long)]
    pub model: PathBuf,
    /// File whose lock says, as long as this worker lives, that the model is in use.
    #[arg(long, value_name = "FILE")]
    pub model_lock: Option<PathBuf>,
    /// Name that clients send as `model`.
    #[arg(long)]
    pub served_name: String,
    /// Ranks that share each layer.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tensor_parallel: u32,
    /// Stages of consecutive layers, each of `tensor_parallel` ranks.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub pipeline_parallel: u32,
    /// Pods of the group.
    #[arg(
        long,
        env = LWS_GROUP_SIZE_ENV,
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=64)
    )]
    pub nodes: u32,
    /// This pod's place in the group, from 0.
    #[arg(long, env = LWS_WORKER_INDEX_ENV, default_value_t = 0)]
    pub node_index: u32,
    /// Longest sequence (prompt and answer) in tokens; the model's own limit when absent.
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// Precision of cached keys and values.
    #[arg(long, value_enum, default_value_t)]
    pub kv_cache_dtype: KvCacheDtype,
    /// Where the ranks compute.
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Compute threads of each rank; the cores shared out evenly when absent.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads_per_rank: Option<u32>,
    /// Name of the group, for reports and logs.
    #[arg(long, default_value = "local")]
    pub group: String,
    /// Hash of the pod template that this group was made from.
    #[arg(long, default_value = "none")]
    pub revision: String,
    /// Incarnation of the group: one more each time it is recreated.
    #[arg(long, default_value_t = 0)]
    pub epoch: u64,
    /// Where rank 0 waits for the ranks of other pods, `host` or `host:port`; needed
    /// when `nodes` > 1.
    #[arg(long, env = LWS_LEADER_ADDRESS_ENV, value_parser = StringValueParser::new().map(with_port))]
    pub rendezvous: Option<String>,
    /// Seconds that running answers get to finish after SIGTERM.
    #[arg(long, default_value_t = 120)]
    pub drain_seconds: u32,
    /// Digest of the golden answer that the ranks must give before requests are taken, as
    /// another group with the same weights, layout and build reported it.
    #[arg(long, value_name = "DIGEST")]
    pub self_test_answer: Option<String>,
    /// Room for adapters.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// Folder below which the internal port is told which adapters the group should have;
    /// clients may load none then. One that cannot be loaded ends nothing.
    #[arg(long, value_name = "FOLDER")]
    pub managed_lora_folder: Option<PathBuf>,
    /// Adapters to load before requests are taken, as NAME=FOLDER.
    #[arg(long, num_args = 1..)]
    pub lora_modules: Vec<AdapterModule>,
    /// Seconds without requests after which the ranks must give their golden answer again;
    /// 0 for never.
    #[arg(long, value_name = "SECONDS", default_value_t = SELF_TEST_INTERVAL_SECONDS)]
    pub self_test_interval: u32,
    /// Seconds that a rank which shows signs of life may keep the others waiting in a step;
    /// one that waits itself has twice the time. Every pod of a group gets the same.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = HANG_TIMEOUT_SECONDS,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    pub hang_timeout: u32,
}

impl LaunchArgs {
    /// The flags that parse back to this value, in one fixed order.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![
            format!("--model={}", self.model.display()),
            format!("--served-name={}", self.served_name),
            format!("--tensor-parallel={}", self.tensor_parallel),
            format!("--pipeline-parallel={}", self.pipeline_parallel),
            format!("--nodes={}", self.nodes),
            format!("--node-index={}", self.node_index),
            format!("--device={}", self.device.as_str()),
            format!("--group={}", self.group),
            format!("--revision={}", self.revision),
            format!("--epoch={}", self.epoch),
            format!("--drain-seconds={}", self.drain_seconds),
        ];
        if let Some(lock) = &self.model_lock {
            args.push(format!("--model-lock={}", lock.display()));
        }
        if self.kv_cache_dtype != KvCacheDtype::default() {
            args.push(format!("--kv-cache-dtype={}", self.kv_cache_dtype.as_str()));
        }
        if let Some(tokens) = self.max_tokens {
            args.push(format!("--max-tokens={tokens}"));
        }
        if let Some(threads) = self.threads_per_rank {
            args.push(format!("--threads-per-rank={threads}"));
        }
        if let Some(address) = &self.rendezvous {
            args.push(format!("--rendezvous={address}"));
        }
        if let Some(answer) = &self.self_test_answer {
            args.push(format!("--self-test-answer={answer}"));
        }
        args.extend(self.adapters.to_args());
        if let Some(folder) = &self.managed_lora_folder {
            args.push(format!("--managed-lora-folder={}", folder.display()));
        }
        for AdapterModule { name, folder } in &self.lora_modules {
            args.push(format!("--lora-modules={name}={}", folder.display()));
        }
        // What is as usual is not said: workers of before know no such flag.
        if self.self_test_interval != SELF_TEST_INTERVAL_SECONDS {
            args.push(format!("--self-test-interval={}", self.self_test_interval));
        }
        if self.hang_timeout != HANG_TIMEOUT_SECONDS {
            args.push(format!("--hang-timeout={}", self.hang_timeout));
        }
        args
    }

    /// Ranks of the group, over all pods and stages.
    pub fn ranks(&self) -> u32 {
        self.tensor_parallel.saturating_mul(self.pipeline_parallel)
    }

    /// Ranks in each pod; `None` when `nodes` does not divide the group's ranks.
    pub fn ranks_per_node(&self) -> Option<u32> {
        let ranks = self.ranks();
        (self.nodes > 0 && ranks.is_multiple_of(self.nodes)).then(|| ranks / self.nodes)
    }
}

/// `address` with a port: [`RENDEZVOUS_PORT`] where it names only a host. What is
/// neither stays as it is, for the worker to refuse.
fn with_port(address: String) -> String {
    if let Ok(host) = address.parse::<Ipv6Addr>() {
        return format!("[{host}]:{RENDEZVOUS_PORT}");
    }
    if address.is_empty() || address.contains(':') {
        return address;
    }
    format!("{address}:{RENDEZVOUS_PORT}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use proptest::prelude::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        launch: LaunchArgs,
    }

    prop_compose! {
        fn launches()(
            model in "/[a-z0-9./_-]{1,40}",
            model_lock in proptest::option::of("/[a-z0-9./_-]{1,40}"),
            served_name in "[A-Za-z0-9._-]{1,40}",
            (tensor_parallel, pipeline_parallel) in (1_u32..=64, 1_u32..=64),
            nodes in 1_u32..=64,
            node_index in 0_u32..64,
            max_tokens in proptest::option::of(1_u32..=1_048_576),
            (cuda, int8) in any::<(bool, bool)>(),
            threads_per_rank in proptest::option::of(1_u32..=1024),
            (group, revision) in ("[a-z0-9-]{1,40}", "[a-f0-9]{8}"),
            epoch in any::<u64>(),
            rendezvous in proptest::option::of("[a-z0-9.-]{1,60}:[1-9][0-9]{1,3}"),
            drain_seconds in 0_u32..=86_400,
            (self_test_answer, self_test_interval, hang_timeout) in
                (proptest::option::of("[a-f0-9]{16}"), 0_u32..=86_400, 1_u32..=3600),
            (max_loras, max_lora_rank) in (0_u8..=64, 1_u16..=512),
            managed_lora_folder in proptest::option::of("/[a-z]{1,10}"),
            modules in proptest::collection::vec(("[a-z-]{1,9}", "/[a-z=]{1,9}"), 0..3),
        ) -> LaunchArgs {
            LaunchArgs {
                model: model.into(),
                model_lock: model_lock.map(PathBuf::from),
                served_name,
                tensor_parallel,
                pipeline_parallel,
                nodes,
                node_index,
                max_tokens,
                kv_cache_dtype: if int8 { KvCacheDtype::Int8 } else { KvCacheDtype::F16 },
                device: if cuda { Device::Cuda } else { Device::Cpu },
                threads_per_rank,
                group,
                revision,
                epoch,
                rendezvous,
                drain_seconds,
                self_test_answer,
                adapters: AdapterArgs { max_loras, max_lora_rank },
                managed_lora_folder: managed_lora_folder.map(PathBuf::from),
                lora_modules: modules
                    .into_iter()
                    .map(|(name, folder)| AdapterModule { name, folder: folder.into() })
                    .collect(),
                self_test_interval,
                hang_timeout,
            }
        }
    }

    proptest! {
        #[test]
        fn what_the_operator_writes_the_worker_reads(launch in launches()) {
            let argv = std::iter::once("llama-worker".to_owned()).chain(launch.to_args());
            let parsed = Cli::try_parse_from(argv).expect("parses");
            prop_assert_eq!(parsed.launch, launch);
        }
    }

    #[test]
    fn ranks_per_node_needs_an_even_split() {
        let argv = ["x", "--model=/m", "--served-name=m", "--tensor-parallel=4"];
        let mut launch = Cli::try_parse_from(argv).expect("parses").launch;
        launch.nodes = 2;
        assert_eq!(launch.ranks_per_node(), Some(2));
        launch.nodes = 3;
        assert_eq!(launch.ranks_per_node(), None);
        launch.pipeline_parallel = 3;
        assert_eq!((launch.ranks(), launch.ranks_per_node()), (12, Some(4)));
    }

    #[test]
    fn addresses_without_a_port_get_the_usual_one() {
        for (given, read) in [
            ("first", "first:29500"),
            ("10.0.0.7", "10.0.0.7:29500"),
            ("fd00::7", "[fd00::7]:29500"),
            ("first.group.ns.svc:1", "first.group.ns.svc:1"),
            ("[::1]:29501", "[::1]:29501"),
            ("", ""),
            (":1", ":1"),
        ] {
            assert_eq!(with_port(given.to_owned()), read);
        }
    }
}
