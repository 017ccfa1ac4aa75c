//! The tokenizer of a Hugging Face `tokenizer.json`.

mod file;

use serde_json::Value;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

use super::added::AddedToken;
use super::origin::{Origin, excerpt};
use super::settings::Settings;
use super::tokenizer::{Parts, Tokenizer};
use super::vocabulary::WrittenBpe;
use crate::error::ModelError;
use file::{FileToken, Model, TokenizerFile, Vocabulary};

/// Longest split pattern, in bytes. The known ones have a few hundred.
const MAX_PATTERN: usize = 4096;

impl Tokenizer {
    /// Builds the tokenizer that a `tokenizer.json` describes; `settings` are those
    /// of its folder.
    ///
    /// # Errors
    /// `ModelInvalid` when the file is damaged, `ModelUnsupported` when it is not
    /// byte-level BPE or changes text before splitting it.
    pub(super) fn from_json(
        origin: &Origin,
        json: &[u8],
        settings: &Settings,
    ) -> Result<Self, ModelError> {
        let file: TokenizerFile = serde_json::from_slice(json)
            .map_err(|error| origin.invalid(format!("not a tokenizer.json: {error}")))?;
        check_model(origin, &file.model)?;
        if let Some(normalizer) = file.normalizer.filter(|normalizer| !normalizer.is_null()) {
            return Err(origin.unsupported(format!(
                "the normalizer {} changes the text; byte-level BPE without one is built in",
                kind_of(&normalizer)
            )));
        }
        let splitting = splitting(origin, file.pre_tokenizer)?;
        let added = file
            .added_tokens
            .into_iter()
            .map(|token| added_token(origin, token))
            .collect::<Result<Vec<_>, _>>()?;
        let id_of = |text: &str| id_of(origin, &added, text);
        let bos = settings.bos.as_deref().map(id_of).transpose()?;
        let eos = settings.eos.as_deref().map(id_of).transpose()?;
        let lead = match settings.add_bos {
            Some(add) => bos.filter(|_| add).into_iter().collect(),
            None => leading_tokens(origin, &file.post_processor)?,
        };
        let tokens = match file.model.vocab {
            Vocabulary::Ids(tokens) => tokens,
            Vocabulary::Scores => Vec::new(),
        };
        let written = WrittenBpe {
            tokens,
            merges: file.model.merges.0,
            ignore_merges: file.model.ignore_merges,
            splitting,
        };
        let (engine, bytes) = written.build(origin, &added)?;
        let parts = Parts {
            engine,
            bytes,
            added,
            bos: bos.or_else(|| lead.first().copied()),
            eos,
            ends: settings.ends.clone(),
            lead,
        };
        Self::assemble(origin, parts)
    }
}

fn check_model(origin: &Origin, model: &Model) -> Result<(), ModelError> {
    let kind = model.kind.as_deref().unwrap_or("BPE");
    let ids = matches!(model.vocab, Vocabulary::Ids(_));
    if kind != "BPE" || !ids {
        return Err(origin.unsupported(format!(
            "the model is {}; only byte-level BPE is built in",
            excerpt(if ids { kind } else { "Unigram" })
        )));
    }
    let affix = |affix: &Option<String>| affix.as_deref().is_some_and(|affix| !affix.is_empty());
    for (name, set) in [
        ("byte_fallback", model.byte_fallback),
        (
            "dropout",
            model.dropout.is_some_and(|dropout| dropout > 0.0),
        ),
        (
            "continuing_subword_prefix",
            affix(&model.continuing_subword_prefix),
        ),
        ("end_of_word_suffix", affix(&model.end_of_word_suffix)),
    ] {
        if set {
            return Err(origin.unsupported(format!(
                "the BPE uses {name}; only byte-level BPE without it is built in"
            )));
        }
    }
    Ok(())
}

fn added_token(origin: &Origin, token: FileToken) -> Result<AddedToken, ModelError> {
    for (name, set) in [
        ("lstrip", token.lstrip),
        ("rstrip", token.rstrip),
        ("single_word", token.single_word),
    ] {
        if set {
            return Err(origin.unsupported(format!(
                "the added token {} is matched with {name}, which is not built in",
                excerpt(&token.content)
            )));
        }
    }
    Ok(AddedToken {
        text: token.content,
        id: token.id,
        control: token.special,
    })
}

