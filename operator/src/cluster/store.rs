//! What the API server told of our objects, and what we wrote to it ourselves.
//!
//! A watch tells of our own writes a moment later. A round that read a cache without
//! them would decide on what it has changed already, so each answer to a write goes
//! into the cache as well, and an older word of the watch does not undo it.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::labels;

/// Namespace and name of a `LlamaDeployment` or a `LlamaModel`.
pub type Key = (String, String);

/// Objects by the deployment (or the model) that their label names, as text: read into a structure an
/// object takes five times the memory, and it is looked at only in rounds of its deployment.
#[derive(Debug)]
pub struct Store<K> {
    inner: Mutex<Inner>,
    kind: PhantomData<fn() -> K>,
}

#[derive(Debug)]
struct Inner {
    /// The label that names whom an object belongs to.
    label: &'static str,
    /// Sorted by name.
    objects: HashMap<Key, Vec<Entry>>,
    /// UIDs of objects that we know are gone, until the watch knows it as well, and the
    /// listing during which we removed them.
    gone: HashMap<String, u64>,
    /// By watched namespace; the empty one stands for all.
    listings: HashMap<String, Listing>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Listing {
    /// How many have begun.
    count: u64,
    synced: bool,
}

#[derive(Debug)]
struct Entry {
    name: Box<str>,
    uid: Box<str>,
    /// The object as JSON; empty if it cannot be written so, which reading it tells.
    text: Box<[u8]>,
    version: u64,
    /// The listing that saw it last, or during which we wrote it.
    seen: u64,
}

impl<K> Default for Store<K> {
    fn default() -> Self {
        Self::by(labels::DEPLOYMENT)
    }
}

impl<K> Store<K> {
    /// Objects by the value of the label `label`.
    pub fn by(label: &'static str) -> Self {
        let inner = Inner {
            label,
            objects: HashMap::new(),
            gone: HashMap::new(),
            listings: HashMap::new(),
        };
        Self {
            inner: Mutex::new(inner),
            kind: PhantomData,
        }
    }
}

impl<K: Resource<DynamicType = ()> + Serialize + DeserializeOwned> Store<K> {
    /// Says that `scope` (a namespace, or empty for all) will be watched.
    pub fn expect(&self, scope: &str) {
        self.lock().listings.entry(scope.to_owned()).or_default();
    }

    /// Takes an event of the watch of `scope` in; gives whom it is about.
    pub fn take(&self, scope: &str, event: Event<K>) -> Option<Key> {
        let mut inner = self.lock();
        match event {
            Event::Init => {
                inner.listings.entry(scope.to_owned()).or_default().count += 1;
                None
            }
            Event::InitApply(object) | Event::Apply(object) => inner.put(&object),
            Event::InitDone => {
                inner.finish_listing(scope);
                None
            }
            Event::Delete(object) => inner.remove(&object, false),
        }
    }

    /// Whether everything that is watched was listed once.
    pub fn is_synced(&self) -> bool {
        let inner = self.lock();
        !inner.listings.is_empty() && inner.listings.values().all(|listing| listing.synced)
    }

    /// What a write of ours answered.
    pub fn wrote(&self, object: &K) {
        self.lock().put(object);
    }

    /// A deletion of ours that took effect at once.
    pub fn removed(&self, object: &K) {
        self.lock().remove(object, true);
    }

