//! A checkpoint: files of weights with their headers read, and the model's shape.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::quantization::Quantization;
use crate::config::{self, HuggingFace, LlamaConfig};
use crate::error::ModelError;
use crate::foreign::{listed, parser_said, read_text, shown};
use crate::format::Format;
use crate::gguf::Gguf;
use crate::layout::Layout;
use crate::names::Names;
use crate::safetensors::{INDEX, SINGLE, Tensors, WeightFile};
use crate::shard::Shard;
use crate::slices::ModelSlices;
use crate::stored::{StoredTensor, StoredType};

/// The shape of a Hugging Face model, beside its weights.
pub const CONFIG: &str = "config.json";
/// Says that a folder holds a model cut for the ranks of one layout.
pub const SHARDS: &str = "llama-shards.json";
/// More than any `config.json` needs.
pub(crate) const CONFIG_LIMIT: u64 = 1 << 20;
/// A manifest names every tensor of every rank, with its digest.
const MANIFEST_LIMIT: u64 = 256 << 20;
/// Version of the form of [`ShardManifest`].
const SHARDS_VERSION: u32 = 1;
/// Hexadecimal digits of a BLAKE3 hash.
const DIGEST_LEN: usize = 64;
/// Ranks that a model may be cut for.
const MAX_RANKS: usize = 4096;

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// From the files of the checkpoint.
    #[default]
    Auto,
    /// From nowhere: random numbers in the shape of `config.json`.
    Dummy,
}

/// What the tensors of a checkpoint are.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// Whole matrices.
    Stored,
    /// Parts that were cut out for each rank.
    Shards(Shards),
    /// There are none; matrices get random numbers in this form.
    Random(Format),
}

/// The parts of every rank.
#[derive(Clone, Debug)]
pub(crate) struct Shards {
    layout: Layout,
    by_rank: Vec<BTreeMap<String, StoredTensor>>,
    digests: Vec<BTreeMap<String, String>>,
}

impl Shards {
    /// The tensors of one rank.
    pub(crate) fn of(&self, shard: &Shard) -> Result<&BTreeMap<String, StoredTensor>, ModelError> {
        let Layout { tensor, pipeline } = self.layout;
        self.by_rank
            .get(shard.rank)
            .filter(|_| shard.layout == self.layout)
            .ok_or_else(|| {
                ModelError::Layout(format!(
                    "the model was cut for tensor parallel {tensor} and pipeline parallel {pipeline}, not for {} and {}",
                    shard.layout.tensor, shard.layout.pipeline
                ))
            })
    }
}

/// What [`SHARDS`] holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardManifest {
    /// Version of this form.
    pub version: u32,
    /// The layout that the model was cut for.
    pub layout: Layout,
    /// Shape of the whole model.
    pub config: LlamaConfig,
    /// Whose names the tensors have.
    pub names: Names,
    /// By rank, in the same folder.
    pub files: Vec<String>,
    /// By rank, the BLAKE3 hash of each tensor's bytes; may be left out.
    #[serde(default)]
    pub digests: Vec<BTreeMap<String, String>>,
}

/// What every version of [`ShardManifest`] holds.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl ShardManifest {
    /// What to write beside the parts of `checkpoint`.
    pub fn new(checkpoint: &Checkpoint, layout: Layout) -> Self {
        Self {
            version: SHARDS_VERSION,
            layout,
            config: checkpoint.config.clone(),
            names: checkpoint.names,
            files: (0..layout.world())
                .map(|rank| format!("rank-{rank:05}.safetensors"))
                .collect(),
            digests: Vec::new(),
        }
    }
}

/// What a rank's part of a matrix is called in its file.
pub fn cut_name(name: &str, format: Format) -> String {
    format!("{name}:{}", format.name())
}

/// What the scales of a rank's part of a matrix are called in its file.
pub fn cut_scales_name(name: &str) -> String {
    format!("{name}:scales")
}

/// An open checkpoint. Its headers are read and checked, its weights are not.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, StoredTensor>,
    content: Content,
    config: LlamaConfig,
    quantization: Quantization,
    names: Names,
    gguf: Option<Gguf>,
}

