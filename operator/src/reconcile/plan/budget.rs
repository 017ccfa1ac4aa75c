//! The `PodDisruptionBudgets` of a deployment. Pure.
//!
//! A group works as a whole or not at all, and its answers need time to finish. So no pod
//! of a group that serves may be evicted: whoever drains a node closes it first, and the
//! operator sees that and moves the group.

use std::collections::BTreeMap;

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use kube::api::ObjectMeta;

use crate::reconcile::groups::{Deletion, GroupPlan};
use crate::reconcile::observe::Observed;
use crate::reconcile::template::Templates;
use crate::reconcile::validate::ValidDeployment;
use crate::{labels, names};

/// The budgets of all groups, and those whose group is over.
pub(super) fn of_groups(
    deployment: &ValidDeployment,
    templates: &Templates,
    observed: &Observed,
    groups: &[GroupPlan],
) -> (Vec<PodDisruptionBudget>, Vec<Deletion>) {
    // Nobody would move a group off a closed node, and its eviction would never end.
    let budgets: Vec<_> = if observed.sees_nodes {
        groups
            .iter()
            .filter_map(|group| {
                let template = templates.of(&group.status.revision);
                let pods = template.map_or(deployment.nodes, |of| of.deployment.nodes);
                let index = u32::try_from(group.status.index).ok()?;
                Some(budget(deployment, index, pods))
            })
            .collect()
    } else {
        Vec::new()
    };
    let planned = |name: &str| {
        budgets
            .iter()
            .any(|budget| budget.metadata.name.as_deref() == Some(name))
    };
    let drop = observed
        .budgets
        .iter()
        .filter(|live| {
            let owners = live.owner_references();
            let ours = owners.iter().any(|owner| owner.uid == deployment.uid);
            ours && !planned(&live.name_any()) && live.metadata.deletion_timestamp.is_none()
        })
        .map(|live| Deletion {
            name: live.name_any(),
            uid: live.uid().unwrap_or_default(),
            grace: None,
        })
        .collect();
    (budgets, drop)
}

/// All `pods` of the group must stay. Not "none may be unavailable": Kubernetes would take
/// the number of groups, which is the scale of the deployment, for the number of pods.
fn budget(deployment: &ValidDeployment, group: u32, pods: u32) -> PodDisruptionBudget {
    let selector = BTreeMap::from([
        (labels::DEPLOYMENT.to_owned(), deployment.name.clone()),
        (labels::GROUP.to_owned(), group.to_string()),
    ]);
    PodDisruptionBudget {
        metadata: ObjectMeta {
            name: Some(names::budget(&deployment.name, group)),
            namespace: Some(deployment.namespace.clone()),
            labels: Some(labels::common(&deployment.name)),
            owner_references: Some(vec![deployment.owner.clone()]),
            ..ObjectMeta::default()
        },
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int(i32::try_from(pods).unwrap_or(i32::MAX))),
            selector: Some(LabelSelector {
                match_labels: Some(selector),
                match_expressions: None,
            }),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
