//! The pod that reads a model's headers before any group exists. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::ObjectMeta;
use llama_contract::{Device, InspectArgs, TERMINATION_LOG};

use super::WorkerSettings;
use super::model::{self, Extent};
use super::pod;
use crate::reconcile::source::Source;
use crate::reconcile::validate::ValidDeployment;
use crate::{labels, names};

/// The container that reads the headers.
pub const INSPECT_CONTAINER: &str = "inspect";
/// CPU that the pod asks for.
const INSPECTION_CPU: &str = "100m";
/// Memory limit of every container of the pod.
pub const INSPECTION_MEMORY: &str = "256Mi";
/// Room for the heads of a model's files.
const HEADS_ROOM: &str = "1Gi";
/// Seconds until a pod that reads from a claim is given up: volumes are attached in them.
const CLAIM_SECONDS: i64 = 600;
/// The same for a pod that reads from a model image, which is pulled first, or a server.
const IMAGE_SECONDS: i64 = 3600;

/// Seconds until the pod is given up.
pub(crate) fn deadline_seconds(source: &Source) -> i64 {
    match source {
        Source::Claim { .. } => CLAIM_SECONDS,
        Source::Image { .. } | Source::ImageVolume { .. } | Source::Fetched(_) => IMAGE_SECONDS,
    }
}

/// The pod. `inputs` is the hash of what the plan is made from, `memory` that of each pod
/// or GPU, where it is known.
pub(crate) fn pod(
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    inputs: &str,
    memory: Option<u64>,
) -> Pod {
    let mut labels = labels::inspection(&deployment.name);
    labels.insert(labels::INSPECTION.to_owned(), inputs.to_owned());
    let placement = &deployment.placement;
    let mut tolerations = placement.tolerations.clone();
    let of_pools = placement.pools.iter().flat_map(|pool| &pool.tolerations);
    tolerations.extend(of_pools.cloned());
    Pod {
        metadata: ObjectMeta {
            name: Some(names::inspection(&deployment.name)),
            namespace: Some(deployment.namespace.clone()),
            labels: Some(labels),
            owner_references: Some(vec![deployment.owner.clone()]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            restart_policy: Some("Never".to_owned()),
            active_deadline_seconds: Some(deadline_seconds(&deployment.source)),
            termination_grace_period_seconds: Some(5),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod::pod_security()),
            node_selector: pod::some_map(&placement.node_selector),
            affinity: pod::in_any_pool(&placement.pools),
            tolerations: pod::some_list(&tolerations),
            priority_class_name: placement.priority_class_name.clone(),
            init_containers: model::init_containers(
                &deployment.source,
                settings,
                Extent::Heads,
                (INSPECTION_CPU, INSPECTION_MEMORY),
            ),
            containers: vec![container(deployment, settings, memory)],
            volumes: Some(model::volumes(
                &deployment.source,
                Extent::Heads,
                Some(HEADS_ROOM),
            )),
            ..PodSpec::default()
        }),
        status: None,
    }
}

fn container(
    deployment: &ValidDeployment,
    settings: &WorkerSettings,
    memory: Option<u64>,
) -> Container {
    let inspect = InspectArgs {
        model: model::path(&deployment.source, Extent::Heads).into(),
        tensor_parallel: deployment.tensor,
        pipeline_parallel: deployment.pipeline,
        nodes: deployment.nodes,
        max_tokens: deployment.max_tokens,
        kv_cache_dtype: deployment.kv_cache_dtype,
        sequences: deployment.min_sequences,
        device: match deployment.gpu {
            Some(_) => Device::Cuda,
            None => Device::Cpu,
        },
        threads_per_rank: deployment.threads_per_rank,
        memory_bytes: memory,
        adapters: pod::adapter_room(deployment),
    };
    let mut args = vec!["inspect".to_owned()];
    args.extend(inspect.to_args());
    let quantity = |text: &str| Quantity(text.to_owned());
    Container {
        name: INSPECT_CONTAINER.to_owned(),
        image: Some(settings.image.clone()),
        image_pull_policy: settings.pull_policy.clone(),
        args: Some(args),
        resources: Some(ResourceRequirements {
            requests: Some(BTreeMap::from([
                ("cpu".to_owned(), quantity(INSPECTION_CPU)),
                ("memory".to_owned(), quantity("64Mi")),
            ])),
            limits: Some(BTreeMap::from([(
                "memory".to_owned(),
                quantity(INSPECTION_MEMORY),
            )])),
            ..ResourceRequirements::default()
        }),
        security_context: Some(pod::container_security()),
        termination_message_path: Some(TERMINATION_LOG.to_owned()),
        volume_mounts: Some(vec![model::reading(&deployment.source, Extent::Heads)]),
        ..Container::default()
    }
}