impl Checkpoint {
    /// Opens what lies at `path`: a GGUF or the folder of one; a folder with
    /// `config.json` and safetensors, or one of its files; a folder that
    /// `llama-worker shard` wrote.
    ///
    /// # Errors
    /// `ModelNotFound` when there is no such file or no single one to choose,
    /// `ModelTruncated` when a tensor would lie behind the end of a file,
    /// `ModelInvalid` and `ModelUnsupported` when headers or `config.json` are
    /// damaged, contradict each other, or ask for what is not computed.
    pub fn open(path: &Path, load_format: LoadFormat) -> Result<Self, ModelError> {
        let folder = if path
            .extension()
            .is_some_and(|ext| ext == "safetensors" || ext == "json")
        {
            path.parent().filter(|folder| folder.join(CONFIG).is_file())
        } else {
            Some(path)
        };
        let folder = folder.unwrap_or(path);
        let checkpoint = if load_format == LoadFormat::Dummy {
            Self::dummy(folder)?
        } else if folder.join(SHARDS).is_file() {
            return Self::shards(folder);
        } else if folder.join(CONFIG).is_file() {
            Self::hugging_face(folder, path)?
        } else {
            Self::gguf_at(path)?
        };
        ModelSlices::check(&checkpoint)?;
        Ok(checkpoint)
    }

    fn dummy(folder: &Path) -> Result<Self, ModelError> {
        let (found, file) = read_config(folder)?;
        if found.quantization != Quantization::default() {
            return Err(ModelError::Unsupported(format!(
                "{file}: random weights are not quantised; remove quantization_config"
            )));
        }
        let format = match found.dtype.as_deref() {
            None | Some("bfloat16") => Format::Bf16,
            Some("float16") => Format::F16,
            Some("float32") => Format::F32,
            Some(other) => {
                return Err(ModelError::Unsupported(format!(
                    "{file}: dtype is \"{}\"; random weights are \"bfloat16\", \"float16\" or \"float32\"",
                    shown(other)
                )));
            }
        };
        Ok(Self::of_config(
            folder,
            found,
            Tensors::default(),
            Content::Random(format),
        ))
    }

    fn hugging_face(folder: &Path, path: &Path) -> Result<Self, ModelError> {
        let (found, _) = read_config(folder)?;
        let mut tensors = Tensors::default();
        if folder.join(INDEX).is_file() {
            tensors = Tensors::from_index(&folder.join(INDEX))?;
        } else if folder.join(SINGLE).is_file() {
            tensors.add(&folder.join(SINGLE))?;
        } else if path.is_file() {
            tensors.add(path)?;
        } else {
            return Err(ModelError::NotFound(format!(
                "the folder {} holds {CONFIG} but neither {INDEX} nor {SINGLE}",
                folder.display()
            )));
        }
        Ok(Self::of_config(folder, found, tensors, Content::Stored))
    }

    fn of_config(folder: &Path, found: HuggingFace, tensors: Tensors, content: Content) -> Self {
        Self {
            path: folder.to_owned(),
            files: tensors.files,
            tensors: tensors.by_name,
            content,
            config: found.config,
            quantization: found.quantization,
            names: found.names,
            gguf: None,
        }
    }

    fn gguf_at(path: &Path) -> Result<Self, ModelError> {
        let gguf = Gguf::open(path)?;
        let config = config::from_gguf(&gguf)?;
        let tensors = gguf.tensors().iter().map(|tensor| {
            let size = |dim: &u64| usize::try_from(*dim).unwrap_or(usize::MAX);
            let stored = StoredTensor {
                name: tensor.name.clone(),
                shape: tensor.dims.iter().rev().map(size).collect(),
                stored: match tensor.ggml_type.format() {
                    Some(format) => StoredType::Format(format),
                    None => StoredType::Ggml(tensor.ggml_type),
                },
                file: 0,
                start: tensor.start,
                bytes: tensor.bytes,
            };
            (tensor.name.clone(), stored)
        });
        let starts = gguf.tensors().iter().map(|tensor| tensor.start);
        let file = WeightFile {
            path: gguf.path().to_owned(),
            len: gguf.file_len(),
            header: starts.min().unwrap_or_else(|| gguf.file_len()),
        };
        Ok(Self {
            path: gguf.path().to_owned(),
            files: vec![file],
            tensors: tensors.collect(),
            content: Content::Stored,
            config,
            quantization: Quantization::default(),
            names: Names::Gguf,
            gguf: Some(gguf),
        })
    }

    fn shards(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(SHARDS);
        let ShardManifest {
            layout,
            config,
            names,
            files: listing,
            digests,
            ..
        } = read_manifest(&path)?;
        let mut shards = Shards {
            layout,
            by_rank: Vec::new(),
            digests,
        };
        let mut files = Vec::new();
        for (rank, name) in listing.iter().enumerate() {
            let mut tensors = Tensors::default();
            tensors.add(&listed(&path, name)?)?;
            files.append(&mut tensors.files);
            for tensor in tensors.by_name.values_mut() {
                tensor.file = rank;
            }
            shards.by_rank.push(tensors.by_name);
        }
        let checkpoint = Self {
            path: folder.to_owned(),
            files,
            tensors: BTreeMap::new(),
            content: Content::Shards(shards),
            config,
            quantization: Quantization::default(),
            names,
            gguf: None,
        };
        for rank in 0..layout.world() {
            let shard = Shard::new(&checkpoint.config, layout, rank)
                .map_err(|error| checkpoint.invalid(&error.to_string()))?;
            ModelSlices::locate(&checkpoint, &shard)?;
        }
        Ok(checkpoint)
    }

