//! One file: continued where it broke off, checked when it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use llama_contract::hex;
use llama_model_copy::head;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::client::{Web, broken, shown};
use crate::error::FetchError;
use crate::listing::{self, Digest, Item, Store};
use crate::state::Progress;

/// Attempts in a row that bring nothing until a file is given up.
pub(crate) const ATTEMPTS: u32 = 5;
/// Bytes of one read of what an earlier start left.
const PIECE: usize = 4 << 20;

/// Time to wait after the failed attempt `attempt`, counted from 0: 1, 2, 4, 8 s.
pub(crate) fn pause(attempt: u32) -> Duration {
    Duration::from_secs(1 << attempt.min(3))
}

/// `error` with how often it was tried.
pub(crate) fn tried(mut error: FetchError, count: u32) -> FetchError {
    if let FetchError::Unreachable { attempts, .. } = &mut error {
        *attempts = count;
    }
    error
}

/// What is computed over the bytes.
enum Sum {
    Sha256(Sha256),
    GitBlob(Sha1),
    None,
}

impl Sum {
    /// Of a file of `bytes`. Without a length no Git object has a name.
    fn new(digest: &Digest, bytes: u64) -> Self {
        match digest {
            Digest::Sha256(_) => Self::Sha256(Sha256::new()),
            Digest::GitBlob(_) => Self::GitBlob(Sha1::new_with_prefix(format!("blob {bytes}\0"))),
            Digest::Unknown => Self::None,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(sum) => sum.update(bytes),
            Self::GitBlob(sum) => sum.update(bytes),
            Self::None => {}
        }
    }

    fn finish(self) -> Option<String> {
        match self {
            Self::Sha256(sum) => Some(hex(&sum.finalize())),
            Self::GitBlob(sum) => Some(hex(&sum.finalize())),
            Self::None => None,
        }
    }
}

/// A file on its way.
pub(crate) struct Fetching {
    pub(crate) item: Item,
    /// Bytes of the whole file.
    pub(crate) bytes: u64,
    pub(crate) web: Web,
    pub(crate) store: Option<Arc<Store>>,
    pub(crate) progress: Arc<Progress>,
}

/// Where the bytes of `target` stand until they are all there.
pub(crate) fn partial(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".part");
    target.with_file_name(name)
}

impl Fetching {
    /// Brings the whole file to `target`. What an earlier start left of it is used; if the
    /// digest is then wrong, the file is fetched once more from its start.
    pub(crate) async fn whole(&self, target: &Path) -> Result<(), FetchError> {
        let part = partial(target);
        let left = fs::metadata(&part).map_or(0, |file| file.len());
        match self.continued(&part, left.min(self.bytes)).await {
            Err(FetchError::Digest { .. }) if left > 0 => self.continued(&part, 0).await?,
            result => result?,
        }
        fs::rename(&part, target).map_err(FetchError::file("write", target))
    }

    async fn continued(&self, part: &Path, from: u64) -> Result<(), FetchError> {
        let unwritable = || FetchError::file("write", part);
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).read(true).write(true);
        let mut file = options.open(part).map_err(unwritable())?;
        file.set_len(from).map_err(unwritable())?;
        let mut sum = Sum::new(&self.item.digest, self.bytes);
        read_through(&mut file, &mut sum).map_err(FetchError::file("read", part))?;
        self.progress.has(from);

