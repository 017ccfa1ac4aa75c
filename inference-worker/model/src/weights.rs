//! Which bytes of the file a rank needs, and reading them.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::buffer::Buffer;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gguf::{Gguf, SharedBytes, TensorInfo};
use crate::kernels::{BLOCK, Format, Isa};
use crate::linear::{Linear, Matrix, MatrixForm};
use crate::shard::Shard;
use crate::threads::Threads;

const EMBEDDING: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";
const OUTPUT_NORM: &str = "output_norm.weight";
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";
/// How many names a message lists.
const LISTED_TENSORS: usize = 4;

/// A rank's part of one matrix: some rows, and of each some columns.
#[derive(Clone, Debug)]
pub(crate) struct MatrixSlice<'a> {
    info: &'a TensorInfo,
    format: Format,
    /// Columns of the whole matrix.
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    /// Columns of a chunk, see [`crate::kernels::Rows::ends`].
    stretch: usize,
}

impl MatrixSlice<'_> {
    /// Bytes that the rank keeps of it.
    fn bytes(&self) -> u64 {
        (self.rows.len() * self.format.row_bytes(self.columns.len())) as u64
    }

    fn read(&self, gguf: &Gguf) -> Result<Buffer, ModelError> {
        let row_bytes = self.format.row_bytes(self.width);
        let start = self.format.row_bytes(self.columns.start);
        let end = self.format.row_bytes(self.columns.end);
        let all = gguf.bytes(self.info);
        let rows = &all[self.rows.start * row_bytes..self.rows.end * row_bytes];
        let mut part = Buffer::zeroed(self.rows.len() * (end - start))?;
        for (part, row) in part
            .chunks_exact_mut(end - start)
            .zip(rows.chunks_exact(row_bytes))
        {
            part.copy_from_slice(&row[start..end]);
        }
        Ok(part)
    }

    /// Reads the part into a matrix that multiplies.
    pub(crate) fn load(
        &self,
        gguf: &Gguf,
        isa: Isa,
        threads: &Arc<Threads>,
    ) -> Result<Linear, ModelError> {
        let columns = self.columns.len();
        let form = MatrixForm {
            format: self.format,
            columns,
            ends: (1..=columns.div_ceil(self.stretch))
                .map(|chunk| columns.min(chunk * self.stretch))
                .collect(),
            scales: None,
        };
        let matrix = Matrix::new(self.read(gguf)?.into(), form)
            .map_err(|error| gguf.invalid(&format!("tensor {}: {error}", self.info.name)))?;
        Ok(Linear::new(matrix, isa, Arc::clone(threads)))
    }
}

/// A vector that every rank keeps whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VectorSlice<'a> {
    info: &'a TensorInfo,
    format: Format,
    len: usize,
}

impl VectorSlice<'_> {
    /// Its name in the file.
    pub(crate) fn name(&self) -> &str {
        &self.info.name
    }

    /// Its values.
    pub(crate) fn values(&self, gguf: &Gguf) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        self.format.unpack(gguf.bytes(self.info), None, &mut values);
        values
    }

    /// Its values as a tensor.
    pub(crate) fn load(&self, gguf: &Gguf) -> Result<Tensor, ModelError> {
        Tensor::from_vec(self.values(gguf), self.len, &Device::Cpu)
            .map_err(|source| tensor_error(self.info, source))
    }
}

fn tensor_error(info: &TensorInfo, source: candle_core::Error) -> ModelError {
    ModelError::Tensor {
        tensor: info.name.clone(),
        source,
    }
}

/// The token embedding, whose rows are widened straight from the mapped file:
/// a step needs few of them, and all ranks of a machine share the pages.
#[derive(Debug)]
pub(crate) struct Embedding {
    bytes: SharedBytes,
    format: Format,
    width: usize,
}

impl Embedding {
    /// Appends the embedding of `token`, which is below the vocabulary size.
    pub(crate) fn push_row(&self, token: usize, out: &mut Vec<f32>) {
        let row_bytes = self.format.row_bytes(self.width);
        let row = &self.bytes.get()[token * row_bytes..(token + 1) * row_bytes];
        let start = out.len();
        out.resize(start + self.width, 0.0);
        self.format.unpack(row, None, &mut out[start..]);
    }
}