fn id_of(origin: &Origin, added: &[AddedToken], text: &str) -> Result<u32, ModelError> {
    added
        .iter()
        .find(|token| token.text == text)
        .map(|token| token.id)
        .ok_or_else(|| {
            origin.invalid(format!(
                "tokenizer_config.json names the token {}, which is not among added_tokens",
                excerpt(text)
            ))
        })
}

/// The steps that split text, all known to keep every byte of it.
fn splitting(
    origin: &Origin,
    pre_tokenizer: Option<Value>,
) -> Result<PreTokenizerWrapper, ModelError> {
    let step = pre_tokenizer.unwrap_or_default();
    let steps = match &step {
        Value::Object(fields) if kind_of(&step) == "\"Sequence\"" => fields
            .get("pretokenizers")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
            .unwrap_or_default(),
        single => std::slice::from_ref(single),
    };
    let byte_level = |step: &Value| kind_of(step) == "\"ByteLevel\"";
    if !steps.last().is_some_and(byte_level) {
        return Err(origin.unsupported(
            "the pre_tokenizer does not end in ByteLevel; only byte-level BPE is built in",
        ));
    }
    for (number, step) in steps.iter().enumerate() {
        let refused = match kind_of(step).as_str() {
            "\"ByteLevel\"" if step["add_prefix_space"] != Value::Bool(false) => {
                Some("adds a space in front")
            }
            "\"ByteLevel\"" if number + 1 < steps.len() => Some("comes before other steps"),
            "\"Split\"" if step["behavior"] == "Removed" => Some("removes text"),
            "\"Split\"" if pattern_len(step) > MAX_PATTERN => Some("has too long a pattern"),
            "\"ByteLevel\"" | "\"Split\"" | "\"Digits\"" => None,
            _ => Some("is not built in"),
        };
        if let Some(why) = refused {
            let kind = kind_of(step);
            return Err(origin.unsupported(format!("the pre_tokenizer {kind} {why}")));
        }
    }
    serde_json::from_value(step)
        .map_err(|error| origin.invalid(format!("the pre_tokenizer is damaged: {error}")))
}

fn pattern_len(split: &Value) -> usize {
    let pattern = &split["pattern"];
    let text = pattern["Regex"]
        .as_str()
        .or_else(|| pattern["String"].as_str());
    text.map_or(0, str::len)
}

/// Tokens that the post-processor puts in front of a text.
fn leading_tokens(origin: &Origin, processor: &Value) -> Result<Vec<u32>, ModelError> {
    let kind = kind_of(processor);
    match kind.as_str() {
        "\"Sequence\"" => {
            let mut lead = Vec::new();
            for step in processor["processors"].as_array().into_iter().flatten() {
                lead.splice(..0, leading_tokens(origin, step)?);
            }
            Ok(lead)
        }
        "\"TemplateProcessing\"" => {
            let single = processor["single"].as_array().into_iter().flatten();
            let mut lead = Vec::new();
            let mut in_front = true;
            for item in single {
                let Some(name) = item["SpecialToken"]["id"].as_str() else {
                    in_front = false;
                    continue;
                };
                if !in_front {
                    return Err(origin.unsupported(format!(
                        "the post_processor puts {} behind the text, which is not built in",
                        excerpt(name)
                    )));
                }
                lead.extend(template_ids(origin, processor, name)?);
            }
            Ok(lead)
        }
        "\"ByteLevel\"" | "none" => Ok(Vec::new()),
        _ => Err(origin.unsupported(format!("the post_processor {kind} is not built in"))),
    }
}

fn template_ids(origin: &Origin, processor: &Value, name: &str) -> Result<Vec<u32>, ModelError> {
    processor["special_tokens"][name]["ids"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect::<Option<Vec<_>>>()
        .filter(|ids| !ids.is_empty())
        .ok_or_else(|| {
            origin.invalid(format!(
                "the post_processor names {} without giving its ids",
                excerpt(name)
            ))
        })
}

/// The `type` of a step, quoted; `none` where there is no step.
fn kind_of(step: &Value) -> String {
    match step {
        Value::Null => "none".to_owned(),
        step => excerpt(step["type"].as_str().unwrap_or("without a type")),
    }
}
