//! All files of a model, into one folder.

use std::fs;
use std::path::{Component, Path};
use std::sync::Arc;

use futures::stream::{self, StreamExt, TryStreamExt};
use llama_contract::FetchSource;
use llama_model_copy::space;

use crate::client::{Web, shown};
use crate::error::FetchError;
use crate::file::{self, Fetching};
use crate::listing::{self, Item, Store};
use crate::state::Progress;

/// Files that are fetched at a time.
pub(crate) const PARALLEL: usize = 4;

/// A model that can be fetched: its files, each with its length.
pub(crate) struct Model {
    files: Vec<(Item, u64)>,
    web: Web,
    store: Option<Arc<Store>>,
}

impl Model {
    /// Asks `source` which files it has, and how long they are.
    pub(crate) async fn find(
        source: &FetchSource,
        web: Web,
        store: Option<Store>,
    ) -> Result<Self, FetchError> {
        let items = listing::items(source, store.as_ref(), &web).await?;
        for item in &items {
            refuse_outside(&item.name)?;
        }
        let files = stream::iter(items)
            .map(|item| async {
                let bytes = match item.bytes {
                    Some(bytes) => bytes,
                    None => length(&item, store.as_ref(), &web).await?,
                };
                Ok::<_, FetchError>((item, bytes))
            })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        let store = store.map(Arc::new);
        Ok(Self { files, web, store })
    }

    /// Bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Brings every file into `folder`.
    pub(crate) async fn fetch(
        &self,
        folder: &Path,
        heads: bool,
        progress: &Arc<Progress>,
    ) -> Result<(), FetchError> {
        self.prepare(folder, heads)?;
        if !heads {
            progress.expect(self.bytes());
        }
        let fetched = stream::iter(&self.files)
            .map(|(item, bytes)| {
                let target = folder.join(&item.name);
                let fetching = Fetching {
                    item: item.clone(),
                    bytes: *bytes,
                    web: self.web.clone(),
                    store: self.store.clone(),
                    progress: Arc::clone(progress),
                };
                // A task each, since sums and writes take a thread's time.
                let task = tokio::spawn(async move {
                    if heads {
                        fetching.head(&target).await
                    } else {
                        fetching.whole(&target).await
                    }
                });
                async move { task.await.map_err(|_| FetchError::Ended)? }
            })
            .buffer_unordered(PARALLEL)
            .try_collect::<Vec<()>>();
        tokio::select! {
            result = fetched => result.map(|_| progress.tell())?,
            () = progress.tell_for_ever() => {}
        }
        Ok(())
    }

    /// Makes folders, and sees that there is room for what is not there yet.
    fn prepare(&self, folder: &Path, heads: bool) -> Result<(), FetchError> {
        let mut needed: u64 = 0;
        for (item, bytes) in &self.files {
            let target = folder.join(&item.name);
            let parent = target.parent().unwrap_or(folder);
            fs::create_dir_all(parent).map_err(FetchError::file("make", parent))?;
            let there = fs::metadata(file::partial(&target)).map_or(0, |file| file.len());
            needed += bytes.saturating_sub(there);
        }
        let free = space::free_bytes(folder)
            .map_err(FetchError::file("tell the free space at", folder))?;
        if !heads && needed > free {
            return Err(FetchError::NoSpace {
                needed,
                free,
                folder: folder.to_owned(),
            });
        }
        Ok(())
    }
}

/// A listing must not name a place outside the model's folder.
fn refuse_outside(name: &str) -> Result<(), FetchError> {
    let inside = Path::new(name)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if inside && !name.is_empty() && !name.ends_with('/') {
        return Ok(());
    }
    Err(FetchError::BadAddress {
        field: "name",
        value: name.to_owned(),
        problem: "must be a path inside the model's folder".to_owned(),
    })
}

/// Bytes of a file that the listing tells no length of.
async fn length(item: &Item, store: Option<&Store>, web: &Web) -> Result<u64, FetchError> {
    listing::retried(|| async {
        let url = listing::url(item, store)?;
        let part = web.part(&url, 0, Some(0), None).await?;
        part.total.ok_or_else(|| FetchError::BadAnswer {
            at: shown(&url),
            problem: "no length of the file".to_owned(),
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_the_folder_are_refused() {
        for name in ["../x", "/x", "a/../../x", "", "a/"] {
            assert!(refuse_outside(name).is_err(), "{name}");
        }
        for name in ["x", "a/b", "..x"] {
            assert!(refuse_outside(name).is_ok(), "{name}");
        }
    }
}
