//! Which nodes take the pods of a group, all of them at once. Pure.
//!
//! The scheduler has the last word; this decides whether a whole group fits now, so that
//! no group holds half of what it needs while another holds the other half.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Taint, Toleration};
use llama_crds::v1alpha1::Topology;

use super::validate::ValidDeployment;
use crate::cluster::capacity::{Amounts, NodeRoom};

/// Label by which a pod is sent to one node.
pub const HOSTNAME: &str = "kubernetes.io/hostname";
/// Nodes that a message names at most.
const NAMED: usize = 4;

/// What a group needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Need<'a> {
    /// Pods.
    pub pods: usize,
    /// What each pod asks for.
    pub each: Amounts,
    /// Labels that nodes must have.
    pub selector: &'a BTreeMap<String, String>,
    /// Taints that the pods tolerate.
    pub tolerations: &'a [Toleration],
    /// How near the pods must be.
    pub topology: Option<&'a Topology>,
    /// Nodes to be used only where there are no others.
    pub avoid: BTreeSet<String>,
}

/// The nodes of a group's pods, in order of the pods.
pub type Assignment = Vec<Seat>;

/// A place for one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The node.
    pub node: String,
    /// Its value of [`HOSTNAME`].
    pub hostname: String,
}

/// Why a group has no place, in a sentence without a full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoRoom(pub String);

impl<'a> Need<'a> {
    /// What a group of `deployment` needs.
    pub fn of(deployment: &'a ValidDeployment, avoid: BTreeSet<String>) -> Self {
        let placement = &deployment.placement;
        Self {
            pods: usize::try_from(deployment.nodes).unwrap_or(usize::MAX),
            each: deployment.pod_requests(),
            selector: &placement.node_selector,
            tolerations: &placement.tolerations,
            topology: placement.topology.as_ref(),
            avoid,
        }
    }
}

/// Chooses nodes for a whole group.
///
/// # Errors
/// What is missing, with the names of the nodes that come nearest.
pub fn place(need: &Need<'_>, nodes: &[NodeRoom]) -> Result<Assignment, NoRoom> {
    let allowed: Vec<&NodeRoom> = nodes.iter().filter(|node| allows(need, node)).collect();
    let preferred: Vec<&NodeRoom> = allowed
        .iter()
        .copied()
        .filter(|node| !need.avoid.contains(&node.name))
        .collect();
    for candidates in [&preferred, &allowed] {
        if let Some(assignment) = among(need, candidates) {
            return Ok(assignment);
        }
    }
    Err(NoRoom(explain(need, &allowed, nodes.len())))
}

fn among(need: &Need<'_>, candidates: &[&NodeRoom]) -> Option<Assignment> {
    let near = need
        .topology
        .and_then(|topology| topology.required.as_ref().or(topology.preferred.as_ref()));
    let required = need
        .topology
        .is_some_and(|topology| topology.required.is_some());
    if let Some(key) = near {
        let best = domains(key, candidates)
            .into_values()
            .filter(|domain| seats(need, domain) >= need.pods)
            .min_by_key(|domain| seats(need, domain));
        if let Some(domain) = best {
            return Some(fill(need, &domain));
        }
        if required {
            return None;
        }
    }
    (seats(need, candidates) >= need.pods).then(|| fill(need, candidates))
}

/// Nodes by their value of the label `key`.
fn domains<'a>(key: &str, nodes: &[&'a NodeRoom]) -> BTreeMap<String, Vec<&'a NodeRoom>> {
    let mut domains: BTreeMap<String, Vec<&NodeRoom>> = BTreeMap::new();
    for node in nodes {
        if let Some(value) = node.labels.get(key) {
            domains.entry(value.clone()).or_default().push(node);
        }
    }
    domains
}

fn seats(need: &Need<'_>, nodes: &[&NodeRoom]) -> usize {
    nodes.iter().map(|node| fits(need, &node.free)).sum()
}

/// How many pods of the group fit into `free`.
fn fits(need: &Need<'_>, free: &Amounts) -> usize {
    need.each
        .iter()
        .filter(|(_, amount)| **amount > 0)
        .map(|(resource, amount)| free.get(resource).copied().unwrap_or(0) / amount)
        .min()
        .map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX))
        .min(need.pods)
}

