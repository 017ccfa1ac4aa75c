//! The adapters of a group by name: loading, forgetting, finding.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use llama_model::adapter::AdapterRoom;

use super::adapter_list::Wanted;
use super::{Front, counted, unix_seconds};
use crate::adapters::{AdapterModule, AdapterOrder, AdapterOutcome, AdapterUse, PlaceSet};
use crate::engine::{EngineClient, SubmitError};
use crate::openai::response::{self, ModelCard};
use crate::openai::{ApiError, LoadAdapterRequest, UnloadAdapterRequest};

/// How long ranks may take to load an adapter, or the last sequence that uses one to end,
/// before a client is told that it goes on.
const PATIENCE: Duration = Duration::from_mins(5);

/// Why an adapter was not loaded or not forgotten.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AdapterError {
    /// No memory is kept for adapters.
    #[error("this worker has no room for adapters; it was started without --max-loras")]
    NoRoom,
    /// All places are taken.
    #[error("all {0} places for adapters are taken (--max-loras); unload one first")]
    Full(usize),
    /// Something else has the name.
    #[error("the name \"{0}\" is taken")]
    NameTaken(String),
    /// There is no such adapter.
    #[error("no adapter \"{0}\" is loaded")]
    Unknown(String),
    /// Clients may not name folders.
    #[error("clients may not load adapters; this worker was started without --lora-folder")]
    NotAllowed,
    /// Nobody says which adapters the group should have.
    #[error("this worker was started without --managed-lora-folder")]
    NotManaged,
    /// The folder is not one that clients may name.
    #[error("\"{path}\" is no folder below {root}")]
    Outside {
        /// What was named.
        path: String,
        /// Where adapters are.
        root: String,
    },
    /// The ranks could not load it.
    #[error("{0}")]
    Refused(String),
    /// The ranks do not listen.
    #[error("{0}")]
    Engine(#[from] SubmitError),
    /// The group ended before the ranks answered.
    #[error("the group ended before the adapter was loaded")]
    Ended,
    /// It takes longer than a client should wait.
    #[error("not done after {} seconds; it goes on", PATIENCE.as_secs())]
    Slow,
}

impl AdapterError {
    fn for_client(&self, name: &'static str, path: &'static str) -> ApiError {
        let text = self.to_string();
        match self {
            Self::NoRoom | Self::Full(_) | Self::NotAllowed | Self::NotManaged => {
                ApiError::invalid(text)
            }
            Self::NameTaken(_) => ApiError::invalid_field(name, &text),
            Self::Unknown(_) => ApiError {
                param: Some(name.to_owned()),
                ..ApiError::not_found(text)
            },
            Self::Outside { .. } | Self::Refused(_) => ApiError::invalid_field(path, &text),
            Self::Engine(SubmitError::GroupFailed(report)) => super::group_failed(report),
            Self::Engine(_) | Self::Ended | Self::Slow => ApiError::unavailable(text),
        }
    }
}

/// An adapter that all ranks have.
#[derive(Clone, Debug)]
struct Loaded {
    adapter: AdapterUse,
    folder: PathBuf,
    created: u64,
}

/// Who says which adapters a group has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Loading {
    /// It has those that it was started with.
    #[default]
    Fixed,
    /// Clients of the API load and forget them, out of folders below this one.
    ByClients(PathBuf),
    /// Somebody tells the internal port which there should be, out of folders below this
    /// one.
    ByList(PathBuf),
}

#[derive(Debug)]
pub(super) struct Inventory {
    loaded: BTreeMap<String, Loaded>,
    /// Those that there should be, and what goes on about them.
    pub(super) wanted: Wanted,
    /// Names that are being loaded.
    coming: BTreeSet<String>,
    free: Vec<u32>,
    loads: u64,
}

/// The adapters of a group. Clones are of one rack.
#[derive(Clone, Debug)]
pub struct AdapterRack {
    engine: EngineClient,
    served_name: String,
    room: AdapterRoom,
    pub(super) loading: Loading,
    inventory: Arc<Mutex<Inventory>>,
}

