//! Reading a rank's part of a checkpoint: only its own bytes, by several threads,
//! into the memory that the kernels multiply from.

mod convert;
mod pieces;

use std::fs::File;

use candle_core::{Device, Tensor};
use llama_checkpoint::checkpoint::cut_name;
use llama_checkpoint::slices::{
    FeedForward, FeedForwardSlices, LayerSlices, MatrixSlice, ModelSlices, ScaleSlice, VectorSlice,
};
use llama_checkpoint::{Checkpoint, Format, ModelError, WeightFile};
use rustix::fs::{Advice, fadvise};

use crate::buffer::{Buffer, WeightBytes};
use crate::kernels;
use crate::linear::{Matrix, MatrixForm};
pub(crate) use pieces::Files as Reader;
use pieces::Files;

/// A rank's part of a model, in memory.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) embedding: Option<Matrix>,
    pub(crate) layers: Vec<LoadedLayer>,
    pub(crate) norm: Option<Tensor>,
    pub(crate) head: Option<Matrix>,
    pub(crate) rope_factors: Option<Vec<f32>>,
}

/// One layer's part.
#[derive(Debug)]
pub(crate) struct LoadedLayer {
    pub(crate) attention_norm: Tensor,
    pub(crate) query: Matrix,
    pub(crate) key: Matrix,
    pub(crate) value: Matrix,
    pub(crate) output: Matrix,
    pub(crate) feed_forward_norm: Tensor,
    pub(crate) feed_forward: LoadedFeedForward,
}

/// The feed-forward part of a layer.
#[derive(Debug)]
pub(crate) enum LoadedFeedForward {
    Dense(Box<LoadedNetwork>),
    Experts {
        router: Box<Matrix>,
        shared: Box<LoadedNetwork>,
        experts: Vec<LoadedNetwork>,
    },
}

/// Gate, up and down projection.
#[derive(Debug)]
pub(crate) struct LoadedNetwork {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

/// Reads `slices`, telling `progress` the bytes filled and the bytes to fill. With
/// `verify`, which names the rank, every matrix must have the digest that the
/// checkpoint holds of it.
///
/// # Errors
/// When a file cannot be read any more, holds numbers that are none, or other bytes
/// than its digest says.
pub(crate) fn read(
    checkpoint: &Checkpoint,
    slices: &ModelSlices,
    verify: Option<usize>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Loaded, ModelError> {
    let files = Files::of(checkpoint.files())?;
    let matrices = slices.matrices();
    let mut buffers = matrices
        .iter()
        .map(|slice| buffer_for(slice))
        .collect::<Result<Vec<_>, _>>()?;
    pieces::fill(&files, &matrices, &mut buffers, progress)?;
    if let Some(rank) = verify {
        for (slice, buffer) in matrices.iter().zip(&buffers) {
            check_digest(checkpoint, rank, slice, buffer)?;
        }
    }
    let filled = matrices
        .iter()
        .zip(buffers)
        .map(|(slice, buffer)| files.matrix(slice, buffer))
        .collect::<Result<Vec<_>, _>>()?;
    Assembly {
        files: &files,
        matrices: filled.into_iter(),
    }
    .model(slices)
}

/// Compares the bytes of the part of `rank` of a matrix with the digest that the
/// checkpoint holds of it.
pub(crate) fn check_digest(
    checkpoint: &Checkpoint,
    rank: usize,
    slice: &MatrixSlice,
    bytes: &[u8],
) -> Result<(), ModelError> {
    let name = cut_name(&slice.name, slice.format);
    let Some(expected) = checkpoint.digest(rank, &name) else {
        return Err(checkpoint.invalid(&format!(
            "tensor {} has no digest; llama-worker shard writes them",
            slice.name
        )));
    };
    if blake3::hash(bytes).to_hex().as_str() == expected {
        return Ok(());
    }
    Err(checkpoint.invalid(&format!(
        "the part of rank {rank} of tensor {} is damaged: its bytes do not have the digest {expected}",
        slice.name
    )))
}

/// Memory for the rows of a matrix.
fn buffer_for(slice: &MatrixSlice) -> Result<Buffer, ModelError> {
    Ok(Buffer::zeroed(
        slice.rows * slice.format.row_bytes(slice.columns),
    )?)
}

/// Puts matrices where they belong, in the order of [`ModelSlices::matrices`].
struct Assembly<'a> {
    files: &'a Files,
    matrices: std::vec::IntoIter<Matrix>,
}

impl Assembly<'_> {
    fn model(mut self, slices: &ModelSlices) -> Result<Loaded, ModelError> {
        let embedding = self.optional(slices.embedding.as_ref())?;
        let head = self.optional(slices.head.as_ref())?;
        let layers = slices
            .layers
            .iter()
            .map(|slices| self.layer(slices))
            .collect::<Result<_, _>>()?;
        let norm = slices.norm.as_ref();
        let factors = slices.rope_factors.as_ref();
        Ok(Loaded {
            embedding,
            layers,
            norm: norm.map(|norm| self.files.tensor(norm)).transpose()?,
            head,
            rope_factors: factors
                .map(|factors| self.files.positive(factors))
                .transpose()?,
        })
    }

