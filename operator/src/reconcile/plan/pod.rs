//! One worker pod. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource,
    HTTPGetAction, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    ObjectFieldSelector, PersistentVolumeClaimVolumeSource, Pod, PodSchedulingGate,
    PodSecurityContext, PodSpec, PreferredSchedulingTerm, Probe, ResourceRequirements,
    SeccompProfile, SecretKeySelector, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::ObjectMeta;
use llama_contract::{
    ADAPTER_MOUNT, API_PORT, API_PORT_NAME, AdapterArgs, Device, HEALTH_PATH, INTERNAL_PORT,
    INTERNAL_PORT_NAME, LIVE_PATH, LaunchArgs, NODE_NAME_ENV, POD_IP_ENV, POD_NAME_ENV,
    RENDEZVOUS_PORT, RENDEZVOUS_PORT_NAME, RENDEZVOUS_TOKEN_ENV, TERMINATION_LOG,
};

use llama_crds::v1alpha1::NodePool;

use super::WorkerSettings;
use super::model::{self, Extent};
use super::secret::TOKEN_KEY;
use crate::reconcile::adapters::AdapterSet;
use crate::reconcile::kueue;
use crate::reconcile::validate::ValidDeployment;
use crate::{labels, names};

/// The container that computes.
pub const WORKER_CONTAINER: &str = "worker";
/// User and group that everything runs as.
const USER: i64 = 65532;
/// Seconds past the drain time until the kubelet kills a worker.
const GRACE_MARGIN_SECONDS: u32 = 15;

const SHARED_MEMORY_VOLUME: &str = "shared-memory";
const ADAPTER_VOLUME: &str = "adapters";

/// Which pod of which incarnation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    /// Index of the group.
    pub(super) group: u32,
    /// Place in the group.
    pub(super) node: u32,
    /// Incarnation.
    pub(super) epoch: i64,
    /// Hash of what the pod is made from.
    pub(super) revision: &'a str,
    /// Nodes to be used only where there are no others.
    pub(super) avoid: &'a BTreeSet<String>,
    /// The golden answer that its group must give.
    pub(super) answer: Option<&'a str>,
    /// Whether it waits until nodes are chosen for the whole group.
    pub(super) gated: bool,
}

/// The pod at `place`.
pub(super) fn pod(
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    place: &Place<'_>,
) -> Pod {
    let mut pod = alone(deployment, settings, place);
    if let Some(queue) = &deployment.queue {
        kueue::enqueue(&mut pod, deployment, queue, place.group, place.epoch);
    }
    pod
}

/// The pod, before anybody but the operator and the scheduler has a say in its nodes.
fn alone(deployment: &ValidDeployment, settings: &WorkerSettings, place: &Place<'_>) -> Pod {
    let name = names::pod(&deployment.name, place.group, place.node);
    let placement = &deployment.placement;
    Pod {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(deployment.namespace.clone()),
            labels: Some(pod_labels(deployment, place)),
            owner_references: Some(vec![deployment.owner.clone()]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            hostname: Some(name),
            subdomain: Some(names::ranks_service(&deployment.name)),
            restart_policy: Some("Never".to_owned()),
            termination_grace_period_seconds: Some(i64::from(
                settings.drain_seconds.saturating_add(GRACE_MARGIN_SECONDS),
            )),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod_security()),
            node_selector: some_map(&placement.node_selector),
            tolerations: some_list(&placement.tolerations),
            priority_class_name: placement.priority_class_name.clone(),
            affinity: affinity(place.avoid),
            scheduling_gates: place.gated.then(|| {
                vec![PodSchedulingGate {
                    name: labels::GANG_GATE.to_owned(),
                }]
            }),
            init_containers: model::init_containers(
                &deployment.source,
                settings,
                Extent::Whole,
                (&deployment.cpu, &deployment.memory),
            ),
            containers: vec![worker(deployment, settings, place)],
            volumes: Some(volumes(deployment)),
            ..PodSpec::default()
        }),
        status: None,
    }
}

fn pod_labels(deployment: &ValidDeployment, place: &Place<'_>) -> BTreeMap<String, String> {
    let mut all = labels::common(&deployment.name);
    all.extend([
        (labels::GROUP.to_owned(), place.group.to_string()),
        (labels::NODE.to_owned(), place.node.to_string()),
        (labels::REVISION.to_owned(), place.revision.to_owned()),
        (labels::EPOCH.to_owned(), place.epoch.to_string()),
    ]);
    if place.node == 0 {
        all.insert(labels::RANK0.to_owned(), labels::TRUE.to_owned());
        all.insert(labels::SERVING.to_owned(), labels::TRUE.to_owned());
    }
    all
}