    /// What was opened: a file, or a folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The files that hold weights.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// The GGUF, where the checkpoint is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// What a user should know of a checkpoint that works: sentences.
    pub fn warnings(&self) -> Vec<String> {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        for tensor in self.tensors.values() {
            if let StoredType::Ggml(kind) = tensor.stored {
                *kinds.entry(kind.to_string()).or_default() += 1;
            }
        }
        let sentence = |(kind, count)| {
            format!(
                "{}: {count} tensors are stored as {kind}, which no kernel multiplies; they are \
                 quantised anew as Q8_0, which takes more memory and rounds once more",
                self.path.display()
            )
        };
        kinds.into_iter().map(sentence).collect()
    }

    /// The layout that the files were cut for, where they were.
    pub fn cut_for(&self) -> Option<Layout> {
        match &self.content {
            Content::Shards(shards) => Some(shards.layout),
            Content::Stored | Content::Random(_) => None,
        }
    }

    /// The BLAKE3 hash that the bytes of `tensor` should have in the file of `rank`,
    /// where the files were cut for ranks.
    pub fn digest(&self, rank: usize, tensor: &str) -> Option<&str> {
        match &self.content {
            Content::Shards(shards) => shards.digests.get(rank)?.get(tensor).map(String::as_str),
            Content::Stored | Content::Random(_) => None,
        }
    }

    /// Every tensor by name; empty where files were cut for ranks.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    pub(crate) fn quantization(&self) -> &Quantization {
        &self.quantization
    }

    pub(crate) fn names(&self) -> Names {
        self.names
    }

    /// Whether `name` belongs to a part of the model that is not text.
    pub(crate) fn is_skipped(&self, name: &str) -> bool {
        self.names
            .other_parts()
            .iter()
            .any(|prefix| name.starts_with(prefix))
    }

    /// A `ModelInvalid` error about this checkpoint.
    pub fn invalid(&self, what: &str) -> ModelError {
        ModelError::Invalid(format!("{}: {what}", self.path.display()))
    }

    /// A `ModelUnsupported` error about this checkpoint.
    pub fn unsupported(&self, what: &str) -> ModelError {
        ModelError::Unsupported(format!("{}: {what}", self.path.display()))
    }
}

/// What `config.json` in `folder` says, and its path.
fn read_config(folder: &Path) -> Result<(HuggingFace, String), ModelError> {
    let path = folder.join(CONFIG);
    let shown = path.display().to_string();
    let found = config::parse(&shown, &read_text(&path, CONFIG_LIMIT)?)?;
    Ok((found, shown))
}

/// What the manifest at `path` says. Its numbers are checked, its files are not.
fn read_manifest(path: &Path) -> Result<ShardManifest, ModelError> {
    let file = path.display();
    let damaged = |error: serde_json::Error| {
        ModelError::Invalid(format!("{file} is damaged: {}", parser_said(&error)))
    };
    let text = read_text(path, MANIFEST_LIMIT)?;
    let Version { version } = serde_json::from_str(&text).map_err(damaged)?;
    if version != SHARDS_VERSION {
        return Err(ModelError::Unsupported(format!(
            "{file} has version {version}; this worker reads version {SHARDS_VERSION}"
        )));
    }
    let manifest: ShardManifest = serde_json::from_str(&text).map_err(damaged)?;
    let (Layout { tensor, pipeline }, files) = (manifest.layout, manifest.files.len());
    if tensor.checked_mul(pipeline) != Some(files) || !(1..=MAX_RANKS).contains(&files) {
        return Err(ModelError::Invalid(format!(
            "{file} names {files} files for tensor parallel {tensor} and pipeline parallel {pipeline}"
        )));
    }
    let digests = manifest.digests.len();
    if digests != 0 && digests != files {
        return Err(ModelError::Invalid(format!(
            "{file} names {files} files and digests of {digests}"
        )));
    }
    let is_digest =
        |text: &str| text.len() == DIGEST_LEN && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut digests = manifest.digests.iter().flatten();
    if let Some((name, digest)) = digests.find(|(_, digest)| !is_digest(digest)) {
        return Err(ModelError::Invalid(format!(
            "{file} gives tensor {} the digest \"{}\", expected {DIGEST_LEN} hexadecimal digits",
            shown(name),
            shown(digest)
        )));
    }
    let config = manifest.config.check(&file.to_string())?;
    Ok(ShardManifest { config, ..manifest })
}
