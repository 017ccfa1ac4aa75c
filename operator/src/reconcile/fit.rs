//! Whether the model fits, before any group exists: when to inspect it, what came of it,
//! and whether new pods may be created. Pure.
//!
//! A plan stands in status under the hash of its inputs, and an inspection pod carries
//! the same hash. The pod is deleted once status has its result.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_contract::{FetchSource, InspectionReport};
use llama_crds::v1alpha1::{
    DeploymentPlan, FailedInspection, LlamaDeploymentStatus, NodePool, Placement, PlanPolicy,
    Reason,
};
use serde::Serialize;

use super::failure;
use super::fit_words;
use super::groups::{Deletion, NewPods, deletions};
use super::observe::Observed;
use super::placement;
use super::plan::{INSPECT_CONTAINER, INSPECTION_MEMORY, WorkerSettings, fnv1a, inspection};
use super::pods::PodView;
use super::source::Source;
use super::validate::ValidDeployment;
use super::waiting;
use crate::backoff::doubled;
use crate::labels;

/// Label of a node with the memory of each of its GPUs in MiB, as GPU feature discovery
/// writes it.
pub const GPU_MEMORY_LABEL: &str = "nvidia.com/gpu.memory";
/// Names of device plugins' resources whose nodes have that label.
const NVIDIA: &str = "nvidia.com/";
/// Inspections that fail for no fault of the model before it takes somebody to try again.
pub const MOST_FAILURES: i32 = 8;
/// First and longest pause before the model is inspected again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(5));

/// A condition before its times are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// `True`, `False` or `Unknown`.
    pub status: &'static str,
    /// Why.
    pub reason: Reason,
    /// With numbers.
    pub message: String,
}

/// Why no new pods are created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdup {
    /// In one word: one of ours, or the category of the failure.
    pub reason: String,
    /// What to do about it.
    pub message: String,
    /// Whether nothing changes until somebody acts.
    pub is_stalled: bool,
    /// Whether the model cannot be had, or is at fault.
    pub concerns_model: bool,
}

/// What is known of the model, and what to do to know more.
#[derive(Clone, Debug)]
pub struct Fit {
    /// The inspection pod to create.
    pub create: Option<Pod>,
    /// Inspection pods to delete.
    pub delete: Vec<Deletion>,
    /// The plan as status should hold it: of older inputs while a new one is made.
    pub plan: Option<DeploymentPlan>,
    /// The failure as status should hold it.
    pub inspection: Option<FailedInspection>,
    /// The condition.
    pub planned: Planned,
    /// What holds new pods up.
    pub holdup: Option<Holdup>,
    /// When to look again without an event.
    pub wake_after: Option<Duration>,
}

impl Fit {
    /// Whether pods of the current revision may be created.
    pub fn new_pods(&self) -> NewPods {
        self.holdup.as_ref().map_or(NewPods::Allowed, |holdup| {
            NewPods::Held(holdup.message.clone())
        })
    }

    /// Nothing to do about inspection pods.
    fn new(status: &'static str, reason: Reason, message: String) -> Self {
        Self {
            create: None,
            delete: Vec::new(),
            plan: None,
            inspection: None,
            planned: Planned {
                status,
                reason,
                message,
            },
            holdup: None,
            wake_after: None,
        }
    }

    /// Holds new pods up for as long as the condition is not `True`, with its words.
    fn held(mut self, is_stalled: bool) -> Self {
        self.holdup = Some(Holdup {
            reason: self.planned.reason.to_string(),
            message: self.planned.message.clone(),
            is_stalled,
            concerns_model: false,
        });
        self
    }
}