/// Away from nodes on which the group failed, where another has room.
fn affinity(avoid: &BTreeSet<String>) -> Option<Affinity> {
    if avoid.is_empty() {
        return None;
    }
    let elsewhere = NodeSelectorTerm {
        // The API takes one name in each.
        match_fields: Some(
            avoid
                .iter()
                .map(|node| NodeSelectorRequirement {
                    key: "metadata.name".to_owned(),
                    operator: "NotIn".to_owned(),
                    values: Some(vec![node.clone()]),
                })
                .collect(),
        ),
        match_expressions: None,
    };
    Some(Affinity {
        node_affinity: Some(NodeAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![
                PreferredSchedulingTerm {
                    preference: elsewhere,
                    weight: 100,
                },
            ]),
            required_during_scheduling_ignored_during_execution: None,
        }),
        ..Affinity::default()
    })
}

/// On a node of any of `pools`.
pub(super) fn in_any_pool(pools: &[NodePool]) -> Option<Affinity> {
    // A term without labels would match no node, and such a pool has all of them.
    if pools.iter().any(|pool| pool.node_selector.is_empty()) || pools.is_empty() {
        return None;
    }
    let has = |(key, value): (&String, &String)| NodeSelectorRequirement {
        key: key.clone(),
        operator: "In".to_owned(),
        values: Some(vec![value.clone()]),
    };
    let term = |pool: &NodePool| NodeSelectorTerm {
        match_expressions: Some(pool.node_selector.iter().map(has).collect()),
        match_fields: None,
    };
    let required = NodeSelector {
        node_selector_terms: pools.iter().map(term).collect(),
    };
    Some(Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(required),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    })
}

