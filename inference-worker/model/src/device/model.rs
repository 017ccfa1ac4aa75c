//! A Llama model's forward pass on one rank, on any candle device.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use llama_checkpoint::blocks::KvGroup;
use llama_checkpoint::memory::{KvFormat, check_context};
use llama_checkpoint::slices::{MatrixSlice, ModelSlices};
use llama_checkpoint::{Checkpoint, Format, LlamaConfig, ModelError, Shard};

use super::adapters::StepAdapters;
use super::cache::{CacheShape, TensorCache};
use super::collective::{Staged, TensorCollective};
use super::layer::{Layer, Pass};
use super::load::DeviceReader;
use super::matrix::{Matrix, Precision};
use super::operations::{Operations, Sequence};
use super::tensors::TensorOperations;
use crate::collective::Collective;
use crate::kernels;
use crate::llama::LoadOptions;
use crate::lora::{self, AdapterLoader, Adapters, LoadedAdapter, Loading, Matrices};
use crate::rope::Rope;
use crate::step::{Segment, StepError, StepModel, join_columns, wanted_rows};

/// One rank's part of a Llama model on a device, with its KV cache.
#[derive(Debug)]
pub struct DeviceLlama {
    config: LlamaConfig,
    operations: TensorOperations,
    /// On the first stage. Stays in main memory: a step needs few of its rows.
    embedding: Option<Embedding>,
    layers: Vec<Layer<Matrix>>,
    /// Norm and output head, on the last stage.
    head: Option<(Tensor, Matrix)>,
    cache: TensorCache,
    is_last_stage: bool,
    /// Rows of the output head that each rank of the group has.
    vocab_ranges: Vec<Range<usize>>,
    adapters: Adapters<Matrix>,
    loading: Loading,
}

/// A rank's rows of the token embedding.
#[derive(Debug)]
struct Embedding {
    bytes: Vec<u8>,
    scales: Option<Vec<f32>>,
    format: Format,
    columns: usize,
    tokens: Range<usize>,
}

impl Embedding {
    /// Writes the row of `token` into `row`, if this rank has it.
    fn unpack(&self, token: usize, row: &mut [f32]) {
        if !self.tokens.contains(&token) {
            return;
        }
        let number = token - self.tokens.start;
        let size = self.format.row_bytes(self.columns);
        let bytes = &self.bytes[number * size..(number + 1) * size];
        let scale = self.scales.as_ref().map(|scales| scales[number]);
        kernels::unpack(self.format, bytes, scale, row);
    }
}

impl DeviceLlama {
    /// Loads the part of `options.rank` onto `device`, telling `progress` the bytes
    /// read and the bytes to read.
    ///
    /// # Errors
    /// Those of [`Llama::load`](crate::Llama::load); `InsufficientMemory` when the
    /// device has no room.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        (device, precision): (&Device, Precision),
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let shard = Shard::new(&config, options.layout, options.rank)?;
        check_context(&config, options.max_tokens)?;
        let slices = ModelSlices::locate(checkpoint, &shard)?;
        let mut reader = DeviceReader::open(
            checkpoint,
            options.verify.then_some(options.rank),
            (device, precision),
            (progress, slices.bytes()),
        )?;

        let embedding = slices.embedding.as_ref();
        // A tied model's head is its embedding.
        let head = slices.head.as_ref().or(embedding);
        let head = match (&slices.norm, head) {
            (Some(norm), Some(head)) => Some((reader.vector(norm)?, reader.matrix(head)?)),
            _ => None,
        };
        let embedding = embedding
            .map(|slice| read_embedding(&mut reader, slice, shard.vocab.clone()))
            .transpose()?;
        let layers = shard
            .layers
            .clone()
            .zip(&slices.layers)
            .map(|(number, slices)| reader.layer((&config, number), slices))
            .collect::<Result<Vec<_>, _>>()?;
        let factors = slices.rope_factors.as_ref();
        let factors = factors
            .map(|factors| reader.divisors(factors))
            .transpose()?;
        let rope = Rope::new(&config, factors.as_deref());

