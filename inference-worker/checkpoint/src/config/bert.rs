//! `config.json` of Hugging Face's `BertModel`, and what sentence-transformers writes
//! beside it of how a vector is made of the model's output.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::fields::Fields;
use super::{MAX_HEADS, MAX_LAYERS};
use crate::error::ModelError;
use crate::foreign::{parser_said, shown};
use crate::format::BLOCK;

/// The `model_type` of these models.
const MODEL_TYPE: &str = "bert";
/// Tokens of a sequence that such a model may take: attention is computed whole.
const MAX_POSITIONS: usize = 8192;
/// Width of the residual stream, and of the network, that such a model may have.
const MAX_WIDTH: usize = 1 << 14;
/// Layers that such a model may have.
const MAX_BERT_LAYERS: usize = if MAX_LAYERS < 128 { MAX_LAYERS } else { 128 };

/// Fields that do not change what a forward pass computes.
const HARMLESS: [&str; 20] = [
    "attention_probs_dropout_prob",
    "bos_token_id",
    "classifier_dropout",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "label2id",
    "model_type",
    "name_or_path",
    "output_past",
    "pad_token_id",
    "return_dict",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];
/// Likewise of the pooling, whose prompts are of those who ask and not of the model.
const HARMLESS_POOLING: [&str; 1] = ["include_prompt"];

/// Shape and constants of a BERT (Devlin et al. 2018) that makes vectors of texts.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// Width of the residual stream, which is the length of a vector.
    pub hidden: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers.
    pub layers: usize,
    /// Positions that have an embedding.
    pub positions: usize,
    /// Kinds of segments that have an embedding; texts are of the first.
    pub types: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Added to the variance in layer norms.
    pub epsilon: f32,
    /// How the tokens' vectors become one.
    pub pooling: Pooling,
    /// Whether vectors are scaled to the length 1.
    pub normalize: bool,
    /// Most tokens of a text, control tokens included.
    pub max_tokens: usize,
}

/// How the vectors of a text's tokens become one (Reimers and Gurevych 2019).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the first token.
    First,
}

/// The files that say what an embedding model is: name and text of each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Files {
    /// `config.json`
    pub(crate) config: (String, String),
    /// `modules.json`
    pub(crate) modules: Option<(String, String)>,
    /// `config.json` of the pooling, by the folder that `modules.json` names.
    pub(crate) pooling: BTreeMap<String, (String, String)>,
    /// `sentence_bert_config.json`
    pub(crate) transformer: Option<(String, String)>,
    /// `config_sentence_transformers.json`
    pub(crate) prompts: Option<(String, String)>,
}

/// Whether the `config.json` of this text is of an embedding model.
pub(crate) fn is_embedding_model(config: &str) -> bool {
    serde_json::from_str::<Map<String, Value>>(config).is_ok_and(|config| {
        config
            .get("model_type")
            .is_some_and(|kind| kind == MODEL_TYPE)
    })
}

/// The folders of the pooling modules that `modules.json` names.
pub(crate) fn pooling_folders((file, text): &(String, String)) -> Result<Vec<String>, ModelError> {
    let modules = modules(file, text)?;
    let pooling = modules.into_iter().filter(|module| module.0 == "Pooling");
    Ok(pooling.map(|module| module.1).collect())
}

