//! Writes an image as the archive of one layer that `docker save` would write: a
//! configuration, the layer, and `manifest.json`, which names both. Equal contents
//! give equal bytes: entries are sorted and have no owner and no time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Seek as _, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::Built;
use super::definition::Definition;
use crate::digest::{self, Hashed};

const FOLDER: u32 = 0o755;
const FILE: u32 = 0o644;
const BUFFER: usize = 1 << 20;
const MANIFEST: &str = "manifest.json";
const EPOCH: &str = "1970-01-01T00:00:00Z";

/// Where a file's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// These.
    Bytes(Vec<u8>),
    /// A file of this machine and its size.
    File(PathBuf, u64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Folder,
    File(Content),
}

/// The files of an image, by path without the leading slash.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tree(BTreeMap<String, (u32, Node)>);

impl Tree {
    /// Adds a file, and the folders above it.
    pub fn file(&mut self, path: &str, mode: u32, content: Content) {
        let path = path.trim_start_matches('/');
        self.add_parents(path);
        self.0.insert(path.to_owned(), (mode, Node::File(content)));
    }

    /// Adds a folder with permissions of its own, and those above it.
    pub fn folder(&mut self, path: &str, mode: u32) {
        self.add_parents(path);
        self.0.insert(path.to_owned(), (mode, Node::Folder));
    }

    fn add_parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            let parent = path[..at].to_owned();
            self.0.entry(parent).or_insert((FOLDER, Node::Folder));
        }
    }

    /// All paths, sorted.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    fn write(&self, layer: impl Write) -> io::Result<()> {
        let mut layer = Builder::new(layer);
        for (path, (mode, node)) in &self.0 {
            match node {
                Node::Folder => append(&mut layer, &format!("{path}/"), *mode, None)?,
                Node::File(Content::Bytes(bytes)) => {
                    let size = bytes.len() as u64;
                    append(&mut layer, path, *mode, Some((size, &mut bytes.as_slice())))?;
                }
                Node::File(Content::File(source, size)) => {
                    let mut file = File::open(source)?;
                    append(&mut layer, path, *mode, Some((*size, &mut file)))?;
                }
            }
        }
        layer.into_inner()?.flush()
    }
}

/// Adds one entry; one without content is a folder.
fn append(
    archive: &mut Builder<impl Write>,
    path: &str,
    mode: u32,
    content: Option<(u64, &mut dyn io::Read)>,
) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let Some((size, bytes)) = content else {
        header.set_entry_type(EntryType::Directory);
        header.set_size(0);
        return archive.append_data(&mut header, path, io::empty());
    };
    header.set_entry_type(EntryType::Regular);
    header.set_size(size);
    let mut counted = Counted { bytes, count: 0 };
    archive.append_data(&mut header, path, (&mut counted).take(size))?;
    // A file that shrank would leave an archive that nobody can read.
    if counted.count == size {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "{path} changed while it was read"
        )))
    }
}

struct Counted<'a> {
    bytes: &'a mut dyn io::Read,
    count: u64,
}

impl io::Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.bytes.read(buffer)?;
        self.count += read as u64;
        Ok(read)
    }
}

/// Writes the archive to `output`, which appears only when it is complete.
pub(super) fn write(image: &Definition, tree: &Tree, output: &Path) -> io::Result<Built> {
    let folder = output
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(folder)?;
    let own = format!("{}.{}", output.display(), std::process::id());
    let (layer, unfinished) = (format!("{own}.layer"), format!("{own}.unfinished"));
    let built = write_parts(image, tree, Path::new(&layer), Path::new(&unfinished));
    // The layer is part of the archive now, or of no use.
    fs::remove_file(&layer)?;
    match &built {
        Ok(_) => fs::rename(&unfinished, output)?,
        Err(_) => {
            // The archive may not have been begun; the first error is what counts.
            let _ = fs::remove_file(&unfinished);
        }
    }
    built
}

