//! Which bytes of a checkpoint a rank reads, and into which matrices.

mod find;

use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::format::Format;
use crate::gguf::GgmlType;
use crate::shard::Shard;
use crate::stored::{Region, StoredType};
use find::Finder;

/// Where bytes lie: in which of the checkpoint's files, and where there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the file.
    pub file: usize,
    /// Which bytes of it.
    pub region: Region,
}

/// How stored bytes become rows of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// As they are, stretch behind stretch.
    Copy(Place),
    /// Each stretch is a column: the values of one input for all outputs.
    Columns(Place),
    /// 8-bit integers, which become `Q8_0` blocks of scale 1.
    Int8(Place),
    /// 4-bit integers, eight to a 32-bit word, which become `Q4_0` blocks.
    Int4 {
        /// The words.
        words: Place,
        /// Their scales, one a row and group of columns.
        scales: Place,
        /// How a scale is stored.
        scale_format: Format,
        /// Columns that share a scale.
        group: usize,
        /// Column of the whole matrix at which this part begins, counted from the
        /// start of the group that it lies in.
        offset: usize,
    },
    /// Blocks that no kernel multiplies, which become `Q8_0` blocks.
    Requantize {
        /// The blocks.
        place: Place,
        /// Their type.
        kind: GgmlType,
        /// Values of each stretch before the first that is wanted.
        skip: usize,
    },
    /// Random numbers that depend on the name and on the place in the whole matrix.
    Random {
        /// Rows of the whole matrix that this part begins with.
        first_row: usize,
        /// Likewise of columns.
        first_column: usize,
        /// Columns of the whole matrix.
        width: usize,
    },
}

impl Source {
    /// The bytes that are read.
    pub fn places(&self) -> Vec<Place> {
        match self {
            Self::Copy(place)
            | Self::Columns(place)
            | Self::Int8(place)
            | Self::Requantize { place, .. } => vec![*place],
            Self::Int4 { words, scales, .. } => vec![*words, *scales],
            Self::Random { .. } => Vec::new(),
        }
    }
}

/// Scales of a matrix, one a row or one for all.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaleSlice {
    /// Name in the header.
    pub name: String,
    /// Where they lie: one value, or one a row.
    pub place: Place,
    /// How they are stored.
    pub format: Format,
    /// Ranks of the group that read the same.
    pub replicas: usize,
}

/// A rank's part of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixSlice {
    /// Name in the header.
    pub name: String,
    /// Form in memory.
    pub format: Format,
    /// Rows in memory.
    pub rows: usize,
    /// Columns in memory.
    pub columns: usize,
    /// Where partial sums over columns end; see [`crate::order`].
    pub ends: Vec<usize>,
    /// Factors of the rows, where the form has them.
    pub scales: Option<ScaleSlice>,
    /// Where the values come from.
    pub source: Source,
    /// Ranks of the group that hold the same part.
    pub replicas: usize,
}

impl MatrixSlice {
    /// Bytes that the rank keeps of it.
    pub fn bytes(&self) -> u64 {
        let rows = (self.rows * self.format.row_bytes(self.columns)) as u64;
        let scales = self
            .scales
            .as_ref()
            .map_or(0, |_| self.rows * size_of::<f32>());
        rows + scales as u64
    }

    /// Everything that is read for it.
    pub fn places(&self) -> Vec<Place> {
        let scales = self.scales.as_ref().map(|scales| scales.place);
        self.source.places().into_iter().chain(scales).collect()
    }
}

/// A vector that every rank of a stage keeps whole.
#[derive(Clone, Debug, PartialEq)]
pub struct VectorSlice {
    /// Name in the header.
    pub name: String,
    /// How it is stored.
    pub format: Format,
    /// Number of values.
    pub len: usize,
    /// Where it lies; `None` for a vector of ones.
    pub place: Option<Place>,
    /// Ranks of the group that hold it.
    pub replicas: usize,
}

/// Gate, up and down projection of a feed-forward network.
#[derive(Clone, Debug, PartialEq)]
pub struct FeedForwardSlices {
    /// Rows of the gate.
    pub gate: MatrixSlice,
    /// Rows that it multiplies.
    pub up: MatrixSlice,
    /// Columns of the way back.
    pub down: MatrixSlice,
}

impl FeedForwardSlices {
    fn matrices(&self) -> [&MatrixSlice; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    /// One network for all tokens.
    Dense(Box<FeedForwardSlices>),
    /// One network for all tokens and, beside it, one of several for each.
    Experts {
        /// Scores of the experts.
        router: Box<MatrixSlice>,
        /// For all tokens.
        shared: Box<FeedForwardSlices>,
        /// By expert.
        experts: Vec<FeedForwardSlices>,
    },
}

/// One layer's part.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSlices {
    /// Norm before attention.
    pub attention_norm: VectorSlice,
    /// Query heads.
    pub query: MatrixSlice,
    /// Key heads.
    pub key: MatrixSlice,
    /// Value heads.
    pub value: MatrixSlice,
    /// Columns of the heads.
    pub output: MatrixSlice,
    /// Norm before the feed-forward network.
    pub feed_forward_norm: VectorSlice,
    /// The feed-forward network.
    pub feed_forward: FeedForward,
}

