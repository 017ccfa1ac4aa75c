//! Step 2: from what the user wrote to what can be planned. Pure.
//!
//! The schema refuses most of this at admission; it is checked again because an object
//! may be older than the installed schema.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;
use llama_contract::KvCacheDtype;
use llama_crds::v1alpha1 as crd;
use llama_crds::v1alpha1::{
    Accelerator, GangProvider, Gpu, LlamaDeployment, LlamaDeploymentSpec, MAX_GROUPS,
    MAX_NAME_LENGTH, MAX_POOLS, MAX_RANKS, MIN_GPU_MEMORY_BYTES, MIN_MEMORY_BYTES, Parallelism,
    Placement, PlanPolicy, SelfTestPolicy,
};

use super::adapters::AdapterSet;
use super::adopt;
use super::kueue;
use super::observe::Observed;
use super::policy::{self, ChangePolicy};
use super::quantity;
use super::source::{self, Source};
use crate::cluster::capacity::Amounts;
use crate::names;

/// Why a spec cannot be planned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValidationError {
    /// A field of metadata that the API server always sets is absent.
    #[error("metadata.{0} is missing")]
    IncompleteMetadata(&'static str),
    /// The name cannot be part of pod and Service names.
    #[error(
        "metadata.name {name:?} must have at most {MAX_NAME_LENGTH} characters, start with a \
         letter and have only lower-case letters, digits and '-'"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// Not exactly one model source.
    #[error(
        "spec.model.source must have exactly one of pvc, image, http, s3 and huggingFace, and has \
         {count}"
    )]
    NotOneSource {
        /// How many it has.
        count: usize,
    },
    /// A cache for a model that is not fetched, or whose bytes are not known beforehand.
    #[error(
        "spec.model.cache is for models that are fetched and whose bytes are known beforehand: \
         from http, huggingFace, or s3 with files"
    )]
    CacheWithoutDigests,
    /// A `LlamaModel` of a model that cannot be kept in a cache.
    #[error(
        "spec.source must be one that is fetched and whose bytes are known beforehand: http, \
         huggingFace, or s3 with files"
    )]
    NotFetchable,
    /// A path that does not name a file where it may.
    #[error("{field} {path:?} {problem}")]
    BadPath {
        /// The field.
        field: &'static str,
        /// Its value.
        path: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A number out of its range.
    #[error("{field} is {value} and must be {least} to {most}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// Its value.
        value: i32,
        /// Least value.
        least: i32,
        /// Greatest value.
        most: i32,
    },
    /// The ranks cannot be shared out evenly.
    #[error(
        "spec.parallelism.tensor {tensor} times pipeline {pipeline} is not a multiple of nodes \
         {nodes}: every pod of a group runs the same number of ranks"
    )]
    UnevenRanks {
        /// Ranks of a stage.
        tensor: u32,
        /// Stages.
        pipeline: u32,
        /// Pods of a group.
        nodes: u32,
    },
    /// A group would have too many ranks.
    #[error(
        "spec.parallelism.tensor {tensor} times pipeline {pipeline} are more than {MAX_RANKS} \
         ranks of a group"
    )]
    TooManyRanks {
        /// Ranks of a stage.
        tensor: u32,
        /// Stages.
        pipeline: u32,
    },
    /// GPU settings without GPUs.
    #[error("spec.resources.gpu is set, but spec.resources.accelerator is Cpu")]
    GpuWithoutAccelerator,
    /// A cache in 8 bits on GPUs.
    #[error(
        "spec.context.kvCache.dtype is Int8, which is computed on CPU cores only, and \
         spec.resources.accelerator is Gpu"
    )]
    Int8OnGpu,
    /// A quantity that does not parse or is too small.
    #[error("{field} is {value:?} and must be a quantity of at least {least}")]
    BadQuantity {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// Least value.
        least: &'static str,
    },
    /// A length of time that does not parse, or is too short or too long.
    #[error("{field} is {value:?} and must be a time such as 90s, 10m or 1h30m, {least} to {most}")]
    BadDuration {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// Least value.
        least: &'static str,
        /// Greatest value.
        most: &'static str,
    },
    /// More adapters than a group has room for.
    #[error("spec.adapters.loaded has {count} adapters and spec.adapters.places is {places}")]
    TooManyAdapters {
        /// How many it has.
        count: usize,
        /// How many it may have.
        places: u32,
    },
    /// An adapter that is called as another, or as the model.
    #[error(
        "spec.adapters.loaded has the name {name:?} twice, or it is that of the model: clients \
         name one of them"
    )]
    AdapterNameTaken {
        /// The name.
        name: String,
    },
    /// Two fields of which only one may be set.
    #[error("at most one of {one} and {other} may be set")]
    Exclusive {
        /// The one.
        one: &'static str,
        /// The other.
        other: &'static str,
    },
    /// Kueue without a queue.
    #[error("spec.placement.gang.provider is Kueue, and spec.placement.queueName is missing")]
    KueueWithoutQueue,
    /// A queue of Kueue's that nothing looks at.
    #[error("spec.placement.queueName is set, and spec.placement.gang.provider is Builtin")]
    QueueWithoutKueue,
    /// Pools that cannot be told apart, or that no node can be of.
    #[error("spec.placement.pools {problem}")]
    BadPools {
        /// What is wrong.
        problem: String,
    },
    /// A Service of a needed name is not ours to change.
    #[error(
        "Service {service} exists already and is not of this LlamaDeployment: {owner}; rename the \
         LlamaDeployment or remove the Service"
    )]
    NameConflict {
        /// The Service.
        service: String,
        /// Who has it.
        owner: String,
    },
}

