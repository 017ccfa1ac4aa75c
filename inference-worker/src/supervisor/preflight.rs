//! What is checked before any rank starts, so that wrong input ends the pod
//! within seconds and with a name.

use llama_contract::{FailureCategory, KvCacheDtype, LaunchArgs};
use llama_model::advice::Limit;
use llama_model::blocks::KvCapacity;
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::Target;
use llama_model::text::{ChatTemplate, ModelText, Tokenizer};
use llama_model::{Checkpoint, Layout, LlamaConfig, MemoryPlan, MemoryRequest};

use super::args::ServeArgs;
use super::devices;
use crate::cgroup::{Cgroup, usable_cores};
use crate::digest::digest;
use crate::failure::{Failure, of_model};
use crate::rank::STEP_TOKENS;
use crate::rank::args::kv_format;

/// A pod whose input is in order.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The flags, with `max_tokens` and `threads_per_rank` filled.
    pub(super) launch: LaunchArgs,
    /// Ranks of this pod.
    pub(super) ranks_here: u32,
    /// What the pod has memory for.
    pub(super) capacity: KvCapacity,
    /// Longest sequence in tokens.
    pub(super) max_tokens: u32,
    /// Whether every rank's threads have cores of their own.
    pub(super) own_cores: bool,
    /// Hash of the model file's header.
    pub(super) digest: String,
    /// What the API needs, on the first pod.
    pub(super) text: Option<(Tokenizer, ChatTemplate)>,
}

/// Checks flags, model, layout and memory.
///
/// # Errors
/// The category that names what is wrong.
pub(super) fn prepare(
    args: &ServeArgs,
    has_token: bool,
    cgroup: &Cgroup,
) -> Result<Prepared, Failure> {
    let mut launch = args.launch.clone();
    let ranks_here = check_flags(&launch, has_token)?;
    let device_memory = devices::memory(&launch, ranks_here)?;
    if device_memory.is_some() && args.launch.kv_cache_dtype == KvCacheDtype::Int8 {
        return Err(configuration(
            "--kv-cache-dtype=int8 is computed on CPU cores only, not with --device=cuda",
        ));
    }
    let checkpoint =
        Checkpoint::open(&launch.model, LoadFormat::Auto).map_err(|error| of_model(&error))?;
    for warning in checkpoint.warnings() {
        tracing::warn!("{warning}");
    }
    let config = checkpoint.config();
    let max_tokens = context(launch.max_tokens, config)?;
    let cores = usable_cores(cgroup);
    let threads = threads_per_rank(&launch, cores, ranks_here);
    let first_rank = launch.node_index * ranks_here;
    let plan = MemoryPlan::new(
        &checkpoint,
        &MemoryRequest {
            layout: Layout {
                tensor: launch.tensor_parallel as usize,
                pipeline: launch.pipeline_parallel as usize,
            },
            ranks: first_rank as usize..(first_rank + ranks_here) as usize,
            target: match device_memory {
                None => Target::Cpu {
                    threads: threads as usize,
                },
                Some(_) => Target::Device {
                    runtime: devices::RUNTIME_BYTES,
                },
            },
            max_tokens: max_tokens as usize,
            step_tokens: STEP_TOKENS as usize,
            kv: kv_format(args.launch.kv_cache_dtype),
            adapters: crate::adapters::room(launch.adapters),
        },
    )
    .map_err(|error| of_model(&error))?;
    let limit = if let Some(memory) = device_memory {
        devices::sequences(&plan, memory)?;
        Limit::Each(memory)
    } else {
        // Without a limit the machine's memory is nobody's promise; the KV cache is
        // taken as it is used.
        let limit = args.memory_limit_bytes.or_else(|| cgroup.memory_limit());
        let limit = limit.unwrap_or(u64::MAX);
        plan.check(limit).map_err(|error| of_model(&error))?;
        Limit::Together(limit)
    };
    let capacity = plan
        .capacity(limit, args.max_sequences.into())
        .ok_or_else(|| {
            let message = "the KV cache has no room for the blocks of one longest sequence";
            Failure::new(FailureCategory::InsufficientMemory, message)
        })?;
    launch.max_tokens = Some(max_tokens);
    launch.threads_per_rank = Some(threads);
    let text = (launch.node_index == 0)
        .then(|| text_of(&checkpoint))
        .transpose()?;
    tracing::info!(
        layers = config.layers.len(),
        max_tokens,
        slots = capacity.slots,
        blocks = capacity.blocks,
        threads,
        ranks_here,
        "the model fits"
    );
    Ok(Prepared {
        ranks_here,
        capacity,
        max_tokens,
        own_cores: u64::from(threads) * u64::from(ranks_here) <= cores as u64,
        digest: digest(&checkpoint).map_err(|error| of_model(&error))?,
        text,
        launch,
    })
}

fn configuration(message: impl Into<String>) -> Failure {
    Failure::new(FailureCategory::InvalidConfiguration, message)
}

