//! Which nodes take the pods of a group, all of them at once. Pure.
//!
//! The scheduler has the last word; this decides whether a whole group fits now, so that
//! no group holds half of what it needs while another holds the other half.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Taint, Toleration};
use llama_crds::v1alpha1::{NodePool, Placement, Reason};

use super::fit::Holdup;
use super::no_room;
use super::validate::ValidDeployment;
use crate::cluster::capacity::{Amounts, NodeRoom};

/// Label by which a pod is sent to one node.
pub const HOSTNAME: &str = "kubernetes.io/hostname";

/// What a group needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Need<'a> {
    /// Pods.
    pub pods: usize,
    /// What each pod asks for.
    pub each: Amounts,
    /// Which nodes, in which pools, and how near each other.
    pub placement: &'a Placement,
    /// Nodes to be used only where there are no others.
    pub avoid: BTreeSet<String>,
}

/// Where a group lies.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment<'a> {
    /// The pool, where there are any.
    pub pool: Option<&'a NodePool>,
    /// The nodes of the pods, in order of the pods.
    pub seats: Vec<Seat>,
}

/// Nodes among which a whole group may lie.
#[derive(Debug)]
pub(super) struct Area<'a, 'n> {
    /// The pool, where there are any.
    pub(super) pool: Option<&'a NodePool>,
    /// Its nodes.
    pub(super) nodes: Vec<&'n NodeRoom>,
}

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
        Self {
            pods: usize::try_from(deployment.nodes).unwrap_or(usize::MAX),
            each: deployment.pod_requests(),
            placement: &deployment.placement,
            avoid,
        }
    }
}

/// Whether the operator chooses the nodes of a group, and not the scheduler alone. With
/// pools it always does: pods wait until it may.
pub fn is_chosen_here(deployment: &ValidDeployment, sees_nodes: bool) -> bool {
    let has_pools = !deployment.placement.pools.is_empty();
    let is_kueues = deployment.queue.is_some();
    has_pools || (sees_nodes && deployment.nodes > 1 && !is_kueues)
}

/// What keeps an operator that may not see nodes from making pods.
pub fn holdup(deployment: &ValidDeployment, sees_nodes: bool) -> Option<Holdup> {
    let cannot_choose = !deployment.placement.pools.is_empty() && !sees_nodes;
    cannot_choose.then(|| Holdup {
        reason: Reason::NodesNotVisible.to_string(),
        message: "spec.placement.pools is set, and the operator cannot see nodes to choose a \
                  pool by what they have free: it watches one namespace, or may not list and \
                  watch nodes and pods. Use spec.placement.nodeSelector and tolerations instead, \
                  or let the operator watch all namespaces."
            .to_owned(),
        is_stalled: true,
        concerns_model: false,
    })
}

/// Chooses nodes for a whole group, in the first pool in which all of it fits.
///
/// # Errors
/// What is missing, with the names of the nodes that come nearest.
pub fn place<'a>(need: &Need<'a>, nodes: &[NodeRoom]) -> Result<Assignment<'a>, NoRoom> {
    let areas = areas(need, nodes);
    for takes_avoided in [false, true] {
        for area in &areas {
            let candidates: Vec<_> = area
                .nodes
                .iter()
                .copied()
                .filter(|node| takes_avoided || !need.avoid.contains(&node.name))
                .collect();
            if let Some(seats) = among(need, &candidates) {
                let pool = area.pool;
                return Ok(Assignment { pool, seats });
            }
        }
    }
    Err(NoRoom(no_room::explain(need, &areas, nodes.len())))
}

/// The nodes of each pool, or all that the pods may run on where there are no pools.
fn areas<'a, 'n>(need: &Need<'a>, nodes: &'n [NodeRoom]) -> Vec<Area<'a, 'n>> {
    rules(need.placement)
        .map(|rules| Area {
            pool: rules.pool,
            nodes: nodes
                .iter()
                .filter(|node| rules.allow(&node.labels, &node.taints))
                .collect(),
        })
        .collect()
}

/// What pods in one pool ask of a node, or all pods where there are no pools.
#[derive(Clone, Copy, Debug)]
struct Rules<'a> {
    placement: &'a Placement,
    pool: Option<&'a NodePool>,
}

/// The rules of each pool of `placement`, or the one where there are no pools.
fn rules(placement: &Placement) -> impl Iterator<Item = Rules<'_>> {
    let pools = placement.pools.iter().map(Some);
    let whole = placement.pools.is_empty().then_some(None);
    let all = pools.chain(whole);
    all.map(move |pool| Rules { placement, pool })
}

impl Rules<'_> {
    /// Whether a node with these labels and taints takes the pods, if it has room.
    fn allow(self, labels: &BTreeMap<String, String>, taints: &[Taint]) -> bool {
        let of_pool = |pool: &NodePool| has_all(labels, &pool.node_selector);
        has_all(labels, &self.placement.node_selector)
            && self.pool.is_none_or(of_pool)
            && taints.iter().all(|taint| self.tolerate(taint))
    }

    fn tolerate(self, taint: &Taint) -> bool {
        let more = self.pool.map_or(&[][..], |pool| &pool.tolerations);
        is_tolerated(taint, &self.placement.tolerations) || is_tolerated(taint, more)
    }
}

/// Whether `placement` lets pods run on a node with these labels and taints, in any pool.
pub fn allows(placement: &Placement, labels: &BTreeMap<String, String>, taints: &[Taint]) -> bool {
    rules(placement).any(|rules| rules.allow(labels, taints))
}

/// Whether pods of `placement` tolerate `taint`, in any pool.
pub fn tolerates(placement: &Placement, taint: &Taint) -> bool {
    rules(placement).any(|rules| rules.tolerate(taint))
}

fn has_all(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    let mut wanted = wanted.iter();
    wanted.all(|(key, value)| labels.get(key) == Some(value))
}

fn among(need: &Need<'_>, candidates: &[&NodeRoom]) -> Option<Vec<Seat>> {
    let topology = need.placement.topology.as_ref();
    let near = topology.and_then(|near| near.required.as_ref().or(near.preferred.as_ref()));
    let required = topology.is_some_and(|near| near.required.is_some());
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
pub(super) fn domains<'a>(
    key: &str,
    nodes: &[&'a NodeRoom],
) -> BTreeMap<String, Vec<&'a NodeRoom>> {
    let mut domains: BTreeMap<String, Vec<&NodeRoom>> = BTreeMap::new();
    for node in nodes {
        if let Some(value) = node.labels.get(key) {
            domains.entry(value.clone()).or_default().push(node);
        }
    }
    domains
}

pub(super) fn seats(need: &Need<'_>, nodes: &[&NodeRoom]) -> usize {
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
fn fill(need: &Need<'_>, nodes: &[&NodeRoom]) -> Vec<Seat> {
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