/// One layer's part.
#[derive(Clone, Debug)]
pub(crate) struct LayerSlices<'a> {
    pub(crate) attn_norm: VectorSlice<'a>,
    pub(crate) q: MatrixSlice<'a>,
    pub(crate) k: MatrixSlice<'a>,
    pub(crate) v: MatrixSlice<'a>,
    pub(crate) o: MatrixSlice<'a>,
    pub(crate) ffn_norm: VectorSlice<'a>,
    pub(crate) gate: MatrixSlice<'a>,
    pub(crate) up: MatrixSlice<'a>,
    pub(crate) down: MatrixSlice<'a>,
}

impl<'a> LayerSlices<'a> {
    fn matrices(&self) -> [&MatrixSlice<'a>; 7] {
        [
            &self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down,
        ]
    }

    /// Bytes that the rank keeps of it.
    pub(crate) fn bytes(&self) -> u64 {
        let matrices: u64 = self.matrices().iter().map(|part| part.bytes()).sum();
        let norms = self.attn_norm.len + self.ffn_norm.len;
        matrices + (norms * size_of::<f32>()) as u64
    }
}

/// A rank's part of a model, found in the file but not read.
#[derive(Clone, Debug)]
pub(crate) struct ModelSlices<'a> {
    pub(crate) layers: Vec<LayerSlices<'a>>,
    pub(crate) norm: VectorSlice<'a>,
    pub(crate) head: MatrixSlice<'a>,
    pub(crate) rope_factors: Option<VectorSlice<'a>>,
    embedding: (&'a TensorInfo, Format),
}

impl<'a> ModelSlices<'a> {
    /// Finds the part of `shard` and checks every tensor's type and shape.
    ///
    /// # Errors
    /// `ModelInvalid` for a missing tensor or a wrong shape, `ModelUnsupported`
    /// for a type without kernels and for tensors that this model would not use.
    pub(crate) fn locate(
        gguf: &'a Gguf,
        config: &LlamaConfig,
        shard: &Shard,
    ) -> Result<Self, ModelError> {
        let mut find = Finder {
            gguf,
            used: BTreeSet::new(),
        };
        let layers = (0..config.layers)
            .map(|layer| find.layer(layer, config, shard))
            .collect::<Result<_, _>>()?;
        let (hidden, vocab) = (config.hidden, config.vocab);
        let embedding = find.matrix(EMBEDDING, hidden, vocab)?;
        let output = if gguf.tensor(OUTPUT).is_some() {
            OUTPUT
        } else {
            EMBEDDING
        };
        let mut head = find.matrix(output, hidden, vocab)?;
        head.rows = shard.vocab.clone();
        let norm = find.vector(OUTPUT_NORM, hidden)?;
        let rope_factors = match gguf.tensor(ROPE_FREQUENCIES) {
            None => None,
            Some(_) => Some(find.vector(ROPE_FREQUENCIES, config.rope_dim / 2)?),
        };
        find.refuse_unused()?;
        Ok(Self {
            layers,
            norm,
            head,
            rope_factors,
            embedding: (embedding.info, embedding.format),
        })
    }

    /// Bytes that the rank keeps in memory.
    pub(crate) fn bytes(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(LayerSlices::bytes).sum();
        layers + self.head_bytes()
    }

    /// Bytes of what comes behind the layers.
    pub(crate) fn head_bytes(&self) -> u64 {
        self.head.bytes() + (self.norm.len * size_of::<f32>()) as u64
    }

    /// The token embedding.
    pub(crate) fn embedding(&self, gguf: &Gguf) -> Embedding {
        let (info, format) = self.embedding;
        Embedding {
            bytes: gguf.shared_bytes(info),
            format,
            width: self.norm.len,
        }
    }
}

/// Looks tensors up and remembers which.
struct Finder<'a> {
    gguf: &'a Gguf,
    used: BTreeSet<&'a str>,
}