impl AdapterRack {
    /// An empty rack with `room`.
    pub fn new(
        engine: EngineClient,
        served_name: String,
        room: AdapterRoom,
        loading: Loading,
    ) -> Self {
        let places = 0..u32::try_from(room.count).unwrap_or(u32::MAX);
        Self {
            engine,
            served_name,
            room,
            loading,
            inventory: Arc::new(Mutex::new(Inventory {
                loaded: BTreeMap::new(),
                wanted: Wanted::default(),
                coming: BTreeSet::new(),
                free: places.rev().collect(),
                loads: 0,
            })),
        }
    }

    pub(super) fn inventory(&self) -> MutexGuard<'_, Inventory> {
        self.inventory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The adapter called `name`.
    pub fn find(&self, name: &str) -> Option<AdapterUse> {
        let loaded = &self.inventory().loaded;
        loaded.get(name).map(|loaded| loaded.adapter)
    }

    /// Adapters that may be loaded at a time.
    pub fn room(&self) -> usize {
        self.room.count
    }

    /// Names of those at `places`.
    pub fn names(&self, places: PlaceSet) -> Vec<String> {
        let inventory = self.inventory();
        let loaded = inventory.loaded.iter();
        loaded
            .filter(|(_, loaded)| places.contains(loaded.adapter.place))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// All of them, as models.
    pub fn cards(&self, max_tokens: u32) -> Vec<ModelCard> {
        let inventory = self.inventory();
        let loaded = inventory.loaded.iter();
        loaded
            .map(|(name, loaded)| ModelCard {
                id: name.clone(),
                created: loaded.created,
                max_tokens,
                parent: Some((
                    self.served_name.clone(),
                    loaded.folder.display().to_string(),
                )),
            })
            .collect()
    }

    /// Folders of the adapters that all ranks have, by name.
    pub(super) fn folders(inventory: &Inventory) -> impl Iterator<Item = (&String, &PathBuf)> {
        let loaded = inventory.loaded.iter();
        loaded.map(|(name, loaded)| (name, &loaded.folder))
    }

    /// Has all ranks load the adapter in `folder`.
    ///
    /// # Errors
    /// When there is no place, the name is taken, a rank cannot load it, or that takes
    /// long.
    pub async fn load(&self, name: String, folder: PathBuf) -> Result<(), AdapterError> {
        // On a task of its own: a client that goes leaves nothing half done.
        let rack = self.clone();
        patiently(async move { rack.load_now(name, folder).await }).await
    }

    async fn load_now(&self, name: String, folder: PathBuf) -> Result<(), AdapterError> {
        if self.room.count == 0 {
            return Err(AdapterError::NoRoom);
        }
        let place = {
            let mut inventory = self.inventory();
            let is_taken = name == self.served_name
                || inventory.loaded.contains_key(&name)
                || inventory.coming.contains(&name);
            if is_taken {
                return Err(AdapterError::NameTaken(name));
            }
            let place = inventory.free.pop();
            let place = place.ok_or(AdapterError::Full(self.room.count))?;
            inventory.coming.insert(name.clone());
            place
        };
        let outcome = self
            .ask(AdapterOrder::Load {
                place,
                folder: folder.clone(),
            })
            .await;
        let mut inventory = self.inventory();
        inventory.coming.remove(&name);
        match outcome {
            Ok(AdapterOutcome::Loaded { rank }) => {
                tracing::info!(name, rank, folder = %folder.display(), "an adapter is loaded");
                let load = inventory.loads;
                inventory.loads += 1;
                let loaded = Loaded {
                    adapter: AdapterUse { place, load },
                    folder,
                    created: unix_seconds(),
                };
                inventory.loaded.insert(name, loaded);
                Ok(())
            }
            Ok(AdapterOutcome::Refused { message }) => {
                inventory.free.push(place);
                Err(AdapterError::Refused(message))
            }
            Ok(AdapterOutcome::Dropped) => Err(AdapterError::Ended),
            Err(error) => {
                inventory.free.push(place);
                Err(error)
            }
        }
    }

    /// Takes no more requests for the adapter `name`, and has the ranks forget it once
    /// none is open.
    ///
    /// # Errors
    /// When there is none, or open requests take long.
    pub async fn unload(&self, name: &str) -> Result<(), AdapterError> {
        let taken = self.inventory().loaded.remove(name);
        let Some(loaded) = taken else {
            return Err(AdapterError::Unknown(name.to_owned()));
        };
        let (rack, place) = (self.clone(), loaded.adapter.place);
        patiently(async move {
            rack.ask(AdapterOrder::Drop { place }).await?;
            rack.inventory().free.push(place);
            Ok(())
        })
        .await
    }

    async fn ask(&self, order: AdapterOrder) -> Result<AdapterOutcome, AdapterError> {
        let outcome = self.engine.adapt(order)?;
        outcome.await.map_err(|_gone| AdapterError::Ended)
    }

    /// Loads `modules` one by one. Where a list says which adapters there should be, it is
    /// told what became of them, and one that is at fault ends nothing.
    ///
    /// # Errors
    /// The first that cannot be loaded, by name.
    pub async fn load_modules(&self, modules: Vec<AdapterModule>) -> Result<(), String> {
        if let Loading::ByList(_) = self.loading {
            return self.begin(modules).await.map_err(|error| error.to_string());
        }
        for AdapterModule { name, folder } in modules {
            let loaded = self.load(name.clone(), folder).await;
            loaded.map_err(|error| format!("--lora-modules={name}: {error}"))?;
        }
        Ok(())
    }

    /// The folder that a client names, if it may.
    fn allowed(&self, path: &str) -> Result<PathBuf, AdapterError> {
        match &self.loading {
            Loading::ByClients(root) => below(root, path),
            _ => Err(AdapterError::NotAllowed),
        }
    }
}

/// The folder `path`, if it is below `root`.
pub(super) fn below(root: &Path, path: &str) -> Result<PathBuf, AdapterError> {
    let outside = || AdapterError::Outside {
        path: path.to_owned(),
        root: root.display().to_string(),
    };
    // With links followed, so that none leads out.
    let real = |path: &Path| path.canonicalize().map_err(|_error| outside());
    let (root, folder) = (real(root)?, real(&root.join(path))?);
    if folder.starts_with(&root) && folder != root && folder.is_dir() {
        Ok(folder)
    } else {
        Err(outside())
    }
}

/// Waits for `work`, which goes on when nobody waits any more.
async fn patiently(
    work: impl Future<Output = Result<(), AdapterError>> + Send + 'static,
) -> Result<(), AdapterError> {
    let task = tokio::spawn(work);
    match tokio::time::timeout(PATIENCE, task).await {
        Ok(ended) => ended.map_err(|_panicked| AdapterError::Ended)?,
        Err(_elapsed) => Err(AdapterError::Slow),
    }
}

/// `POST /v1/load_lora_adapter`
pub(super) async fn load(State(front): State<Arc<Front>>, request: Request) -> Response {
    let answer = async {
        front.admit()?;
        let body = front.room.read(request).await?;
        let request = LoadAdapterRequest::read(&body.bytes)?;
        let client = |error: AdapterError| error.for_client("lora_name", "lora_path");
        let folder = front.rack.allowed(&request.path).map_err(client)?;
        let name = request.name.clone();
        front
            .rack
            .load(request.name, folder)
            .await
            .map_err(client)?;
        let cards = front.rack.cards(front.max_tokens);
        let card = cards.iter().find(|card| card.id == name);
        Ok(axum::Json(card.map(ModelCard::body)).into_response())
    };
    counted(&front.metrics, answer.await)
}

/// `POST /v1/unload_lora_adapter`
pub(super) async fn unload(State(front): State<Arc<Front>>, request: Request) -> Response {
    let answer = async {
        front.admit()?;
        let body = front.room.read(request).await?;
        let UnloadAdapterRequest { name } = UnloadAdapterRequest::read(&body.bytes)?;
        if !matches!(front.rack.loading, Loading::ByClients(_)) {
            return Err(AdapterError::NotAllowed.for_client("lora_name", "lora_path"));
        }
        let unloaded = front.rack.unload(&name).await;
        unloaded.map_err(|error| error.for_client("lora_name", "lora_path"))?;
        Ok(axum::Json(response::deleted(&name)).into_response())
    };
    counted(&front.metrics, answer.await)
}