    /// The objects of a deployment or model, by name.
    ///
    /// # Errors
    /// One of them cannot be read back.
    pub fn of(&self, key: &Key) -> Result<Vec<Arc<K>>, serde_json::Error> {
        let inner = self.lock();
        let objects = inner.objects.get(key).into_iter().flatten();
        let read = |entry: &Entry| serde_json::from_slice(&entry.text).map(Arc::new);
        objects.map(read).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn put<K: Resource<DynamicType = ()> + Serialize>(&mut self, object: &K) -> Option<Key> {
        let key = key(object, self.label)?;
        let uid = object.uid().unwrap_or_default();
        if self.gone.contains_key(&uid) {
            return Some(key);
        }
        let name = object.name_any();
        let version = version(object);
        let seen = self.listing_of(&key.0);
        let objects = self.objects.entry(key.clone()).or_default();
        let place = objects.binary_search_by(|entry| (*entry.name).cmp(&name));
        let known = place.ok().and_then(|place| objects.get_mut(place));
        if let Some(known) = known
            && known.version > version
            && *known.uid == *uid
        {
            known.seen = seen;
            return Some(key);
        }
        let entry = Entry {
            name: name.into(),
            uid: uid.into(),
            text: serde_json::to_vec(object).unwrap_or_default().into(),
            version,
            seen,
        };
        match place {
            Ok(place) => objects[place] = entry,
            Err(place) => {
                objects.reserve_exact(1);
                objects.insert(place, entry);
            }
        }
        Some(key)
    }

    /// `ours`: the watch has yet to tell.
    fn remove<K: Resource<DynamicType = ()>>(&mut self, object: &K, ours: bool) -> Option<Key> {
        let key = key(object, self.label)?;
        let uid = object.uid().unwrap_or_default();
        if ours {
            let listing = self.listing_of(&key.0);
            self.gone.insert(uid.clone(), listing);
        } else {
            self.gone.remove(&uid);
        }
        if let Some(objects) = self.objects.get_mut(&key) {
            let name = object.name_any();
            // A younger object of this name stays.
            objects.retain(|entry| *entry.name != *name || *entry.uid != *uid);
            if objects.is_empty() {
                self.objects.remove(&key);
            }
        }
        Some(key)
    }

    /// How often the watch that tells of `namespace` has listed.
    fn listing_of(&self, namespace: &str) -> u64 {
        let own = self.listings.get(namespace);
        own.or_else(|| self.listings.get(""))
            .map_or(0, |listing| listing.count)
    }

    fn finish_listing(&mut self, scope: &str) {
        let listings = self.listings.clone();
        let of_scope = |key: &Key| {
            let own = listings.contains_key(&key.0);
            if own {
                key.0 == scope
            } else {
                scope.is_empty()
            }
        };
        let listing = self.listings.entry(scope.to_owned()).or_default();
        listing.synced = true;
        let count = listing.count;
        self.objects.retain(|key, objects| {
            if of_scope(key) {
                objects.retain(|entry| entry.seen == count);
            }
            !objects.is_empty()
        });
        self.gone.retain(|_, removed| *removed >= count);
    }
}

/// Whom an object belongs to, by its label.
fn key<K: Resource>(object: &K, label: &str) -> Option<Key> {
    let meta = object.meta();
    let name = meta.labels.as_ref()?.get(label)?;
    Some((meta.namespace.clone()?, name.clone()))
}

/// Versions of one resource can be compared (KEP-5504); one that is no number is always
/// the latest.
pub(crate) fn version<K: Resource>(object: &K) -> u64 {
    let version = object.meta().resource_version.as_deref();
    version
        .and_then(|version| version.parse().ok())
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::kinds::WorkerPod;
    use kube::api::ObjectMeta;
    use std::collections::BTreeMap;

    fn pod(name: &str, uid: &str, version: u64) -> WorkerPod {
        WorkerPod {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some("team".to_owned()),
                uid: Some(uid.to_owned()),
                resource_version: Some(version.to_string()),
                labels: Some(BTreeMap::from([(
                    labels::DEPLOYMENT.to_owned(),
                    "m".to_owned(),
                )])),
                ..ObjectMeta::default()
            },
            ..WorkerPod::default()
        }
    }

    fn versions(store: &Store<WorkerPod>) -> Vec<(String, u64)> {
        let pods = store.of(&("team".to_owned(), "m".to_owned()));
        let pods = pods.expect("readable");
        pods.iter()
            .map(|pod| (pod.name_any(), version(pod.as_ref())))
            .collect()
    }

    #[test]
    fn an_older_word_of_the_watch_does_not_undo_a_write() {
        let store = Store::default();
        store.take("", Event::Apply(pod("a", "1", 5)));
        store.wrote(&pod("a", "1", 9));
        store.take("", Event::Apply(pod("a", "1", 7)));
        assert_eq!(versions(&store), [("a".to_owned(), 9)]);
        store.take("", Event::Apply(pod("a", "1", 11)));
        assert_eq!(versions(&store), [("a".to_owned(), 11)]);
    }

    #[test]
    fn what_we_removed_stays_away_and_its_name_is_free() {
        let store = Store::default();
        store.wrote(&pod("a", "1", 5));
        store.removed(&pod("a", "1", 5));
        store.take("", Event::Apply(pod("a", "1", 6)));
        assert!(versions(&store).is_empty());
        store.wrote(&pod("a", "2", 8));
        store.take("", Event::Delete(pod("a", "1", 7)));
        assert_eq!(versions(&store), [("a".to_owned(), 8)]);
    }

    #[test]
    fn one_namespace_is_listed_without_harm_to_others() {
        let store = Store::default();
        store.expect("team");
        store.expect("other");
        store.take("team", Event::Init);
        store.take("team", Event::InitApply(pod("a", "1", 5)));
        store.take("team", Event::InitDone);
        assert!(!store.is_synced());
        store.take("other", Event::Init);
        store.take("other", Event::InitDone);
        assert!(store.is_synced());
        assert_eq!(versions(&store), [("a".to_owned(), 5)]);
    }

    #[test]
    fn a_listing_drops_what_it_does_not_hold_but_no_write_since_it_began() {
        let store = Store::default();
        store.take("", Event::Apply(pod("old", "1", 5)));
        assert!(!store.is_synced());
        store.take("", Event::Init);
        store.take("", Event::InitApply(pod("listed", "2", 6)));
        store.wrote(&pod("young", "3", 7));
        store.take("", Event::InitDone);
        assert!(store.is_synced());
        let names: Vec<_> = versions(&store).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["listed", "young"]);
    }
}
