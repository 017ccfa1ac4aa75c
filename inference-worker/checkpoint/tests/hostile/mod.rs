//! Checkpoints that are broken on purpose: headers of real ones, changed, over
//! holes in place of their weights.

#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    clippy::expect_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "each test file uses a part, and tests may fail"
)]

pub mod gguf;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use llama_checkpoint::checkpoint::LoadFormat;
use llama_checkpoint::{Checkpoint, ModelError, ModelErrorCategory};
use serde_json::{Map, Value};
use tempfile::TempDir;

pub use llama_checkpoint::ModelErrorCategory::{
    ModelInvalid as Invalid, ModelNotFound as NotFound, ModelTruncated as Truncated,
    ModelUnsupported as Unsupported,
};

pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
/// Optimised, the worst takes less than a second; tests are not, and share their
/// machine.
const LONGEST: Duration = Duration::from_secs(10);

/// The folder of a real checkpoint.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../model/tests/reference")
        .join(name)
}

/// The header of a safetensors file, and the length of what lies behind it.
pub fn header_of(path: &Path) -> (Vec<u8>, u64) {
    let bytes = std::fs::read(path).expect("is there");
    let (len, rest) = bytes.split_first_chunk().expect("has a length");
    let len = usize::try_from(u64::from_le_bytes(*len)).expect("fits");
    (rest[..len].to_vec(), (rest.len() - len) as u64)
}

/// What `path` is refused with, with the folder's name cut out of the sentence.
pub fn refusal_of(folder: &Path, path: &Path, format: LoadFormat) -> (ModelErrorCategory, String) {
    let start = Instant::now();
    let Err(error) = Checkpoint::open(path, format) else {
        panic!("{} opens", path.display())
    };
    assert!(start.elapsed() < LONGEST, "{error}: {:?}", start.elapsed());
    let category = error.category();
    (category, sentence(&error, folder))
}

/// The error in one line, with `folder` cut out.
pub fn sentence(error: &ModelError, folder: &Path) -> String {
    let folder = format!("{}/", folder.display());
    error.to_string().replace(&folder, "")
}

/// A checkpoint to be broken.
pub struct Folder(TempDir);

impl Folder {
    pub fn empty() -> Self {
        Self(TempDir::new().expect("a folder"))
    }

    /// Headers and texts of the checkpoint `name`.
    pub fn of(name: &str) -> Self {
        let folder = Self::empty();
        for entry in fixture(name).read_dir().expect("is there") {
            let path = entry.expect("reads").path();
            let name = path.file_name().expect("a name").to_str().expect("text");
            if name.ends_with(".safetensors") && name != "reference.safetensors" {
                let (header, data) = header_of(&path);
                folder.put_tensors(name, &header, data);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                std::fs::copy(&path, folder.path().join(name)).expect("copies");
            }
        }
        folder
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file.
    pub fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path().join(name), bytes).expect("writes");
    }

    /// Writes a safetensors file with `data` bytes of nothing behind its header.
    pub fn put_tensors(&self, name: &str, header: &[u8], data: u64) {
        let mut file = File::create(self.path().join(name)).expect("creates");
        let len = header.len() as u64;
        file.write_all(&len.to_le_bytes()).expect("writes");
        file.write_all(header).expect("writes");
        file.set_len(8 + len + data).expect("grows");
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.path().join(name)).expect("removes");
    }

    /// Makes a file longer or shorter.
    pub fn resize(&self, name: &str, change: i64) {
        let file = File::options()
            .write(true)
            .open(self.path().join(name))
            .expect("opens");
        let len = file.metadata().expect("reads").len();
        file.set_len(len.checked_add_signed(change).expect("fits"))
            .expect("resizes");
    }

    /// Changes a JSON file.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let text = std::fs::read(self.path().join(name)).expect("is there");
        let mut json = serde_json::from_slice(&text).expect("is JSON");
        change(&mut json);
        self.put(name, json.to_string());
    }

    /// Changes the header of a file, not its length.
    pub fn change_header(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let (header, data) = header_of(&self.path().join(name));
        let mut json: Value = serde_json::from_slice(&header).expect("is JSON");
        change(json.as_object_mut().expect("an object"));
        self.put_tensors(name, json.to_string().as_bytes(), data);
    }

    /// Changes types and shapes of a file whose places follow.
    pub fn change_tensors(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let (header, _) = header_of(&self.path().join(name));
        let mut json: Value = serde_json::from_slice(&header).expect("is JSON");
        let tensors = json.as_object_mut().expect("an object");
        change(tensors);
        let data = lay_out(tensors);
        self.put_tensors(name, json.to_string().as_bytes(), data);
    }

    pub fn refusal(&self) -> (ModelErrorCategory, String) {
        refusal_of(self.path(), self.path(), LoadFormat::Auto)
    }

    /// Without weights.
    pub fn dummy_refusal(&self) -> (ModelErrorCategory, String) {
        refusal_of(self.path(), self.path(), LoadFormat::Dummy)
    }

    pub fn opens(&self) -> Checkpoint {
        match Checkpoint::open(self.path(), LoadFormat::Auto) {
            Ok(checkpoint) => checkpoint,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Puts tensors one behind the other and says where the last ends.
fn lay_out(tensors: &mut Map<String, Value>) -> u64 {
    let mut end = 0;
    for (name, tensor) in tensors {
        if name == "__metadata__" {
            continue;
        }
        let size = match tensor["dtype"].as_str().expect("a type") {
            "F64" | "I64" => 8,
            "F32" | "I32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        let sizes = tensor["shape"].as_array().expect("a shape");
        let values: u64 = sizes
            .iter()
            .map(|size| size.as_u64().expect("a size"))
            .product();
        let start = end;
        end += values * size;
        tensor["data_offsets"] = serde_json::json!([start, end]);
    }
    end
}