impl ValidationError {
    /// The same in one word, for conditions and metrics.
    pub fn reason(&self) -> llama_crds::v1alpha1::Reason {
        match self {
            Self::NameConflict { .. } => llama_crds::v1alpha1::Reason::NameConflict,
            _ => llama_crds::v1alpha1::Reason::InvalidSpec,
        }
    }
}

/// A deployment that can be planned.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidDeployment {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// UID.
    pub uid: String,
    /// Owner reference for everything that belongs to it.
    pub owner: OwnerReference,
    /// Name that clients send as `model`.
    pub served_name: String,
    /// Where the model comes from.
    pub source: Source,
    /// Adapters that are served beside it.
    pub adapters: Option<AdapterSet>,
    /// Ranks that share each layer.
    pub tensor: u32,
    /// Stages, each of as many ranks.
    pub pipeline: u32,
    /// Pods of a group.
    pub nodes: u32,
    /// The extended resource of GPUs; `None` for CPU.
    pub gpu: Option<Gpu>,
    /// CPU request of a pod.
    pub cpu: String,
    /// Compute threads of each rank.
    pub threads_per_rank: u32,
    /// Memory request and limit of a pod.
    pub memory: String,
    /// The same in bytes.
    pub memory_bytes: u64,
    /// Memory of each GPU in bytes, where the spec says it.
    pub gpu_memory_bytes: Option<u64>,
    /// Longest sequence.
    pub max_tokens: Option<u32>,
    /// Precision of cached keys and values.
    pub kv_cache_dtype: KvCacheDtype,
    /// Sequences of that length that must fit.
    pub min_sequences: u32,
    /// What a plan that does not fit means.
    pub plan_policy: PlanPolicy,
    /// Groups.
    pub replicas: u32,
    /// Which nodes.
    pub placement: Placement,
    /// The `LocalQueue` of Kueue that gives groups their nodes; the operator chooses without.
    pub queue: Option<String>,
    /// Text that makes another revision of the same spec.
    pub restart: Option<String>,
    /// Whether a group must give the golden answer that another gave before.
    pub checks_answers: bool,
    /// Seconds of rest after which a group gives its golden answer again; 0 for never.
    pub self_test_interval: u32,
    /// Seconds that a rank may keep others waiting.
    pub hang_timeout: u32,
    /// What happens when things change or fail.
    pub change: ChangePolicy,
    /// No pods at all.
    pub suspend: bool,
}