/// Flags that clap cannot judge one by one. Returns the ranks of this pod.
fn check_flags(launch: &LaunchArgs, has_token: bool) -> Result<u32, Failure> {
    let LaunchArgs {
        tensor_parallel,
        pipeline_parallel,
        nodes,
        node_index,
        ..
    } = *launch;
    let ranks_here = launch.ranks_per_node().ok_or_else(|| {
        let message = format!(
            "{} ranks (tensor parallel size {tensor_parallel}, pipeline parallel size \
             {pipeline_parallel}) cannot be spread over {nodes} nodes",
            launch.ranks()
        );
        Failure::new(FailureCategory::InvalidLayout, message)
    })?;
    if node_index >= nodes {
        return Err(configuration(format!(
            "node index {node_index} is outside a group of {nodes} nodes"
        )));
    }
    if nodes > 1 && !launch.rendezvous.as_deref().is_some_and(is_host_and_port) {
        return Err(configuration(
            "--rendezvous must be host:port when --nodes is above 1",
        ));
    }
    if nodes > 1 && !has_token {
        return Err(configuration(format!(
            "{} must hold the rendezvous token when --nodes is above 1",
            llama_contract::RENDEZVOUS_TOKEN_ENV
        )));
    }
    Ok(ranks_here)
}

fn is_host_and_port(address: &str) -> bool {
    address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// The longest sequence: the wanted one where the model was trained for it, else its own.
pub(crate) fn context(wanted: Option<u32>, config: &LlamaConfig) -> Result<u32, Failure> {
    let longest = u32::try_from(config.context_length).unwrap_or(u32::MAX);
    match wanted {
        None => Ok(longest),
        Some(wanted) if wanted > longest => Err(configuration(format!(
            "--max-tokens={wanted} is more than the {longest} tokens that the model was trained for"
        ))),
        Some(0 | 1) => Err(configuration(
            "--max-tokens must leave room for a prompt and an answer, at least 2",
        )),
        Some(wanted) => Ok(wanted),
    }
}

fn threads_per_rank(launch: &LaunchArgs, cores: usize, ranks_here: u32) -> u32 {
    let share = cores / ranks_here.max(1) as usize;
    launch
        .threads_per_rank
        .unwrap_or_else(|| u32::try_from(share.max(1)).unwrap_or(1))
}

fn text_of(checkpoint: &Checkpoint) -> Result<(Tokenizer, ChatTemplate), Failure> {
    let text = match checkpoint.gguf() {
        Some(gguf) => ModelText::from_gguf(gguf),
        None => ModelText::open(checkpoint.path()),
    };
    text.map(|text| (text.tokenizer, text.template))
        .map_err(|error| of_model(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        launch: LaunchArgs,
    }

    fn launch(flags: &[&str]) -> LaunchArgs {
        let argv = ["x", "--model=/m", "--served-name=m"].iter().chain(flags);
        Cli::try_parse_from(argv).unwrap().launch
    }

    #[test]
    fn flags_that_contradict_each_other_are_named() {
        let pods = [
            "--tensor-parallel=4",
            "--nodes=2",
            "--rendezvous=first:29500",
        ];
        assert_eq!(check_flags(&launch(&pods), true), Ok(2));
        let stages = [&pods[..], &["--pipeline-parallel=3"]].concat();
        assert_eq!(check_flags(&launch(&stages), true), Ok(6));
        for (flags, has_token, category, word) in [
            (
                &["--tensor-parallel=3", "--nodes=2"][..],
                true,
                FailureCategory::InvalidLayout,
                "2 nodes",
            ),
            (
                &["--node-index=1"],
                true,
                FailureCategory::InvalidConfiguration,
                "node index 1",
            ),
            (
                &["--tensor-parallel=2", "--nodes=2"],
                true,
                FailureCategory::InvalidConfiguration,
                "--rendezvous",
            ),
            (
                &pods,
                false,
                FailureCategory::InvalidConfiguration,
                "LLAMA_RENDEZVOUS_TOKEN",
            ),
        ] {
            let failure = check_flags(&launch(flags), has_token).unwrap_err();
            assert_eq!(failure.category, category, "{failure}");
            assert!(failure.message.contains(word), "{failure}");
        }
    }

    #[test]
    fn cores_are_shared_out_and_every_rank_gets_a_thread() {
        let auto = launch(&[]);
        assert_eq!(threads_per_rank(&auto, 8, 3), 2);
        assert_eq!(threads_per_rank(&auto, 2, 3), 1);
        assert_eq!(
            threads_per_rank(&launch(&["--threads-per-rank=5"]), 2, 3),
            5
        );
    }

    #[test]
    fn addresses_need_host_and_port() {
        assert!(is_host_and_port("first.group.ns.svc:29500"));
        assert!(is_host_and_port("[::1]:29500"));
        for address in ["first", ":29500", "first:port", "first:70000"] {
            assert!(!is_host_and_port(address), "{address}");
        }
    }
}
