//! What a user sees: when objects are there, when their first pod is, when they are ready.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::{Stream, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, DynamicObject};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// Whether an object is ready.
pub(crate) type IsReady = fn(&DynamicObject) -> bool;

/// Moments of one object.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    /// The API server has answered that it exists.
    pub(crate) created: Option<Instant>,
    /// The watch has told of a pod that it owns.
    pub(crate) first_pod: Option<Instant>,
    /// The watch has told that it is ready, and nothing else since.
    pub(crate) ready: Option<Instant>,
}

/// Everything seen so far.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Objects that were created, by name; they stay when they are deleted.
    pub(crate) moments: HashMap<String, Moments>,
    /// Names of the objects that exist.
    pub(crate) objects: HashSet<String>,
    /// Names of the pods that exist.
    pub(crate) pods: HashSet<String>,
    /// Pods ever seen.
    pub(crate) pods_made: usize,
    /// When the last of them was.
    pub(crate) last_pod: Option<Instant>,
}

impl Seen {
    /// How many objects are ready.
    pub(crate) fn ready(&self) -> usize {
        let ready = |moments: &&Moments| moments.ready.is_some();
        self.moments.values().filter(ready).count()
    }

    fn object(&mut self, name: String, is_ready: bool) {
        let now = Instant::now();
        let moments = self.moments.entry(name.clone()).or_default();
        moments.ready = is_ready.then(|| moments.ready.unwrap_or(now));
        self.objects.insert(name);
    }

    fn pod(&mut self, name: String, owner: Option<String>) {
        if !self.pods.insert(name) {
            return;
        }
        let now = Instant::now();
        self.pods_made += 1;
        self.last_pod = Some(now);
        if let Some(owner) = owner {
            let moments = self.moments.entry(owner).or_default();
            moments.first_pod.get_or_insert(now);
        }
    }
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Notify,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen());
        self.changed.notify_waiters();
    }
}

/// Watches the objects of one kind, and the pods, of some namespaces.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Watch {
    /// Begins to watch the namespaces whose names begin with `prefix`.
    pub(crate) fn start(
        client: &Client,
        prefix: &'static str,
        resource: &ApiResource,
        is_ready: IsReady,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let objects: Api<DynamicObject> = Api::all_with(client.clone(), resource);
        // Metadata only: this program shares its cores with what it measures.
        let pods: Api<PartialObjectMeta<Pod>> = Api::all(client.clone());
        let pods = watch(pods, watcher::Config::default());
        let objects = watch(objects, watcher::Config::default());
        let (told, told_pods) = (Arc::clone(&shared), Arc::clone(&shared));
        let tasks = [
            tokio::spawn(follow(prefix, objects, move |event| match event {
                Event::Apply(object) | Event::InitApply(object) => {
                    let ready = is_ready(&object);
                    told.change(|seen| seen.object(object.name_any(), ready));
                }
                Event::Delete(object) => told.change(|seen| {
                    seen.objects.remove(&object.name_any());
                }),
                Event::Init | Event::InitDone => {}
            })),
            tokio::spawn(follow(prefix, pods, move |event| match event {
                Event::Apply(pod) | Event::InitApply(pod) => {
                    let owner = pod.owner_references().first();
                    let owner = owner.map(|owner| owner.name.clone());
                    told_pods.change(|seen| seen.pod(pod.name_any(), owner));
                }
                Event::Delete(pod) => told_pods.change(|seen| {
                    seen.pods.remove(&pod.name_any());
                }),
                Event::Init | Event::InitDone => {}
            })),
        ];
        Self { shared, tasks }
    }

    /// The API server has answered that the object `name` exists.
    pub(crate) fn created(&self, name: &str) {
        let now = Instant::now();
        self.shared.change(|seen| {
            seen.moments.entry(name.to_owned()).or_default().created = Some(now);
        });
    }

    /// What was seen so far.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.shared.seen())
    }

    /// Returns once `done` is true of what was seen.
    pub(crate) async fn until(&self, done: impl Fn(&Seen) -> bool) {
        loop {
            let changed = self.shared.changed.notified();
            let mut changed = pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            if self.look(&done) {
                return;
            }
            changed.await;
        }
    }
}

/// Tells `tell` every event of the namespaces whose names begin with `prefix`; a watch that
/// breaks is opened again.
async fn follow<K: kube::Resource>(
    prefix: &'static str,
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send,
    mut tell: impl FnMut(Event<K>),
) {
    let wanted = |object: &K| {
        let namespace = object.meta().namespace.as_deref();
        namespace.is_some_and(|namespace| namespace.starts_with(prefix))
    };
    let mut events = pin!(events.default_backoff());
    loop {
        match events.try_next().await {
            Ok(Some(event)) => match &event {
                Event::Apply(object) | Event::InitApply(object) | Event::Delete(object)
                    if !wanted(object) => {}
                _ => tell(event),
            },
            Ok(None) => return,
            Err(error) => eprintln!("  bench: a watch broke: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pod_counts_and_every_pod_once() {
        let mut seen = Seen::default();
        seen.object("a".to_owned(), false);
        seen.pod("a-0".to_owned(), Some("a".to_owned()));
        let first = seen.moments["a"].first_pod;
        seen.pod("a-1".to_owned(), Some("a".to_owned()));
        seen.pod("a-1".to_owned(), Some("a".to_owned()));
        assert_eq!(seen.moments["a"].first_pod, first);
        assert_eq!((seen.pods_made, seen.pods.len()), (2, 2));
    }

    #[test]
    fn an_object_that_is_ready_no_more_does_not_count() {
        let mut seen = Seen::default();
        seen.object("a".to_owned(), true);
        let since = seen.moments["a"].ready;
        seen.object("a".to_owned(), true);
        assert_eq!(seen.moments["a"].ready, since);
        assert_eq!(seen.ready(), 1);
        seen.object("a".to_owned(), false);
        assert_eq!(seen.ready(), 0);
    }

    #[tokio::test]
    async fn a_change_during_the_look_is_not_missed() {
        let shared = Arc::new(Shared::default());
        let watch = Watch {
            shared: Arc::clone(&shared),
            tasks: [tokio::spawn(async {}), tokio::spawn(async {})],
        };
        let waits = watch.until(|seen| seen.pods_made == 2);
        let change = async {
            for name in ["a", "b"] {
                shared.change(|seen| seen.pod(name.to_owned(), None));
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(waits, change);
    }
}