fn worker(deployment: &ValidDeployment, settings: &WorkerSettings, place: &Place<'_>) -> Container {
    let mut args = vec!["serve".to_owned()];
    args.extend(launch(deployment, settings, place).to_args());
    let mut mounts = vec![model::reading(&deployment.source, Extent::Whole)];
    if deployment.gpu.is_some() {
        mounts.push(mount(SHARED_MEMORY_VOLUME, "/dev/shm"));
    }
    if deployment.adapters.is_some() {
        mounts.push(VolumeMount {
            read_only: Some(true),
            ..mount(ADAPTER_VOLUME, ADAPTER_MOUNT)
        });
    }
    Container {
        name: WORKER_CONTAINER.to_owned(),
        image: Some(settings.image.clone()),
        image_pull_policy: settings.pull_policy.clone(),
        args: Some(args),
        env: Some(environment(deployment)),
        ports: Some(ports(deployment, place)),
        readiness_probe: Some(Probe {
            period_seconds: Some(2),
            timeout_seconds: Some(2),
            failure_threshold: Some(3),
            ..probe(HEALTH_PATH)
        }),
        liveness_probe: Some(Probe {
            period_seconds: Some(10),
            timeout_seconds: Some(5),
            failure_threshold: Some(6),
            ..probe(LIVE_PATH)
        }),
        resources: Some(worker_resources(deployment)),
        security_context: Some(container_security()),
        termination_message_path: Some(TERMINATION_LOG.to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

fn launch(
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    place: &Place<'_>,
) -> LaunchArgs {
    let rendezvous = (deployment.nodes > 1)
        .then(|| names::rendezvous_address(&deployment.name, &deployment.namespace, place.group));
    LaunchArgs {
        model: model::path(&deployment.source, Extent::Whole).into(),
        model_lock: model::lock(&deployment.source).map(Into::into),
        served_name: deployment.served_name.clone(),
        tensor_parallel: deployment.tensor,
        pipeline_parallel: deployment.pipeline,
        nodes: deployment.nodes,
        node_index: place.node,
        max_tokens: deployment.max_tokens,
        kv_cache_dtype: deployment.kv_cache_dtype,
        device: match deployment.gpu {
            Some(_) => Device::Cuda,
            None => Device::Cpu,
        },
        threads_per_rank: Some(deployment.threads_per_rank),
        group: names::group(&deployment.name, place.group),
        revision: place.revision.to_owned(),
        epoch: u64::try_from(place.epoch).unwrap_or_default(),
        rendezvous,
        drain_seconds: settings.drain_seconds,
        self_test_answer: place.answer.map(str::to_owned),
        adapters: adapter_room(deployment),
        managed_lora_folder: deployment.adapters.as_ref().map(|_| ADAPTER_MOUNT.into()),
        lora_modules: deployment
            .adapters
            .as_ref()
            .map(AdapterSet::modules)
            .unwrap_or_default(),
        self_test_interval: deployment.self_test_interval,
        hang_timeout: deployment.hang_timeout,
    }
}

/// Room that ranks keep for adapters.
pub(super) fn adapter_room(deployment: &ValidDeployment) -> AdapterArgs {
    let set = deployment.adapters.as_ref();
    set.map_or_else(AdapterArgs::default, |set| AdapterArgs {
        max_loras: set.places,
        max_lora_rank: set.max_rank,
    })
}

fn field(name: &str, path: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".to_owned()),
                field_path: path.to_owned(),
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}

/// Tells a program which node it runs on, for its reports.
pub(super) fn node_name() -> EnvVar {
    field(NODE_NAME_ENV, "spec.nodeName")
}

fn environment(deployment: &ValidDeployment) -> Vec<EnvVar> {
    let mut all = vec![
        node_name(),
        field(POD_NAME_ENV, "metadata.name"),
        field(POD_IP_ENV, "status.podIP"),
    ];
    if deployment.nodes > 1 {
        all.push(EnvVar {
            name: RENDEZVOUS_TOKEN_ENV.to_owned(),
            value_from: Some(EnvVarSource {
                secret_key_ref: Some(SecretKeySelector {
                    name: names::rendezvous_secret(&deployment.name),
                    key: TOKEN_KEY.to_owned(),
                    optional: None,
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        });
    }
    all
}

fn ports(deployment: &ValidDeployment, place: &Place<'_>) -> Vec<ContainerPort> {
    let port = |name: &str, number: u16| ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(number),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let mut all = vec![port(INTERNAL_PORT_NAME, INTERNAL_PORT)];
    if place.node == 0 {
        all.push(port(API_PORT_NAME, API_PORT));
        if deployment.nodes > 1 {
            all.push(port(RENDEZVOUS_PORT_NAME, RENDEZVOUS_PORT));
        }
    }
    all
}

fn probe(path: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(INTERNAL_PORT_NAME.to_owned()),
            ..HTTPGetAction::default()
        }),
        ..Probe::default()
    }
}

/// No CPU limit: throttling one rank stalls all of them.
fn worker_resources(deployment: &ValidDeployment) -> ResourceRequirements {
    let quantity = |text: &str| Quantity(text.to_owned());
    let mut requests = BTreeMap::from([
        ("cpu".to_owned(), quantity(&deployment.cpu)),
        ("memory".to_owned(), quantity(&deployment.memory)),
    ]);
    let mut limits = BTreeMap::from([("memory".to_owned(), quantity(&deployment.memory))]);
    if let Some(gpu) = &deployment.gpu {
        let count = Quantity(deployment.ranks_per_pod().to_string());
        requests.insert(gpu.resource_name.clone(), count.clone());
        limits.insert(gpu.resource_name.clone(), count);
    }
    ResourceRequirements {
        requests: Some(requests),
        limits: Some(limits),
        ..ResourceRequirements::default()
    }
}

fn volumes(deployment: &ValidDeployment) -> Vec<Volume> {
    let mut all = model::volumes(&deployment.source, Extent::Whole, None);
    if deployment.gpu.is_some() {
        all.push(Volume {
            name: SHARED_MEMORY_VOLUME.to_owned(),
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some("Memory".to_owned()),
                size_limit: None,
            }),
            ..Volume::default()
        });
    }
    if let Some(set) = &deployment.adapters {
        all.push(Volume {
            name: ADAPTER_VOLUME.to_owned(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: set.claim.clone(),
                read_only: Some(true),
            }),
            ..Volume::default()
        });
    }
    all
}

/// What Pod Security `restricted` asks of a pod.
pub(super) fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        fs_group_change_policy: Some("OnRootMismatch".to_owned()),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".to_owned(),
            localhost_profile: None,
        }),
        ..PodSecurityContext::default()
    }
}

/// What Pod Security `restricted` asks of a container, and a read-only root besides.
pub(super) fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".to_owned()]),
            add: None,
        }),
        ..SecurityContext::default()
    }
}

pub(super) fn mount(volume: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        ..VolumeMount::default()
    }
}

pub(super) fn some_map(map: &BTreeMap<String, String>) -> Option<BTreeMap<String, String>> {
    (!map.is_empty()).then(|| map.clone())
}

pub(super) fn some_list<T: Clone>(list: &[T]) -> Option<Vec<T>> {
    (!list.is_empty()).then(|| list.to_vec())
}
