//! What the nodes of the cluster have free.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use kube::runtime::watcher::Event;

use super::kinds::{ClusterNode, PlacedPod, Requests};
use super::known::KnownNode;
use super::store::version;
use crate::labels;
use crate::reconcile::placement::Assignment;
use crate::reconcile::quantity;

/// Resource that every pod takes one of.
const PODS: &str = "pods";
/// Longest wait for nodes and pods to be listed before rounds go on without them.
const KNOWN_WITHIN: Duration = Duration::from_secs(30);

/// Amounts by resource, in thousandths of their unit.
pub type Amounts = BTreeMap<String, u64>;

/// A node that may take pods.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeRoom {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Arc<BTreeMap<String, String>>,
    /// Its taints.
    pub taints: Arc<Vec<Taint>>,
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
    /// Since when it is being learned.
    expected: Option<Instant>,
    /// By UID.
    pods: HashMap<String, Taken>,
    /// What `pods` take of each node, by the place of the resource in `names`.
    used: HashMap<String, Vec<u64>>,
    listing: u64,
    pods_synced: bool,
    /// Names of resources, each once.
    names: Vec<String>,
}

#[derive(Debug)]
struct Node {
    labels: Arc<BTreeMap<String, String>>,
    taints: Arc<Vec<Taint>>,
    open: bool,
    cordoned: bool,
    created: Option<Timestamp>,
    allocatable: Amounts,
}

/// What one pod takes.
#[derive(Debug)]
struct Taken {
    node: String,
    amounts: Vec<(u16, u64)>,
    listing: u64,
    /// Of the pod that said so; none while the write that says so is under way.
    version: Option<u64>,
}

/// Nodes that were chosen for pods, taken for them until this is dropped. From then on
/// they are taken by what the API server says of the pods.
#[derive(Debug)]
pub struct Reservation<'a> {
    capacity: &'a Capacity,
    uids: Vec<String>,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut inner = self.capacity.lock();
        for uid in &self.uids {
            if inner.pods.get(uid).is_some_and(Taken::is_reserved) {
                inner.release(uid);
            }
        }
    }
}

impl Taken {
    fn is_reserved(&self) -> bool {
        self.version.is_none()
    }
}

impl Capacity {
    /// Says that nodes and pods will be watched.
    pub fn expect(&self) {
        self.lock().expected = Some(Instant::now());
    }

    /// Whether it will be known soon what nodes have: a round that did not wait would take
    /// back what follows from it.
    pub fn is_awaited(&self) -> bool {
        let inner = self.lock();
        let expected = inner.expected;
        let is_late = |since: Instant| since.elapsed() > KNOWN_WITHIN;
        !inner.is_synced() && expected.is_some_and(|since| !is_late(since))
    }

    /// Takes an event about a node in; whether it changes which pods may go where.
    pub fn take_node(&self, event: Event<ClusterNode>) -> bool {
        let mut inner = self.lock();
        match event {
            Event::Init => {
                inner.nodes_seen.clear();
                false
            }
            Event::InitApply(node) => {
                inner.nodes_seen.push(node.name_any());
                inner.put_node(&node)
            }
            Event::InitDone => {
                let seen = std::mem::take(&mut inner.nodes_seen);
                inner.nodes.retain(|name, _| seen.contains(name));
                inner.nodes_synced = true;
                true
            }
            Event::Apply(node) => inner.put_node(&node),
            Event::Delete(node) => inner.nodes.remove(&node.name_any()).is_some(),
        }
    }

    /// Takes an event about a pod in.
    pub fn take_pod(&self, event: Event<PlacedPod>) {
        let mut inner = self.lock();
        match event {
            Event::Init => inner.listing += 1,
            Event::InitApply(pod) | Event::Apply(pod) => inner.put_pod(&pod),
            Event::InitDone => {
                inner.drop_unlisted();
                inner.pods_synced = true;
            }
            Event::Delete(pod) => inner.release(&pod.uid().unwrap_or_default()),
        }
    }

    /// What a write of ours answered.
    pub fn wrote(&self, pod: &PlacedPod) {
        self.lock().put_pod(pod);
    }

    /// Every node that takes pods, with what it has free; `None` while that is not
    /// known, or may not be.
    pub fn nodes(&self) -> Option<Vec<NodeRoom>> {
        self.lock().rooms()
    }

    /// Every node, by name; `None` while they are not known, or may not be.
    pub fn known_nodes(&self) -> Option<Vec<KnownNode>> {
        let inner = self.lock();
        let known = |(name, node): (&String, &Node)| KnownNode {
            name: name.clone(),
            labels: Arc::clone(&node.labels),
            taints: Arc::clone(&node.taints),
            open: node.open,
            created: node.created,
        };
        let synced = inner.nodes_synced;
        synced.then(|| inner.nodes.iter().map(known).collect())
    }