        let shape = CacheShape {
            slots: options.slots,
            max_tokens: options.max_tokens,
            kv_heads: shard.kv_heads.len(),
            head_dim: config.head_dim,
            blocks: options.blocks,
            chunk: config.chunk,
            layers: layers
                .iter()
                .map(|layer| match layer.attention.chunk {
                    Some(_) => KvGroup::Chunk,
                    None => KvGroup::All,
                })
                .collect(),
        };
        let kept = match options.kv {
            KvFormat::F16 => DType::F16,
            KvFormat::F32 => DType::F32,
            KvFormat::Int8 => {
                return Err(ModelError::Unsupported(
                    "keys and values in 8 bits are computed on CPU cores only".to_owned(),
                ));
            }
        };
        Ok(Self {
            operations: TensorOperations::new(device, rope.steps().to_vec()),
            embedding,
            layers,
            head,
            cache: TensorCache::new(shape, kept, device).map_err(|error| {
                ModelError::Memory(format!(
                    "the device has no memory for the KV cache: {error}"
                ))
            })?,
            is_last_stage: shard.is_last_stage(),
            vocab_ranges: vocab_ranges(&config, options)?,
            adapters: Adapters::new(),
            loading: Loading::on_device(checkpoint, shard, options.adapters, (device, precision)),
            config,
        })
    }

    /// The residual stream where this stage begins: rows of the embedding, of which
    /// each rank has a part, or what the stage before sends.
    fn begin(
        &self,
        segments: &[Segment],
        collective: &mut dyn TensorCollective,
    ) -> Result<Tensor, StepError> {
        let count = segments.iter().map(|segment| segment.tokens.len()).sum();
        let shape = (count, self.config.hidden);
        let device = self.operations.device();
        let Some(embedding) = &self.embedding else {
            let x = Tensor::zeros(shape, DType::F32, device).map_err(StepError::Compute)?;
            collective.receive_previous(&x)?;
            return Ok(x);
        };
        let mut rows = vec![0.0; count * self.config.hidden];
        let tokens = segments.iter().flat_map(|segment| &segment.tokens);
        for (token, row) in tokens.zip(rows.chunks_exact_mut(self.config.hidden)) {
            embedding.unpack(*token as usize, row);
        }
        let x = Tensor::from_vec(rows, shape, device).map_err(StepError::Compute)?;
        collective.all_reduce_sum(&x)?;
        Ok(x)
    }

    fn compute(
        &mut self,
        segments: &[Segment],
        collective: &mut dyn TensorCollective,
    ) -> Result<Vec<Vec<f32>>, StepError> {
        let sequences: Vec<Sequence> = segments.iter().map(sequence).collect();
        let mut x = self.begin(segments, collective)?;
        for segment in segments {
            self.cache.extend(segment);
        }
        let rows = self
            .operations
            .rows(&sequences)
            .map_err(StepError::Compute)?;
        let adapters = StepAdapters::new(&self.adapters, segments);
        let mut pass = Pass {
            operations: &self.operations,
            rows: &rows,
            cache: &mut self.cache,
            epsilon: self.config.rms_epsilon,
            adapters: &adapters,
            collective,
        };
        for (number, layer) in self.layers.iter().enumerate() {
            x = layer.forward(number, &x, &mut pass)?;
        }
        if !self.is_last_stage {
            collective.send_next(&x)?;
        }
        let wanted = wanted_rows(segments);
        if wanted.is_empty() {
            // A peer's failure belongs to the step in which it happened.
            collective.settle()?;
            return Ok(Vec::new());
        }
        let part = match &self.head {
            None => None,
            Some(head) => Some(
                self.project(&x, &wanted, head)
                    .map_err(StepError::Compute)?,
            ),
        };
        let lens: Vec<usize> = self
            .vocab_ranges
            .iter()
            .map(|range| range.len() * wanted.len())
            .collect();
        let all = collective.all_gather(part.as_ref(), &lens)?;
        Ok(join_columns(&all, &self.vocab_ranges, wanted.len()))
    }

    /// This rank's columns of the logits after the rows `wanted`.
    fn project(
        &self,
        x: &Tensor,
        wanted: &[u32],
        (norm, head): &(Tensor, Matrix),
    ) -> candle_core::Result<Tensor> {
        let wanted = Tensor::from_slice(wanted, wanted.len(), self.operations.device())?;
        let x = x.index_select(&wanted, 0)?;
        let x = self
            .operations
            .rms_norm(&x, norm, self.config.rms_epsilon)?;
        self.operations.linear(&x, head)
    }
}

/// Rows of the output head that each rank of the group has: none before the last
/// stage.
fn vocab_ranges(
    config: &LlamaConfig,
    options: &LoadOptions,
) -> Result<Vec<Range<usize>>, ModelError> {
    (0..options.layout.world())
        .map(|rank| {
            let shard = Shard::new(config, options.layout, rank)?;
            Ok(if shard.is_last_stage() {
                shard.vocab
            } else {
                0..0
            })
        })
        .collect()
}

fn read_embedding(
    reader: &mut DeviceReader<'_>,
    slice: &MatrixSlice,
    tokens: Range<usize>,
) -> Result<Embedding, ModelError> {
    let (bytes, scales) = reader.bytes(slice)?;
    Ok(Embedding {
        bytes,
        scales,
        format: slice.format,
        columns: slice.columns,
        tokens,
    })
}

fn sequence(segment: &Segment) -> Sequence {
    Sequence {
        slot: segment.slot as usize,
        start: segment.start as usize,
        len: segment.tokens.len(),
    }
}

impl StepModel for DeviceLlama {
    fn vocab_size(&self) -> usize {
        self.config.vocab
    }

    fn step(
        &mut self,
        segments: &[Segment],
        collective: &mut dyn Collective,
    ) -> Result<Vec<Vec<f32>>, StepError> {
        self.cache.check(segments, self.config.vocab)?;
        lora::check(&self.adapters, segments).map_err(StepError::Invalid)?;
        if segments.is_empty() {
            return Ok(Vec::new());
        }
        match collective.on_device() {
            Some(collective) => self.compute(segments, collective),
            None => self.compute(segments, &mut Staged(collective)),
        }
    }

    fn kv_cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    fn adapter_loader(&self) -> AdapterLoader {
        self.loading.loader()
    }

    fn put_adapter(&mut self, place: u32, adapter: LoadedAdapter) -> Result<(), StepError> {
        let Matrices::Device(adapter) = adapter.matrices else {
            return Err(StepError::Invalid("an adapter for CPU cores".to_owned()));
        };
        self.adapters.insert(place, adapter);
        Ok(())
    }

    fn drop_adapter(&mut self, place: u32) {
        self.adapters.remove(&place);
    }
}