/// What is known of the model of `deployment`, and what to do to know more.
pub fn fit(
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    observed: &Observed,
    previous: &LlamaDeploymentStatus,
    now: Timestamp,
) -> Fit {
    let all: Vec<_> = observed
        .pods
        .iter()
        .filter_map(|pod| PodView::alone(pod, labels::INSPECTION))
        .collect();
    let (pods, strangers): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|pod| pod.is_owned_by(&deployment.uid));
    if deployment.plan_policy == PlanPolicy::Disabled {
        let message = "spec.planPolicy is Disabled.".to_owned();
        let mut fit = Fit::new("Unknown", Reason::PlanDisabled, message);
        fit.delete = deletions(&pods, None);
        return fit;
    }
    let memory = known_memory(deployment, observed.gpu_memory, previous.plan.as_ref());
    let inputs = inputs(deployment, memory);
    let inspection = Inspection {
        deployment,
        settings,
        inputs: &inputs,
        memory,
        record: previous
            .inspection
            .as_ref()
            .filter(|record| record.inputs == inputs),
        now,
    };
    let known = previous.plan.as_ref().filter(|plan| plan.inputs == inputs);
    let mut fit = match known {
        Some(plan) => {
            let mut fit = judged(deployment, plan.clone());
            fit.delete = deletions(&pods, None);
            fit
        }
        None => inspection.run(&pods, &strangers),
    };
    if deployment.plan_policy != PlanPolicy::Enforce {
        fit.holdup = None;
    }
    if fit.plan.is_none() {
        fit.plan.clone_from(&previous.plan);
    }
    fit
}

/// Bytes of each pod, or of each GPU. What a plan of the same inputs was made with stays,
/// whatever nodes come and go.
fn known_memory(
    deployment: &ValidDeployment,
    observed: Option<u64>,
    plan: Option<&DeploymentPlan>,
) -> Option<u64> {
    if deployment.gpu.is_none() {
        return Some(deployment.memory_bytes);
    }
    let before = || {
        let plan = plan?;
        let memory = plan
            .memory_bytes
            .and_then(|bytes| u64::try_from(bytes).ok());
        memory.filter(|_| plan.inputs == inputs(deployment, memory))
    };
    deployment.gpu_memory_bytes.or_else(before).or(observed)
}

/// Everything that the answer of an inspection depends on.
#[derive(Serialize)]
struct Inputs<'a> {
    claim: Option<(&'a str, &'a str)>,
    image: Option<(&'a str, &'a str)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fetched: Option<&'a FetchSource>,
    tensor: u32,
    pipeline: u32,
    nodes: u32,
    gpu: bool,
    threads: u32,
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache: Option<&'static str>,
    min_sequences: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapters: Option<(u8, u16)>,
    memory: Option<u64>,
    /// Which nodes' GPUs count, where the spec does not say how much memory they have.
    placement: Option<(&'a BTreeMap<String, String>, &'a [Toleration])>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pools: Option<&'a [NodePool]>,
}

/// Sixteen hexadecimal digits. The worker image is no input: a new one does not have
/// every model inspected again.
fn inputs(deployment: &ValidDeployment, memory: Option<u64>) -> String {
    let (claim, image, fetched) = match &deployment.source {
        Source::Claim { claim, path } => (Some((claim.as_str(), path.as_str())), None, None),
        // The same headers, however they come into the pod.
        Source::Image {
            reference, path, ..
        }
        | Source::ImageVolume {
            reference, path, ..
        } => (None, Some((reference.as_str(), path.as_str())), None),
        Source::Fetched(fetched) => (None, None, Some(&fetched.from)),
    };
    let by_label = deployment.gpu.is_some() && deployment.gpu_memory_bytes.is_none();
    let placement = &deployment.placement;
    let inputs = Inputs {
        claim,
        image,
        fetched,
        tensor: deployment.tensor,
        pipeline: deployment.pipeline,
        nodes: deployment.nodes,
        gpu: deployment.gpu.is_some(),
        threads: deployment.threads_per_rank,
        max_tokens: deployment.max_tokens,
        kv_cache: deployment.other_kv_cache(),
        min_sequences: deployment.min_sequences,
        adapters: deployment
            .adapters
            .as_ref()
            .map(|set| (set.places, set.max_rank)),
        memory,
        placement: by_label.then_some((&placement.node_selector, &placement.tolerations)),
        pools: (by_label && !placement.pools.is_empty()).then_some(&placement.pools),
    };
    // Plain fields and maps with text keys always serialize.
    let text = serde_json::to_string(&inputs).unwrap_or_default();
    format!("{:016x}", fnv1a(text.as_bytes()))
}