    /// Chooses nodes for the pods with these UIDs, each of which asks for `each`, and
    /// takes them: what is chosen next sees them taken, although no write has said so yet.
    /// `None` while it is not known what is free.
    pub fn reserve<'n, E>(
        &self,
        uids: Vec<String>,
        each: &Amounts,
        choose: impl FnOnce(&[NodeRoom]) -> Result<Assignment<'n>, E>,
    ) -> Option<Result<(Assignment<'n>, Reservation<'_>), E>> {
        let mut inner = self.lock();
        let chosen = match choose(&inner.rooms()?) {
            Ok(chosen) => chosen,
            Err(why) => return Some(Err(why)),
        };
        for (uid, seat) in uids.iter().zip(&chosen.seats) {
            // What the API server said of a pod stays, however the write ends.
            if inner.pods.contains_key(uid) {
                continue;
            }
            let taken = Taken {
                node: seat.node.clone(),
                amounts: inner.by_index(each.clone()),
                listing: inner.listing,
                version: None,
            };
            inner.take(uid.clone(), taken);
        }
        drop(inner);
        let reservation = Reservation {
            capacity: self,
            uids,
        };
        Some(Ok((chosen, reservation)))
    }

    /// Whether everything was listed once.
    pub fn is_synced(&self) -> bool {
        self.lock().is_synced()
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
    fn is_synced(&self) -> bool {
        self.nodes_synced && self.pods_synced
    }

    /// Whether it changes which pods may go there.
    fn put_node(&mut self, node: &ClusterNode) -> bool {
        let ready = node
            .status
            .conditions
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let entry = Node {
            labels: Arc::new(node.labels().clone()),
            taints: Arc::new(node.spec.taints.clone()),
            open: ready && !node.spec.unschedulable,
            cordoned: ready && node.spec.unschedulable,
            created: node.metadata.creation_timestamp.as_ref().map(|time| time.0),
            allocatable: amounts(&node.status.allocatable),
        };
        let before = self.nodes.get(&node.name_any());
        let changed = before.is_none_or(|before| {
            before.labels != entry.labels
                || before.taints != entry.taints
                || (before.open, before.cordoned) != (entry.open, entry.cordoned)
                || before.created != entry.created
        });
        self.nodes.insert(node.name_any(), entry);
        changed
    }

    fn put_pod(&mut self, pod: &PlacedPod) {
        let uid = pod.uid().unwrap_or_default();
        let version = version(pod);
        let phase = pod.status.phase.as_deref().unwrap_or_default();
        let is_over = matches!(phase, "Succeeded" | "Failed");
        let node = match &pod.spec.node_name {
            _ if is_over => None,
            Some(node) => Some(node),
            // Nodes that were chosen for a group are taken before its pods are bound.
            None if pod.spec.scheduling_gates.is_empty() => {
                pod.annotations().get(labels::ASSIGNED_NODE)
            }
            None => None,
        };
        let listing = self.listing;
        if let Some(known) = self.pods.get_mut(&uid) {
            // An older word of the watch does not undo what we wrote or are writing.
            let is_older = known
                .version
                .map_or_else(|| node.is_none(), |known| known > version);
            if is_older && !is_over {
                known.listing = listing;
                return;
            }
        }
        let Some(node) = node else {
            self.release(&uid);
            return;
        };
        let taken = Taken {
            node: node.clone(),
            amounts: self.by_index(requests(pod)),
            listing,
            version: Some(version),
        };
        self.take(uid, taken);
    }

    /// Every node that takes pods, with what it has free, if that is known.
    fn rooms(&self) -> Option<Vec<NodeRoom>> {
        if !self.is_synced() {
            return None;
        }
        let open = self.nodes.iter().filter(|(_, node)| node.open);
        let rooms = open.map(|(name, node)| {
            let mut free = node.allocatable.clone();
            let used = self.used.get(name).into_iter().flatten();
            for (resource, amount) in self.names.iter().zip(used) {
                if let Some(free) = free.get_mut(resource) {
                    *free = free.saturating_sub(*amount);
                }
            }
            NodeRoom {
                name: name.clone(),
                labels: Arc::clone(&node.labels),
                taints: Arc::clone(&node.taints),
                free,
            }
        });
        Some(rooms.collect())
    }

    fn take(&mut self, uid: String, taken: Taken) {
        self.release(&uid);
        let used = self.used.entry(taken.node.clone()).or_default();
        for (resource, amount) in &taken.amounts {
            let place = usize::from(*resource);
            if used.len() <= place {
                used.resize(place + 1, 0);
            }
            used[place] = used[place].saturating_add(*amount);
        }
        self.pods.insert(uid, taken);
    }

    fn release(&mut self, uid: &str) {
        let Some(taken) = self.pods.remove(uid) else {
            return;
        };
        let Some(used) = self.used.get_mut(&taken.node) else {
            return;
        };
        for (resource, amount) in &taken.amounts {
            if let Some(sum) = used.get_mut(usize::from(*resource)) {
                *sum = sum.saturating_sub(*amount);
            }
        }
        if used.iter().all(|amount| *amount == 0) {
            self.used.remove(&taken.node);
        }
    }

    /// Releases what the listing that ends now has not told of.
    fn drop_unlisted(&mut self) {
        let listing = self.listing;
        let gone = self
            .pods
            .iter()
            .filter(|(_, taken)| taken.listing != listing);
        let gone: Vec<_> = gone.map(|(uid, _)| uid.clone()).collect();
        for uid in gone {
            self.release(&uid);
        }
    }

    fn by_index(&mut self, amounts: Amounts) -> Vec<(u16, u64)> {
        let amounts = amounts.into_iter();
        amounts
            .map(|(name, amount)| (self.resource(&name), amount))
            .collect()
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
    use crate::reconcile::placement::Seat;
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

    /// One node with eight GPUs and a pod that wants three, which waits for a node.
    fn one_gated_pod() -> (Capacity, PlacedPod) {
        let capacity = Capacity::default();
        capacity.take_node(Event::InitApply(node("a", "8")));
        capacity.take_node(Event::InitDone);
        capacity.take_pod(Event::Init);
        capacity.take_pod(Event::InitDone);
        let gpus = json!([{"resources": {"requests": {"nvidia.com/gpu": "3"}}}]);
        let gang = json!([{"name": labels::GANG_GATE}]);
        let mut gated = pod("1", &json!({"containers": gpus, "schedulingGates": gang}));
        gated.metadata.resource_version = Some("5".to_owned());
        capacity.take_pod(Event::Apply(gated.clone()));
        (capacity, gated)
    }

    fn reserve(capacity: &Capacity) -> Reservation<'_> {
        let each = Amounts::from([("nvidia.com/gpu".to_owned(), 3000)]);
        let (node, hostname) = ("a".to_owned(), "a".to_owned());
        let seats = vec![Seat { node, hostname }];
        let assignment = Assignment { pool: None, seats };
        let chosen = capacity.reserve(vec!["1".to_owned()], &each, |_| Ok::<_, ()>(assignment));
        chosen.expect("known").expect("chosen").1
    }

    fn assigned(mut gated: PlacedPod, version: &str) -> PlacedPod {
        gated.spec.scheduling_gates.clear();
        let annotations = gated.annotations_mut();
        annotations.insert(labels::ASSIGNED_NODE.to_owned(), "a".to_owned());
        gated.metadata.resource_version = Some(version.to_owned());
        gated
    }

    #[test]
    fn what_is_chosen_is_taken_until_the_write_has_failed() {
        let (capacity, gated) = one_gated_pod();
        let reservation = reserve(&capacity);
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 5);
        capacity.take_pod(Event::Apply(gated));
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 5, "the watch is late");
        drop(reservation);
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 8);
    }

    #[test]
    fn what_was_written_stays_taken_whatever_the_watch_is_late_with() {
        let (capacity, gated) = one_gated_pod();
        let reservation = reserve(&capacity);
        let written = assigned(gated.clone(), "9");
        capacity.wrote(&written);
        drop(reservation);
        capacity.take_pod(Event::Apply(gated));
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 5);
        drop(reserve(&capacity));
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 5, "chosen again in vain");
        capacity.take_pod(Event::Delete(written));
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 8);
    }

    #[test]
    fn nothing_is_awaited_that_is_not_watched_or_is_known() {
        let capacity = Capacity::default();
        assert!(!capacity.is_awaited());
        capacity.expect();
        assert!(capacity.is_awaited());
        capacity.take_node(Event::InitDone);
        assert!(capacity.is_awaited());
        capacity.take_pod(Event::InitDone);
        assert!(!capacity.is_awaited());
    }

    #[test]
    fn a_listing_gives_back_what_it_does_not_hold() {
        let (capacity, gated) = one_gated_pod();
        capacity.wrote(&assigned(gated, "9"));
        capacity.take_pod(Event::Init);
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 5);
        capacity.take_pod(Event::InitDone);
        assert_eq!(free(&capacity, "nvidia.com/gpu"), 8);
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
