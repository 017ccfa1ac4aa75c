//! Models that pods share: each in a folder of its own, under a lock, within a budget.
//!
//! There is no process that keeps the cache. Whoever needs a model fills its entry while
//! it holds the entry's lock alone; workers hold it together as long as they live. So what
//! is in use is what is locked, whatever happens to pods. Locks are `flock`, which NFS
//! passes on to its server.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use llama_contract::{CACHE_LOCK, CACHE_MODEL_FOLDER};
use llama_model_copy::progress;

use crate::error::FetchError;
use crate::state::Progress;

/// File of an entry that says how many bytes it has; there once the entry is whole.
const WHOLE: &str = "whole";
/// The same while it is being filled.
const FILLING: &str = "filling";
/// Time after its last use in which an entry is not removed: between the end of the
/// program that found it and the start of the worker nobody holds its lock.
const RECENT: Duration = Duration::from_mins(15);
/// Time between two looks at a lock that another holds.
const LOOK: Duration = Duration::from_millis(500);
/// Time until a fetch of another that brings nothing new is complained of.
const STUCK: Duration = Duration::from_mins(10);
/// Time between two lines about waiting.
const TELL: Duration = Duration::from_secs(10);

/// A folder of entries.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    /// Most bytes of all entries together.
    budget: u64,
}

/// An entry that only this process may touch.
#[derive(Debug)]
pub(crate) struct Claimed {
    entry: PathBuf,
    _lock: File,
}

/// What an entry is.
#[derive(Debug)]
pub(crate) enum Found {
    /// Whole: it can be read.
    Whole,
    /// To be filled by whoever asked.
    Mine(Claimed),
}

impl Cache {
    pub(crate) fn new(folder: &Path, budget: u64) -> Self {
        Self {
            folder: folder.to_owned(),
            budget,
        }
    }

