//! Copies files in large pieces, each under a temporary name until it is whole.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use llama_contract::FailureCategory;

use llama_model_copy::space::{free_bytes, is_full};
use llama_model_copy::{head, progress};

use crate::plan::{self, Item};

/// Bytes of one read and one write.
const PIECE: usize = 4 << 20;
/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// How much of each file is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All of it.
    Whole,
    /// What readers of headers look at. The copy is as long as the file, with a hole.
    Heads,
}

/// Why a model could not be copied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// Nothing at the path.
    #[error("the image has no {path}; its folder {parent} {holds}")]
    NotFound {
        /// The path asked for.
        path: PathBuf,
        /// The nearest folder that exists.
        parent: PathBuf,
        /// What that folder holds, in words.
        holds: String,
    },
    /// A folder without a file.
    #[error("the image's folder {path} has no file to copy: it {holds}")]
    EmptyFolder {
        /// The folder.
        path: PathBuf,
        /// What it holds, in words.
        holds: String,
    },
    /// A device, a socket or a pipe.
    #[error("the image's {path} is neither a file nor a folder")]
    NotAFile {
        /// The path asked for.
        path: PathBuf,
    },
    /// The volume hides the place of the image that was asked for.
    #[error(
        "the model's path {path} lies in {folder}, where the pod's volume hides what the image \
         has; put the model elsewhere in the image"
    )]
    Hidden {
        /// The path asked for.
        path: PathBuf,
        /// The folder to copy into.
        folder: PathBuf,
    },
    /// The folder to copy into does not exist.
    #[error("cannot copy into {folder}: it is not a folder; mount a volume there")]
    NoFolder {
        /// The folder to copy into.
        folder: PathBuf,
    },
    /// Too little room.
    #[error(
        "the model has {needed} bytes ({}), the volume at {folder} has {free} bytes ({}) free",
        progress::size(*.needed), progress::size(*.free)
    )]
    NoSpace {
        /// Bytes to copy.
        needed: u64,
        /// Bytes free for this user.
        free: u64,
        /// The folder to copy into.
        folder: PathBuf,
    },
    /// The free space is unknown.
    #[error("cannot tell the free space at {folder}")]
    FreeSpace {
        /// The folder to copy into.
        folder: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Reading failed.
    #[error("cannot read the image's {path}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Writing failed.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// More or fewer bytes came than the file has.
    #[error("{path} has {copied} bytes after copying, the image's file had {expected}")]
    Size {
        /// The copy.
        path: PathBuf,
        /// Bytes of the file in the image.
        expected: u64,
        /// Bytes of the copy.
        copied: u64,
    },
    /// SIGTERM cannot be watched.
    #[error("cannot watch for SIGTERM")]
    Signal(#[source] io::Error),
    /// SIGTERM came.
    #[error("stopped by SIGTERM before the model was copied")]
    Stopped,
}

impl CopyError {
    pub(crate) fn category(&self) -> FailureCategory {
        match self {
            Self::NotFound { .. } | Self::EmptyFolder { .. } => FailureCategory::ModelNotFound,
            Self::NotAFile { .. } => FailureCategory::ModelInvalid,
            // The image's files belong to another user: no retry changes that.
            Self::Read { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                FailureCategory::ModelInvalid
            }
            Self::Hidden { .. } | Self::NoFolder { .. } => FailureCategory::InvalidConfiguration,
            Self::NoSpace { .. } => FailureCategory::InsufficientStorage,
            Self::Write { source, .. } if is_full(source) => FailureCategory::InsufficientStorage,
            Self::FreeSpace { .. }
            | Self::Read { .. }
            | Self::Write { .. }
            | Self::Size { .. }
            | Self::Signal(_)
            | Self::Stopped => FailureCategory::Internal,
        }
    }
}

/// Copies the file at `from`, or the folder at `from` with its files, into `folder`
/// under their own names. What a former start left there is replaced. `stop` is
/// looked at before each piece.
pub(crate) fn copy(
    from: &Path,
    folder: &Path,
    extent: Extent,
    stop: &AtomicBool,
) -> Result<(), CopyError> {
    if !folder.is_dir() {
        return Err(CopyError::NoFolder {
            folder: folder.to_owned(),
        });
    }
    refuse_hidden(from, folder)?;
    let mut items = plan::items(from)?;
    let folder = &target_of(from, folder)?;
    if extent == Extent::Heads {
        for item in &mut items {
            item.copied =
                head::bytes(&item.from, item.bytes).map_err(|source| CopyError::Read {
                    path: item.from.clone(),
                    source,
                })?;
        }
    }
    for item in &items {
        remove(&folder.join(&item.name))?;
        remove(&partial(folder, item))?;
    }
    let needed = items.iter().map(|item| item.copied).sum();
    let free = free_bytes(folder).map_err(|source| CopyError::FreeSpace {
        folder: folder.to_owned(),
        source,
    })?;
    if needed > free {
        return Err(CopyError::NoSpace {
            needed,
            free,
            folder: folder.to_owned(),
        });
    }
    let mut meter = Meter::new(needed);
    let mut piece = vec![0; PIECE];
    for item in &items {
        copy_file(item, folder, &mut piece, &mut meter, stop)?;
    }
    meter.tell();
    Ok(())
}

/// Where the files go: a folder keeps its name, as a file does, so that whoever opens the
/// copy needs not know which of the two it is.
fn target_of(from: &Path, folder: &Path) -> Result<PathBuf, CopyError> {
    let Some(name) = from.file_name().filter(|_| from.is_dir()) else {
        return Ok(folder.to_owned());
    };
    let path = folder.join(name);
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(CopyError::Write { path, source }),
    }
}

