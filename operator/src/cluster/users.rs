//! Which deployments use which cached models.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Bell;
use super::store::Key;
use crate::reconcile::source::Cache;

/// Cached models of deployments, by namespace and then by the deployment's name.
type Uses = HashMap<String, BTreeMap<String, Cache>>;

/// The cached model of each deployment, as of its last round.
#[derive(Debug, Default)]
pub struct Users {
    entries: Mutex<Uses>,
    /// How often that changed.
    pub changes: Bell,
}

impl Users {
    /// Notes what the deployment `key` uses.
    pub fn note(&self, key: Key, uses: Option<&Cache>) {
        let (namespace, name) = key;
        let mut all = self.lock();
        let names = all.entry(namespace.clone()).or_default();
        let changed = names.get(&name) != uses;
        match uses {
            Some(uses) => names.insert(name, uses.clone()),
            None => names.remove(&name),
        };
        if names.is_empty() {
            all.remove(&namespace);
        }
        drop(all);
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// The deployments of `namespace` that use the model `cache`, by name.
    pub fn of(&self, namespace: &str, cache: &Cache) -> Vec<String> {
        let all = self.lock();
        let names = all.get(namespace).into_iter().flatten();
        let same = |(_, used): &(&String, &Cache)| {
            (&used.claim, &used.entry) == (&cache.claim, &cache.entry)
        };
        names.filter(same).map(|(name, _)| name.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Uses> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_uses_a_model_is_known_until_it_uses_another() {
        let users = Users::default();
        let key = |name: &str| ("team".to_owned(), name.to_owned());
        let cache = |entry: &str| Cache {
            claim: "models".to_owned(),
            bytes: 1 << 30,
            entry: entry.to_owned(),
        };
        users.note(key("b"), Some(&cache("x")));
        users.note(key("a"), Some(&cache("x")));
        users.note(key("c"), Some(&cache("y")));
        let rings = *users.changes.borrow();
        users.note(key("a"), Some(&cache("x")));
        assert_eq!(*users.changes.borrow(), rings, "nothing changed");
        assert_eq!(users.of("team", &cache("x")), ["a", "b"]);
        assert!(users.of("other", &cache("x")).is_empty());
        users.note(key("a"), Some(&cache("y")));
        users.note(key("b"), None);
        assert!(users.of("team", &cache("x")).is_empty());
        assert_eq!(*users.changes.borrow(), rings + 2);
    }
}
