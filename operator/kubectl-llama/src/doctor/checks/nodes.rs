//! Nodes: whether they are well, and what GPUs they have free.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Taint;
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use llama_crds::v1alpha1::{Accelerator, Gpu, LlamaDeployment};
use llama_operator::cluster::capacity::Capacity;
use llama_operator::cluster::kinds::ClusterNode;
use llama_operator::reconcile::placement;
use llama_operator::reconcile::quantity;

use crate::doctor::facts::{Facts, Seen, Subject};
use crate::doctor::finding::Finding;
use crate::words::{NONE, count, full_name};

/// Conditions that a node should not have.
const PRESSURES: [&str; 4] = [
    "MemoryPressure",
    "DiskPressure",
    "PIDPressure",
    "NetworkUnavailable",
];
/// Nodes that a finding names at most.
const NAMED: usize = 8;

/// What there is to say of them.
pub(super) fn check(facts: &Facts, subjects: &[Subject]) -> Vec<Finding> {
    let nodes = match &facts.nodes {
        Seen::Known(nodes) => nodes,
        Seen::Hidden(why) => return vec![Finding::skip("nodes", why)],
    };
    let mut findings = conditions(nodes, subjects);
    let wanted: Vec<&LlamaDeployment> = subjects
        .iter()
        .map(|subject| &subject.deployment)
        .filter(|deployment| deployment.spec.resources.accelerator == Accelerator::Gpu)
        .collect();
    let resource_of = |deployment: &&LlamaDeployment| {
        let gpu = deployment.spec.resources.gpu.clone();
        gpu.unwrap_or_default().resource_name
    };
    let mut resources: BTreeSet<String> = wanted.iter().map(resource_of).collect();
    resources.insert(Gpu::default().resource_name);
    for resource in resources {
        let users: Vec<_> = wanted
            .iter()
            .filter(|deployment| resource_of(deployment) == resource)
            .copied()
            .collect();
        let holders: Vec<_> = nodes
            .iter()
            .filter(|node| allocatable(node, &resource) > 0)
            .collect();
        findings.extend(free(facts, nodes, &resource, &holders, &users));
        if !users.is_empty() {
            findings.extend(taints(&resource, &holders, &users));
        }
    }
    findings
}

fn conditions(nodes: &[ClusterNode], subjects: &[Subject]) -> Vec<Finding> {
    let used: BTreeSet<&str> = subjects
        .iter()
        .flat_map(|subject| &subject.pods)
        .filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref())
        .collect();
    let mut findings = Vec::new();
    for node in nodes {
        let name = node.name_any();
        let has = |type_: &str, status: &str| {
            let mut all = node.status.conditions.iter();
            all.any(|condition| condition.type_ == type_ && condition.status == status)
        };
        let mut wrong: Vec<&str> = PRESSURES
            .into_iter()
            .filter(|type_| has(type_, "True"))
            .collect();
        if !has("Ready", "True") {
            wrong.insert(0, "not Ready");
        }
        let next = format!("kubectl describe node {name}");
        let is_used = used.contains(name.as_str());
        let what = wrong.join(", ");
        match (wrong.is_empty(), is_used) {
            (true, true) if node.spec.unschedulable => findings.push(Finding::warn(
                "nodes",
                format!("node {name} is closed (cordoned) and has pods of a LlamaDeployment"),
                format!("wait until its groups have moved, or kubectl uncordon {name}"),
            )),
            (true, _) => {}
            (false, true) => {
                let message = format!("node {name}, which has pods of a LlamaDeployment: {what}");
                findings.push(Finding::fail("nodes", message, next));
            }
            (false, false) => {
                findings.push(Finding::warn("nodes", format!("node {name}: {what}"), next));
            }
        }
    }
    if nodes.is_empty() {
        let next = "add a node to the cluster";
        findings.push(Finding::fail("nodes", "the cluster has no nodes", next));
    } else if findings.is_empty() {
        let number = count(i64::try_from(nodes.len()).unwrap_or(i64::MAX), "node");
        findings.push(Finding::ok(
            "nodes",
            format!("{number}, all ready and none under pressure"),
        ));
    }
    findings
}

