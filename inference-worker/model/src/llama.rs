//! A Llama model's forward pass on one tensor-parallel rank.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::attention::{Attend, Rope, StepRows};
use crate::collective::Collective;
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::gguf::Gguf;
use crate::kernels::{BLOCK, Isa};
use crate::kv::KvCache;
use crate::linear::Linear;
use crate::ops::{AddTo, Reduce, RmsNorm, SiluMul};
use crate::shard::Shard;
use crate::step::{Segment, StepError, StepModel};
use crate::threads::Threads;
use crate::weights::{Embedding, LayerSlices, ModelSlices};

/// How a rank loads its part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// This rank, from 0.
    pub rank: usize,
    /// Ranks of the group.
    pub world: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Sequences that the KV cache has a place for.
    pub slots: usize,
    /// Tokens that a sequence may have.
    pub max_tokens: usize,
}

/// One rank's shard of a Llama model, with its KV cache.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rope: Rope,
    cache: KvCache,
    /// Rows of the output head that each rank has.
    vocab_ranges: Vec<Range<usize>>,
    threads: Arc<Threads>,
    isa: Isa,
}

#[derive(Debug)]
struct Layer {
    attn_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    ffn_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(
        slices: &LayerSlices<'_>,
        gguf: &Gguf,
        config: &LlamaConfig,
        isa: Isa,
        threads: &Arc<Threads>,
    ) -> Result<Self, ModelError> {
        let epsilon = config.rms_epsilon;
        Ok(Self {
            attn_norm: RmsNorm::new(slices.attn_norm.load(gguf)?, epsilon),
            q: slices.q.load(gguf, isa, threads)?,
            k: slices.k.load(gguf, isa, threads)?,
            v: slices.v.load(gguf, isa, threads)?,
            o: slices.o.load(gguf, isa, threads)?,
            ffn_norm: RmsNorm::new(slices.ffn_norm.load(gguf)?, epsilon),
            gate: slices.gate.load(gguf, isa, threads)?,
            up: slices.up.load(gguf, isa, threads)?,
            down: slices.down.load(gguf, isa, threads)?,
        })
    }
}

