//! Finds out what is to be copied, before the first byte is.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::copy::CopyError;

/// Names told of a folder that does not hold what was asked for.
const NAMES_TOLD: usize = 8;

/// One file to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    /// Where it is.
    pub from: PathBuf,
    /// Its name in the folder that gets it.
    pub name: OsString,
    /// Its size.
    pub bytes: u64,
    /// How much of its start is copied; the rest becomes a hole.
    pub copied: u64,
}

/// The file at `from`, or the regular files of the folder at `from` in order of
/// their names. Links are followed.
pub(crate) fn items(from: &Path) -> Result<Vec<Item>, CopyError> {
    let metadata = match fs::metadata(from) {
        Ok(metadata) => metadata,
        Err(error) if is_missing(&error) => return Err(not_found(from)),
        Err(source) => return Err(unreadable(from, source)),
    };
    if metadata.is_dir() {
        return folder_items(from);
    }
    match item(from, &metadata) {
        Some(item) => Ok(vec![item]),
        None => Err(CopyError::NotAFile {
            path: from.to_owned(),
        }),
    }
}

fn folder_items(folder: &Path) -> Result<Vec<Item>, CopyError> {
    let mut items = Vec::new();
    let entries = fs::read_dir(folder).map_err(|source| unreadable(folder, source))?;
    for entry in entries {
        let path = entry.map_err(|source| unreadable(folder, source))?.path();
        let metadata = fs::metadata(&path).map_err(|source| unreadable(&path, source))?;
        items.extend(item(&path, &metadata));
    }
    if items.is_empty() {
        return Err(CopyError::EmptyFolder {
            path: folder.to_owned(),
            holds: holds(folder),
        });
    }
    items.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(items)
}

fn item(path: &Path, metadata: &Metadata) -> Option<Item> {
    metadata.is_file().then_some(())?;
    Some(Item {
        from: path.to_owned(),
        name: path.file_name()?.to_owned(),
        bytes: metadata.len(),
        copied: metadata.len(),
    })
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn unreadable(path: &Path, source: io::Error) -> CopyError {
    CopyError::Read {
        path: path.to_owned(),
        source,
    }
}

/// Tells what the nearest folder on the way to `path` does hold: a wrong path is
/// most often a nearly right one.
fn not_found(path: &Path) -> CopyError {
    let parent = path
        .ancestors()
        .skip(1)
        .find(|folder| folder.is_dir())
        .unwrap_or_else(|| Path::new("/"));
    CopyError::NotFound {
        path: path.to_owned(),
        parent: parent.to_owned(),
        holds: holds(parent),
    }
}

fn holds(folder: &Path) -> String {
    match fs::read_dir(folder) {
        Ok(entries) => told(
            entries
                .flatten()
                .map(|entry| {
                    let slash = if entry.path().is_dir() { "/" } else { "" };
                    format!("{}{slash}", entry.file_name().display())
                })
                .collect(),
        ),
        Err(error) => format!("cannot be listed ({error})"),
    }
}

fn told(mut names: Vec<String>) -> String {
    if names.is_empty() {
        return "is empty".to_owned();
    }
    names.sort();
    let more = names.len().saturating_sub(NAMES_TOLD);
    names.truncate(NAMES_TOLD);
    let names = names.join(", ");
    if more == 0 {
        format!("holds {names}")
    } else {
        format!("holds {names} and {more} more")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_files_in_order_and_no_subfolder() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("b.gguf"), "bb").unwrap();
        fs::write(folder.path().join("a.json"), "a").unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/c"), "c").unwrap();
        let found: Vec<_> = items(folder.path())
            .unwrap()
            .into_iter()
            .map(|item| (item.name.into_string().unwrap(), item.bytes))
            .collect();
        assert_eq!(found, [("a.json".to_owned(), 1), ("b.gguf".to_owned(), 2)]);
    }

    #[test]
    fn links_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("blob"), "12345").unwrap();
        let link = folder.path().join("m.gguf");
        std::os::unix::fs::symlink("blob", &link).unwrap();
        let found = items(&link).unwrap();
        assert_eq!(
            (found[0].name.to_str(), found[0].bytes),
            (Some("m.gguf"), 5)
        );
    }

    #[test]
    fn a_missing_file_names_what_the_nearest_folder_holds() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("models")).unwrap();
        fs::write(folder.path().join("models/right.gguf"), "x").unwrap();
        for wrong in ["models/wrong.gguf", "models/deep/er/wrong.gguf"] {
            let text = items(&folder.path().join(wrong)).unwrap_err().to_string();
            assert!(text.contains(wrong), "{text}");
            assert!(text.ends_with("models holds right.gguf"), "{text}");
        }
        let below_a_file = folder.path().join("models/right.gguf/x");
        let text = items(&below_a_file).unwrap_err().to_string();
        assert!(text.contains("holds right.gguf"), "{text}");
    }

    #[test]
    fn eight_names_are_told_and_the_rest_counted() {
        let names = |n: usize| (0..n).map(|i| format!("f{i:02}")).collect::<Vec<_>>();
        assert_eq!(told(names(0)), "is empty");
        assert_eq!(
            told(names(8)),
            "holds f00, f01, f02, f03, f04, f05, f06, f07"
        );
        assert!(told(names(11)).ends_with("f07 and 3 more"));
    }

    #[test]
    fn a_folder_without_files_and_a_device_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = items(folder.path()).unwrap_err();
        assert!(matches!(error, CopyError::EmptyFolder { .. }), "{error}");
        let error = items(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, CopyError::NotAFile { .. }), "{error}");
    }
}
