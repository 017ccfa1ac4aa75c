//! `LoRA` adapters as PEFT stores them: changes of a model's matrices by products of
//! two thin ones (Hu et al. 2021). `W·x` becomes `W·x + s·B·(A·x)`.
//!
//! An adapter is cut as the matrices that it changes. Where those are cut by rows, a
//! rank has the whole A and its rows of B; where they are cut by columns, it has its
//! columns of A and the whole B.

mod settings;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::checkpoint::Checkpoint;
use crate::config::{ARCHITECTURE_KEY, LlamaConfig};
use crate::error::ModelError;
use crate::foreign::shown;
use crate::format::{BLOCK, Format};
use crate::gguf::Gguf;
use crate::safetensors::Tensors;
use crate::shard::Shard;
use crate::stored::{Region, StoredTensor, StoredType};
use settings::Settings;

/// The file with the matrices.
const MATRICES: &str = "adapter_model.safetensors";
/// What each matrix of an adapter takes besides its values: bookkeeping, and what the
/// allocator rounds up. Measured: 2056 bytes.
const MATRIX_BYTES: usize = 2560;
/// What a GGUF of the plain kind calls its architecture.
const GGUF_LLAMA: &str = "llama";
/// What PEFT puts before the names of a model's parts.
const PEFT_PREFIX: &str = "base_model.model.";
/// What models put before the names of their layers.
const LAYER_PREFIXES: [&str; 3] = ["model.", "language_model.model.", "model.language_model."];

/// A matrix of a layer that adapters may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Attention output projection.
    Output,
    /// Gate projection of the feed-forward network, or of the one beside the experts.
    Gate,
    /// Its up projection.
    Up,
    /// Its down projection.
    Down,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The name in an adapter's tensors, behind that of the layer.
    fn name(self, has_experts: bool, feed_forward: &str) -> String {
        let network = |part: &str| {
            let shared = if has_experts { "shared_expert." } else { "" };
            format!("{feed_forward}.{shared}{part}")
        };
        match self {
            Self::Query => "self_attn.q_proj".to_owned(),
            Self::Key => "self_attn.k_proj".to_owned(),
            Self::Value => "self_attn.v_proj".to_owned(),
            Self::Output => "self_attn.o_proj".to_owned(),
            Self::Gate => network("gate_proj"),
            Self::Up => network("up_proj"),
            Self::Down => network("down_proj"),
        }
    }

    /// Whether ranks have some of its columns, and not of its rows.
    pub fn is_cut_by_columns(self) -> bool {
        matches!(self, Self::Output | Self::Down)
    }
}

/// Room that a rank keeps for adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdapterRoom {
    /// Adapters that may be loaded at a time.
    pub count: usize,
    /// Highest rank of one.
    pub rank: usize,
}

impl AdapterRoom {
    /// For none.
    pub const NONE: Self = Self { count: 0, rank: 0 };

    /// Bytes that they take on the rank of `shard`, each of the highest rank, in f32,
    /// and changing every matrix that it may.
    pub fn bytes(self, config: &LlamaConfig, shard: &Shard) -> u64 {
        let values = |layer: usize| -> usize {
            let sizes = Target::ALL.map(|target| {
                let part = part(config, shard, layer, target);
                self.rank * part.columns.len()
                    + part.rows.len() * (self.rank.next_multiple_of(BLOCK) + 1)
            });
            sizes.into_iter().sum()
        };
        let values: usize = shard.layers.clone().map(values).sum();
        let matrices = 2 * Target::ALL.len() * shard.layers.len();
        let each = values * size_of::<f32>() + matrices * MATRIX_BYTES;
        (self.count * each) as u64
    }
}

/// The part of a changed matrix that a rank has.
struct Part {
    /// All rows and columns.
    shape: (usize, usize),
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    /// Where partial sums over `columns` end, counted from their start.
    ends: Vec<usize>,
}

fn part(config: &LlamaConfig, shard: &Shard, layer: usize, target: Target) -> Part {
    let hidden = config.hidden;
    let (width, network) = match config.experts {
        Some(experts) if config.layers[layer].experts => (experts.shared_ffn, &shard.shared_ffn),
        _ => (config.ffn, &shard.ffn),
    };
    let by_rows = |height, rows| Part {
        shape: (height, hidden),
        rows,
        columns: 0..hidden,
        ends: vec![hidden],
    };
    let by_columns = |width, columns, ends| Part {
        shape: (hidden, width),
        rows: 0..hidden,
        columns,
        ends,
    };
    match target {
        Target::Query => by_rows(config.query_width(), shard.query_range(config)),
        Target::Key | Target::Value => by_rows(config.kv_width(), shard.kv_range(config)),
        Target::Gate | Target::Up => by_rows(width, network.clone()),
        Target::Output => by_columns(
            config.query_width(),
            shard.query_range(config),
            shard.query_ends(config),
        ),
        Target::Down => {
            let ends = Shard::ffn_ends(config, width, network);
            by_columns(width, network.clone(), ends)
        }
    }
}

