//! Shape and constants of a Llama model, from the metadata of its GGUF.

use crate::error::ModelError;
use crate::gguf::{Gguf, Value};
use crate::kernels::BLOCK;

const ARCHITECTURE_KEY: &str = "general.architecture";
const ARCHITECTURE: &str = "llama";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const SPLIT_KEY: &str = "split.count";
/// Base of the rotary frequencies where the file names none.
const DEFAULT_ROPE_BASE: f64 = 10_000.0;
/// No model comes near these; larger numbers are damage, and arithmetic on
/// anything smaller cannot overflow.
const MAX_SIZE: u64 = 1 << 24;

/// Metadata that changes the computation when it is not zero, and that this
/// crate does not compute.
const UNSUPPORTED_WHEN_SET: [&str; 8] = [
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
];

/// Shape and constants of a Llama model.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Leading dimensions of a head that rotary embedding turns.
    pub rope_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Positions are divided by this before they turn (linear scaling); 1 for none.
    pub rope_scale: f64,
    /// Added to the mean square in `RMSNorm`.
    pub rms_epsilon: f32,
    /// Tokens that the model was trained to attend over.
    pub context_length: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
}

impl LlamaConfig {
    /// Reads the configuration.
    ///
    /// # Errors
    /// `ModelUnsupported` for another architecture or for metadata that changes
    /// the computation in a way that is not built in, by name; `ModelInvalid`
    /// for missing or contradicting numbers.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        check_architecture(gguf)?;
        let keys = Keys(gguf);
        for key in UNSUPPORTED_WHEN_SET {
            keys.refuse_when_set(key)?;
        }
        let hidden = keys.size("embedding_length")?;
        let heads = keys.size("attention.head_count")?;
        let kv_heads = keys
            .optional_size("attention.head_count_kv")?
            .unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(gguf.invalid(&format!(
                "{heads} attention heads do not share {kv_heads} KV heads evenly"
            )));
        }
        let head_dim = match keys.optional_size("attention.key_length")? {
            Some(length) => length,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(gguf.invalid(&format!(
                    "embedding length {hidden} is not a multiple of {heads} attention heads"
                )));
            }
        };
        keys.expect_equal("attention.value_length", head_dim)?;
        if !head_dim.is_multiple_of(BLOCK) {
            return Err(gguf.unsupported(&format!(
                "attention heads are {head_dim} wide; this worker takes multiples of {BLOCK}"
            )));
        }
        let rope_dim = keys
            .optional_size("rope.dimension_count")?
            .unwrap_or(head_dim);
        if rope_dim > head_dim || !rope_dim.is_multiple_of(2) {
            return Err(gguf.invalid(&format!(
                "rotary embedding of {rope_dim} dimensions in heads of {head_dim}"
            )));
        }
        Ok(Self {
            layers: keys.size("block_count")?,
            hidden,
            ffn: keys.size("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            rope_dim,
            rope_base: keys
                .positive("rope.freq_base")?
                .unwrap_or(DEFAULT_ROPE_BASE),
            rope_scale: keys.rope_scale()?,
            rms_epsilon: keys.rms_epsilon()?,
            context_length: keys.size("context_length")?,
            vocab: vocab_size(gguf)?,
        })
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

fn check_architecture(gguf: &Gguf) -> Result<(), ModelError> {
    match gguf.text(ARCHITECTURE_KEY)? {
        Some(ARCHITECTURE) => {}
        Some(other) => {
            return Err(gguf.unsupported(&format!(
                "{ARCHITECTURE_KEY} is \"{other}\"; this worker runs \"{ARCHITECTURE}\""
            )));
        }
        None => return Err(gguf.invalid(&format!("metadata {ARCHITECTURE_KEY} is missing"))),
    }
    match gguf.unsigned(SPLIT_KEY)? {
        None | Some(0 | 1) => Ok(()),
        Some(parts) => Err(gguf.unsupported(&format!(
            "the model is split into {parts} files; merge them into one (llama-gguf-split --merge)"
        ))),
    }
}

fn vocab_size(gguf: &Gguf) -> Result<usize, ModelError> {
    let tokens = gguf
        .texts(TOKENS_KEY)?
        .ok_or_else(|| gguf.invalid(&format!("metadata {TOKENS_KEY} is missing")))?
        .len();
    let declared = Keys(gguf).optional_size("vocab_size")?;
    if declared.is_some_and(|declared| declared != tokens) || tokens == 0 {
        return Err(gguf.invalid(&format!(
            "{ARCHITECTURE}.vocab_size is {} but {TOKENS_KEY} has {tokens} entries",
            declared.unwrap_or_default()
        )));
    }
    Ok(tokens)
}

/// Metadata under the architecture's name.
struct Keys<'a>(&'a Gguf);