        let (mut have, mut idle) = (from, 0);
        while have < self.bytes {
            let before = have;
            let result = self.stream(&mut file, part, &mut sum, &mut have).await;
            idle = if have > before { 0 } else { idle + 1 };
            match result {
                Ok(()) => {}
                Err(error) if error.is_passing() && idle < ATTEMPTS => {
                    eprintln!(
                        "llama-model-fetch: {}: {error}; trying again from byte {have}",
                        self.item.name
                    );
                    tokio::time::sleep(pause(idle)).await;
                }
                Err(error) => return Err(tried(error, idle.max(1))),
            }
        }
        file.sync_data().map_err(unwritable())?;
        self.check(sum).inspect_err(|_| {
            // So that the next start does not continue what is wrong.
            let _ = fs::remove_file(part);
            self.progress.lost(have);
        })
    }

    /// One answer's bytes, from `have` on. Writing blocks the thread that runs this, which
    /// has nothing else to do: there is one for each file that is fetched at a time.
    async fn stream(
        &self,
        file: &mut File,
        path: &Path,
        sum: &mut Sum,
        have: &mut u64,
    ) -> Result<(), FetchError> {
        let url = listing::url(&self.item, self.store.as_deref())?;
        let version = self.item.version.as_deref();
        let mut part = self.web.part(&url, *have, None, version).await?;
        if let Some(total) = part.total.filter(|total| *total != self.bytes) {
            return Err(self.wrong_length(total));
        }
        if part.start < *have {
            // The server knows no parts: all over again.
            self.progress.lost(*have);
            *have = 0;
            *sum = Sum::new(&self.item.digest, self.bytes);
            file.set_len(0).map_err(FetchError::file("write", path))?;
            file.rewind().map_err(FetchError::file("write", path))?;
        }
        while let Some(piece) = part.response.chunk().await.map_err(|e| broken(&url, &e))? {
            let count = piece.len() as u64;
            if *have + count > self.bytes {
                return Err(self.wrong_length(*have + count));
            }
            file.write_all(&piece)
                .map_err(FetchError::file("write", path))?;
            sum.add(&piece);
            *have += count;
            self.progress.add(count);
        }
        if *have < self.bytes {
            return Err(FetchError::Unreachable {
                at: shown(&url),
                problem: format!("broke off after {have} of {} bytes", self.bytes),
                attempts: 1,
            });
        }
        Ok(())
    }

    fn check(&self, sum: Sum) -> Result<(), FetchError> {
        let (kind, expected) = match &self.item.digest {
            Digest::Sha256(expected) => ("SHA-256", expected),
            Digest::GitBlob(expected) => ("Git object name", expected),
            Digest::Unknown => return Ok(()),
        };
        let found = sum.finish().unwrap_or_default();
        if found.eq_ignore_ascii_case(expected) {
            return Ok(());
        }
        Err(FetchError::Digest {
            name: self.item.name.clone(),
            at: self.at(),
            kind,
            expected: expected.clone(),
            found,
        })
    }

    /// Brings what readers of headers look at to `target`, as long as the file, with a hole.
    pub(crate) async fn head(&self, target: &Path) -> Result<(), FetchError> {
        let name = Path::new(&self.item.name);
        let start = if head::is_told(name) {
            self.first(head::START_BYTES.min(self.bytes)).await?
        } else {
            Vec::new()
        };
        let wanted = head::from_start(name, self.bytes, &start);
        let bytes = self.first(wanted).await?;
        self.progress.add(wanted);
        let write = |path: &Path| -> io::Result<()> {
            let mut file = File::create(path)?;
            file.write_all(&bytes)?;
            file.set_len(self.bytes)
        };
        write(target).map_err(FetchError::file("write", target))
    }

    /// The first `count` bytes.
    async fn first(&self, count: u64) -> Result<Vec<u8>, FetchError> {
        if count == 0 {
            return Ok(Vec::new());
        }
        listing::retried(|| async {
            let url = listing::url(&self.item, self.store.as_deref())?;
            let version = self.item.version.as_deref();
            let mut part = self.web.part(&url, 0, Some(count - 1), version).await?;
            let mut bytes = Vec::new();
            while (bytes.len() as u64) < count {
                let Some(piece) = part.response.chunk().await.map_err(|e| broken(&url, &e))? else {
                    return Err(self.wrong_length(bytes.len() as u64));
                };
                bytes.extend_from_slice(&piece);
            }
            bytes.truncate(usize::try_from(count).unwrap_or(usize::MAX));
            Ok(bytes)
        })
        .await
    }

    fn wrong_length(&self, found: u64) -> FetchError {
        FetchError::Length {
            name: self.item.name.clone(),
            at: self.at(),
            expected: self.bytes,
            found,
        }
    }

    fn at(&self) -> String {
        listing::url(&self.item, self.store.as_deref())
            .map_or_else(|error| error.to_string(), |url| shown(&url))
    }
}

/// Adds all of `file` to `sum` and leaves it at its end.
fn read_through(file: &mut File, sum: &mut Sum) -> io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(()),
            count => sum.add(&piece[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_git_object_is_named_as_git_names_it() {
        // `printf 'hello\n' | git hash-object --stdin`
        let digest = Digest::GitBlob(String::new());
        let mut sum = Sum::new(&digest, 6);
        sum.add(b"hello\n");
        let name = sum.finish().unwrap();
        assert_eq!(name, "ce013625030ba8dba906f756967f9e9ca394464a");
    }

    #[test]
    fn pauses_double_and_stay_short() {
        let pauses: Vec<_> = (0..6).map(|n| pause(n).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 8, 8]);
    }
}