    fn layer(&mut self, slices: &LayerSlices) -> Result<LoadedLayer, ModelError> {
        Ok(LoadedLayer {
            attention_norm: self.files.tensor(&slices.attention_norm)?,
            query: self.next(&slices.query)?,
            key: self.next(&slices.key)?,
            value: self.next(&slices.value)?,
            output: self.next(&slices.output)?,
            feed_forward_norm: self.files.tensor(&slices.feed_forward_norm)?,
            feed_forward: match &slices.feed_forward {
                FeedForward::Dense(network) => {
                    LoadedFeedForward::Dense(Box::new(self.network(network)?))
                }
                FeedForward::Experts {
                    router,
                    shared,
                    experts,
                } => LoadedFeedForward::Experts {
                    router: Box::new(self.next(router)?),
                    shared: Box::new(self.network(shared)?),
                    experts: experts
                        .iter()
                        .map(|expert| self.network(expert))
                        .collect::<Result<_, _>>()?,
                },
            },
        })
    }

    fn network(&mut self, slices: &FeedForwardSlices) -> Result<LoadedNetwork, ModelError> {
        Ok(LoadedNetwork {
            gate: self.next(&slices.gate)?,
            up: self.next(&slices.up)?,
            down: self.next(&slices.down)?,
        })
    }

    fn optional(&mut self, slice: Option<&MatrixSlice>) -> Result<Option<Matrix>, ModelError> {
        slice.map(|slice| self.next(slice)).transpose()
    }

    fn next(&mut self, slice: &MatrixSlice) -> Result<Matrix, ModelError> {
        self.matrices
            .next()
            .ok_or_else(|| ModelError::Invalid(format!("tensor {} was not read", slice.name)))
    }
}

impl Files {
    /// The rows of a matrix.
    pub(crate) fn matrix_bytes(&self, slice: &MatrixSlice) -> Result<Vec<u8>, ModelError> {
        let mut buffer = [buffer_for(slice)?];
        pieces::fill(self, &[slice], &mut buffer, &|_, _| {})?;
        let [buffer] = buffer;
        Ok(buffer.to_vec())
    }

    /// Reads matrices whole.
    pub(crate) fn matrices(&self, slices: &[&MatrixSlice]) -> Result<Vec<Matrix>, ModelError> {
        let buffers = slices.iter().map(|slice| buffer_for(slice));
        let mut buffers = buffers.collect::<Result<Vec<_>, _>>()?;
        pieces::fill(self, slices, &mut buffers, &|_, _| {})?;
        let filled = slices.iter().zip(buffers);
        filled
            .map(|(slice, buffer)| self.matrix(slice, buffer))
            .collect()
    }

