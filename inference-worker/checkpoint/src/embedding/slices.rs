//! Where the matrices of a BERT lie.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::EmbeddingCheckpoint;
use crate::error::ModelError;
use crate::format::Format;
use crate::slices::{MatrixSlice, Place, Source, VectorSlice};
use crate::stored::{Region, StoredTensor, StoredType};

/// Parts of a `BertModel` that no vector depends on.
const UNREAD: [&str; 3] = [
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
];
/// How many names a message lists.
const LISTED_TENSORS: usize = 4;

/// A layer norm.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSlices {
    /// Factors.
    pub weight: VectorSlice,
    /// What is added.
    pub bias: VectorSlice,
}

/// A matrix and what is added to its products.
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectionSlices {
    /// The matrix.
    pub weight: MatrixSlice,
    /// What is added.
    pub bias: VectorSlice,
}

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingLayerSlices {
    /// Queries.
    pub query: ProjectionSlices,
    /// Keys.
    pub key: ProjectionSlices,
    /// Values.
    pub value: ProjectionSlices,
    /// What the heads attended to, back to the residual stream.
    pub output: ProjectionSlices,
    /// Norm behind attention.
    pub attention_norm: NormSlices,
    /// Into the feed-forward network.
    pub up: ProjectionSlices,
    /// Out of it.
    pub down: ProjectionSlices,
    /// Norm behind the network.
    pub output_norm: NormSlices,
}

/// All of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingSlices {
    /// Embeddings of tokens.
    pub words: MatrixSlice,
    /// Embeddings of positions.
    pub positions: MatrixSlice,
    /// Embeddings of the kinds of segments.
    pub types: MatrixSlice,
    /// Norm of their sum.
    pub norm: NormSlices,
    /// The layers, in order.
    pub layers: Vec<EmbeddingLayerSlices>,
}

impl EmbeddingLayerSlices {
    fn projections(&self) -> [&ProjectionSlices; 6] {
        [
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.up,
            &self.down,
        ]
    }
}

impl EmbeddingSlices {
    /// Finds every tensor of the model.
    ///
    /// # Errors
    /// `ModelInvalid` when one is missing or of another shape, `ModelUnsupported` when
    /// one is stored as no kernel multiplies it, or belongs to no part of the model.
    pub fn locate(checkpoint: &EmbeddingCheckpoint) -> Result<Self, ModelError> {
        let finder = Finder {
            checkpoint,
            found: RefCell::default(),
        };
        let config = checkpoint.config();
        let (hidden, ffn) = (config.hidden, config.ffn);
        let layers = (0..config.layers).map(|number| {
            let at = |part: &str| format!("encoder.layer.{number}.{part}");
            let project = |part: &str, rows, columns| finder.projection(&at(part), (rows, columns));
            Ok(EmbeddingLayerSlices {
                query: project("attention.self.query", hidden, hidden)?,
                key: project("attention.self.key", hidden, hidden)?,
                value: project("attention.self.value", hidden, hidden)?,
                output: project("attention.output.dense", hidden, hidden)?,
                attention_norm: finder.norm(&at("attention.output.LayerNorm"))?,
                up: project("intermediate.dense", ffn, hidden)?,
                down: project("output.dense", hidden, ffn)?,
                output_norm: finder.norm(&at("output.LayerNorm"))?,
            })
        });
        let table = |name: &str, rows| {
            finder.matrix(
                &format!("embeddings.{name}_embeddings.weight"),
                (rows, hidden),
            )
        };
        let slices = Self {
            words: table("word", config.vocab)?,
            positions: table("position", config.positions)?,
            types: table("token_type", config.types)?,
            norm: finder.norm("embeddings.LayerNorm")?,
            layers: layers.collect::<Result<_, ModelError>>()?,
        };
        finder.refuse_rest()?;
        Ok(slices)
    }

    /// Every matrix, in the order in which they are kept.
    pub fn matrices(&self) -> Vec<&MatrixSlice> {
        let tables = [&self.words, &self.positions, &self.types];
        let layers = self
            .layers
            .iter()
            .flat_map(EmbeddingLayerSlices::projections);
        tables
            .into_iter()
            .chain(layers.map(|projection| &projection.weight))
            .collect()
    }

