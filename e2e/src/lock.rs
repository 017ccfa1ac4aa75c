//! A lock file, so that two runs do not build or change the same thing at once.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::wait::{self, Look, WaitError};

/// The lock could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The file cannot be opened or locked.
    #[error("could not lock {}", path.display())]
    File {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another run held it all the time.
    #[error("another run holds {}", path.display())]
    Held {
        /// The lock file.
        path: PathBuf,
        /// The wait for it.
        #[source]
        source: WaitError,
    },
}

/// Held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Waits at most `deadline` for the lock of the file `path`, which is created.
    pub async fn take(path: &Path, deadline: Duration) -> Result<Self, LockError> {
        let mut said = false;
        let taken = wait::until("the lock", deadline, async || match try_take(path) {
            Ok(Some(file)) => Look::Done(Ok(file)),
            Ok(None) => {
                if !said {
                    eprintln!("  waiting for another run that holds {}", path.display());
                    said = true;
                }
                Look::NotYet("held by another run".to_owned())
            }
            Err(source) => Look::Done(Err(source)),
        })
        .await;
        let path = path.to_owned();
        match taken {
            Ok(Ok(file)) => Ok(Self { path, _file: file }),
            Ok(Err(source)) => Err(LockError::File { path, source }),
            Err(source) => Err(LockError::Held { path, source }),
        }
    }

    /// Gives the lock back and removes its file.
    pub fn remove(self) -> io::Result<()> {
        // Removed while still held: whoever waits finds that its file is no longer
        // the one at this path and opens it anew.
        fs::remove_file(&self.path)
    }
}

fn try_take(path: &Path) -> io::Result<Option<File>> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = File::options().create(true).append(true).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(source)) => return Err(source),
    }
    let current = match fs::metadata(path) {
        Ok(current) => current,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok((current.ino() == file.metadata()?.ino()).then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(300);

    #[tokio::test]
    async fn only_one_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/lock");
        let first = Lock::take(&path, SHORT).await.unwrap();
        assert!(matches!(
            Lock::take(&path, SHORT).await,
            Err(LockError::Held { .. })
        ));
        drop(first);
        Lock::take(&path, SHORT).await.unwrap().remove().unwrap();
        assert!(!path.exists());
    }
}