/// What must be known of a model to load adapters of it.
#[derive(Clone, Debug)]
pub struct AdapterBase {
    /// The model's shape.
    pub config: LlamaConfig,
    /// The rank that loads.
    pub shard: Shard,
    /// Whether rows of query and key projections lie in another order than where the
    /// adapter was trained: those of a GGUF turn together side by side, those of
    /// Hugging Face's Llama half a head apart.
    pub is_reordered: bool,
}

impl AdapterBase {
    /// Of the part of a model that `shard` says.
    pub fn new(checkpoint: &Checkpoint, shard: Shard) -> Self {
        let is_llama = |gguf: &Gguf| {
            let architecture = gguf.text(ARCHITECTURE_KEY);
            architecture.is_ok_and(|name| name == Some(GGUF_LLAMA))
        };
        Self {
            config: checkpoint.config().clone(),
            shard,
            is_reordered: checkpoint.gguf().is_some_and(is_llama),
        }
    }
}

/// One of the two matrices of a change, or the part of it that a rank has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinMatrix {
    /// Name in the header.
    pub name: String,
    /// How its values are stored: F32, F16 or BF16.
    pub format: Format,
    /// Where the rows lie, or parts of them.
    pub region: Region,
    /// Rows.
    pub rows: usize,
    /// Columns that the rank has.
    pub columns: usize,
}

/// How an adapter changes one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Layer of the model.
    pub layer: usize,
    /// The matrix.
    pub target: Target,
    /// `[rank, columns]`.
    pub a: ThinMatrix,
    /// `[rows, rank]`.
    pub b: ThinMatrix,
    /// Where partial sums over the columns of A end; see [`crate::order`].
    pub ends: Vec<usize>,
    /// What `B·A` is multiplied by.
    pub scale: f32,
    /// Rows of a head in which B must be put into the order of the model.
    pub reordered_heads: Option<usize>,
}

/// An adapter in a folder: its settings and the header of its matrices.
#[derive(Debug)]
pub struct AdapterFiles {
    settings: Settings,
    path: PathBuf,
    tensors: Tensors,
}

impl AdapterFiles {
    /// Opens the adapter in `folder`.
    ///
    /// # Errors
    /// When one of its files is missing or damaged, or asks for what is not computed.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(MATRICES);
        for (file, what) in [
            (folder.join(settings::SETTINGS), "settings"),
            (path.clone(), "matrices"),
        ] {
            if !file.is_file() {
                return Err(ModelError::NotFound(format!(
                    "{} does not exist; an adapter's {what} are there",
                    file.display()
                )));
            }
        }
        let settings = Settings::read(folder)?;
        let mut tensors = Tensors::default();
        tensors.add(&path)?;
        Ok(Self {
            settings,
            path,
            tensors,
        })
    }

    /// The file that holds the matrices.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Rank of the changes.
    pub fn rank(&self) -> usize {
        self.settings.rank
    }

    /// Hash of the settings and the header.
    pub fn fingerprint(&self) -> u64 {
        let hash =
            blake3::hash(format!("{:?}{:?}", self.settings, self.tensors.by_name).as_bytes());
        let bytes = hash.as_bytes().first_chunk();
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// What of it a rank of the model reads, layer by layer.
    ///
    /// # Errors
    /// When the adapter changes what cannot be changed here, is of another shape than
    /// the model, or of a higher rank than `room` says.
    pub fn locate(&self, base: &AdapterBase, room: AdapterRoom) -> Result<Vec<Change>, ModelError> {
        let rank = self.settings.rank;
        if rank > room.rank {
            return Err(self.invalid(&format!(
                "an adapter of rank {rank}, the highest that there is room for is {}",
                room.rank
            )));
        }
        let mut halves = self.halves(&base.config)?;
        let mut changes = Vec::new();
        for layer in 0..base.config.layers.len() {
            for target in Target::ALL {
                let Some([a, b]) = halves.remove(&(layer, target)) else {
                    continue;
                };
                let change = self.change(base, (layer, target), [a, b])?;
                if base.shard.layers.contains(&layer) {
                    changes.push(change);
                }
            }
        }
        Ok(changes)
    }

    /// Both matrices of every change.
    fn halves(
        &self,
        config: &LlamaConfig,
    ) -> Result<BTreeMap<(usize, Target), [&StoredTensor; 2]>, ModelError> {
        let mut found: BTreeMap<(usize, Target), [Option<&StoredTensor>; 2]> = BTreeMap::new();
        for (name, tensor) in &self.tensors.by_name {
            let place = parse_name(name, config).ok_or_else(|| {
                ModelError::Unsupported(format!(
                    "{}: tensor {} changes no matrix that adapters may change: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj of the {} layers",
                    self.path.display(),
                    shown(name),
                    config.layers.len()
                ))
            })?;
            let (layer, target, half) = place;
            found.entry((layer, target)).or_default()[half] = Some(tensor);
        }
        if found.is_empty() {
            return Err(self.invalid("it holds no tensors"));
        }
        let both = found.into_iter().map(|(place, halves)| match halves {
            [Some(a), Some(b)] => Ok((place, [a, b])),
            [a, b] => {
                let name = a.or(b).map_or("", |tensor| &tensor.name);
                Err(self.invalid(&format!(
                    "tensor {} has no counterpart: lora_A and lora_B belong together",
                    shown(name)
                )))
            }
        });
        both.collect()
    }

    fn change(
        &self,
        base: &AdapterBase,
        (layer, target): (usize, Target),
        [a, b]: [&StoredTensor; 2],
    ) -> Result<Change, ModelError> {
        let part = part(&base.config, &base.shard, layer, target);
        let rank = self.settings.rank;
        let a = self.thin(a, (rank, part.shape.1), (0..rank, part.columns))?;
        let b = self.thin(b, (part.shape.0, rank), (part.rows, 0..rank))?;
        let turns = matches!(target, Target::Query | Target::Key);
        Ok(Change {
            layer,
            target,
            a,
            b,
            ends: part.ends,
            scale: self.settings.scale,
            reordered_heads: (base.is_reordered && turns).then_some(base.config.head_dim),
        })
    }

    /// The rows and columns of a matrix of `shape`.
    fn thin(
        &self,
        tensor: &StoredTensor,
        shape: (usize, usize),
        (rows, columns): (std::ops::Range<usize>, std::ops::Range<usize>),
    ) -> Result<ThinMatrix, ModelError> {
        if tensor.shape != [shape.0, shape.1] {
            return Err(self.invalid(&format!(
                "tensor {} has the shape {:?}, expected [{}, {}]",
                tensor.name, tensor.shape, shape.0, shape.1
            )));
        }
        let format = match tensor.stored {
            StoredType::Format(format @ (Format::F32 | Format::F16 | Format::Bf16)) => format,
            other => {
                return Err(self.invalid(&format!(
                    "tensor {} is stored as {other}, expected F32, F16 or BF16",
                    tensor.name
                )));
            }
        };
        let size = format.value_bytes().unwrap_or(1) as u64;
        let stride = shape.1 as u64 * size;
        let start = tensor.start + rows.start as u64 * stride + columns.start as u64 * size;
        Ok(ThinMatrix {
            name: tensor.name.clone(),
            format,
            region: Region::new(
                start,
                columns.len() as u64 * size,
                stride,
                rows.len() as u64,
            ),
            rows: rows.len(),
            columns: columns.len(),
        })
    }

    fn invalid(&self, what: &str) -> ModelError {
        ModelError::Invalid(format!("{}: {what}", self.path.display()))
    }
}