impl Llama {
    /// Loads the part of `options.rank`, telling `progress` the bytes read and
    /// the bytes to read. Only the rank's own slices are copied to memory.
    ///
    /// # Errors
    /// `InvalidLayout` when the model cannot be split so, `ModelUnsupported` and
    /// `ModelInvalid` when the file is not a Llama model that this crate runs.
    pub fn load(
        gguf: &Gguf,
        options: &LoadOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, ModelError> {
        let config = LlamaConfig::from_gguf(gguf)?;
        let shard = Shard::new(&config, options.rank, options.world, BLOCK)?;
        check_context(&config, options.max_tokens)?;
        let slices = ModelSlices::locate(gguf, &config, &shard)?;
        let threads = Arc::new(Threads::new(options.threads)?);
        let isa = Isa::best();

        let total = slices.bytes();
        let mut done = 0;
        progress(done, total);
        let mut layers = Vec::with_capacity(slices.layers.len());
        for slices in &slices.layers {
            layers.push(Layer::load(slices, gguf, &config, isa, &threads)?);
            done += slices.bytes();
            progress(done, total);
        }
        let norm = RmsNorm::new(slices.norm.load(gguf)?, config.rms_epsilon);
        let head = slices.head.load(gguf, isa, &threads)?;
        gguf.release_pages()?;
        progress(total, total);

        let factors = rope_factors(gguf, &slices)?;
        let vocab_ranges = (0..options.world)
            .map(|rank| Shard::new(&config, rank, options.world, BLOCK).map(|shard| shard.vocab))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embedding: slices.embedding(gguf),
            layers,
            norm,
            head,
            rope: Rope::new(&config, factors.as_deref()),
            cache: KvCache::new(&config, &shard, options.slots, options.max_tokens),
            vocab_ranges,
            threads,
            isa,
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

    /// Refuses what no rank may begin, before the first collective.
    fn check(&self, segments: &[Segment]) -> Result<(), StepError> {
        let invalid = |text: String| Err(StepError::Invalid(text));
        let mut slots = BTreeSet::new();
        for Segment {
            slot,
            start,
            tokens,
            ..
        } in segments
        {
            let (slot, start) = (*slot as usize, *start as usize);
            if slot >= self.cache.slots() {
                return invalid(format!("slot {slot} of {}", self.cache.slots()));
            }
            if !slots.insert(slot) {
                return invalid(format!("slot {slot} occurs twice"));
            }
            if tokens.is_empty() {
                return invalid(format!("no tokens for slot {slot}"));
            }
            if start > self.cache.tokens(slot) {
                return invalid(format!(
                    "slot {slot} goes on at position {start} but has {} tokens",
                    self.cache.tokens(slot)
                ));
            }
            if start + tokens.len() > self.cache.max_tokens() {
                return invalid(format!(
                    "slot {slot} would have {} tokens, the limit is {}",
                    start + tokens.len(),
                    self.cache.max_tokens()
                ));
            }
            if let Some(token) = tokens
                .iter()
                .find(|token| **token as usize >= self.config.vocab)
            {
                return invalid(format!(
                    "token {token} is not in the vocabulary of {}",
                    self.config.vocab
                ));
            }
        }
        Ok(())
    }

    fn embed(&self, segments: &[Segment]) -> candle_core::Result<Tensor> {
        let tokens = || segments.iter().flat_map(|segment| &segment.tokens);
        let count = tokens().count();
        let mut rows = Vec::with_capacity(count * self.config.hidden);
        for token in tokens() {
            self.embedding.push_row(*token as usize, &mut rows);
        }
        Tensor::from_vec(rows, (count, self.config.hidden), &Device::Cpu)
    }

    fn compute(
        &mut self,
        segments: &[Segment],
        reduce: &Reduce<'_>,
    ) -> Result<Vec<Vec<f32>>, StepError> {
        let x = self.embed(segments).map_err(StepError::Compute)?;
        let sequences = segments.iter().map(|segment| {
            let (slot, start) = (segment.slot as usize, segment.start as usize);
            (slot, start, segment.tokens.len())
        });
        for (slot, start, len) in sequences.clone() {
            self.cache.extend(slot, start, len);
        }
        let rows = StepRows::new(sequences, &self.rope);
        for (index, layer) in self.layers.iter().enumerate() {
            let attend = Attend {
                cache: RefCell::new(&mut self.cache),
                rows: &rows,
                layer: index,
                head_dim: self.config.head_dim,
                threads: &self.threads,
                isa: self.isa,
            };
            let part = layer.attention(&x, &attend).map_err(StepError::Compute)?;
            reduce.sum(&part)?;
            x.inplace_op2(&part, &AddTo).map_err(StepError::Compute)?;
            let part = layer
                .feed_forward(&x, self.isa)
                .map_err(StepError::Compute)?;
            reduce.sum(&part)?;
            x.inplace_op2(&part, &AddTo).map_err(StepError::Compute)?;
        }
        let wanted = wanted_rows(segments);
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let part = self.project(&x, &wanted).map_err(StepError::Compute)?;
        reduce.gather_rows(&part, &self.vocab_ranges)
    }

    /// This rank's columns of the logits after the rows `wanted`.
    fn project(&self, x: &Tensor, wanted: &[u32]) -> candle_core::Result<Tensor> {
        let wanted = Tensor::from_slice(wanted, wanted.len(), &Device::Cpu)?;
        let x = self.norm.forward(&x.index_select(&wanted, 0)?)?;
        self.head.forward(&x)
    }
}

impl Layer {
    /// This rank's part of the attention output.
    fn attention(&self, x: &Tensor, attend: &Attend<'_>) -> candle_core::Result<Tensor> {
        let x = self.attn_norm.forward(x)?;
        let (q, k, v) = (
            self.q.forward(&x)?,
            self.k.forward(&x)?,
            self.v.forward(&x)?,
        );
        self.o.forward(&q.apply_op3_no_bwd(&k, &v, attend)?)
    }

    /// This rank's part of the feed-forward network's output.
    fn feed_forward(&self, x: &Tensor, isa: Isa) -> candle_core::Result<Tensor> {
        let x = self.ffn_norm.forward(x)?;
        let gate = self.gate.forward(&x)?;
        let up = self.up.forward(&x)?;
        self.down
            .forward(&gate.apply_op2_no_bwd(&up, &SiluMul(isa))?)
    }
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
        self.check(segments)?;
        if segments.is_empty() {
            return Ok(Vec::new());
        }
        let threads = Arc::clone(&self.threads);
        threads.run(|| self.compute(segments, &Reduce::new(collective)))
    }
}

/// Llama 3's divisors of the rotary frequencies, where the file has them.
fn rope_factors(gguf: &Gguf, slices: &ModelSlices<'_>) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(slice) = slices.rope_factors else {
        return Ok(None);
    };
    let factors = slice.values(gguf);
    match factors
        .iter()
        .find(|factor| **factor <= 0.0 || factor.is_nan())
    {
        Some(factor) => Err(gguf.invalid(&format!(
            "{} holds {factor}, expected positive numbers",
            slice.name()
        ))),
        None => Ok(Some(factors)),
    }
}

/// Rows of the last tokens whose logits are wanted.
fn wanted_rows(segments: &[Segment]) -> Vec<u32> {
    let mut wanted = Vec::new();
    let mut end = 0_u32;
    for segment in segments {
        end += u32::try_from(segment.tokens.len()).unwrap_or(u32::MAX);
        if segment.wants_logits {
            wanted.push(end - 1);
        }
    }
    wanted
}

/// A sequence longer than the model was trained for would be answered with
/// nonsense.
pub(crate) fn check_context(config: &LlamaConfig, max_tokens: usize) -> Result<(), ModelError> {
    if max_tokens == 0 || max_tokens > config.context_length {
        return Err(ModelError::Layout(format!(
            "sequences of {max_tokens} tokens: the model takes 1 to {}",
            config.context_length
        )));
    }
    Ok(())
}