impl ValidDeployment {
    /// Ranks of each pod.
    pub fn ranks_per_pod(&self) -> u32 {
        self.tensor * self.pipeline / self.nodes
    }

    /// What the scheduler counts for each pod, in thousandths by resource.
    pub fn pod_requests(&self) -> Amounts {
        let amount = |text: &str| quantity::thousandths(text).unwrap_or(0);
        let mut all = Amounts::from([
            ("cpu".to_owned(), amount(&self.cpu)),
            ("memory".to_owned(), amount(&self.memory)),
            ("pods".to_owned(), 1000),
        ]);
        if let Some(gpu) = &self.gpu {
            let ranks = u64::from(self.ranks_per_pod());
            all.insert(gpu.resource_name.clone(), ranks * 1000);
        }
        all
    }

    /// Precision of cached keys and values, where it is not the usual one: hashes that were
    /// made before there was another stay as they are.
    pub fn other_kv_cache(&self) -> Option<&'static str> {
        let dtype = self.kv_cache_dtype;
        (dtype != KvCacheDtype::default()).then(|| dtype.as_str())
    }

    /// The last time whose answers are compared, if any are.
    pub fn answers_within(&self) -> Option<Duration> {
        let limits = self.change.rollout.answers;
        limits.map(|limits| limits.window)
    }

    /// Groups that should exist now.
    pub fn wanted_groups(&self) -> u32 {
        if self.suspend { 0 } else { self.replicas }
    }
}

/// Checks `object` as far as the cluster's state `observed` and the spec allow.
///
/// # Errors
/// The first thing that is wrong.
pub fn validate(
    object: &LlamaDeployment,
    observed: &Observed,
) -> Result<ValidDeployment, ValidationError> {
    let (name, namespace, uid, owner) = identity(object)?;
    let spec = &object.spec;
    let (tensor, pipeline, nodes) = layout(spec.parallelism)?;
    let max_tokens = spec
        .context
        .and_then(|context| context.max_tokens)
        .map(|tokens| in_range("spec.context.maxTokens", tokens, 1, 1_048_576))
        .transpose()?;
    let min_sequences = spec
        .context
        .and_then(|context| context.min_concurrent_sequences)
        .unwrap_or(1);
    let gpu = match (spec.resources.accelerator, &spec.resources.gpu) {
        (Accelerator::Cpu, None) => None,
        (Accelerator::Cpu, Some(_)) => return Err(ValidationError::GpuWithoutAccelerator),
        (Accelerator::Gpu, gpu) => Some(gpu.clone().unwrap_or_default()),
    };
    let placement = placement(spec)?;
    let cpu_millis = cpu_millis(spec)?;
    let threads = cpu_millis / 1000 / u64::from(tensor * pipeline / nodes);
    let served_name = spec.model.served_name.clone();
    let served_name = served_name.unwrap_or_else(|| name.clone());
    let valid = ValidDeployment {
        adapters: AdapterSet::of(spec, &served_name)?,
        served_name,
        source: source::source(spec)?,
        tensor,
        pipeline,
        nodes,
        gpu,
        cpu: spec.resources.cpu.0.clone(),
        threads_per_rank: u32::try_from(threads.clamp(1, 1024)).unwrap_or(1),
        memory: spec.resources.memory.0.clone(),
        memory_bytes: memory(spec)?,
        gpu_memory_bytes: gpu_memory(spec)?,
        max_tokens,
        kv_cache_dtype: kv_cache_dtype(spec)?,
        min_sequences: in_range("spec.context.minConcurrentSequences", min_sequences, 1, 64)?,
        plan_policy: spec.plan_policy,
        replicas: in_range("spec.replicas", spec.replicas, 0, MAX_GROUPS)?,
        queue: kueue::queue(&placement, observed.has_kueue).map(str::to_owned),
        placement,
        restart: spec.restart.as_ref().map(|restart| restart.id.clone()),
        checks_answers: spec
            .preflight
            .as_ref()
            .is_none_or(|preflight| preflight.self_test == SelfTestPolicy::Enforce),
        self_test_interval: policy::self_test_interval(spec)?,
        hang_timeout: policy::hang_timeout(spec)?,
        change: policy::change(spec)?,
        suspend: spec.suspend,
        name,
        namespace,
        uid,
        owner,
    };
    free_names(&valid, observed)?;
    Ok(valid)
}