/// Also keeps the removal of old copies away from the model itself.
fn refuse_hidden(from: &Path, folder: &Path) -> Result<(), CopyError> {
    let resolved = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if from.starts_with(folder) || resolved(from).starts_with(resolved(folder)) {
        return Err(CopyError::Hidden {
            path: from.to_owned(),
            folder: folder.to_owned(),
        });
    }
    Ok(())
}

fn partial(folder: &Path, item: &Item) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(&item.name);
    name.push(".part");
    folder.join(name)
}

fn remove(path: &Path) -> Result<(), CopyError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(CopyError::Write {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

fn copy_file(
    item: &Item,
    folder: &Path,
    piece: &mut [u8],
    meter: &mut Meter,
    stop: &AtomicBool,
) -> Result<(), CopyError> {
    let part = partial(folder, item);
    let done = write_part(item, &part, piece, meter, stop).and_then(|()| {
        let target = folder.join(&item.name);
        fs::rename(&part, &target).map_err(|source| CopyError::Write {
            path: target,
            source,
        })
    });
    if done.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&part);
    }
    done
}

fn write_part(
    item: &Item,
    part: &Path,
    piece: &mut [u8],
    meter: &mut Meter,
    stop: &AtomicBool,
) -> Result<(), CopyError> {
    let unreadable = |source| CopyError::Read {
        path: item.from.clone(),
        source,
    };
    let unwritable = |source| CopyError::Write {
        path: part.to_owned(),
        source,
    };
    let source = File::open(&item.from).map_err(unreadable)?;
    // A whole file is read to its end, so that one that grows is noticed.
    let most = if item.copied < item.bytes {
        item.copied
    } else {
        u64::MAX
    };
    let mut source = source.take(most);
    let mut target = File::create(part).map_err(unwritable)?;
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(CopyError::Stopped);
        }
        let count = match source.read(piece) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(error)),
        };
        target.write_all(&piece[..count]).map_err(unwritable)?;
        meter.add(count as u64);
    }
    let copied = target.metadata().map_err(unwritable)?.len();
    if copied == item.copied && copied < item.bytes {
        return target.set_len(item.bytes).map_err(unwritable);
    }
    if copied != item.bytes {
        return Err(CopyError::Size {
            path: part.to_owned(),
            expected: item.bytes,
            copied,
        });
    }
    Ok(())
}

/// Counts bytes and tells progress on stderr about every second.
struct Meter {
    done: u64,
    total: u64,
    start: Instant,
    told: Instant,
}

impl Meter {
    fn new(total: u64) -> Self {
        let now = Instant::now();
        Self {
            done: 0,
            total,
            start: now,
            told: now,
        }
    }

    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.told.elapsed() >= PROGRESS_EVERY {
            self.told = Instant::now();
            self.tell();
        }
    }

    fn tell(&self) {
        let line = progress::line(self.done, self.total, self.start.elapsed());
        eprintln!("llama-model-copy: {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_leaves_no_file_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (image, volume) = (folder.path().join("image"), folder.path().join("volume"));
        fs::create_dir(&image).unwrap();
        fs::create_dir(&volume).unwrap();
        fs::write(image.join("m.gguf"), "model").unwrap();
        let stop = AtomicBool::new(true);
        let error = copy(&image, &volume, Extent::Whole, &stop).unwrap_err();
        assert!(matches!(error, CopyError::Stopped), "{error}");
        assert_eq!(fs::read_dir(volume.join("image")).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_changes_its_size_is_no_copy() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("m.gguf");
        fs::write(&from, "shorter").unwrap();
        let volume = folder.path().join("volume");
        fs::create_dir(&volume).unwrap();
        let item = Item {
            from,
            name: "m.gguf".into(),
            bytes: 100,
            copied: 100,
        };
        let (mut piece, mut meter) = (vec![0; 3], Meter::new(100));
        let stop = AtomicBool::new(false);
        let error = copy_file(&item, &volume, &mut piece, &mut meter, &stop).unwrap_err();
        assert!(
            error.to_string().contains("has 7 bytes after copying"),
            "{error}"
        );
        assert_eq!(error.category(), FailureCategory::Internal);
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 0);
    }

    #[test]
    fn a_full_disk_is_told_apart_from_other_failures() {
        let write = |kind: ErrorKind| CopyError::Write {
            path: "/model/m".into(),
            source: kind.into(),
        };
        let category = |kind| write(kind).category();
        assert_eq!(
            category(ErrorKind::StorageFull),
            FailureCategory::InsufficientStorage
        );
        assert_eq!(category(ErrorKind::Other), FailureCategory::Internal);
    }

    #[test]
    fn both_sizes_are_named_when_room_is_short() {
        let error = CopyError::NoSpace {
            needed: 3 << 30,
            free: 1 << 30,
            folder: "/model".into(),
        };
        let text = error.to_string();
        assert!(text.contains("3221225472 bytes (3.0 GiB)"), "{text}");
        assert!(text.contains("1073741824 bytes (1.0 GiB) free"), "{text}");
    }
}
