//! Shape and constants of a model, from the metadata of its GGUF.

use super::{
    Experts, LayerKind, LlamaConfig, MAX_LAYERS, MAX_SIZE, Rope, RopePairs, RopeScaling,
    Temperature,
};
use crate::error::ModelError;
use crate::foreign::shown;
use crate::gguf::{Gguf, Value};

pub(crate) const ARCHITECTURE_KEY: &str = "general.architecture";
const LLAMA: &str = "llama";
const LLAMA4: &str = "llama4";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const SPLIT_KEY: &str = "split.count";
/// Divisors of rotary frequencies, where a model has them.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// A tied model has no such tensor.
pub(crate) const OUTPUT: &str = "output.weight";
/// Base of the rotary frequencies where the file names none.
const DEFAULT_ROPE_BASE: f64 = 10_000.0;

/// Llama 4's constants that its GGUF does not carry: every fourth layer has no
/// rotary embedding, and the queries of such layers grow.
const NO_ROPE_INTERVAL: usize = 4;
const ATTENTION_CHUNK: usize = 8192;
const TEMPERATURE: Temperature = Temperature {
    floor_scale: 8192.0,
    scale: 0.1,
};
/// Experts of a Maverick layer; Maverick does not normalise queries and keys.
const MAVERICK_EXPERTS: usize = 128;

/// A Llama 4 in which no layer attends in chunks says so with a window of 0.
const SLIDING_WINDOW: &str = "attention.sliding_window";
/// Metadata that changes the computation when it is not zero, and that this
/// crate does not compute.
const UNSUPPORTED_WHEN_SET: [&str; 8] = [
    SLIDING_WINDOW,
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "expert_weights_scale",
];

/// Reads the configuration.
///
/// # Errors
/// `ModelUnsupported` for another architecture or for metadata that changes the
/// computation in a way that is not built in, by name; `ModelInvalid` for missing
/// or contradicting numbers.
pub(crate) fn from_gguf(gguf: &Gguf) -> Result<LlamaConfig, ModelError> {
    let keys = Keys {
        gguf,
        architecture: architecture(gguf)?,
    };
    for key in UNSUPPORTED_WHEN_SET {
        keys.refuse_when_set(key)?;
    }
    let hidden = keys.size("embedding_length")?;
    let heads = keys.size("attention.head_count")?;
    let kv_heads = keys
        .optional_size("attention.head_count_kv")?
        .unwrap_or(heads);
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(length) => length,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(gguf.invalid(&format!(
                "embedding length {hidden} is not a multiple of {heads} attention heads"
            )));
        }
    };
    keys.expect_equal("attention.value_length", head_dim, "keys as wide as values")?;
    let ffn = keys.size("feed_forward_length")?;
    let plain = LlamaConfig {
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        layers: vec![LayerKind::PLAIN; keys.layer_count()?],
        rope: Rope {
            dim: keys
                .optional_size("rope.dimension_count")?
                .unwrap_or(head_dim),
            base: keys
                .positive("rope.freq_base")?
                .unwrap_or(DEFAULT_ROPE_BASE),
            pairs: RopePairs::Neighbours,
            scaling: keys.rope_scaling()?,
        },
        experts: None,
        chunk: None,
        qk_norm: false,
        temperature: None,
        rms_epsilon: keys.rms_epsilon()?,
        context_length: keys.size("context_length")?,
        vocab: keys.vocab_size()?,
        tied: gguf.tensor(OUTPUT).is_none(),
    };
    let config = if keys.architecture == LLAMA4 {
        llama4(&keys, plain)?
    } else {
        keys.refuse_when_set("expert_count")?;
        plain
    };
    config.check(&gguf.path().display().to_string())
}

/// What Llama 4 adds.
fn llama4(keys: &Keys<'_>, plain: LlamaConfig) -> Result<LlamaConfig, ModelError> {
    let window = keys.key(SLIDING_WINDOW);
    if keys.gguf.metadata().contains_key(&window) {
        return Err(keys.gguf.unsupported(&format!(
            "{window} is 0, so all layers attend to all tokens, which this worker does not compute"
        )));
    }
    let count = keys.size("expert_count")?;
    keys.expect_equal("expert_used_count", 1, "one expert a token")?;
    let ffn = keys.size("expert_feed_forward_length")?;
    let step = keys
        .optional_size("interleave_moe_layer_step")?
        .unwrap_or(1);
    let layers = (1..=plain.layers.len())
        .map(|number| LayerKind {
            rope: !number.is_multiple_of(NO_ROPE_INTERVAL),
            chunked: !number.is_multiple_of(NO_ROPE_INTERVAL),
            experts: number.is_multiple_of(step),
        })
        .collect();
    Ok(LlamaConfig {
        layers,
        experts: Some(Experts {
            count,
            ffn,
            shared_ffn: keys
                .optional_size("expert_shared_feed_forward_length")?
                .unwrap_or(ffn),
        }),
        chunk: Some(
            keys.optional_size("attention.chunk_size")?
                .unwrap_or(ATTENTION_CHUNK),
        ),
        qk_norm: count != MAVERICK_EXPERTS,
        temperature: Some(TEMPERATURE),
        ..plain
    })
}