impl LayerSlices {
    /// Its matrices.
    pub fn matrices(&self) -> Vec<&MatrixSlice> {
        let mut all = vec![&self.query, &self.key, &self.value, &self.output];
        match &self.feed_forward {
            FeedForward::Dense(network) => all.extend(network.matrices()),
            FeedForward::Experts {
                router,
                shared,
                experts,
            } => {
                all.push(router);
                all.extend(shared.matrices());
                all.extend(experts.iter().flat_map(FeedForwardSlices::matrices));
            }
        }
        all
    }

    /// Its vectors.
    pub fn vectors(&self) -> [&VectorSlice; 2] {
        [&self.attention_norm, &self.feed_forward_norm]
    }
}

/// A rank's part of a model, found in the headers but not read.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSlices {
    /// Rows of the token embedding, on the first stage.
    pub embedding: Option<MatrixSlice>,
    /// The layers of the stage.
    pub layers: Vec<LayerSlices>,
    /// Norm before the output head, on the last stage.
    pub norm: Option<VectorSlice>,
    /// Rows of the output head, on the last stage; `None` where it is the
    /// embedding that this rank holds anyway.
    pub head: Option<MatrixSlice>,
    /// Divisors of the rotary frequencies.
    pub rope_factors: Option<VectorSlice>,
}

impl ModelSlices {
    /// Finds the part of `shard` and checks every tensor's type and shape.
    ///
    /// # Errors
    /// `ModelInvalid` for a missing tensor or a wrong shape, `ModelUnsupported`
    /// for a type that cannot be computed with.
    pub fn locate(checkpoint: &Checkpoint, shard: &Shard) -> Result<Self, ModelError> {
        Finder::new(checkpoint, shard).model()
    }

    /// As [`ModelSlices::locate`] for a single rank, and refuses tensors that a
    /// model of this shape does not read: they would change the result if they
    /// were read.
    pub(crate) fn check(checkpoint: &Checkpoint) -> Result<(), ModelError> {
        let layout = crate::layout::Layout::tensor(1);
        let shard = Shard::new(checkpoint.config(), layout, 0)?;
        let finder = Finder::new(checkpoint, &shard);
        finder.model()?;
        finder.refuse_unused()
    }

    /// Its matrices.
    pub fn matrices(&self) -> Vec<&MatrixSlice> {
        let ends = self.embedding.iter().chain(&self.head);
        let layers = self.layers.iter().flat_map(LayerSlices::matrices);
        ends.chain(layers).collect()
    }

    /// Its vectors.
    pub fn vectors(&self) -> Vec<&VectorSlice> {
        let layers = self.layers.iter().flat_map(LayerSlices::vectors);
        layers.chain(&self.norm).chain(&self.rope_factors).collect()
    }

    /// Bytes that the rank keeps in memory.
    pub fn bytes(&self) -> u64 {
        let matrices: u64 = self.matrices().iter().map(|matrix| matrix.bytes()).sum();
        let values: usize = self.vectors().iter().map(|vector| vector.len).sum();
        matrices + (values * size_of::<f32>()) as u64
    }

    /// Everything that the rank reads.
    pub fn places(&self) -> Vec<Place> {
        let matrices = self.matrices().into_iter().flat_map(MatrixSlice::places);
        let vectors = self.vectors().into_iter().filter_map(|vector| vector.place);
        matrices.chain(vectors).collect()
    }

    /// Bytes that the rank reads.
    pub fn read_bytes(&self) -> u64 {
        self.places().iter().map(|place| place.region.bytes()).sum()
    }
}

/// A part of a matrix that a rank wants.
#[derive(Clone, Debug)]
struct Wanted {
    name: String,
    /// Rows and columns of the whole matrix.
    height: usize,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    ends: Vec<usize>,
    replicas: usize,
}

impl Wanted {
    /// Some rows, whole.
    fn rows(name: String, (height, width): (usize, usize), rows: Range<usize>) -> Self {
        Self {
            name,
            height,
            width,
            rows,
            columns: 0..width,
            ends: vec![width],
            replicas: 1,
        }
    }

    /// Some columns of every row, with partial sums that end at `ends`.
    fn columns(
        name: String,
        (height, width): (usize, usize),
        columns: Range<usize>,
        ends: Vec<usize>,
    ) -> Self {
        Self {
            name,
            height,
            width,
            rows: 0..height,
            columns,
            ends,
            replicas: 1,
        }
    }

    fn replicated(self, replicas: usize) -> Self {
        Self { replicas, ..self }
    }

    /// The part, in memory in `format`.
    fn slice(self, format: Format, scales: Option<ScaleSlice>, source: Source) -> MatrixSlice {
        MatrixSlice {
            name: self.name,
            format,
            rows: self.rows.len(),
            columns: self.columns.len(),
            ends: self.ends,
            scales,
            source,
            replicas: self.replicas,
        }
    }
}

/// How a stored value becomes one in memory, for messages.
fn known_types() -> String {
    let formats = Format::ALL.map(Format::name).join(", ");
    format!("{formats}, I8 with scales, packed 4-bit integers, and ggml's K-quants")
}

/// Whether `stored` holds floats that may be scales or norms.
fn float_format(stored: StoredType) -> Option<Format> {
    match stored {
        StoredType::Format(format @ (Format::F32 | Format::F16 | Format::Bf16)) => Some(format),
        _ => None,
    }
}