fn write_parts(
    image: &Definition,
    tree: &Tree,
    layer_path: &Path,
    unfinished: &Path,
) -> io::Result<Built> {
    let layer = BufWriter::with_capacity(BUFFER, File::create(layer_path)?);
    let mut hashed = Hashed::new(layer);
    tree.write(&mut hashed)?;
    let layer_digest = hashed.digest();
    let config = configuration(image, &layer_digest);
    let id = digest::of(&config);
    let layer_name = format!("{layer_digest}.tar");
    let config_name = format!("{id}.json");
    let manifest = json!([{
        "Config": config_name,
        "RepoTags": [image.reference],
        "Layers": [layer_name],
    }]);
    let manifest = manifest.to_string();

    let mut archive = Builder::new(BufWriter::with_capacity(1 << 20, File::create(unfinished)?));
    for (name, text) in [(MANIFEST, &manifest), (config_name.as_str(), &config)] {
        let size = text.len() as u64;
        append(&mut archive, name, FILE, Some((size, &mut text.as_bytes())))?;
    }
    let mut layer = File::open(layer_path)?;
    let size = layer.metadata()?.len();
    append(&mut archive, &layer_name, FILE, Some((size, &mut layer)))?;
    let mut file = archive
        .into_inner()?
        .into_inner()
        .map_err(io::Error::from)?;
    Ok(Built {
        reference: image.reference.clone(),
        id: format!("sha256:{id}"),
        bytes: file.stream_position()?,
    })
}

/// The image's configuration, as the OCI image specification names its fields.
fn configuration(image: &Definition, layer_digest: &str) -> String {
    let env: Vec<String> = image
        .env
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    json!({
        "created": EPOCH,
        "architecture": architecture,
        "os": "linux",
        "config": {
            "User": image.user,
            "Entrypoint": image.entrypoint,
            "Env": env,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
        "history": [{"created": EPOCH, "created_by": "llama-cluster image"}],
    })
    .to_string()
}

/// The name of the image in an archive.
pub fn reference(archive: &Path) -> io::Result<String> {
    let mut archive = tar::Archive::new(File::open(archive)?);
    for entry in archive.entries_with_seek()? {
        let mut entry = entry?;
        if entry.path()?.as_os_str() != MANIFEST {
            continue;
        }
        let mut text = String::new();
        entry.read_to_string(&mut text)?;
        let manifest: serde_json::Value = serde_json::from_str(&text)?;
        if let Some(name) = manifest[0]["RepoTags"][0].as_str() {
            return Ok(name.to_owned());
        }
    }
    Err(io::Error::other(format!("no image is named in {MANIFEST}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_is_sorted_with_folders_before_their_files() {
        let mut tree = Tree::default();
        tree.file("/usr/bin/b", 0o755, Content::Bytes(b"b".to_vec()));
        tree.folder("tmp", 0o1777);
        tree.file("/usr/bin/a", 0o644, Content::Bytes(b"aa".to_vec()));
        let mut bytes = Vec::new();
        tree.write(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries: Vec<(String, u32, u64)> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                assert_eq!((header.uid().unwrap(), header.mtime().unwrap()), (0, 0));
                let path = entry.path().unwrap().display().to_string();
                (path, header.mode().unwrap(), header.size().unwrap())
            })
            .collect();
        let expected = [
            ("tmp/", 0o1777, 0),
            ("usr/", 0o755, 0),
            ("usr/bin/", 0o755, 0),
            ("usr/bin/a", 0o644, 2),
            ("usr/bin/b", 0o755, 1),
        ];
        let expected = expected.map(|(path, mode, size)| (path.to_owned(), mode, size));
        assert_eq!(entries, expected);
    }

    #[test]
    fn a_file_of_another_size_than_announced_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("f");
        fs::write(&source, "four").unwrap();
        let mut tree = Tree::default();
        tree.file("f", 0o644, Content::File(source, 5));
        assert!(tree.write(io::sink()).is_err());
    }

    #[test]
    fn no_archive_appears_on_failure() {
        let folder = tempfile::tempdir().unwrap();
        let image = Definition::parse("reference: a:b\nfiles: []\n").unwrap();
        let mut tree = Tree::default();
        tree.file("f", 0o644, Content::File("/no/such/file".into(), 1));
        assert!(write(&image, &tree, &folder.path().join("x.tar")).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn configuration_names_the_layer() {
        let text = "reference: a:b\nuser: 65532:65532\nenv: {A: b}\nfiles: []\n";
        let config = configuration(&Definition::parse(text).unwrap(), "abc");
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], "sha256:abc");
        assert_eq!(config["config"]["Env"][0], "A=b");
        assert_eq!(config["config"]["User"], "65532:65532");
    }
}