/// Whether the memory of GPUs has to be read from nodes: the spec does not say it, and no
/// plan of this generation knows it.
pub fn needs_nodes(
    spec: &llama_crds::v1alpha1::LlamaDeploymentSpec,
    status: Option<&LlamaDeploymentStatus>,
    generation: Option<i64>,
) -> bool {
    use llama_crds::v1alpha1::Accelerator;
    let gpu = spec.resources.gpu.clone().unwrap_or_default();
    let known = status.is_some_and(|status| {
        let plan = status.plan.as_ref();
        status.observed_generation == generation
            && plan.is_some_and(|plan| plan.memory_bytes.is_some())
    });
    spec.resources.accelerator == Accelerator::Gpu
        && spec.plan_policy != PlanPolicy::Disabled
        && gpu.memory.is_none()
        && gpu.resource_name.starts_with(NVIDIA)
        && !known
}

/// Bytes of the smallest GPU among the labelled `nodes` that `placement` allows, in any of
/// its pools.
pub fn least_gpu_memory(nodes: &[Node], placement: Option<&Placement>) -> Option<u64> {
    let anywhere = Placement::default();
    let placement = placement.unwrap_or(&anywhere);
    let allowed = |node: &&Node| {
        let labels = node.metadata.labels.clone().unwrap_or_default();
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref());
        placement::allows(placement, &labels, taints.unwrap_or_default())
    };
    let memory = |node: &Node| {
        let mib = node.metadata.labels.as_ref()?.get(GPU_MEMORY_LABEL)?;
        mib.parse::<u64>().ok()?.checked_mul(1 << 20)
    };
    nodes.iter().filter(allowed).filter_map(memory).min()
}

/// What a plan means for new pods.
fn judged(deployment: &ValidDeployment, plan: DeploymentPlan) -> Fit {
    let message = fit_words::verdict(deployment, &plan);
    let mut fit = match plan.fits {
        Some(true) => Fit::new("True", Reason::Fits, message),
        Some(false) => Fit::new("False", Reason::NotFit, message).held(true),
        None => Fit::new("Unknown", Reason::GPUMemoryUnknown, message),
    };
    fit.plan = Some(plan);
    fit
}

/// An inspection that status has no result of yet.
struct Inspection<'a> {
    deployment: &'a ValidDeployment,
    settings: &'a WorkerSettings,
    inputs: &'a str,
    memory: Option<u64>,
    record: Option<&'a FailedInspection>,
    now: Timestamp,
}