    /// The scales of a matrix's rows, where it has them.
    pub(crate) fn matrix_scales(
        &self,
        slice: &MatrixSlice,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let scales = slice.scales.as_ref();
        scales
            .map(|scales| self.scales(scales, slice.rows))
            .transpose()
    }

    /// The matrix whose rows are in `buffer`.
    fn matrix(&self, slice: &MatrixSlice, buffer: Buffer) -> Result<Matrix, ModelError> {
        let scales = self.matrix_scales(slice)?;
        let form = MatrixForm {
            format: slice.format,
            columns: slice.columns,
            ends: slice.ends.as_slice().into(),
            scales: scales.map(Into::into),
        };
        Matrix::new(WeightBytes::from(buffer), form)
            .map_err(|error| ModelError::Invalid(format!("tensor {}: {error}", slice.name)))
    }

    /// One scale a row.
    fn scales(&self, scales: &ScaleSlice, rows: usize) -> Result<Vec<f32>, ModelError> {
        let size = scales.format.value_bytes().unwrap_or(1) as u64;
        let count = usize::try_from(scales.place.region.bytes() / size).unwrap_or(0);
        let mut bytes = vec![0; count * scales.format.value_bytes().unwrap_or(1)];
        self.read(scales.place.file, scales.place.region.start, &mut bytes)?;
        let mut values = vec![0.0; count];
        kernels::unpack(scales.format, &bytes, None, &mut values);
        check_finite(&scales.name, &values)?;
        if count == 1 {
            values.resize(rows, values[0]);
        }
        Ok(values)
    }

    /// The values of a vector.
    pub(crate) fn vector(&self, slice: &VectorSlice) -> Result<Vec<f32>, ModelError> {
        let Some(place) = slice.place else {
            return Ok(vec![1.0; slice.len]);
        };
        let mut bytes = vec![0; slice.len * slice.format.value_bytes().unwrap_or(1)];
        self.read(place.file, place.region.start, &mut bytes)?;
        let mut values = vec![0.0; slice.len];
        kernels::unpack(slice.format, &bytes, None, &mut values);
        check_finite(&slice.name, &values)?;
        Ok(values)
    }

    fn tensor(&self, slice: &VectorSlice) -> Result<Tensor, ModelError> {
        Tensor::from_vec(self.vector(slice)?, slice.len, &Device::Cpu)
            .map_err(|error| ModelError::Invalid(format!("tensor {}: {error}", slice.name)))
    }

    /// The values of a vector that holds divisors.
    pub(crate) fn positive(&self, slice: &VectorSlice) -> Result<Vec<f32>, ModelError> {
        let values = self.vector(slice)?;
        match values.iter().find(|value| **value <= 0.0) {
            Some(value) => Err(ModelError::Invalid(format!(
                "tensor {} holds {value}, expected positive numbers",
                slice.name
            ))),
            None => Ok(values),
        }
    }
}

/// Refuses what no scale and no norm can be.
fn check_finite(name: &str, values: &[f32]) -> Result<(), ModelError> {
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(ModelError::Invalid(format!(
            "tensor {name} holds {value}, expected numbers"
        ))),
        None => Ok(()),
    }
}

/// Number, path and handle of each file.
fn open(files: &[WeightFile]) -> Result<Vec<(String, File)>, ModelError> {
    files
        .iter()
        .map(|file| {
            let path = file.path.display().to_string();
            match File::open(&file.path) {
                Ok(opened) => {
                    // Only a wish, for the kernel to read further ahead.
                    fadvise(&opened, 0, None, Advice::Sequential).ok();
                    Ok((path, opened))
                }
                Err(source) => Err(ModelError::Io { path, source }),
            }
        })
        .collect()
}

/// The bytes that a value of `format` takes, for formats without blocks.
fn value_bytes(format: Format) -> usize {
    format.value_bytes().unwrap_or(1)
}
