//! Adapters by a list: the group loads what is missing of it and forgets what is not on it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use llama_contract::{AdapterModule, AdapterPhase, AdapterReport};

use super::adapters::{AdapterError, AdapterRack, Inventory, Loading, below};

/// Pause before a place is looked for again that open requests still hold.
const PLACE_PAUSE: Duration = Duration::from_secs(1);

/// The adapters that there should be.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// By name.
    list: BTreeMap<String, Entry>,
    /// Whether somebody is at work on it.
    is_settling: bool,
}

#[derive(Debug)]
struct Entry {
    folder: PathBuf,
    /// Why it cannot be loaded.
    refused: Option<String>,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Forget(String),
    Load(AdapterModule),
}

impl AdapterRack {
    /// Makes the adapters those of `list`, beside what goes on. Those that were refused are
    /// tried again.
    ///
    /// # Errors
    /// When nobody may say so, or they are more than there is room for.
    pub fn want(&self, list: Vec<AdapterModule>) -> Result<(), AdapterError> {
        if self.note(list)? {
            // Ends with the group at the latest: no order reaches its ranks then.
            tokio::spawn(self.clone().settle());
        }
        Ok(())
    }

    /// The same at the start, once all of them are loaded or refused.
    pub(super) async fn begin(&self, list: Vec<AdapterModule>) -> Result<(), AdapterError> {
        if self.note(list)? {
            self.clone().settle().await;
        }
        Ok(())
    }

    /// What became of the adapters that there should be.
    pub fn reports(&self) -> Vec<AdapterReport> {
        let inventory = self.inventory();
        let loaded: BTreeMap<_, _> = Self::folders(&inventory).collect();
        let wanted = inventory.wanted.list.iter();
        wanted
            .map(|(name, entry)| AdapterReport {
                phase: match &entry.refused {
                    Some(_) => AdapterPhase::Refused,
                    None if loaded.get(name) == Some(&&entry.folder) => AdapterPhase::Loaded,
                    None => AdapterPhase::Loading,
                },
                message: entry.refused.clone(),
                module: AdapterModule {
                    name: name.clone(),
                    folder: entry.folder.clone(),
                },
            })
            .collect()
    }

    /// Notes the list; whether somebody has to begin work on it.
    fn note(&self, list: Vec<AdapterModule>) -> Result<bool, AdapterError> {
        if !matches!(self.loading, Loading::ByList(_)) {
            return Err(AdapterError::NotManaged);
        }
        let entry = |AdapterModule { name, folder }| {
            let refused = None;
            (name, Entry { folder, refused })
        };
        let list: BTreeMap<_, _> = list.into_iter().map(entry).collect();
        if list.len() > self.room() {
            return Err(AdapterError::Full(self.room()));
        }
        let wanted = &mut self.inventory().wanted;
        wanted.list = list;
        Ok(!std::mem::replace(&mut wanted.is_settling, true))
    }

    /// Works until there is nothing to do.
    async fn settle(self) {
        loop {
            let step = {
                let mut inventory = self.inventory();
                let step = next(&inventory);
                inventory.wanted.is_settling = step.is_some();
                step
            };
            let done = match step {
                None => return,
                Some(Step::Forget(name)) => self.unload(&name).await,
                Some(Step::Load(module)) => self.load_listed(module).await,
            };
            match done {
                // Who waits for open requests goes on by itself.
                Ok(()) | Err(AdapterError::Slow) => {}
                // Its place is not free yet.
                Err(AdapterError::Full(_)) => tokio::time::sleep(PLACE_PAUSE).await,
                Err(error) => {
                    tracing::warn!(%error, "adapters stay as they are");
                    self.inventory().wanted.is_settling = false;
                    return;
                }
            }
        }
    }

    /// Notes why, if it cannot be loaded.
    async fn load_listed(&self, module: AdapterModule) -> Result<(), AdapterError> {
        let AdapterModule { name, folder } = module.clone();
        let allowed = match &self.loading {
            Loading::ByList(root) => below(root, &folder.to_string_lossy()),
            _ => Err(AdapterError::NotManaged),
        };
        let loaded = match allowed {
            Ok(_) => self.load(name, folder).await,
            Err(error) => Err(error),
        };
        match loaded {
            Err(
                error @ (AdapterError::Outside { .. }
                | AdapterError::Refused(_)
                | AdapterError::NameTaken(_)
                | AdapterError::NoRoom),
            ) => {
                let text = error.to_string();
                tracing::warn!(name = module.name, error = text, "an adapter is refused");
                let mut inventory = self.inventory();
                let entry = inventory.wanted.list.get_mut(&module.name);
                // It may be another one by now.
                if let Some(entry) = entry.filter(|entry| entry.folder == module.folder) {
                    entry.refused = Some(text);
                }
                Ok(())
            }
            other => other,
        }
    }
}

/// First what should not be there goes, which makes room.
fn next(inventory: &Inventory) -> Option<Step> {
    let wanted = &inventory.wanted.list;
    let loaded: BTreeMap<_, _> = AdapterRack::folders(inventory).collect();
    let is_wanted = |name: &String, folder: &PathBuf| {
        wanted
            .get(name)
            .is_some_and(|entry| entry.folder == *folder)
    };
    let mut strangers = loaded
        .iter()
        .filter(|(name, folder)| !is_wanted(name, folder));
    if let Some((name, _)) = strangers.next() {
        return Some(Step::Forget((*name).clone()));
    }
    let mut missing = wanted
        .iter()
        .filter(|(name, entry)| entry.refused.is_none() && !loaded.contains_key(name));
    missing.next().map(|(name, entry)| {
        Step::Load(AdapterModule {
            name: name.clone(),
            folder: entry.folder.clone(),
        })
    })
}