impl<'a> Finder<'a> {
    fn tensor(
        &mut self,
        name: &str,
        dims: &[usize],
    ) -> Result<(&'a TensorInfo, Format), ModelError> {
        let Some(info) = self.gguf.tensor(name) else {
            return Err(self.gguf.invalid(&format!("tensor {name} is missing")));
        };
        let Some(format) = Format::from_ggml(info.ggml_type) else {
            let known = Format::ALL.into_iter().filter_map(Format::ggml_type);
            let known: Vec<String> = known.map(|known| known.to_string()).collect();
            let known = known.join(", ");
            return Err(self.gguf.unsupported(&format!(
                "tensor {name} is stored as {}; this worker computes with {known}",
                info.ggml_type
            )));
        };
        if !info
            .dims
            .iter()
            .copied()
            .eq(dims.iter().map(|&dim| dim as u64))
        {
            return Err(self.gguf.invalid(&format!(
                "tensor {name} has the shape {:?}, expected {dims:?}",
                info.dims
            )));
        }
        self.used.insert(&info.name);
        Ok((info, format))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<VectorSlice<'a>, ModelError> {
        let (info, format) = self.tensor(name, &[len])?;
        Ok(VectorSlice { info, format, len })
    }

    fn matrix(
        &mut self,
        name: &str,
        columns: usize,
        rows: usize,
    ) -> Result<MatrixSlice<'a>, ModelError> {
        let (info, format) = self.tensor(name, &[columns, rows])?;
        if !columns.is_multiple_of(BLOCK) {
            return Err(self.gguf.unsupported(&format!(
                "tensor {} has {columns} columns; this worker takes multiples of {BLOCK}",
                info.name
            )));
        }
        Ok(MatrixSlice {
            info,
            format,
            width: columns,
            rows: 0..rows,
            columns: 0..columns,
            stretch: columns,
        })
    }

    fn layer(
        &mut self,
        layer: usize,
        config: &LlamaConfig,
        shard: &Shard,
    ) -> Result<LayerSlices<'a>, ModelError> {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let (hidden, query, kv) = (config.hidden, config.query_width(), config.kv_width());
        let mut by_rows = |part: &str, rows: usize, range: Range<usize>| {
            self.matrix(&name(part), hidden, rows)
                .map(|slice| MatrixSlice {
                    rows: range,
                    ..slice
                })
        };
        let q = by_rows("attn_q", query, shard.query_range(config))?;
        let k = by_rows("attn_k", kv, shard.kv_range(config))?;
        let v = by_rows("attn_v", kv, shard.kv_range(config))?;
        let gate = by_rows("ffn_gate", config.ffn, shard.ffn.clone())?;
        let up = by_rows("ffn_up", config.ffn, shard.ffn.clone())?;
        let mut by_columns = |part: &str, columns: usize, range: Range<usize>| {
            self.matrix(&name(part), columns, hidden)
                .map(|slice| MatrixSlice {
                    stretch: stretch(columns, config.kv_heads),
                    columns: range,
                    ..slice
                })
        };
        let o = by_columns("attn_output", query, shard.query_range(config))?;
        let down = by_columns("ffn_down", config.ffn, shard.ffn.clone())?;
        Ok(LayerSlices {
            attn_norm: self.vector(&name("attn_norm"), hidden)?,
            q,
            k,
            v,
            o,
            ffn_norm: self.vector(&name("ffn_norm"), hidden)?,
            gate,
            up,
            down,
        })
    }

    /// A tensor that nothing reads would change the result if it were read: a
    /// bias, an expert, an adapter.
    fn refuse_unused(&self) -> Result<(), ModelError> {
        let unused: Vec<&str> = self
            .gguf
            .tensors()
            .iter()
            .map(|tensor| tensor.name.as_str())
            .filter(|name| !self.used.contains(name))
            .collect();
        if unused.is_empty() {
            return Ok(());
        }
        let mut listed = unused[..unused.len().min(LISTED_TENSORS)].join(", ");
        if unused.len() > LISTED_TENSORS {
            listed.push_str(", …");
        }
        Err(self.gguf.unsupported(&format!(
            "{} tensors are not part of a Llama model that this worker computes: {listed}",
            unused.len()
        )))
    }
}

/// Columns whose products one rank of the largest possible group would sum:
/// with sums taken over these, one rank and that many ranks agree to the bit.
fn stretch(columns: usize, kv_heads: usize) -> usize {
    if columns.is_multiple_of(kv_heads * BLOCK) {
        columns / kv_heads
    } else {
        columns
    }
}