/// The nodes with the most seats first: fewer nodes, shorter ways between ranks. Among
/// equals the one with the least left over, so that whole nodes stay free.
fn fill(need: &Need<'_>, nodes: &[&NodeRoom]) -> Assignment {
    let mut nodes: Vec<_> = nodes.to_vec();
    nodes.sort_by_cached_key(|node| {
        let count = fits(need, &node.free);
        let free: Vec<u64> = need
            .each
            .keys()
            .map(|resource| node.free.get(resource).copied().unwrap_or(0))
            .collect();
        (std::cmp::Reverse(count), free, node.name.clone())
    });
    let seats = nodes.iter().flat_map(|node| {
        let hostname = node.labels.get(HOSTNAME).unwrap_or(&node.name);
        std::iter::repeat_n(
            Seat {
                node: node.name.clone(),
                hostname: hostname.clone(),
            },
            fits(need, &node.free),
        )
    });
    seats.take(need.pods).collect()
}

fn allows(need: &Need<'_>, node: &NodeRoom) -> bool {
    let selected = need
        .selector
        .iter()
        .all(|(key, value)| node.labels.get(key) == Some(value));
    selected
        && node
            .taints
            .iter()
            .all(|taint| is_tolerated(taint, need.tolerations))
}

/// Whether a pod with `tolerations` may run where `taint` is.
pub fn is_tolerated(taint: &Taint, tolerations: &[Toleration]) -> bool {
    taint.effect == "PreferNoSchedule"
        || tolerations.iter().any(|toleration| {
            let effect = toleration.effect.as_deref().unwrap_or_default();
            let key = toleration.key.as_deref().unwrap_or_default();
            let exists = toleration.operator.as_deref() == Some("Exists");
            let value = toleration.value.as_deref().unwrap_or_default();
            (effect.is_empty() || effect == taint.effect)
                && ((exists && key.is_empty()) || key == taint.key)
                && (exists || value == taint.value.as_deref().unwrap_or_default())
        })
}

/// What is missing: the resource of which the best nodes have too little, and theirs.
fn explain(need: &Need<'_>, allowed: &[&NodeRoom], all: usize) -> String {
    if allowed.is_empty() {
        return format!(
            "none of the {all} nodes that are ready matches spec.placement (nodeSelector and \
             tolerations)"
        );
    }
    let required = need
        .topology
        .and_then(|topology| topology.required.as_deref());
    let (place, candidates) = match required {
        None => ("free now".to_owned(), allowed.to_vec()),
        Some(key) => {
            let best = domains(key, allowed)
                .into_iter()
                .max_by_key(|(_, nodes)| seats(need, nodes));
            let Some((value, nodes)) = best else {
                return format!("no node has the label {key} of spec.placement.topology.required");
            };
            (format!("best is {value}"), nodes)
        }
    };
    let scarce = scarcest(need, &candidates);
    let amount = need.each.get(&scarce).copied().unwrap_or(0);
    let mut found: Vec<_> = candidates
        .iter()
        .map(|node| (node.free.get(&scarce).copied().unwrap_or(0), &node.name))
        .collect();
    found.sort_by(|one, other| (other.0, one.1).cmp(&(one.0, other.1)));
    let mut names: Vec<String> = found
        .iter()
        .take(NAMED)
        .map(|(free, name)| format!("{name} has {}", shown(&scarce, *free)))
        .collect();
    match found.len().saturating_sub(NAMED) {
        0 => {}
        more => names.push(format!("{more} more nodes have no more")),
    }
    let pods = match need.pods {
        1 => "1 pod needs".to_owned(),
        pods => format!("{pods} pods each need"),
    };
    let near = required.map_or_else(String::new, |key| format!(" within one {key}"));
    format!(
        "{pods} {} {} free on their node{near}; {place}: {}",
        shown(&scarce, amount),
        unit(&scarce),
        names.join(", ")
    )
}

/// The resource that lets the fewest pods in.
fn scarcest(need: &Need<'_>, nodes: &[&NodeRoom]) -> String {
    let seats_of = |resource: &String, amount: u64| -> u64 {
        nodes
            .iter()
            .map(|node| node.free.get(resource).copied().unwrap_or(0) / amount)
            .sum()
    };
    need.each
        .iter()
        .filter(|(_, amount)| **amount > 0)
        .min_by_key(|(resource, amount)| {
            // Of equals the one that is not plain CPU or memory: GPUs are what people ask for.
            let plain = !resource.contains('/');
            (seats_of(resource, **amount), plain)
        })
        .map(|(resource, _)| resource.clone())
        .unwrap_or_default()
}

fn unit(resource: &str) -> &str {
    if resource == "cpu" { "CPU" } else { resource }
}

/// An amount as people write it.
fn shown(resource: &str, thousandths: u64) -> String {
    const MIB: u64 = 1 << 20;
    if resource == "memory" || resource == "ephemeral-storage" {
        return format!("{}Mi", thousandths / 1000 / MIB);
    }
    if thousandths.is_multiple_of(1000) {
        (thousandths / 1000).to_string()
    } else {
        format!("{thousandths}m")
    }
}
