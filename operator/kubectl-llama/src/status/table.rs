//! LlamaDeployments as a table. Pure.

use jiff::Timestamp;
use kube::ResourceExt;
use llama_crds::v1alpha1::{ConditionType, LlamaDeployment};

use super::{condition, is_current};
use crate::words::{NONE, Table, age_of};

/// One line for each of `deployments`, with their namespaces if `namespaces`.
pub fn table(deployments: &[LlamaDeployment], namespaces: bool, now: Timestamp) -> String {
    if deployments.is_empty() {
        return String::new();
    }
    let titles = [
        "NAMESPACE",
        "NAME",
        "READY",
        "GROUPS",
        "REASON",
        "RESTARTS",
        "MODEL",
        "AGE",
        "MESSAGE",
    ];
    let mut table = Table::new(&titles[usize::from(!namespaces)..]);
    for deployment in deployments {
        let namespace = namespaces.then(|| deployment.namespace().unwrap_or_default());
        let row = row(deployment, now);
        table.row(namespace.into_iter().chain(row));
    }
    table.text("")
}

fn row(deployment: &LlamaDeployment, now: Timestamp) -> [String; 8] {
    let status = deployment.status.clone().unwrap_or_default();
    let restarts: i64 = status
        .groups
        .iter()
        .map(|group| i64::from(group.restarts))
        .sum();
    let ready = condition(deployment, ConditionType::Ready).filter(|_| is_current(deployment));
    let (known, reason, message) = match ready {
        Some(ready) => (
            ready.status.clone(),
            ready.reason.clone(),
            ready.message.clone(),
        ),
        None => (
            "Unknown".to_owned(),
            NONE.to_owned(),
            "the operator has not looked at this spec yet".to_owned(),
        ),
    };
    [
        deployment.name_any(),
        known,
        format!("{}/{}", status.ready_replicas, deployment.spec.replicas),
        reason,
        restarts.to_string(),
        status.served_name.unwrap_or_else(|| NONE.to_owned()),
        age_of(deployment.metadata.creation_timestamp.as_ref(), now),
        message.replace('\n', " "),
    ]
}
