//! `config.json` of Hugging Face's `LlamaForCausalLM` and of the text model of
//! `Llama4ForConditionalGeneration`.

use serde_json::Value;

use super::fields::Fields;
use super::quantization::{self, Quantization};
use super::{
    Experts, LayerKind, Llama3Scaling, LlamaConfig, MAX_LAYERS, Rope, RopePairs, RopeScaling,
    Temperature,
};
use crate::error::ModelError;
use crate::foreign::{parser_said, shown};
use crate::names::Names;

/// Base of the rotary frequencies where the file names none.
const LLAMA_ROPE_BASE: f64 = 10_000.0;
const LLAMA4_ROPE_BASE: f64 = 500_000.0;
/// Tokens of an attention chunk, where the file does not say.
const ATTENTION_CHUNK: usize = 8192;
/// Every how many layers one has no rotary embedding, where the file does not say.
const NO_ROPE_INTERVAL: usize = 4;

/// Fields that do not change what a forward pass computes.
const HARMLESS: [&str; 40] = [
    "architectures",
    "attention_dropout",
    "bad_words_ids",
    "begin_suppress_tokens",
    "boi_token_index",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype",
    "eoi_token_index",
    "eos_token_id",
    "finetuning_task",
    "for_llm_compressor",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "image_token_index",
    "initializer_range",
    "is_decoder",
    "label2id",
    "max_length",
    "model_type",
    "name_or_path",
    "output_router_logits",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "use_cache",
    "vision_config",
];

/// What `config.json` says of a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HuggingFace {
    pub(crate) config: LlamaConfig,
    pub(crate) quantization: Quantization,
    pub(crate) names: Names,
    /// Precision of the weights, where it is named.
    pub(crate) dtype: Option<String>,
}

/// Reads `config.json`, whose path is `file`.
///
/// # Errors
/// `ModelInvalid` for missing or impossible values, `ModelUnsupported` for other
/// models and for every field that is not known to leave the computation alone.
pub(crate) fn parse(file: &str, text: &str) -> Result<HuggingFace, ModelError> {
    let json: Value = serde_json::from_str(text).map_err(|error| {
        ModelError::Invalid(format!("{file} is not JSON: {}", parser_said(&error)))
    })?;
    let Value::Object(object) = &json else {
        return Err(ModelError::Invalid(format!("{file} is not a JSON object")));
    };
    let fields = Fields::new(file, object);
    let dtype = |fields: &Fields<'_>| -> Result<Option<String>, ModelError> {
        let name = fields.text("dtype")?.or(fields.text("torch_dtype")?);
        Ok(name.map(str::to_owned))
    };
    let quantized = fields.object("quantization_config")?;
    let quantization = quantization::parse(quantized.as_ref())?;
    match fields.text("model_type")? {
        Some("llama") => Ok(HuggingFace {
            config: llama(&fields)?.check(file)?,
            quantization,
            names: Names::Llama,
            dtype: dtype(&fields)?,
        }),
        Some("llama4_text") => Ok(HuggingFace {
            config: llama4(&fields)?.check(file)?,
            quantization,
            names: Names::Llama4,
            dtype: dtype(&fields)?,
        }),
        Some("llama4") => {
            let Some(text) = fields.object("text_config")? else {
                return Err(fields.invalid("text_config is missing"));
            };
            fields.expect("tie_word_embeddings", "an output head of its own", |v| {
                v == &Value::Bool(false)
            })?;
            fields.refuse_unknown(&HARMLESS)?;
            Ok(HuggingFace {
                config: llama4(&text)?.check(file)?,
                quantization,
                names: Names::Llama4Conditional,
                dtype: dtype(&text)?.or(dtype(&fields)?),
            })
        }
        Some("bert") => Err(fields.unsupported(
            "model_type is \"bert\", an embedding model; `serve` and `plan` take such models",
        )),
        other => Err(fields.unsupported(&format!(
            "model_type is \"{}\"; \"llama\", \"llama4\" and \"llama4_text\" are built in",
            shown(other.unwrap_or_default())
        ))),
    }
}