impl BertConfig {
    /// Reads the model's files.
    ///
    /// # Errors
    /// `ModelInvalid` for missing or impossible values, `ModelUnsupported` for other
    /// models and for every field that is not known to leave the vectors alone.
    pub(crate) fn read(files: &Files) -> Result<Self, ModelError> {
        let object = object(&files.config)?;
        let fields = Fields::new(&files.config.0, &object);
        let mut config = shape(&fields)?;
        let Some(named) = &files.modules else {
            return Err(fields.unsupported(
                "there is no modules.json beside it, which says how the tokens' vectors become one",
            ));
        };
        config.normalize = read_modules(named)?;
        let mut pooling = files.pooling.values();
        match (pooling.next(), pooling.next()) {
            (Some(file), None) => config.pooling = read_pooling(file, config.hidden)?,
            _ => {
                return Err(ModelError::Unsupported(format!(
                    "{} must name one Pooling module with a config.json",
                    named.0
                )));
            }
        }
        if let Some(file) = &files.transformer {
            config.max_tokens = read_transformer(file, config.positions)?;
        }
        if let Some(file) = &files.prompts {
            check_prompts(file)?;
        }
        Ok(config)
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

fn object((file, text): &(String, String)) -> Result<Map<String, Value>, ModelError> {
    serde_json::from_str(text).map_err(|error| {
        ModelError::Invalid(format!(
            "{file} is not a JSON object: {}",
            parser_said(&error)
        ))
    })
}

fn shape(fields: &Fields<'_>) -> Result<BertConfig, ModelError> {
    let architectures = fields.texts("architectures")?.unwrap_or_default();
    if architectures != ["BertModel"] {
        return Err(fields.unsupported(&format!(
            "architectures is {}; of BERT models \"BertModel\" is built in",
            shown(&format!("{architectures:?}"))
        )));
    }
    let is = |expected: &'static str| move |value: &Value| value.as_str() == Some(expected);
    fields.expect("hidden_act", "GELU with \"gelu\"", is("gelu"))?;
    fields.expect(
        "position_embedding_type",
        "\"absolute\" positions",
        is("absolute"),
    )?;
    let (hidden, heads) = (
        fields.size("hidden_size")?,
        fields.size("num_attention_heads")?,
    );
    let (ffn, layers) = (
        fields.size("intermediate_size")?,
        fields.size("num_hidden_layers")?,
    );
    let positions = fields.size("max_position_embeddings")?;
    for (name, value, most) in [
        ("hidden_size", hidden, MAX_WIDTH),
        ("intermediate_size", ffn, MAX_WIDTH),
        ("num_attention_heads", heads, MAX_HEADS),
        ("num_hidden_layers", layers, MAX_BERT_LAYERS),
        ("max_position_embeddings", positions, MAX_POSITIONS),
    ] {
        if value > most {
            return Err(fields.unsupported(&format!("{name} is {value}, more than {most}")));
        }
    }
    let is_whole = |width: usize| width.is_multiple_of(BLOCK);
    if !hidden.is_multiple_of(heads) || !is_whole(hidden / heads) || !is_whole(ffn) {
        return Err(fields.unsupported(&format!(
            "hidden_size {hidden} in {heads} heads and intermediate_size {ffn}; heads and network \
             must be multiples of {BLOCK} wide"
        )));
    }
    #[expect(clippy::cast_possible_truncation, reason = "the sums are f32")]
    let epsilon = fields.positive("layer_norm_eps")? as f32;
    let config = BertConfig {
        hidden,
        ffn,
        heads,
        layers,
        positions,
        types: fields.size("type_vocab_size")?,
        vocab: fields.size("vocab_size")?,
        epsilon,
        pooling: Pooling::Mean,
        normalize: false,
        max_tokens: positions,
    };
    fields.refuse_unknown(&HARMLESS)?;
    Ok(config)
}

/// Kind and folder of each module, in order.
fn modules(file: &str, text: &str) -> Result<Vec<(String, String)>, ModelError> {
    let damaged = |what: &str| ModelError::Invalid(format!("{file}: {what}"));
    let list: Vec<Map<String, Value>> =
        serde_json::from_str(text).map_err(|error| damaged(&parser_said(&error)))?;
    let one = |module: Map<String, Value>| {
        let text = |name: &str| module.get(name).and_then(Value::as_str);
        match (text("type"), text("path")) {
            (Some(kind), Some(path)) => {
                let kind = kind.rsplit('.').next().unwrap_or_default();
                Ok((kind.to_owned(), path.to_owned()))
            }
            _ => Err(damaged("a module has no type or no path")),
        }
    };
    list.into_iter().map(one).collect()
}

/// Whether the modules end in one that normalises.
fn read_modules((file, text): &(String, String)) -> Result<bool, ModelError> {
    let kinds: Vec<String> = modules(file, text)?.into_iter().map(|m| m.0).collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    match kinds[..] {
        ["Transformer", "Pooling"] => Ok(false),
        ["Transformer", "Pooling", "Normalize"] => Ok(true),
        _ => Err(ModelError::Unsupported(format!(
            "{file} names the modules {}; Transformer and Pooling, and Normalize behind them, are \
             built in",
            shown(&kinds.join(", "))
        ))),
    }
}

fn read_pooling(file: &(String, String), hidden: usize) -> Result<Pooling, ModelError> {
    let object = object(file)?;
    let fields = Fields::new(&file.0, &object);
    let width = fields.size("word_embedding_dimension")?;
    if width != hidden {
        return Err(fields.invalid(&format!(
            "word_embedding_dimension is {width}, but hidden_size is {hidden}"
        )));
    }
    let mean = fields.bool("pooling_mode_mean_tokens")?.unwrap_or(false);
    let first = fields.bool("pooling_mode_cls_token")?.unwrap_or(false);
    // Other modes that are switched on are left over, and named.
    fields.refuse_unknown(&HARMLESS_POOLING)?;
    match (mean, first) {
        (true, false) => Ok(Pooling::Mean),
        (false, true) => Ok(Pooling::First),
        _ => Err(fields.unsupported(
            "one of pooling_mode_mean_tokens and pooling_mode_cls_token must be true",
        )),
    }
}

/// The most tokens of a text.
fn read_transformer(file: &(String, String), positions: usize) -> Result<usize, ModelError> {
    let object = object(file)?;
    let fields = Fields::new(&file.0, &object);
    let most = fields.optional_size("max_seq_length")?;
    // On would mean lower case beside what the tokenizer does.
    fields.refuse_unknown(&[])?;
    match most {
        Some(most) if most > positions || most < 3 => Err(fields.invalid(&format!(
            "max_seq_length is {most}, expected 3 to {positions}"
        ))),
        most => Ok(most.unwrap_or(positions)),
    }
}

/// Refuses a prompt that stands before every text.
fn check_prompts(file: &(String, String)) -> Result<(), ModelError> {
    let object = object(file)?;
    Fields::new(&file.0, &object).expect("default_prompt_name", "texts as they are", |_| false)
}