impl Keys<'_> {
    fn key(name: &str) -> String {
        format!("{ARCHITECTURE}.{name}")
    }

    fn optional_size(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let key = Self::key(name);
        if let Some(Value::UnsignedList(_) | Value::SignedList(_)) = self.0.metadata().get(&key) {
            return Err(self
                .0
                .unsupported(&format!("{key} differs from layer to layer")));
        }
        match self.0.unsigned(&key)? {
            None => Ok(None),
            Some(value @ 1..=MAX_SIZE) => Ok(usize::try_from(value).ok()),
            Some(value) => Err(self
                .0
                .invalid(&format!("{key} is {value}, expected 1 to {MAX_SIZE}"))),
        }
    }

    fn size(&self, name: &str) -> Result<usize, ModelError> {
        self.optional_size(name)?.ok_or_else(|| {
            self.0
                .invalid(&format!("metadata {} is missing", Self::key(name)))
        })
    }

    fn positive(&self, name: &str) -> Result<Option<f64>, ModelError> {
        let key = Self::key(name);
        match self.0.float(&key)? {
            Some(value) if !(value > 0.0 && value.is_finite()) => Err(self
                .0
                .invalid(&format!("{key} is {value}, expected a positive number"))),
            value => Ok(value),
        }
    }

    fn expect_equal(&self, name: &str, expected: usize) -> Result<(), ModelError> {
        match self.optional_size(name)? {
            Some(value) if value != expected => Err(self.0.unsupported(&format!(
                "{} is {value}, but keys are {expected} wide",
                Self::key(name)
            ))),
            _ => Ok(()),
        }
    }

    fn refuse_when_set(&self, name: &str) -> Result<(), ModelError> {
        let key = Self::key(name);
        let value = match self.0.metadata().get(&key) {
            None | Some(Value::Unsigned(0) | Value::Signed(0) | Value::Bool(false)) => {
                return Ok(());
            }
            Some(Value::Float(value)) if *value == 0.0 => return Ok(()),
            Some(Value::Unsigned(value)) => value.to_string(),
            Some(Value::Signed(value)) => value.to_string(),
            Some(Value::Float(value)) => value.to_string(),
            Some(other) => other.kind().to_owned(),
        };
        Err(self.0.unsupported(&format!(
            "{key} is {value}, which this worker does not compute"
        )))
    }

    fn rms_epsilon(&self) -> Result<f32, ModelError> {
        let name = "attention.layer_norm_rms_epsilon";
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the file stores an f32, widened when read"
        )]
        let narrow = |value| value as f32;
        self.positive(name)?.map(narrow).ok_or_else(|| {
            self.0
                .invalid(&format!("metadata {} is missing", Self::key(name)))
        })
    }

    /// Divisor of positions. Llama 3's own scaling is not metadata but the tensor
    /// `rope_freqs.weight`.
    fn rope_scale(&self) -> Result<f64, ModelError> {
        let key = Self::key("rope.scaling.type");
        match self.0.text(&key)? {
            None => Ok(self.positive("rope.scale_linear")?.unwrap_or(1.0)),
            Some("none") => Ok(1.0),
            Some("linear") => Ok(self.positive("rope.scaling.factor")?.unwrap_or(1.0)),
            Some(other) => Err(self.0.unsupported(&format!(
                "{key} is \"{other}\"; \"none\", \"linear\" and Llama 3's rope_freqs.weight are built in"
            ))),
        }
    }
}
