//! Container images without Docker: written as archives that `docker load`,
//! `ctr images import` and `kind load image-archive` read.

pub mod archive;
pub mod definition;
pub mod elf;
pub mod libraries;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use archive::{Content, Tree};
use definition::Definition;

/// A file every image with `system: true` gets, its content and where it lies.
const SYSTEM_FILES: [(&str, &str); 3] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n",
    ),
    ("etc/group", "root:x:0:\nnonroot:x:65532:\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
];
/// Certificates of public authorities, where Debian, Ubuntu and Go look for them.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
const STICKY: u32 = 0o1777;
const PLAIN: u32 = 0o644;
const EXECUTABLE: u32 = 0o755;

/// An image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Its definition is wrong.
    #[error("image definition {}", path.display())]
    Definition {
        /// The definition's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: definition::DefinitionError,
    },
    /// A file that the image needs was not given.
    #[error("the image needs the file {input:?}: give it with --input {input}=PATH")]
    NoInput {
        /// Its name in the definition.
        input: String,
    },
    /// A file was given that the image does not use.
    #[error("--input {input}=…: the image has no such file; it takes {}", known.join(", "))]
    UnknownInput {
        /// The name given.
        input: String,
        /// The names in the definition.
        known: Vec<String>,
    },
    /// A file cannot be read or written.
    #[error("could not read or write {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program's shared libraries cannot be found.
    #[error("the shared libraries of {}", path.display())]
    Libraries {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: libraries::LibraryError,
    },
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::File { path, source }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// The image's name.
    pub reference: String,
    /// Digest of its configuration, which Docker calls the image's ID.
    pub id: String,
    /// Size of the archive in bytes.
    pub bytes: u64,
}

/// Writes the image that the file `definition` describes to the archive `output`.
/// `inputs` are the files that it carries, by their names in the definition.
pub fn build(
    definition: &Path,
    inputs: &BTreeMap<String, PathBuf>,
    output: &Path,
) -> Result<Built, ImageError> {
    let text = fs::read_to_string(definition).map_err(file_error(definition))?;
    let image = Definition::parse(&text).map_err(|source| ImageError::Definition {
        path: definition.to_owned(),
        source,
    })?;
    build_defined(&image, inputs, output)
}

/// Like [`build`], of a definition that was read already.
pub fn build_defined(
    image: &Definition,
    inputs: &BTreeMap<String, PathBuf>,
    output: &Path,
) -> Result<Built, ImageError> {
    let known: Vec<String> = image.files.iter().map(|file| file.input.clone()).collect();
    if let Some(input) = inputs.keys().find(|input| !known.contains(input)) {
        let input = input.clone();
        return Err(ImageError::UnknownInput { input, known });
    }
    let mut tree = Tree::default();
    if image.system {
        add_system_files(&mut tree)?;
    }
    for file in &image.files {
        let path = inputs.get(&file.input).ok_or_else(|| ImageError::NoInput {
            input: file.input.clone(),
        })?;
        let size = path.metadata().map_err(file_error(path))?.len();
        let content = Content::File(path.clone(), size);
        tree.file(&file.to, file.mode, content);
        if file.mode & 0o111 != 0 {
            add_libraries(&mut tree, path)?;
        }
    }
    archive::write(image, &tree, output).map_err(file_error(output))
}

fn add_system_files(tree: &mut Tree) -> Result<(), ImageError> {
    for (path, text) in SYSTEM_FILES {
        tree.file(path, PLAIN, Content::Bytes(text.into()));
    }
    let authorities = Path::new(AUTHORITIES);
    let bytes = fs::read(authorities).map_err(file_error(authorities))?;
    tree.file(AUTHORITIES, PLAIN, Content::Bytes(bytes));
    tree.folder("tmp", STICKY);
    Ok(())
}

fn add_libraries(tree: &mut Tree, program: &Path) -> Result<(), ImageError> {
    let found = libraries::needed_by(program).map_err(|source| ImageError::Libraries {
        path: program.to_owned(),
        source,
    })?;
    for library in found {
        let size = library.metadata().map_err(file_error(&library))?.len();
        let path = library.to_string_lossy().into_owned();
        tree.file(&path, EXECUTABLE, Content::File(library, size));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(text: &str) -> Definition {
        Definition::parse(text).unwrap()
    }

    const ONE_FILE: &str =
        "reference: a/b:dev\nfiles: [{input: data, to: /d/data, mode: '0644'}]\n";

    #[test]
    fn inputs_must_match_the_definition() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out.tar");
        let image = definition(ONE_FILE);
        let none = build_defined(&image, &BTreeMap::new(), &output);
        assert!(matches!(none, Err(ImageError::NoInput { .. })));
        let other = BTreeMap::from([("date".to_owned(), PathBuf::from("/x"))]);
        let message = build_defined(&image, &other, &output)
            .unwrap_err()
            .to_string();
        assert!(message.contains("it takes data"), "{message}");
    }

    #[test]
    fn same_inputs_give_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        fs::write(&data, vec![7; 3000]).unwrap();
        let inputs = BTreeMap::from([("data".to_owned(), data.clone())]);
        let image = definition(ONE_FILE);
        let outputs = ["1.tar", "2.tar"].map(|name| folder.path().join(name));
        let first = build_defined(&image, &inputs, &outputs[0]).unwrap();
        // Neither the file's time nor the archive's name matters.
        fs::write(&data, vec![7; 3000]).unwrap();
        let second = build_defined(&image, &inputs, &outputs[1]).unwrap();
        assert_eq!(first, second);
        assert_eq!(
            fs::read(&outputs[0]).unwrap(),
            fs::read(&outputs[1]).unwrap()
        );
        assert_eq!(archive::reference(&outputs[0]).unwrap(), "a/b:dev");
        fs::write(&data, vec![8; 3000]).unwrap();
        let third = build_defined(&image, &inputs, &outputs[1]).unwrap();
        assert_ne!(first.id, third.id);
    }

    #[test]
    fn own_program_gets_its_libraries() {
        let mut tree = Tree::default();
        add_libraries(&mut tree, &std::env::current_exe().unwrap()).unwrap();
        let paths: Vec<&str> = tree.paths().collect();
        assert!(
            paths.iter().any(|path| path.ends_with("/libc.so.6")),
            "{paths:?}"
        );
    }
}