/// Which layer's matrix a tensor changes, and whether it is A (0) or B (1).
fn parse_name(name: &str, config: &LlamaConfig) -> Option<(usize, Target, usize)> {
    let name = name.strip_prefix(PEFT_PREFIX)?;
    let name = LAYER_PREFIXES
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix)?.strip_prefix("layers."))?;
    let (layer, name) = name.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let has_experts = config.layers.get(layer)?.experts;
    let (name, half) = match name.strip_suffix(".lora_A.weight") {
        Some(name) => (name, 0),
        None => (name.strip_suffix(".lora_B.weight")?, 1),
    };
    let target = Target::ALL.into_iter().find(|target| {
        let networks = if has_experts {
            &["feed_forward"][..]
        } else {
            &["mlp", "feed_forward"]
        };
        networks
            .iter()
            .any(|network| target.name(has_experts, network) == name)
    })?;
    Some((layer, target, half))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::config;
    use crate::layout::Layout;

    #[test]
    fn names_of_peft_are_read() {
        let config = config(4, 2, 128, 100);
        let read = |name: &str| parse_name(name, &config);
        let query = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
        assert_eq!(read(query), Some((1, Target::Query, 0)));
        for prefix in ["language_model.model", "model.language_model"] {
            let name =
                format!("base_model.model.{prefix}.layers.0.feed_forward.down_proj.lora_B.weight");
            assert_eq!(read(&name), Some((0, Target::Down, 1)));
        }
        for name in [
            "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.router.lora_A.weight",
            "base_model.model.model.layers.0.mlp.shared_expert.up_proj.lora_A.weight",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.lm_head.lora_A.weight",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.weight",
        ] {
            assert_eq!(read(name), None, "{name}");
        }
    }

    #[test]
    fn room_is_cut_as_the_matrices() {
        let config = config(4, 2, 128, 100);
        let room = AdapterRoom { count: 3, rank: 8 };
        let bytes = |tensor: usize, rank: usize| {
            let shard = Shard::new(&config, Layout::tensor(tensor), rank).expect("splits");
            room.bytes(&config, &shard)
        };
        let (hidden, query, kv) = (config.hidden, config.query_width(), config.kv_width());
        let change = |rows: usize, columns: usize| 8 * columns + rows * 33;
        let layer = change(query, hidden)
            + 2 * change(kv, hidden)
            + change(hidden, query)
            + 2 * change(128, hidden)
            + change(hidden, 128);
        let expected = 3 * config.layers.len() * (4 * layer + 14 * MATRIX_BYTES);
        assert_eq!(bytes(1, 0), expected as u64);
        assert!(bytes(2, 0) < bytes(1, 0) && bytes(2, 0) > bytes(1, 0) / 2);
    }
}