fn llama(fields: &Fields<'_>) -> Result<LlamaConfig, ModelError> {
    let (hidden, heads) = (
        fields.size("hidden_size")?,
        fields.size("num_attention_heads")?,
    );
    let head_dim = match fields.optional_size("head_dim")? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(fields.invalid(&format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is missing"
            )));
        }
    };
    let layers = layer_count(fields)?;
    let config = LlamaConfig {
        hidden,
        ffn: fields.size("intermediate_size")?,
        heads,
        kv_heads: fields
            .optional_size("num_key_value_heads")?
            .unwrap_or(heads),
        head_dim,
        layers: vec![LayerKind::PLAIN; layers],
        rope: rope(fields, head_dim, RopePairs::Halves, LLAMA_ROPE_BASE)?,
        experts: None,
        chunk: None,
        qk_norm: false,
        temperature: None,
        rms_epsilon: rms_epsilon(fields)?,
        context_length: fields.size("max_position_embeddings")?,
        vocab: fields.size("vocab_size")?,
        tied: fields.bool("tie_word_embeddings")?.unwrap_or(false),
    };
    check_common(fields)?;
    fields.expect("mlp_bias", "feed-forward networks without bias", is_false)?;
    fields.refuse_unknown(&HARMLESS)?;
    Ok(config)
}

fn llama4(fields: &Fields<'_>) -> Result<LlamaConfig, ModelError> {
    let (hidden, heads) = (
        fields.size("hidden_size")?,
        fields.size("num_attention_heads")?,
    );
    let head_dim = fields.size("head_dim")?;
    let expert_ffn = fields.size("intermediate_size")?;
    let experts = fields.size("num_local_experts")?;
    fields.expect("num_experts_per_tok", "one expert a token", |value| {
        value.as_u64() == Some(1)
    })?;
    let layers = layer_kinds(fields)?;
    let tuned = fields.bool("attn_temperature_tuning")?.unwrap_or(true);
    let (floor_scale, scale) = (
        fields.optional_positive("floor_scale")?.unwrap_or(8192.0),
        fields.optional_positive("attn_scale")?.unwrap_or(0.1),
    );
    let is_chunked = layers.iter().any(|layer| layer.chunked);
    if is_chunked && fields.is_null("attention_chunk_size") {
        return Err(fields.invalid("attention_chunk_size is null, but layers attend in chunks"));
    }
    let chunk = fields
        .optional_size("attention_chunk_size")?
        .unwrap_or(ATTENTION_CHUNK);
    let has_experts = layers.iter().any(|layer| layer.experts);
    let config = LlamaConfig {
        hidden,
        ffn: fields.size("intermediate_size_mlp")?,
        heads,
        kv_heads: fields
            .optional_size("num_key_value_heads")?
            .unwrap_or(heads),
        head_dim,
        layers,
        rope: rope(fields, head_dim, RopePairs::Neighbours, LLAMA4_ROPE_BASE)?,
        experts: has_experts.then_some(Experts {
            count: experts,
            ffn: expert_ffn,
            shared_ffn: expert_ffn,
        }),
        chunk: is_chunked.then_some(chunk),
        qk_norm: fields.bool("use_qk_norm")?.unwrap_or(true),
        temperature: tuned.then_some(Temperature { floor_scale, scale }),
        rms_epsilon: rms_epsilon(fields)?,
        context_length: fields.size("max_position_embeddings")?,
        vocab: fields.size("vocab_size")?,
        tied: fields.bool("tie_word_embeddings")?.unwrap_or(false),
    };
    check_common(fields)?;
    fields.refuse_unknown(&HARMLESS)?;
    Ok(config)
}

fn check_common(fields: &Fields<'_>) -> Result<(), ModelError> {
    fields.expect("attention_bias", "attention without bias", is_false)?;
    fields.expect("hidden_act", "SwiGLU with \"silu\"", |value| {
        value.as_str() == Some("silu")
    })
}

fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

fn layer_count(fields: &Fields<'_>) -> Result<usize, ModelError> {
    match fields.size("num_hidden_layers")? {
        layers @ 1..=MAX_LAYERS => Ok(layers),
        layers => Err(fields.invalid(&format!(
            "num_hidden_layers is {layers}, expected 1 to {MAX_LAYERS}"
        ))),
    }
}

