//! The pod that fetches a model ahead. Pure.

use k8s_openapi::api::core::v1::{
    Affinity, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec,
};
use kube::api::ObjectMeta;

use super::WorkerSettings;
use super::model::{self, Extent};
use super::pod;
use crate::models::validate::ValidModel;
use crate::reconcile::source::Source;
use crate::{labels, names};

/// Memory limit of the container that fetches: most of it is what is on its way to the disk.
pub(crate) const FETCHING_MEMORY: &str = "1Gi";
/// The field of a node that has its name.
const NODE_NAME: &str = "metadata.name";

/// The pod for the node `node`, or for any where all nodes share a copy. It runs what the
/// init container of a worker does. The scheduler places it, so that taints count and what a
/// node has no room for waits.
pub(crate) fn pod(model: &ValidModel, settings: &WorkerSettings, node: Option<&str>) -> Pod {
    let mut labels = labels::fetching(&model.name);
    labels.insert(labels::REVISION.to_owned(), model.revision.clone());
    let source = Source::Fetched(Box::new(model.fetched.clone()));
    let fetch = model::init_containers(
        &source,
        settings,
        Extent::Whole,
        (model::CPU, FETCHING_MEMORY),
    );
    Pod {
        metadata: ObjectMeta {
            name: Some(names::fetch(&model.name, model.entry_of(node))),
            namespace: Some(model.namespace.clone()),
            labels: Some(labels),
            owner_references: Some(vec![model.owner.clone()]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            restart_policy: Some("Never".to_owned()),
            termination_grace_period_seconds: Some(5),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod::pod_security()),
            node_selector: pod::some_map(&model.nodes.node_selector),
            tolerations: pod::some_list(&model.nodes.tolerations),
            affinity: node.map(only_on),
            containers: fetch.unwrap_or_default(),
            volumes: Some(model::volumes(&source, Extent::Whole, None)),
            ..PodSpec::default()
        }),
        status: None,
    }
}

fn only_on(node: &str) -> Affinity {
    let this = NodeSelectorTerm {
        match_fields: Some(vec![NodeSelectorRequirement {
            key: NODE_NAME.to_owned(),
            operator: "In".to_owned(),
            values: Some(vec![node.to_owned()]),
        }]),
        match_expressions: None,
    };
    Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: vec![this],
            }),
            preferred_during_scheduling_ignored_during_execution: None,
        }),
        ..Affinity::default()
    }
}
