//! Finds the shared libraries that a program needs on this machine.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::elf::{self, ElfError};

/// Where the loader looks without a cache, which images do not have.
const FOLDERS: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];

/// The libraries cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// A file cannot be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not a program or library.
    #[error("could not read what {} needs", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ElfError,
    },
    /// No folder has it.
    #[error("{name} is in none of {}", FOLDERS.join(", "))]
    NotFound {
        /// The library.
        name: String,
    },
}

/// Every library that `program` needs, directly or not, and its loader, as paths at
/// which the loader looks. None for a static program.
pub fn needed_by(program: &Path) -> Result<BTreeSet<PathBuf>, LibraryError> {
    let mut found = BTreeSet::new();
    let mut open = vec![program.to_owned()];
    while let Some(path) = open.pop() {
        let file = fs::read(&path).map_err(|source| LibraryError::Read {
            path: path.clone(),
            source,
        })?;
        let needs = elf::needs(&file).map_err(|source| LibraryError::Elf { path, source })?;
        let mut paths: Vec<PathBuf> = needs.interpreter.map(PathBuf::from).into_iter().collect();
        for name in needs.libraries {
            // The loader itself is named as a library too, at its own path.
            if !found
                .iter()
                .chain(&paths)
                .any(|path: &PathBuf| path.ends_with(&name))
            {
                paths.push(find(name)?);
            }
        }
        for path in paths {
            if found.insert(path.clone()) {
                open.push(path);
            }
        }
    }
    Ok(found)
}

fn find(name: String) -> Result<PathBuf, LibraryError> {
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(&name))
        .find(|path| path.exists())
        .ok_or(LibraryError::NotFound { name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_library_is_found_once() {
        let found = needed_by(&std::env::current_exe().unwrap()).unwrap();
        let names: BTreeSet<_> = found.iter().map(|path| path.file_name()).collect();
        assert_eq!(names.len(), found.len(), "{found:?}");
        assert!(found.iter().all(|path| path.exists()));
    }

    #[test]
    fn missing_library_is_named() {
        let message = find("libno-such.so.1".to_owned()).unwrap_err().to_string();
        assert!(message.contains("libno-such.so.1"), "{message}");
    }
}