/// Which layers of a Llama 4 turn queries and keys, attend in chunks and have
/// experts.
fn layer_kinds(fields: &Fields<'_>) -> Result<Vec<LayerKind>, ModelError> {
    let count = layer_count(fields)?;
    let of_length = |name: &str, len: usize| {
        if len == count {
            return Ok(());
        }
        Err(fields.invalid(&format!(
            "{name} has {len} entries, but num_hidden_layers is {count}"
        )))
    };
    let interval = fields
        .optional_size("no_rope_layer_interval")?
        .unwrap_or(NO_ROPE_INTERVAL);
    // Despite its name, 1 marks a layer with rotary embedding.
    let listed = fields.indices("no_rope_layers", 2)?;
    let ropes = match listed.filter(|list| !list.is_empty()) {
        Some(list) => list.into_iter().map(|entry| entry == 1).collect(),
        None => (1..=count)
            .map(|number| number % interval != 0)
            .collect::<Vec<bool>>(),
    };
    of_length("no_rope_layers", ropes.len())?;
    let chunked = match fields.texts("layer_types")? {
        None => ropes.clone(),
        Some(types) => types
            .into_iter()
            .map(|kind| match kind {
                "chunked_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => Err(fields.unsupported(&format!(
                    "layer_types holds \"{}\"; \"chunked_attention\" and \"full_attention\" are built in",
                    shown(other)
                ))),
            })
            .collect::<Result<_, _>>()?,
    };
    of_length("layer_types", chunked.len())?;
    let step = fields
        .optional_size("interleave_moe_layer_step")?
        .unwrap_or(1);
    // An empty list means that no layer has experts.
    let listed = fields.indices("moe_layers", count)?;
    let has_experts = |layer: usize| match &listed {
        Some(list) => list.contains(&layer),
        None => (layer + 1).is_multiple_of(step),
    };
    let kinds = ropes.iter().zip(&chunked).enumerate();
    Ok(kinds
        .map(|(layer, (rope, chunked))| LayerKind {
            rope: *rope,
            chunked: *chunked,
            experts: has_experts(layer),
        })
        .collect())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the reference computes with an f32"
)]
fn rms_epsilon(fields: &Fields<'_>) -> Result<f32, ModelError> {
    fields.positive("rms_norm_eps").map(|value| value as f32)
}

/// Rotary embedding, in either spelling: `rope_parameters`, or `rope_theta` with
/// `rope_scaling`. Where a file has both they must say the same, because the
/// reference would take the older one.
fn rope(
    fields: &Fields<'_>,
    head_dim: usize,
    pairs: RopePairs,
    default_base: f64,
) -> Result<Rope, ModelError> {
    let base = fields
        .optional_positive("rope_theta")?
        .unwrap_or(default_base);
    expect_whole_heads(fields)?;
    let plain = Rope {
        dim: head_dim,
        base,
        pairs,
        scaling: RopeScaling::None,
    };
    let read = |name| -> Result<Option<Rope>, ModelError> {
        let settings = fields.object(name)?.filter(|settings| !settings.is_empty());
        settings
            .map(|settings| scaled(fields, &settings, &plain))
            .transpose()
    };
    match (read("rope_parameters")?, read("rope_scaling")?) {
        (Some(new), Some(old)) if new != old => Err(fields.unsupported(
            "rope_parameters and rope_scaling say different things; remove one of them",
        )),
        (new, old) => Ok(new.or(old).unwrap_or(plain)),
    }
}

fn expect_whole_heads(fields: &Fields<'_>) -> Result<(), ModelError> {
    fields.expect("partial_rotary_factor", "heads that turn whole", |value| {
        value.as_f64() == Some(1.0)
    })
}

/// `plain` with what `settings`, an object of `fields`, change.
fn scaled(fields: &Fields<'_>, settings: &Fields<'_>, plain: &Rope) -> Result<Rope, ModelError> {
    expect_whole_heads(settings)?;
    let base = settings.optional_positive("rope_theta")?;
    let scaling = match settings.text("rope_type")?.or(settings.text("type")?) {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear(settings.positive("factor")?),
        Some("llama3") => RopeScaling::Llama3(Llama3Scaling {
            factor: settings.positive("factor")?,
            low: settings.positive("low_freq_factor")?,
            high: settings.positive("high_freq_factor")?,
            original: match settings.optional_positive("original_max_position_embeddings")? {
                Some(original) => original,
                None => fields.positive("max_position_embeddings")?,
            },
        }),
        Some(other) => {
            return Err(settings.unsupported(&format!(
                "the rope_type \"{}\" is not built in; \"default\", \"linear\" and \"llama3\" are",
                shown(other)
            )));
        }
    };
    settings.refuse_unknown(&[])?;
    Ok(Rope {
        base: base.unwrap_or(plain.base),
        scaling,
        ..plain.clone()
    })
}
