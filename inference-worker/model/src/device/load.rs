//! Reading a rank's part of a checkpoint onto a device, one matrix at a time.

use candle_core::{Device, Tensor};
use llama_checkpoint::slices::{
    FeedForward as FeedForwardPart, FeedForwardSlices, LayerSlices, MatrixSlice, VectorSlice,
};
use llama_checkpoint::{Checkpoint, LlamaConfig, ModelError};

use super::layer::{Experts, FeedForward, Gated, Layer};
use super::matrix::{Matrix, Precision};
use super::operations::AttentionRules;
use crate::load::{Reader, check_digest};

/// Reads onto a device. Main memory holds the bytes of one matrix.
pub(super) struct DeviceReader<'a> {
    files: Reader,
    checkpoint: &'a Checkpoint,
    /// The rank whose digests matrices must have.
    verify: Option<usize>,
    place: (&'a Device, Precision),
    progress: &'a (dyn Fn(u64, u64) + Sync),
    done: u64,
    total: u64,
}

impl<'a> DeviceReader<'a> {
    /// Opens the files, of which `total` bytes are to be kept. With `verify`, which
    /// names the rank, every matrix must have the digest that the checkpoint holds of
    /// it.
    pub(super) fn open(
        checkpoint: &'a Checkpoint,
        verify: Option<usize>,
        place: (&'a Device, Precision),
        (progress, total): (&'a (dyn Fn(u64, u64) + Sync), u64),
    ) -> Result<Self, ModelError> {
        progress(0, total);
        Ok(Self {
            files: Reader::of(checkpoint.files())?,
            checkpoint,
            verify,
            place,
            progress,
            done: 0,
            total,
        })
    }

    fn note(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done, self.total);
    }

    /// The rows of a matrix and their scales, in main memory.
    pub(super) fn bytes(
        &mut self,
        slice: &MatrixSlice,
    ) -> Result<(Vec<u8>, Option<Vec<f32>>), ModelError> {
        let bytes = self.files.matrix_bytes(slice)?;
        if let Some(rank) = self.verify {
            check_digest(self.checkpoint, rank, slice, &bytes)?;
        }
        let scales = self.files.matrix_scales(slice)?;
        self.note(slice.bytes());
        Ok((bytes, scales))
    }

    /// The values of a vector that holds divisors, in main memory.
    pub(super) fn divisors(&mut self, slice: &VectorSlice) -> Result<Vec<f32>, ModelError> {
        self.files.positive(slice)
    }

    pub(super) fn matrix(&mut self, slice: &MatrixSlice) -> Result<Matrix, ModelError> {
        let (bytes, scales) = self.bytes(slice)?;
        let shape = (slice.rows, slice.columns);
        let matrix =
            Matrix::from_bytes((&bytes, scales.as_deref()), slice.format, shape, self.place);
        matrix.map_err(|error| refused(&slice.name, &error))
    }

    pub(super) fn vector(&mut self, slice: &VectorSlice) -> Result<Tensor, ModelError> {
        let values = self.files.vector(slice)?;
        let vector = Tensor::from_vec(values, slice.len, self.place.0);
        self.note((slice.len * size_of::<f32>()) as u64);
        vector.map_err(|error| refused(&slice.name, &error))
    }

    /// The `number`-th layer of the model.
    pub(super) fn layer(
        &mut self,
        (config, number): (&LlamaConfig, usize),
        slices: &LayerSlices,
    ) -> Result<Layer<Matrix>, ModelError> {
        Ok(Layer {
            attn_norm: self.vector(&slices.attention_norm)?,
            q: self.matrix(&slices.query)?,
            k: self.matrix(&slices.key)?,
            v: self.matrix(&slices.value)?,
            o: self.matrix(&slices.output)?,
            attention: rules(config, number),
            ffn_norm: self.vector(&slices.feed_forward_norm)?,
            feed_forward: match &slices.feed_forward {
                FeedForwardPart::Dense(network) => FeedForward::Dense(self.gated(network)?),
                FeedForwardPart::Experts {
                    router,
                    shared,
                    experts,
                } => FeedForward::Experts(Experts {
                    router: self.matrix(router)?,
                    shared: self.gated(shared)?,
                    experts: experts
                        .iter()
                        .map(|expert| self.gated(expert))
                        .collect::<Result<_, _>>()?,
                }),
            },
        })
    }

    fn gated(&mut self, slices: &FeedForwardSlices) -> Result<Gated<Matrix>, ModelError> {
        Ok(Gated {
            gate: self.matrix(&slices.gate)?,
            up: self.matrix(&slices.up)?,
            down: self.matrix(&slices.down)?,
        })
    }
}

/// How the `number`-th layer of a model attends.
fn rules(config: &LlamaConfig, number: usize) -> AttentionRules {
    let kind = config.layers[number];
    AttentionRules {
        rotary: kind.rope.then_some(config.rope.pairs),
        chunk: config.chunk.filter(|_| kind.chunked),
        qk_norm: (config.qk_norm && kind.rope).then_some(config.rms_epsilon),
        temperature: config.temperature.filter(|_| !kind.rope),
    }
}

/// A tensor that the device did not take.
fn refused(name: &str, error: &candle_core::Error) -> ModelError {
    ModelError::Memory(format!("tensor {name}: {error}"))
}
