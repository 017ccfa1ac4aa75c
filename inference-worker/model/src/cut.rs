//! Writing a model cut for the ranks of a layout: one file a rank, which the rank
//! reads from end to end.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use llama_checkpoint::checkpoint::{CONFIG, SHARDS, ShardManifest, cut_name, cut_scales_name};
use llama_checkpoint::slices::{MatrixSlice, ModelSlices, VectorSlice};
use llama_checkpoint::{Checkpoint, Layout, ModelError, Shard};
use serde_json::{Map, Value, json};

use crate::load::Reader;

/// Files with text and configuration that go with the weights.
const COPIED: [&str; 7] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// Metadata of a GGUF without its tensors: its tokenizer and chat template.
const TEXT: &str = "text.gguf";
/// Headers of safetensors files are padded to multiples of this.
const HEADER_ALIGNMENT: usize = 8;

/// Writes the parts of `checkpoint` for every rank of `layout` into the folder
/// `out`, which must be empty or missing, telling `progress` the bytes written and
/// the bytes to write. The manifest comes last, so that a folder with one is
/// complete.
///
/// # Errors
/// `InvalidLayout` when the model cannot be split so; when the folder is not empty,
/// or files cannot be read or written.
pub fn write_shards(
    checkpoint: &Checkpoint,
    layout: Layout,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ModelError> {
    let ranks = (0..layout.world())
        .map(|rank| {
            let shard = Shard::new(checkpoint.config(), layout, rank)?;
            ModelSlices::locate(checkpoint, &shard)
        })
        .collect::<Result<Vec<_>, _>>()?;
    claim(out)?;
    let total = ranks.iter().map(ModelSlices::bytes).sum();
    let mut manifest = ShardManifest::new(checkpoint, layout);
    let reader = Reader::of(checkpoint.files())?;
    let mut written = 0;
    for (slices, name) in ranks.iter().zip(manifest.files.clone()) {
        let path = out.join(&name);
        let mut file = Output::create(&path)?;
        let entries = entries(slices);
        file.write(&header(&entries))?;
        let mut digests = BTreeMap::new();
        for entry in &entries {
            let bytes = entry.bytes(&reader)?;
            file.write(&bytes)?;
            let (name, ..) = entry.description();
            digests.insert(name, blake3::hash(&bytes).to_hex().to_string());
            written += bytes.len() as u64;
            progress(written, total);
        }
        file.finish()?;
        manifest.digests.push(digests);
    }
    copy_text(checkpoint, out)?;
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| ModelError::Invalid(format!("write {SHARDS}: {error}")))?;
    let mut file = Output::create(&out.join(SHARDS))?;
    file.write(&text)?;
    file.finish()
}

/// Makes the folder, or makes sure that it is empty.
fn claim(out: &Path) -> Result<(), ModelError> {
    let io = |source| io_error(out, source);
    fs::create_dir_all(out).map_err(io)?;
    if out.read_dir().map_err(io)?.next().is_some() {
        return Err(ModelError::Layout(format!(
            "the folder {} is not empty; name a new one",
            out.display()
        )));
    }
    Ok(())
}

/// What a rank's file holds, in order.
enum Entry<'a> {
    Matrix(&'a MatrixSlice),
    Scales(&'a MatrixSlice),
    Vector(&'a VectorSlice),
}

fn entries(slices: &ModelSlices) -> Vec<Entry<'_>> {
    let matrices = slices.matrices().into_iter().flat_map(|matrix| {
        let scales = matrix.scales.as_ref().map(|_| Entry::Scales(matrix));
        [Some(Entry::Matrix(matrix)), scales].into_iter().flatten()
    });
    let vectors = slices.vectors().into_iter().map(Entry::Vector);
    matrices.chain(vectors).collect()
}

impl Entry<'_> {
    /// Name, type and shape.
    fn description(&self) -> (String, &'static str, Vec<usize>) {
        match self {
            Self::Matrix(matrix) => {
                let shape = vec![matrix.rows, matrix.format.row_bytes(matrix.columns)];
                (cut_name(&matrix.name, matrix.format), "U8", shape)
            }
            Self::Scales(matrix) => (cut_scales_name(&matrix.name), "F32", vec![matrix.rows]),
            Self::Vector(vector) => (vector.name.clone(), "F32", vec![vector.len]),
        }
    }

    fn bytes(&self, reader: &Reader) -> Result<Vec<u8>, ModelError> {
        let floats = |values: Vec<f32>| {
            let bytes = values.into_iter().flat_map(f32::to_le_bytes);
            bytes.collect()
        };
        match self {
            Self::Matrix(matrix) => reader.matrix_bytes(matrix),
            Self::Scales(matrix) => Ok(floats(reader.matrix_scales(matrix)?.unwrap_or_default())),
            Self::Vector(vector) => Ok(floats(reader.vector(vector)?)),
        }
    }
}

/// The header of a safetensors file with these entries.
fn header(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut tensors = Map::new();
    let mut end = 0;
    for entry in entries {
        let (name, kind, shape) = entry.description();
        let start = end;
        let size = if kind == "F32" { size_of::<f32>() } else { 1 };
        end += shape.iter().product::<usize>() * size;
        let info = json!({"dtype": kind, "shape": shape, "data_offsets": [start, end]});
        tensors.insert(name, info);
    }
    let mut text = Value::Object(tensors).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

/// Copies what the model's text needs.
fn copy_text(checkpoint: &Checkpoint, out: &Path) -> Result<(), ModelError> {
    if let Some(gguf) = checkpoint.gguf() {
        let mut file = Output::create(&out.join(TEXT))?;
        file.write(&gguf.without_tensors()?)?;
        return file.finish();
    }
    for name in COPIED {
        let from = checkpoint.path().join(name);
        if from.is_file() {
            let to = out.join(name);
            fs::copy(&from, &to).map_err(|source| io_error(&to, source))?;
        }
    }
    Ok(())
}

/// A file being written, whose errors name it.
struct Output {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Output {
    fn create(path: &Path) -> Result<Self, ModelError> {
        let file = File::create_new(path).map_err(|source| io_error(path, source))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        let written = self.file.write_all(bytes);
        written.map_err(|source| io_error(&self.path, source))
    }

    fn finish(self) -> Result<(), ModelError> {
        let path = self.path;
        let file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all())
            .map_err(|source| io_error(&path, source))
    }
}

fn io_error(path: &Path, source: io::Error) -> ModelError {
    ModelError::Write {
        path: path.display().to_string(),
        source,
    }
}