fn identity(
    object: &LlamaDeployment,
) -> Result<(String, String, String, OwnerReference), ValidationError> {
    let meta = &object.metadata;
    let required = |value: &Option<String>, field| {
        value
            .clone()
            .ok_or(ValidationError::IncompleteMetadata(field))
    };
    let name = required(&meta.name, "name")?;
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = name.len() <= MAX_NAME_LENGTH
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.chars().all(letters);
    if !good {
        return Err(ValidationError::BadName { name });
    }
    let owner = object
        .controller_owner_ref(&())
        .ok_or(ValidationError::IncompleteMetadata("uid"))?;
    let owner = OwnerReference {
        block_owner_deletion: Some(true),
        ..owner
    };
    Ok((
        name,
        required(&meta.namespace, "namespace")?,
        required(&meta.uid, "uid")?,
        owner,
    ))
}

/// Ranks of a stage, stages and pods.
fn layout(parallelism: Parallelism) -> Result<(u32, u32, u32), ValidationError> {
    let tensor = in_range("spec.parallelism.tensor", parallelism.tensor, 1, 64)?;
    let pipeline = in_range("spec.parallelism.pipeline", parallelism.pipeline, 1, 64)?;
    let nodes = in_range("spec.parallelism.nodes", parallelism.nodes, 1, 64)?;
    if tensor * pipeline > MAX_RANKS {
        return Err(ValidationError::TooManyRanks { tensor, pipeline });
    }
    if !(tensor * pipeline).is_multiple_of(nodes) {
        return Err(ValidationError::UnevenRanks {
            tensor,
            pipeline,
            nodes,
        });
    }
    Ok((tensor, pipeline, nodes))
}

fn placement(spec: &LlamaDeploymentSpec) -> Result<Placement, ValidationError> {
    let placement = spec.placement.clone().unwrap_or_default();
    let both = |topology: &llama_crds::v1alpha1::Topology| {
        topology.required.is_some() && topology.preferred.is_some()
    };
    if placement.topology.as_ref().is_some_and(both) {
        return Err(ValidationError::Exclusive {
            one: "spec.placement.topology.required",
            other: "spec.placement.topology.preferred",
        });
    }
    pools(&placement)?;
    queue(&placement)?;
    Ok(placement)
}

fn queue(placement: &Placement) -> Result<(), ValidationError> {
    const QUEUE: &str = "spec.placement.queueName";
    let provider = placement.gang.as_ref().map(|gang| gang.provider);
    let has_queue = placement.queue_name.is_some();
    if has_queue && !placement.pools.is_empty() {
        return Err(ValidationError::Exclusive {
            one: "spec.placement.pools",
            other: QUEUE,
        });
    }
    match provider {
        Some(GangProvider::Kueue) if !has_queue => Err(ValidationError::KueueWithoutQueue),
        Some(GangProvider::Builtin) if has_queue => Err(ValidationError::QueueWithoutKueue),
        _ => Ok(()),
    }
}

fn pools(placement: &Placement) -> Result<(), ValidationError> {
    let bad = |problem| Err(ValidationError::BadPools { problem });
    let pools = &placement.pools;
    if pools.len() > MAX_POOLS {
        return bad(format!("has {} pools, of at most {MAX_POOLS}", pools.len()));
    }
    let mut names = BTreeSet::new();
    for pool in pools {
        let name = &pool.name;
        if !names.insert(name) {
            return bad(format!("has two pools named {name}; names must differ"));
        }
        let everywhere = &placement.node_selector;
        let other = |(key, value): &(&String, &String)| {
            everywhere.get(*key).is_some_and(|known| known != *value)
        };
        if let Some((key, value)) = pool.node_selector.iter().find(other) {
            return bad(format!(
                "{name:?} asks for nodes with {key}={value}, and spec.placement.nodeSelector for \
                 another value of {key}: no node has both"
            ));
        }
    }
    Ok(())
}