    /// Waits until the entry `identity` is whole, or may be filled.
    /// `progress` is told what another pod brings meanwhile.
    pub(crate) async fn find(
        &self,
        identity: &str,
        progress: &Progress,
    ) -> Result<Found, FetchError> {
        let entry = self.folder.join(identity);
        fs::create_dir_all(&entry).map_err(FetchError::file("make", &entry))?;
        let path = entry.join(CACHE_LOCK);
        let lock = open_lock(&path)?;
        let (mut seen, mut quiet, mut since_told) = (0, Duration::ZERO, TELL);
        loop {
            if try_lock(&lock, &path, false)? {
                if entry.join(WHOLE).exists() {
                    lock.set_modified(SystemTime::now())
                        .map_err(FetchError::file("mark as used", &path))?;
                    return Ok(Found::Whole);
                }
                lock.unlock().map_err(FetchError::file("unlock", &path))?;
                if try_lock(&lock, &path, true)? {
                    if !entry.join(WHOLE).exists() {
                        return Ok(Found::Mine(Claimed { entry, _lock: lock }));
                    }
                    lock.unlock().map_err(FetchError::file("unlock", &path))?;
                    continue;
                }
            }
            let there = bytes_below(&entry.join(CACHE_MODEL_FOLDER));
            quiet = if there == seen {
                quiet + LOOK
            } else {
                Duration::ZERO
            };
            seen = there;
            progress.watch(there);
            if let Some(bytes) = read_bytes(&entry.join(FILLING)) {
                progress.expect(bytes);
            }
            if quiet >= STUCK {
                let seconds = STUCK.as_secs();
                return Err(FetchError::Stuck {
                    lock: path,
                    seconds,
                });
            }
            if since_told >= TELL {
                eprintln!("{}: another pod fetches the model", crate::PROGRAM);
                progress.tell();
                since_told = Duration::ZERO;
            }
            since_told += LOOK;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Makes room for `bytes` in the entry that `claimed` is, by removing those that were
    /// not used for the longest time.
    pub(crate) async fn make_room(&self, claimed: &Claimed, bytes: u64) -> Result<(), FetchError> {
        let path = self.folder.join(CACHE_LOCK);
        let lock = open_lock(&path)?;
        let mut waited = Duration::ZERO;
        while !try_lock(&lock, &path, true)? {
            if waited >= STUCK {
                let seconds = STUCK.as_secs();
                return Err(FetchError::Stuck {
                    lock: path,
                    seconds,
                });
            }
            tokio::time::sleep(LOOK).await;
            waited += LOOK;
        }
        let mut others = self.entries(&claimed.entry)?;
        // The longest unused last.
        others.sort_by_key(|entry| std::cmp::Reverse(entry.used));
        let mut held: u64 = others.iter().map(|entry| entry.bytes).sum();
        let mut kept = Vec::new();
        while held.saturating_add(bytes) > self.budget {
            let Some(oldest) = others.pop() else {
                return Err(FetchError::OverBudget {
                    needed: bytes,
                    budget: self.budget,
                    held,
                });
            };
            if oldest.remove()? {
                held -= oldest.bytes;
            } else {
                kept.push(oldest);
            }
        }
        let note = claimed.entry.join(FILLING);
        fs::write(&note, bytes.to_string()).map_err(FetchError::file("write", note))
    }

    /// Every entry but `own`.
    fn entries(&self, own: &Path) -> Result<Vec<Entry>, FetchError> {
        let unreadable = || FetchError::file("read", &self.folder);
        let mut all = Vec::new();
        for folder in fs::read_dir(&self.folder).map_err(unreadable())? {
            let path = folder.map_err(unreadable())?.path();
            let lock = path.join(CACHE_LOCK);
            let Ok(meta) = fs::metadata(&lock) else {
                continue;
            };
            if path == own {
                continue;
            }
            let told = [WHOLE, FILLING]
                .into_iter()
                .find_map(|name| read_bytes(&path.join(name)));
            all.push(Entry {
                bytes: told.unwrap_or_else(|| bytes_below(&path.join(CACHE_MODEL_FOLDER))),
                used: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                path,
            });
        }
        Ok(all)
    }
}

impl Claimed {
    /// Where the files go. What another model's remains or a former try left stays: it is
    /// of the same bytes and is continued.
    pub(crate) fn folder(&self) -> Result<PathBuf, FetchError> {
        let folder = self.entry.join(CACHE_MODEL_FOLDER);
        fs::create_dir_all(&folder).map_err(FetchError::file("make", &folder))?;
        Ok(folder)
    }

    /// Says that the entry is whole, of `bytes`.
    pub(crate) fn complete(self, bytes: u64) -> Result<(), FetchError> {
        let whole = self.entry.join(WHOLE);
        let part = self.entry.join(".whole.part");
        let write = || -> io::Result<()> {
            fs::write(&part, bytes.to_string())?;
            File::open(&part)?.sync_all()?;
            fs::rename(&part, &whole)?;
            gone(fs::remove_file(self.entry.join(FILLING)))
        };
        write().map_err(FetchError::file("write", whole))
    }
}

/// An entry of which only this is known.
struct Entry {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

impl Entry {
    /// Removes what the entry holds, unless it is in use or was a short time ago. The lock
    /// stays: others may have it open.
    fn remove(&self) -> Result<bool, FetchError> {
        let recent = self
            .used
            .elapsed()
            .is_ok_and(|unused| unused < RECENT && self.path.join(WHOLE).exists());
        if recent {
            return Ok(false);
        }
        let path = self.path.join(CACHE_LOCK);
        let lock = open_lock(&path)?;
        if !try_lock(&lock, &path, true)? {
            return Ok(false);
        }
        let clear = || -> io::Result<()> {
            gone(fs::remove_file(self.path.join(WHOLE)))?;
            gone(fs::remove_dir_all(self.path.join(CACHE_MODEL_FOLDER)))?;
            gone(fs::remove_file(self.path.join(FILLING)))
        };
        clear().map_err(FetchError::file("remove", &self.path))?;
        let name = self.path.file_name().unwrap_or_default();
        eprintln!(
            "llama-model-fetch: removed {} ({}) from the cache",
            name.display(),
            progress::size(self.bytes)
        );
        Ok(true)
    }
}

/// The number of bytes that the file at `path` tells, if it is there.
fn read_bytes(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn open_lock(path: &Path) -> Result<File, FetchError> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    options.open(path).map_err(FetchError::file("open", path))
}

fn try_lock(lock: &File, path: &Path, alone: bool) -> Result<bool, FetchError> {
    let result = if alone {
        lock.try_lock()
    } else {
        lock.try_lock_shared()
    };
    match result {
        Ok(()) => Ok(true),
        Err(fs::TryLockError::WouldBlock) => Ok(false),
        Err(fs::TryLockError::Error(error)) => Err(FetchError::file("lock", path)(error)),
    }
}

/// Bytes of the files below `folder`; what cannot be read counts nothing.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(files) = fs::read_dir(folder) else {
        return 0;
    };
    files
        .flatten()
        .map(|file| match file.metadata() {
            Ok(meta) if meta.is_dir() => bytes_below(&file.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn fill(cache: &Cache, identity: &str, bytes: usize) -> Result<(), FetchError> {
        let Found::Mine(claimed) = cache.find(identity, &Progress::new()).await? else {
            return Ok(());
        };
        cache.make_room(&claimed, bytes as u64).await?;
        fs::write(claimed.folder()?.join("m.gguf"), vec![0; bytes]).unwrap();
        claimed.complete(bytes as u64)
    }

    fn used(cache: &Cache, identity: &str, minutes_ago: u64) {
        let path = cache.folder.join(identity).join(CACHE_LOCK);
        let then = SystemTime::now() - Duration::from_mins(minutes_ago);
        open_lock(&path).unwrap().set_modified(then).unwrap();
    }

    fn holds(cache: &Cache, identity: &str) -> bool {
        let entry = cache.folder.join(identity);
        let (whole, model) = (entry.join(WHOLE), entry.join("model/m.gguf"));
        assert_eq!(whole.exists(), model.exists());
        whole.exists()
    }

    #[tokio::test]
    async fn the_longest_unused_makes_room() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path(), 100);
        fill(&cache, "a", 40).await.unwrap();
        fill(&cache, "b", 40).await.unwrap();
        used(&cache, "a", 60);
        used(&cache, "b", 30);
        fill(&cache, "c", 50).await.unwrap();
        assert!(!holds(&cache, "a") && holds(&cache, "b") && holds(&cache, "c"));
    }

    #[tokio::test]
    async fn what_is_used_stays() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path(), 100);
        fill(&cache, "a", 40).await.unwrap();
        fill(&cache, "b", 40).await.unwrap();
        used(&cache, "a", 60);
        // As a worker does.
        let worker = File::open(folder.path().join("a").join(CACHE_LOCK)).unwrap();
        worker.try_lock_shared().unwrap();
        let error = fill(&cache, "c", 50).await.unwrap_err().to_string();
        assert!(error.contains("80 B are models in use or used"), "{error}");
        assert!(holds(&cache, "a") && holds(&cache, "b"));
        drop(worker);
        fill(&cache, "c", 50).await.unwrap();
        assert!(!holds(&cache, "a") && holds(&cache, "c"));
    }

