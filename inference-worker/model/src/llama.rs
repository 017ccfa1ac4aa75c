//! A Llama model's forward pass on one rank.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use llama_checkpoint::adapter::AdapterRoom;
use llama_checkpoint::blocks::KvBlocks;
use llama_checkpoint::memory::{KvFormat, check_context};
use llama_checkpoint::slices::ModelSlices;
use llama_checkpoint::{Checkpoint, Layout, LlamaConfig, ModelError, Shard};

use crate::attention::{Attend, AttentionForm, LayerStep, StepRows};
use crate::collective::Collective;
use crate::experts::Experts;
use crate::kernels::Isa;
use crate::kv::KvCache;
use crate::layer::{FeedForward, Layer, Network};
use crate::linear::{Linear, Matrix};
use crate::load::{self, LoadedFeedForward, LoadedNetwork};
use crate::lora::rows::StepAdapters;
use crate::lora::{self, AdapterLoader, Adapters, LoadedAdapter, Loading, Matrices};
use crate::ops::{Reduce, RmsNorm};
use crate::rope::Rope;
use crate::step::{Segment, StepError, StepModel, wanted_rows};
use crate::threads::Threads;

/// How a rank loads its part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// How the ranks of the group divide the model.
    pub layout: Layout,
    /// This rank, from 0.
    pub rank: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Sequences that the KV cache has a place for.
    pub slots: usize,
    /// Blocks that they share, as steps say. `None` gives each slot its own, for a
    /// sequence of `max_tokens`.
    pub blocks: Option<KvBlocks>,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
    /// The form of keys and values.
    pub kv: KvFormat,
    /// Whether weights must have the digests that the checkpoint holds of them.
    pub verify: bool,
    /// Room for adapters.
    pub adapters: AdapterRoom,
}

/// One rank's part of a Llama model, with its KV cache.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    shard: Shard,
    /// Rows of the token embedding, on the first stage.
    embedding: Option<Matrix>,
    layers: Vec<Layer>,
    /// Norm and output head, on the last stage.
    head: Option<(RmsNorm, Linear)>,
    rope: Rope,
    cache: KvCache,
    /// Rows of the output head that each rank of the group has.
    vocab_ranges: Vec<Range<usize>>,
    threads: Arc<Threads>,
    isa: Isa,
    adapters: Adapters<Linear>,
    loading: Loading,
}

/// What turns loaded weights into parts of a model.
struct Builder<'a> {
    config: &'a LlamaConfig,
    threads: Arc<Threads>,
    isa: Isa,
}

impl Builder<'_> {
    fn linear(&self, matrix: Matrix) -> Linear {
        Linear::new(matrix, self.isa, Arc::clone(&self.threads))
    }

    fn norm(&self, weight: Tensor) -> RmsNorm {
        RmsNorm::new(weight, self.config.rms_epsilon)
    }

    fn network(&self, loaded: LoadedNetwork) -> Network {
        Network {
            gate: self.linear(loaded.gate),
            up: self.linear(loaded.up),
            down: self.linear(loaded.down),
        }
    }

    fn layer(&self, number: usize, loaded: load::LoadedLayer) -> Layer {
        let config = self.config;
        let kind = config.layers[number];
        Layer {
            attention_norm: self.norm(loaded.attention_norm),
            query: self.linear(loaded.query),
            key: self.linear(loaded.key),
            value: self.linear(loaded.value),
            output: self.linear(loaded.output),
            form: AttentionForm {
                rope: kind.rope,
                chunked: kind.chunked && config.chunk.is_some(),
                norm: (config.qk_norm && kind.rope).then_some(config.rms_epsilon),
                temperature: config.temperature.filter(|_| !kind.rope),
            },
            feed_forward_norm: self.norm(loaded.feed_forward_norm),
            feed_forward: match loaded.feed_forward {
                LoadedFeedForward::Dense(network) => FeedForward::Dense(self.network(*network)),
                LoadedFeedForward::Experts {
                    router,
                    shared,
                    experts,
                } => FeedForward::Experts {
                    shared: self.network(*shared),
                    experts: Experts {
                        router: self.linear(*router),
                        networks: experts
                            .into_iter()
                            .map(|loaded| self.network(loaded))
                            .collect(),
                        isa: self.isa,
                    },
                },
            },
        }
    }
}