fn kv_cache_dtype(spec: &LlamaDeploymentSpec) -> Result<KvCacheDtype, ValidationError> {
    let cache = spec.context.and_then(|context| context.kv_cache);
    match (cache.unwrap_or_default().dtype, spec.resources.accelerator) {
        (crd::KvCacheDtype::F16, _) => Ok(KvCacheDtype::F16),
        (crd::KvCacheDtype::Int8, Accelerator::Cpu) => Ok(KvCacheDtype::Int8),
        (crd::KvCacheDtype::Int8, Accelerator::Gpu) => Err(ValidationError::Int8OnGpu),
    }
}

pub(crate) fn in_range(
    field: &'static str,
    value: i32,
    least: i32,
    most: i32,
) -> Result<u32, ValidationError> {
    let error = ValidationError::OutOfRange {
        field,
        value,
        least,
        most,
    };
    if (least..=most).contains(&value) {
        u32::try_from(value).map_err(|_| error)
    } else {
        Err(error)
    }
}

fn cpu_millis(spec: &LlamaDeploymentSpec) -> Result<u64, ValidationError> {
    let value = &spec.resources.cpu.0;
    match quantity::thousandths(value) {
        Some(millis) if millis > 0 => Ok(millis),
        _ => Err(ValidationError::BadQuantity {
            field: "spec.resources.cpu",
            value: value.clone(),
            least: "1m",
        }),
    }
}

fn memory(spec: &LlamaDeploymentSpec) -> Result<u64, ValidationError> {
    let value = &spec.resources.memory.0;
    match quantity::thousandths(value) {
        Some(thousandths) if thousandths / 1000 >= MIN_MEMORY_BYTES => Ok(thousandths / 1000),
        _ => Err(ValidationError::BadQuantity {
            field: "spec.resources.memory",
            value: value.clone(),
            least: "32Mi",
        }),
    }
}

fn gpu_memory(spec: &LlamaDeploymentSpec) -> Result<Option<u64>, ValidationError> {
    let gpu = spec.resources.gpu.as_ref();
    let Some(value) = gpu.and_then(|gpu| gpu.memory.as_ref()) else {
        return Ok(None);
    };
    match quantity::thousandths(&value.0) {
        Some(thousandths) if thousandths / 1000 >= MIN_GPU_MEMORY_BYTES => {
            Ok(Some(thousandths / 1000))
        }
        _ => Err(ValidationError::BadQuantity {
            field: "spec.resources.gpu.memory",
            value: value.0.clone(),
            least: "1Gi",
        }),
    }
}

/// A Service that somebody else made must not be taken over: its selector would change
/// under its owner.
fn free_names(valid: &ValidDeployment, observed: &Observed) -> Result<(), ValidationError> {
    let needed = [
        names::client_service(&valid.name),
        names::ranks_service(&valid.name),
    ];
    for service in &observed.services {
        let meta = &service.metadata;
        let Some(name) = meta.name.as_ref().filter(|name| needed.contains(name)) else {
            continue;
        };
        let owners = meta.owner_references.as_deref().unwrap_or_default();
        let is_ours = owners.iter().any(|owner| owner.uid == valid.uid);
        if is_ours || adopt::is_orphan(meta) {
            continue;
        }
        return Err(ValidationError::NameConflict {
            service: name.clone(),
            owner: owners.first().map_or_else(
                || "it has no owner".to_owned(),
                |owner| format!("it is of {} {} (UID {})", owner.kind, owner.name, owner.uid),
            ),
        });
    }
    Ok(())
}
