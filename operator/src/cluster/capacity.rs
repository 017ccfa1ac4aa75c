//! What the nodes of the cluster have free.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use kube::runtime::watcher::Event;

use super::kinds::{ClusterNode, PlacedPod, Requests};
use crate::labels;
use crate::reconcile::quantity;

/// Resource that every pod takes one of.
const PODS: &str = "pods";

/// Amounts by resource, in thousandths of their unit.
pub type Amounts = BTreeMap<String, u64>;

/// A node that may take pods.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeRoom {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints.
    pub taints: Vec<Taint>,
    /// What no pod has asked for.
    pub free: Amounts,
}

/// Nodes and what pods take of them, as far as the API server told.
#[derive(Debug, Default)]
pub struct Capacity {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<String, Node>,
    nodes_seen: Vec<String>,
    nodes_synced: bool,
    pods: HashMap<String, Taken>,
    listing: u64,
    pods_synced: bool,
    /// Names of resources, each once.
    names: Vec<String>,
}

#[derive(Debug)]
struct Node {
    labels: BTreeMap<String, String>,
    taints: Vec<Taint>,
    open: bool,
    cordoned: bool,
    allocatable: Amounts,
}

/// What one pod takes.
#[derive(Debug)]
struct Taken {
    node: String,
    amounts: Vec<(u16, u64)>,
    listing: u64,
}

impl Capacity {
    /// Takes an event about a node in.
    pub fn take_node(&self, event: Event<ClusterNode>) {
        let mut inner = self.lock();
        match event {
            Event::Init => inner.nodes_seen.clear(),
            Event::InitApply(node) => {
                inner.nodes_seen.push(node.name_any());
                inner.put_node(&node);
            }
            Event::InitDone => {
                let seen = std::mem::take(&mut inner.nodes_seen);
                inner.nodes.retain(|name, _| seen.contains(name));
                inner.nodes_synced = true;
            }
            Event::Apply(node) => inner.put_node(&node),
            Event::Delete(node) => {
                inner.nodes.remove(&node.name_any());
            }
        }
    }

    /// Takes an event about a pod in.
    pub fn take_pod(&self, event: Event<PlacedPod>) {
        let mut inner = self.lock();
        match event {
            Event::Init => inner.listing += 1,
            Event::InitApply(pod) | Event::Apply(pod) => inner.put_pod(&pod),
            Event::InitDone => {
                let listing = inner.listing;
                inner.pods.retain(|_, taken| taken.listing == listing);
                inner.pods_synced = true;
            }
            Event::Delete(pod) => {
                inner.pods.remove(&pod.uid().unwrap_or_default());
            }
        }
    }

    /// What a write of ours answered.
    pub fn wrote(&self, pod: &PlacedPod) {
        self.lock().put_pod(pod);
    }

    /// Every node that takes pods, with what it has free; `None` while that is not
    /// known, or may not be.
    pub fn nodes(&self) -> Option<Vec<NodeRoom>> {
        let inner = self.lock();
        if !(inner.nodes_synced && inner.pods_synced) {
            return None;
        }
        let mut rooms: BTreeMap<&str, NodeRoom> = inner
            .nodes
            .iter()
            .filter(|(_, node)| node.open)
            .map(|(name, node)| {
                let room = NodeRoom {
                    name: name.clone(),
                    labels: node.labels.clone(),
                    taints: node.taints.clone(),
                    free: node.allocatable.clone(),
                };
                (name.as_str(), room)
            })
            .collect();
        for taken in inner.pods.values() {
            let Some(room) = rooms.get_mut(taken.node.as_str()) else {
                continue;
            };
            for (resource, amount) in &taken.amounts {
                if let Some(free) = inner
                    .names
                    .get(usize::from(*resource))
                    .and_then(|name| room.free.get_mut(name))
                {
                    *free = free.saturating_sub(*amount);
                }
            }
        }
        Some(rooms.into_values().collect())
    }

    /// Whether everything was listed once.
    pub fn is_synced(&self) -> bool {
        let inner = self.lock();
        inner.nodes_synced && inner.pods_synced
    }

    /// Nodes that take no new pods although they are there.
    pub fn closed(&self) -> BTreeSet<String> {
        let inner = self.lock();
        let closed = inner.nodes.iter().filter(|(_, node)| node.cordoned);
        closed.map(|(name, _)| name.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn put_node(&mut self, node: &ClusterNode) {
        let ready = node
            .status
            .conditions
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let entry = Node {
            labels: node.labels().clone(),
            taints: node.spec.taints.clone(),
            open: ready && !node.spec.unschedulable,
            cordoned: ready && node.spec.unschedulable,
            allocatable: amounts(&node.status.allocatable),
        };
        self.nodes.insert(node.name_any(), entry);
    }

    fn put_pod(&mut self, pod: &PlacedPod) {
        let uid = pod.uid().unwrap_or_default();
        let phase = pod.status.phase.as_deref().unwrap_or_default();
        let node = match &pod.spec.node_name {
            _ if matches!(phase, "Succeeded" | "Failed") => None,
            Some(node) => Some(node),
            // Nodes that were chosen for a group are taken before its pods are bound.
            None if pod.spec.scheduling_gates.is_empty() => {
                pod.annotations().get(labels::ASSIGNED_NODE)
            }
            None => None,
        };
        let Some(node) = node else {
            self.pods.remove(&uid);
            return;
        };
        let amounts = requests(pod)
            .into_iter()
            .map(|(name, amount)| (self.resource(&name), amount))
            .collect();
        let taken = Taken {
            node: node.clone(),
            amounts,
            listing: self.listing,
        };
        self.pods.insert(uid, taken);
    }

    fn resource(&mut self, name: &str) -> u16 {
        let known = self.names.iter().position(|known| known == name);
        let index = known.unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.names.len() - 1
        });
        u16::try_from(index).unwrap_or(u16::MAX)
    }
}