impl Llama {
    /// Loads the part of `options.rank`, telling `progress` the bytes read and
    /// the bytes to read. Only the rank's own slices are read.
    ///
    /// # Errors
    /// `InvalidLayout` when the model cannot be split so; whatever reading the
    /// weights refuses.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let layout = options.layout;
        let shard = Shard::new(&config, layout, options.rank)?;
        check_context(&config, options.max_tokens)?;
        let slices = ModelSlices::locate(checkpoint, &shard)?;
        let loaded = load::read(
            checkpoint,
            &slices,
            options.verify.then_some(options.rank),
            progress,
        )?;
        let builder = Builder {
            config: &config,
            threads: Arc::new(Threads::new(options.threads)?),
            isa: Isa::best(),
        };
        let numbers = shard.layers.clone();
        let layers = numbers
            .zip(loaded.layers)
            .map(|(number, layer)| builder.layer(number, layer))
            .collect();
        let head = loaded.norm.map(|norm| {
            // A tied model's head is its embedding.
            let matrix = loaded.head.or_else(|| loaded.embedding.clone());
            matrix.map(|matrix| (builder.norm(norm), builder.linear(matrix)))
        });
        let vocab_ranges = (0..layout.world())
            .map(|rank| {
                let shard = Shard::new(&config, layout, rank)?;
                let none = shard.vocab.end..shard.vocab.end;
                Ok(if shard.is_last_stage() {
                    shard.vocab
                } else {
                    none
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let (threads, isa) = (builder.threads, builder.isa);
        Ok(Self {
            embedding: loaded.embedding,
            layers,
            head: head.flatten(),
            rope: Rope::new(&config, loaded.rope_factors.as_deref()),
            cache: KvCache::new(
                &config,
                &shard,
                options.kv,
                (options.slots, options.max_tokens),
                options.blocks,
            ),
            vocab_ranges,
            threads,
            isa,
            adapters: Adapters::new(),
            loading: Loading::on_cores(checkpoint, shard.clone(), options.adapters),
            shard,
            config,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The instructions that its kernels use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The residual stream where this stage begins: rows of the embedding, of which
    /// each rank has a part, or what the stage before sends.
    fn begin(&self, segments: &[Segment], reduce: &Reduce<'_>) -> Result<Tensor, StepError> {
        let count = segments.iter().map(|segment| segment.tokens.len()).sum();
        let hidden = self.config.hidden;
        let Some(embedding) = &self.embedding else {
            return reduce.receive((count, hidden));
        };
        let table = embedding.rows();
        let mut rows = vec![0.0; count * hidden];
        let tokens = segments.iter().flat_map(|segment| &segment.tokens);
        for (token, row) in tokens.zip(rows.chunks_exact_mut(hidden)) {
            let token = *token as usize;
            if self.shard.vocab.contains(&token) {
                table.unpack_row(token - self.shard.vocab.start, row);
            }
        }
        let x =
            Tensor::from_vec(rows, (count, hidden), &Device::Cpu).map_err(StepError::Compute)?;
        reduce.sum(&x)?;
        Ok(x)
    }

    fn compute(
        &mut self,
        segments: &[Segment],
        reduce: &Reduce<'_>,
    ) -> Result<Vec<Vec<f32>>, StepError> {
        let x = self.begin(segments, reduce)?;
        let sequences = segments.iter().map(|segment| {
            let (slot, start) = (segment.slot as usize, segment.start as usize);
            (slot, start, segment.tokens.len())
        });
        for segment in segments {
            self.cache.extend(segment);
        }
        let rows = StepRows::new(sequences, &self.rope, self.config.chunk);
        let adapters = StepAdapters::new(&self.adapters, segments).map_err(StepError::Compute)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let attend = Attend {
                cache: RefCell::new(&mut self.cache),
                step: LayerStep {
                    rows: &rows,
                    rope: &self.rope,
                    form: layer.form,
                    layer: index,
                    head_dim: self.config.head_dim,
                    threads: &self.threads,
                    isa: self.isa,
                },
            };
            layer.forward(&x, &attend, adapters.of_layer(index), reduce)?;
        }
        if !self.shard.is_last_stage() {
            reduce.send(&x)?;
        }
        let wanted = wanted_rows(segments);
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let part = match &self.head {
            None => None,
            Some((norm, head)) => {
                let part = project(&x, &wanted, norm, head);
                Some(part.map_err(StepError::Compute)?)
            }
        };
        reduce.gather_rows(wanted.len(), part.as_ref(), &self.vocab_ranges)
    }
}

/// This rank's columns of the logits after the rows `wanted`.
fn project(
    x: &Tensor,
    wanted: &[u32],
    norm: &RmsNorm,
    head: &Linear,
) -> candle_core::Result<Tensor> {
    let wanted = Tensor::from_slice(wanted, wanted.len(), &Device::Cpu)?;
    head.forward(&norm.forward(&x.index_select(&wanted, 0)?)?)
}

impl StepModel for Llama {
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
        let threads = Arc::clone(&self.threads);
        threads.run(|| self.compute(segments, &Reduce::new(collective)))
    }

    fn kv_cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    fn adapter_loader(&self) -> AdapterLoader {
        self.loading.loader()
    }

    fn put_adapter(&mut self, place: u32, adapter: LoadedAdapter) -> Result<(), StepError> {
        let Matrices::Cores(adapter) = adapter.matrices else {
            return Err(StepError::Invalid("an adapter for a device".to_owned()));
        };
        let linear = |matrix| Linear::new(matrix, self.isa, Arc::clone(&self.threads));
        let adapter = lora::rows::multiplying(adapter, linear);
        self.adapters.insert(place, adapter);
        Ok(())
    }

    fn drop_adapter(&mut self, place: u32) {
        self.adapters.remove(&place);
    }
}