/// What `node` has of `resource`, in whole units.
fn allocatable(node: &ClusterNode, resource: &str) -> u64 {
    let amount = node.status.allocatable.get(resource);
    let thousandths = amount.and_then(|amount| quantity::thousandths(&amount.0));
    thousandths.unwrap_or(0) / 1000
}

fn free(
    facts: &Facts,
    nodes: &[ClusterNode],
    resource: &str,
    holders: &[&ClusterNode],
    users: &[&LlamaDeployment],
) -> Option<Finding> {
    if holders.is_empty() {
        return users.first().map(|first| {
            let message = format!(
                "no node has {resource}, for which {} asks",
                full_name(*first)
            );
            let next = "install the device plugin of the GPUs, or add nodes that have some";
            Finding::fail("GPUs", message, next)
        });
    }
    let all: u64 = holders.iter().map(|node| allocatable(node, resource)).sum();
    let has = format!(
        "{all} {resource} on {}",
        count(i64::try_from(holders.len()).unwrap_or(i64::MAX), "node")
    );
    let Seen::Known(placed) = &facts.placed else {
        return Some(Finding::ok(
            "GPUs",
            format!("{has}; pods of all namespaces may not be listed: not known how many are free"),
        ));
    };
    // The operator's own way to count.
    let capacity = Capacity::default();
    for node in nodes {
        capacity.take_node(Event::InitApply(node.clone()));
    }
    capacity.take_node(Event::InitDone);
    capacity.take_pod(Event::Init);
    for pod in placed {
        capacity.take_pod(Event::InitApply(pod.clone()));
    }
    capacity.take_pod(Event::InitDone);
    let rooms: BTreeMap<String, u64> = capacity
        .nodes()
        .unwrap_or_default()
        .into_iter()
        .filter_map(|room| Some((room.name, room.free.get(resource)? / 1000)))
        .filter(|(_, free)| *free > 0)
        .collect();
    let sum: u64 = rooms.values().sum();
    let mut named: Vec<_> = rooms
        .iter()
        .take(NAMED)
        .map(|(name, free)| format!("{name} {free}"))
        .collect();
    if rooms.len() > NAMED {
        named.push(format!("{} more nodes", rooms.len() - NAMED));
    }
    let list = if named.is_empty() {
        NONE.to_owned()
    } else {
        named.join(", ")
    };
    let message = format!("{has}, {sum} free on nodes that take pods: {list}");
    Some(Finding::ok("GPUs", message))
}

/// Nodes with `resource` that none of `users` can reach.
fn taints(resource: &str, holders: &[&ClusterNode], users: &[&LlamaDeployment]) -> Vec<Finding> {
    let tolerates = |deployment: &&LlamaDeployment, taint: &Taint| {
        let placement = deployment.spec.placement.clone().unwrap_or_default();
        placement::tolerates(&placement, taint)
    };
    let mut unreached: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in holders {
        for taint in &node.spec.taints {
            if !users.iter().any(|user| tolerates(user, taint)) {
                let value = taint.value.as_deref().unwrap_or_default();
                let taint = format!("{}={value}:{}", taint.key, taint.effect);
                unreached.entry(taint).or_default().push(node.name_any());
            }
        }
    }
    let finding = |(taint, mut names): (String, Vec<String>)| {
        if names.len() > NAMED {
            let more = names.len() - NAMED;
            names.truncate(NAMED);
            names.push(format!("{more} more"));
        }
        let names = names.join(", ");
        let message = format!(
            "no LlamaDeployment with {resource} tolerates the taint {taint} of nodes {names}"
        );
        let next = "add it to spec.placement.tolerations if these nodes are meant for it";
        Finding::warn("taints", message, next)
    };
    unreached.into_iter().map(finding).collect()
}