impl Inspection<'_> {
    fn run(&self, pods: &[PodView<'_>], strangers: &[PodView<'_>]) -> Fit {
        let (mine, others): (Vec<_>, Vec<_>) = pods
            .iter()
            .copied()
            .partition(|pod| pod.revision == self.inputs);
        let in_the_way = || {
            let leaving = mine.iter().filter(|pod| pod.is_deleting());
            leaving.chain(&others).chain(strangers).next()
        };
        let mut fit = match mine.iter().find(|pod| !pod.is_deleting()) {
            Some(pod) => self.look(pod),
            None => match in_the_way() {
                Some(pod) => {
                    let message = format!("waiting for pod {} to end", pod.name);
                    let mut fit = self.planning(message);
                    fit.wake_after = Some(Duration::from_secs(10));
                    fit
                }
                None => self.start(),
            },
        };
        fit.delete.extend(deletions(&others, None));
        fit
    }

    fn planning(&self, message: String) -> Fit {
        let mut fit = Fit::new("Unknown", Reason::Planning, message).held(false);
        fit.inspection = self.record.cloned();
        fit
    }

    /// There is no pod: create it, when it is time. One that had failed for good and was
    /// deleted by somebody is tried anew.
    fn start(&self) -> Fit {
        let record = self.record.filter(|record| !record.stopped);
        if let Some(record) = record {
            let since = self.now.duration_since(record.time.0);
            let since = Duration::try_from(since).unwrap_or_default();
            let left = pause(record.failures).saturating_sub(since);
            if left > Duration::ZERO {
                return Self::retrying(record, left);
            }
        }
        let (deployment, settings) = (self.deployment, self.settings);
        let pod = inspection::pod(deployment, settings, self.inputs, self.memory);
        let mut fit = self.planning("the model's headers are read by a pod first".to_owned());
        fit.inspection = record.cloned();
        fit.create = Some(pod);
        fit
    }

    /// The pod exists.
    fn look(&self, pod: &PodView<'_>) -> Fit {
        if let Some(report) = report(pod) {
            let plan = fit_words::plan(self.deployment, self.inputs, &report);
            let mut fit = judged(self.deployment, plan);
            fit.wake_after = Some(Duration::ZERO);
            return fit;
        }
        if pod.has_ended() {
            return self.ended(pod);
        }
        let obstacle = waiting::of_scheduling(pod)
            .or_else(|| waiting::of_containers(pod, &self.deployment.source));
        let Some(obstacle) = obstacle else {
            let name = pod.name;
            return self.planning(match pod.node_name() {
                None => format!("pod {name}, which reads the model's headers, waits for a node"),
                Some(node) => format!("pod {name} on node {node} reads the model's headers"),
            });
        };
        let message = format!(
            "pod {}, which reads the model's headers, cannot start: {}",
            pod.name, obstacle.message
        );
        let mut fit = Fit::new("Unknown", Reason::InspectionFailed, message).held(false);
        fit.inspection = self.record.cloned();
        if let Some(holdup) = &mut fit.holdup {
            holdup.reason = obstacle.reason.to_string();
            holdup.concerns_model = obstacle.concerns_model();
        }
        fit
    }

    /// The pod has failed: put it on record first, then delete it, unless the failure
    /// would repeat.
    fn ended(&self, pod: &PodView<'_>) -> Fit {
        if let Some(record) = self.record.filter(|record| record.pod == pod.uid) {
            if record.stopped {
                return self.stopped(record);
            }
            let mut fit = Self::retrying(record, pause(record.failures));
            fit.delete = deletions(&[*pod], None);
            return fit;
        }
        let record = self.failure(pod);
        let mut fit = if record.stopped {
            self.stopped(&record)
        } else {
            Self::retrying(&record, Duration::ZERO)
        };
        fit.wake_after = Some(Duration::ZERO);
        fit
    }

    fn failure(&self, pod: &PodView<'_>) -> FailedInspection {
        let failures = self.record.map_or(0, |record| record.failures) + 1;
        let cause = failure::cause(&[*pod], INSPECTION_MEMORY);
        let late = pod.pod.status.reason.as_deref() == Some("DeadlineExceeded");
        let (reason, message, permanent) = match cause {
            Some(cause) if !late || cause.permanent => {
                (cause.reason, cause.message, cause.permanent)
            }
            _ => (
                Reason::InspectionFailed.to_string(),
                format!(
                    "pod {} did not read the model's headers within {} s",
                    pod.name,
                    inspection::deadline_seconds(&self.deployment.source)
                ),
                false,
            ),
        };
        FailedInspection {
            inputs: self.inputs.to_owned(),
            pod: pod.uid.to_owned(),
            failures,
            reason,
            message,
            stopped: permanent || failures >= MOST_FAILURES,
            time: Time(self.now),
        }
    }

    /// A failure that is tried again.
    fn retrying(record: &FailedInspection, left: Duration) -> Fit {
        let message = format!(
            "the model could not be inspected: {}; attempt {} of {MOST_FAILURES} follows {} s after \
             the last",
            record.message.trim_end_matches('.'),
            record.failures + 1,
            pause(record.failures).as_secs()
        );
        let mut fit = Fit::new("Unknown", Reason::InspectionFailed, message).held(false);
        fit.inspection = Some(record.clone());
        fit.wake_after = Some(left);
        fit
    }

    /// A failure that somebody has to do something about.
    fn stopped(&self, record: &FailedInspection) -> Fit {
        let message = format!(
            "{}. Then change the spec, or delete pod {} to try again.",
            record.message.trim_end_matches('.'),
            crate::names::inspection(&self.deployment.name)
        );
        let mut fit = Fit::new("False", Reason::InspectionFailed, message).held(true);
        fit.inspection = Some(record.clone());
        if let Some(holdup) = &mut fit.holdup {
            holdup.concerns_model = failure::concerns_model(&record.reason);
            holdup.reason.clone_from(&record.reason);
        }
        fit
    }
}

/// The answer that `pod` has left.
fn report(pod: &PodView<'_>) -> Option<InspectionReport> {
    let container = pod
        .containers()
        .find(|container| container.name == INSPECT_CONTAINER)?;
    let terminated = container.state.as_ref()?.terminated.as_ref()?;
    let text = terminated.message.as_deref().unwrap_or_default();
    (terminated.exit_code == 0)
        .then(|| InspectionReport::from_termination_message(text))
        .flatten()
}

/// Pause before the model is inspected again.
fn pause(failures: i32) -> Duration {
    doubled(BACKOFF.0, BACKOFF.1, u32::try_from(failures).unwrap_or(0))
}