fn amounts(quantities: &BTreeMap<String, Quantity>) -> Amounts {
    quantities
        .iter()
        .filter_map(|(name, quantity)| Some((name.clone(), quantity::thousandths(&quantity.0)?)))
        .collect()
}

/// What the scheduler counts for a pod: the sum of its containers and of those of
/// initialization that go on beside them, or the greatest of the others if that is more.
fn requests(pod: &PlacedPod) -> Amounts {
    let mut total = Amounts::new();
    let mut greatest = Amounts::new();
    let add = |into: &mut Amounts, container: &Requests| {
        for (name, amount) in amounts(&container.resources.requests) {
            let sum = into.entry(name).or_default();
            *sum = sum.saturating_add(amount);
        }
    };
    for container in &pod.spec.init_containers {
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut total, container);
        } else {
            for (name, amount) in amounts(&container.resources.requests) {
                let most = greatest.entry(name).or_default();
                *most = amount.max(*most);
            }
        }
    }
    for container in &pod.spec.containers {
        add(&mut total, container);
    }
    for (name, amount) in greatest {
        let sum = total.entry(name).or_default();
        *sum = amount.max(*sum);
    }
    for (name, amount) in amounts(&pod.spec.overhead) {
        let sum = total.entry(name).or_default();
        *sum = sum.saturating_add(amount);
    }
    total.insert(PODS.to_owned(), 1000);
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(name: &str, gpus: &str) -> ClusterNode {
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "status": {
                "allocatable": {"nvidia.com/gpu": gpus, "pods": "110", "cpu": "8"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }))
        .expect("a node")
    }

    fn pod(uid: &str, spec: &Value) -> PlacedPod {
        let mut pod = json!({"metadata": {"name": uid, "uid": uid, "namespace": "x"}});
        pod["spec"] = spec.clone();
        serde_json::from_value(pod).expect("a pod")
    }

    fn free(capacity: &Capacity, resource: &str) -> u64 {
        let nodes = capacity.nodes().expect("known");
        nodes[0].free[resource] / 1000
    }

    #[test]
    fn pods_take_and_give_back() {
        let capacity = Capacity::default();
        assert_eq!(capacity.nodes(), None);
        capacity.take_node(Event::InitApply(node("a", "8")));
        capacity.take_node(Event::InitDone);
        capacity.take_pod(Event::Init);
        capacity.take_pod(Event::InitDone);
        let gpus = json!([{"resources": {"requests": {"nvidia.com/gpu": "3", "cpu": "1"}}}]);
        let bound = pod("1", &json!({"nodeName": "a", "containers": gpus}));
        capacity.take_pod(Event::Apply(bound.clone()));
        let mut chosen = pod("2", &json!({"containers": gpus}));
        capacity.take_pod(Event::Apply(chosen.clone()));
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 5);
        chosen
            .annotations_mut()
            .insert(labels::ASSIGNED_NODE.to_owned(), "a".to_owned());
        capacity.wrote(&chosen);
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 2);
        assert_eq!(free(&capacity, "pods"), 108);
        capacity.take_pod(Event::Delete(bound));
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 5);
    }

    #[test]
    fn a_node_that_is_closed_has_no_room() {
        let capacity = Capacity::default();
        let mut closed = node("a", "8");
        closed.spec.unschedulable = true;
        capacity.take_node(Event::InitApply(closed));
        capacity.take_node(Event::InitDone);
        capacity.take_pod(Event::InitDone);
        assert_eq!(capacity.nodes(), Some(Vec::new()));
    }

    #[test]
    fn initialization_counts_as_the_scheduler_counts_it() {
        let container = |cpu: &str, restart: Option<&str>| {
            json!({
                "resources": {"requests": {"cpu": cpu}},
                "restartPolicy": restart,
            })
        };
        let pod = pod(
            "1",
            &json!({
                "initContainers": [container("5", None), container("1", Some("Always"))],
                "containers": [container("2", None), container("1", None)],
                "overhead": {"cpu": "500m"},
            }),
        );
        assert_eq!(requests(&pod)["cpu"], 5500);
    }
}