fn architecture(gguf: &Gguf) -> Result<&'static str, ModelError> {
    let name = match gguf.text(ARCHITECTURE_KEY)? {
        Some(LLAMA) => LLAMA,
        Some(LLAMA4) => LLAMA4,
        Some(other) => {
            return Err(gguf.unsupported(&format!(
                "{ARCHITECTURE_KEY} is \"{}\"; this worker runs \"{LLAMA}\" and \"{LLAMA4}\"",
                shown(other)
            )));
        }
        None => return Err(gguf.invalid(&format!("metadata {ARCHITECTURE_KEY} is missing"))),
    };
    match gguf.unsigned(SPLIT_KEY)? {
        None | Some(0 | 1) => Ok(name),
        Some(parts) => Err(gguf.unsupported(&format!(
            "the model is split into {parts} files; merge them into one (llama-gguf-split --merge)"
        ))),
    }
}

/// Metadata under the architecture's name.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn vocab_size(&self) -> Result<usize, ModelError> {
        let tokens = self
            .gguf
            .texts(TOKENS_KEY)?
            .ok_or_else(|| {
                self.gguf
                    .invalid(&format!("metadata {TOKENS_KEY} is missing"))
            })?
            .len();
        let declared = self.optional_size("vocab_size")?;
        if declared.is_some_and(|declared| declared != tokens) || tokens == 0 {
            return Err(self.gguf.invalid(&format!(
                "{} is {} but {TOKENS_KEY} has {tokens} entries",
                self.key("vocab_size"),
                declared.unwrap_or_default()
            )));
        }
        Ok(tokens)
    }

    fn layer_count(&self) -> Result<usize, ModelError> {
        match self.size("block_count")? {
            layers @ 1..=MAX_LAYERS => Ok(layers),
            layers => Err(self.gguf.invalid(&format!(
                "{} is {layers}, expected 1 to {MAX_LAYERS}",
                self.key("block_count")
            ))),
        }
    }

    fn optional_size(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let key = self.key(name);
        if let Some(Value::UnsignedList(_) | Value::SignedList(_)) = self.gguf.metadata().get(&key)
        {
            return Err(self
                .gguf
                .unsupported(&format!("{key} differs from layer to layer")));
        }
        match self.gguf.unsigned(&key)? {
            None => Ok(None),
            Some(value @ 1..=MAX_SIZE) => Ok(usize::try_from(value).ok()),
            Some(value) => Err(self
                .gguf
                .invalid(&format!("{key} is {value}, expected 1 to {MAX_SIZE}"))),
        }
    }

    fn size(&self, name: &str) -> Result<usize, ModelError> {
        self.optional_size(name)?.ok_or_else(|| {
            self.gguf
                .invalid(&format!("metadata {} is missing", self.key(name)))
        })
    }

    fn positive(&self, name: &str) -> Result<Option<f64>, ModelError> {
        let key = self.key(name);
        match self.gguf.float(&key)? {
            Some(value) if !(value > 0.0 && value.is_finite()) => Err(self
                .gguf
                .invalid(&format!("{key} is {value}, expected a positive number"))),
            value => Ok(value),
        }
    }

    fn expect_equal(&self, name: &str, size: usize, expected: &str) -> Result<(), ModelError> {
        match self.optional_size(name)? {
            Some(value) if value != size => Err(self.gguf.unsupported(&format!(
                "{} is {value}, expected {size}: this worker computes {expected}",
                self.key(name)
            ))),
            _ => Ok(()),
        }
    }

    fn refuse_when_set(&self, name: &str) -> Result<(), ModelError> {
        let key = self.key(name);
        let value = match self.gguf.metadata().get(&key) {
            None | Some(Value::Unsigned(0) | Value::Signed(0) | Value::Bool(false)) => {
                return Ok(());
            }
            Some(Value::Float(value)) if *value == 0.0 => return Ok(()),
            Some(Value::Unsigned(value)) => value.to_string(),
            Some(Value::Signed(value)) => value.to_string(),
            Some(Value::Float(value)) => value.to_string(),
            Some(other) => other.kind().to_owned(),
        };
        Err(self.gguf.unsupported(&format!(
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
            self.gguf
                .invalid(&format!("metadata {} is missing", self.key(name)))
        })
    }

    /// Llama 3's own scaling is not metadata but a tensor.
    fn rope_scaling(&self) -> Result<RopeScaling, ModelError> {
        let key = self.key("rope.scaling.type");
        let factor = match self.gguf.text(&key)? {
            None => self.positive("rope.scale_linear")?.unwrap_or(1.0),
            Some("none") => 1.0,
            Some("linear") => self.positive("rope.scaling.factor")?.unwrap_or(1.0),
            Some(other) => {
                return Err(self.gguf.unsupported(&format!(
                    "{key} is \"{}\"; \"none\", \"linear\" and Llama 3's {ROPE_FACTORS} are built in",
                    shown(other)
                )));
            }
        };
        let has_factors = self.gguf.tensor(ROPE_FACTORS).is_some();
        let is_scaled = (factor - 1.0).abs() > 0.0;
        match (has_factors, is_scaled) {
            (true, false) => Ok(RopeScaling::Factors),
            (true, true) => Err(self.gguf.unsupported(&format!(
                "{key} and {ROPE_FACTORS} together are not built in"
            ))),
            (false, false) => Ok(RopeScaling::None),
            (false, true) => Ok(RopeScaling::Linear(factor)),
        }
    }
}
