//! Reading an embedding model.

use std::sync::Arc;

use llama_checkpoint::EmbeddingCheckpoint;
use llama_checkpoint::embedding::{
    EmbeddingLayerSlices, EmbeddingSlices, NormSlices, ProjectionSlices,
};

use super::Embedder;
use super::layer::{AddBias, Layer, LayerNorm, Projection};
use crate::error::ModelError;
use crate::kernels::Isa;
use crate::linear::{Linear, Matrix};
use crate::load::Reader;
use crate::threads::Threads;

/// Loads the model of `checkpoint`.
pub(super) fn load(
    checkpoint: &EmbeddingCheckpoint,
    threads: Arc<Threads>,
    isa: Isa,
) -> Result<Embedder, ModelError> {
    let slices = EmbeddingSlices::locate(checkpoint)?;
    let files = Reader::of(checkpoint.files())?;
    let mut loader = Loader {
        matrices: files.matrices(&slices.matrices())?.into_iter(),
        files: &files,
        checkpoint,
        threads,
        isa,
    };
    let (words, positions, types) = (loader.next()?, loader.next()?, loader.next()?);
    let mut segment = vec![0.0; checkpoint.config().hidden];
    types.rows().unpack_row(0, &mut segment);
    let layers = slices.layers.iter().map(|layer| loader.layer(layer));
    let layers = layers.collect::<Result<_, _>>()?;
    Ok(Embedder {
        config: checkpoint.config().clone(),
        words,
        positions,
        segment,
        norm: loader.norm(&slices.norm)?,
        layers,
        threads: loader.threads,
    })
}

/// Puts matrices where they belong, in the order of [`EmbeddingSlices::matrices`].
struct Loader<'a> {
    matrices: std::vec::IntoIter<Matrix>,
    files: &'a Reader,
    checkpoint: &'a EmbeddingCheckpoint,
    threads: Arc<Threads>,
    isa: Isa,
}

impl Loader<'_> {
    fn next(&mut self) -> Result<Matrix, ModelError> {
        self.matrices.next().ok_or_else(|| {
            let path = self.checkpoint.path().display();
            ModelError::Invalid(format!("{path}: a matrix was not read"))
        })
    }

    fn projection(&mut self, slices: &ProjectionSlices) -> Result<Projection, ModelError> {
        Ok(Projection {
            linear: Linear::new(self.next()?, self.isa, Arc::clone(&self.threads)),
            bias: AddBias {
                bias: self.files.vector(&slices.bias)?,
                gelu: false,
                isa: self.isa,
                threads: Arc::clone(&self.threads),
            },
        })
    }

    fn norm(&self, slices: &NormSlices) -> Result<LayerNorm, ModelError> {
        Ok(LayerNorm {
            weight: self.files.vector(&slices.weight)?,
            bias: self.files.vector(&slices.bias)?,
            epsilon: self.checkpoint.config().epsilon,
        })
    }

    fn layer(&mut self, slices: &EmbeddingLayerSlices) -> Result<Layer, ModelError> {
        let mut layer = Layer {
            query: self.projection(&slices.query)?,
            key: self.projection(&slices.key)?,
            value: self.projection(&slices.value)?,
            heads: self.checkpoint.config().heads,
            output: self.projection(&slices.output)?,
            attention_norm: self.norm(&slices.attention_norm)?,
            up: self.projection(&slices.up)?,
            down: self.projection(&slices.down)?,
            output_norm: self.norm(&slices.output_norm)?,
        };
        layer.up.bias.gelu = true;
        Ok(layer)
    }
}