    #[tokio::test]
    async fn a_fetch_that_was_given_up_is_continued_and_counts() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path(), 100);
        let Found::Mine(claimed) = cache.find("a", &Progress::new()).await.unwrap() else {
            panic!("nobody has it")
        };
        cache.make_room(&claimed, 60).await.unwrap();
        fs::write(claimed.folder().unwrap().join(".m.gguf.part"), "abc").unwrap();
        // While it is filled it is counted with all its bytes.
        let error = fill(&cache, "b", 50).await.unwrap_err();
        assert!(
            matches!(error, FetchError::OverBudget { held: 60, .. }),
            "{error}"
        );
        drop(claimed);
        let Found::Mine(again) = cache.find("a", &Progress::new()).await.unwrap() else {
            panic!("it is not whole")
        };
        let part = again.folder().unwrap().join(".m.gguf.part");
        assert_eq!(fs::read_to_string(part).unwrap(), "abc");
        drop(again);
        fill(&cache, "b", 50).await.unwrap();
        assert!(holds(&cache, "b"), "what nobody fills makes room");
    }

    #[tokio::test]
    async fn one_fills_and_the_others_wait() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path(), 100);
        let Found::Mine(claimed) = cache.find("a", &Progress::new()).await.unwrap() else {
            panic!("nobody has it")
        };
        cache.make_room(&claimed, 10).await.unwrap();
        let other = Cache::new(folder.path(), 100);
        let waits = tokio::spawn(async move { other.find("a", &Progress::new()).await });
        tokio::time::sleep(LOOK * 2).await;
        assert!(!waits.is_finished());
        fs::write(claimed.folder().unwrap().join("m.gguf"), "x").unwrap();
        claimed.complete(10).unwrap();
        let found = waits.await.unwrap().unwrap();
        assert!(matches!(found, Found::Whole));
    }
}