    /// Bytes of all matrices and vectors in memory.
    pub fn bytes(&self) -> u64 {
        let norm = |norm: &NormSlices| 2 * norm.weight.len;
        let layer = |layer: &EmbeddingLayerSlices| {
            let biases = layer.projections().map(|projection| projection.bias.len);
            biases.iter().sum::<usize>() + norm(&layer.attention_norm) + norm(&layer.output_norm)
        };
        let values = norm(&self.norm) + self.layers.iter().map(layer).sum::<usize>();
        let matrices = self.matrices().into_iter().map(MatrixSlice::bytes);
        matrices.sum::<u64>() + (values * size_of::<f32>()) as u64
    }
}

struct Finder<'a> {
    checkpoint: &'a EmbeddingCheckpoint,
    found: RefCell<BTreeSet<String>>,
}

impl Finder<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<(Format, Place), ModelError> {
        let Some(tensor) = self.checkpoint.tensors.get(name) else {
            let what = format!("tensor {name} is missing");
            return Err(self.checkpoint.invalid(&what));
        };
        if tensor.shape != shape {
            return Err(self.checkpoint.invalid(&format!(
                "tensor {name} has the shape {:?}, config.json asks for {shape:?}",
                tensor.shape
            )));
        }
        self.found.borrow_mut().insert(name.to_owned());
        match tensor.stored {
            StoredType::Format(format @ (Format::F32 | Format::F16 | Format::Bf16)) => {
                Ok((format, place(tensor)))
            }
            other => Err(self.checkpoint.unsupported(&format!(
                "tensor {name} is stored as {other}; F32, F16 and BF16 are built in"
            ))),
        }
    }

    fn matrix(
        &self,
        name: &str,
        (rows, columns): (usize, usize),
    ) -> Result<MatrixSlice, ModelError> {
        let (format, place) = self.tensor(name, &[rows, columns])?;
        Ok(MatrixSlice {
            name: name.to_owned(),
            format,
            rows,
            columns,
            ends: vec![columns],
            scales: None,
            source: Source::Copy(place),
            replicas: 1,
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<VectorSlice, ModelError> {
        let (format, place) = self.tensor(name, &[len])?;
        Ok(VectorSlice {
            name: name.to_owned(),
            format,
            len,
            place: Some(place),
            replicas: 1,
        })
    }

    fn projection(
        &self,
        name: &str,
        (rows, columns): (usize, usize),
    ) -> Result<ProjectionSlices, ModelError> {
        Ok(ProjectionSlices {
            weight: self.matrix(&format!("{name}.weight"), (rows, columns))?,
            bias: self.vector(&format!("{name}.bias"), rows)?,
        })
    }

    fn norm(&self, name: &str) -> Result<NormSlices, ModelError> {
        let hidden = self.checkpoint.config.hidden;
        Ok(NormSlices {
            weight: self.vector(&format!("{name}.weight"), hidden)?,
            bias: self.vector(&format!("{name}.bias"), hidden)?,
        })
    }

    /// Refuses tensors that nobody looked up: they may belong to the computation.
    fn refuse_rest(&self) -> Result<(), ModelError> {
        let found = self.found.borrow();
        let names = self.checkpoint.tensors.keys();
        let rest: Vec<&str> = names
            .filter(|name| !found.contains(*name) && !UNREAD.contains(&name.as_str()))
            .map(String::as_str)
            .collect();
        if rest.is_empty() {
            return Ok(());
        }
        let listed = rest[..rest.len().min(LISTED_TENSORS)].join(", ");
        Err(self.checkpoint.unsupported(&format!(
            "{} tensors belong to no part of a BertModel, such as {listed}",
            rest.len()
        )))
    }
}

fn place(tensor: &StoredTensor) -> Place {
    Place {
        file: tensor.file,
        region: Region::one(tensor.start, tensor.bytes),
    }
}
