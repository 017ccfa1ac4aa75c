//! The tokenizer that a GGUF's metadata describes.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::added::AddedToken;
use super::origin::{Origin, excerpt};
use super::split::{LLAMA3, LLAMA4};
use super::tokenizer::{Parts, Tokenizer};
use super::vocabulary::WrittenBpe;
use crate::error::ModelError;
use crate::gguf::{Gguf, Texts, Value};

const MODEL_KEY: &str = "tokenizer.ggml.model";
const PRE_KEY: &str = "tokenizer.ggml.pre";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const TYPES_KEY: &str = "tokenizer.ggml.token_type";
const MERGES_KEY: &str = "tokenizer.ggml.merges";
const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";
const EOS_KEY: &str = "tokenizer.ggml.eos_token_id";
const EOT_KEY: &str = "tokenizer.ggml.eot_token_id";
const EOM_KEY: &str = "tokenizer.ggml.eom_token_id";
const ADD_BOS_KEY: &str = "tokenizer.ggml.add_bos_token";

/// Token types of `tokenizer.ggml.token_type`.
const TYPE_CONTROL: i64 = 3;
const TYPE_USER_DEFINED: i64 = 4;

impl Tokenizer {
    /// Builds the tokenizer that the GGUF describes.
    ///
    /// # Errors
    /// `ModelUnsupported` for a kind of tokenizer that is not byte-level BPE or
    /// that splits text in an unknown way, `ModelInvalid` when parts are missing
    /// or contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let origin = Origin::new(gguf.path());
        let model = gguf.text(MODEL_KEY)?.unwrap_or_default();
        if model != "gpt2" {
            return Err(origin.unsupported(format!(
                "{MODEL_KEY} is \"{model}\"; only \"gpt2\" (byte-level BPE) is built in"
            )));
        }
        let tokens = required_texts(&origin, gguf, TOKENS_KEY)?;
        let types = token_types(&origin, gguf, tokens.len())?;
        let (splitting, ignore_merges) = pre_tokenizer(&origin, gguf)?;
        let added: Vec<AddedToken> = (0_u32..)
            .zip(tokens.iter().zip(types))
            .filter(|(_, (_, kind))| matches!(*kind, TYPE_CONTROL | TYPE_USER_DEFINED))
            .map(|(id, (text, kind))| AddedToken {
                text: text.to_owned(),
                id,
                control: kind == TYPE_CONTROL,
            })
            .collect();
        let written = WrittenBpe {
            tokens: tokens.iter().map(str::to_owned).zip(0_u32..).collect(),
            merges: merges(&origin, gguf)?,
            ignore_merges,
            splitting,
        };
        let (engine, bytes) = written.build(&origin, &added)?;

        let id = |key| token_id(&origin, gguf, key, tokens.len());
        let bos = id(BOS_KEY)?;
        // Llama's prompts begin with it whether or not the file says so.
        let leads = gguf.bool(ADD_BOS_KEY)?.unwrap_or(ignore_merges);
        let parts = Parts {
            engine,
            bytes,
            added,
            bos,
            eos: id(EOS_KEY)?,
            ends: [id(EOT_KEY)?, id(EOM_KEY)?].into_iter().flatten().collect(),
            lead: bos.filter(|_| leads).into_iter().collect(),
        };
        Self::assemble(&origin, parts)
    }
}

/// How text is split before BPE, and whether whole words of the vocabulary are
/// taken without merging.
fn pre_tokenizer(origin: &Origin, gguf: &Gguf) -> Result<(PreTokenizerWrapper, bool), ModelError> {
    let name = gguf.text(PRE_KEY)?.unwrap_or_default();
    let by_words = PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true));
    let pattern = match name {
        "gpt-2" => return Ok((by_words, false)),
        "smollm" => {
            let digits = PreTokenizerWrapper::Digits(Digits::new(true));
            let steps = Sequence::new(vec![digits, by_words]);
            return Ok((PreTokenizerWrapper::Sequence(steps), false));
        }
        "llama-bpe" | "llama3" | "llama-v3" => LLAMA3,
        "llama4" => LLAMA4,
        other => {
            return Err(origin.unsupported(format!(
                "{PRE_KEY} is {}; \"smollm\", \"gpt-2\", \"llama-bpe\" and \"llama4\" are built in",
                excerpt(other)
            )));
        }
    };
    let split = Split::new(
        SplitPattern::Regex(pattern.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(|error| origin.unsupported(format!("{PRE_KEY} \"{name}\": {error}")))?;
    let steps = Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)),
    ]);
    Ok((PreTokenizerWrapper::Sequence(steps), true))
}

fn merges(origin: &Origin, gguf: &Gguf) -> Result<Vec<(String, String)>, ModelError> {
    required_texts(origin, gguf, MERGES_KEY)?
        .iter()
        .map(|merge| {
            let (left, right) = merge.split_once(' ').ok_or_else(|| {
                origin.invalid(format!("the merge {} is not two tokens", excerpt(merge)))
            })?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect()
}

fn required_texts<'a>(origin: &Origin, gguf: &'a Gguf, key: &str) -> Result<&'a Texts, ModelError> {
    gguf.texts(key)?
        .ok_or_else(|| origin.invalid(format!("metadata {key} is missing")))
}

fn token_types(origin: &Origin, gguf: &Gguf, tokens: usize) -> Result<Vec<i64>, ModelError> {
    let types = match gguf.metadata().get(TYPES_KEY) {
        None => return Ok(vec![1; tokens]),
        Some(Value::SignedList(types)) => types.clone(),
        Some(Value::UnsignedList(types)) => types
            .iter()
            .map(|&kind| i64::try_from(kind).unwrap_or(0))
            .collect(),
        Some(other) => {
            return Err(origin.invalid(format!(
                "metadata {TYPES_KEY} is {}, expected a list of integers",
                other.kind()
            )));
        }
    };
    if types.len() == tokens {
        return Ok(types);
    }
    Err(origin.invalid(format!(
        "{TYPES_KEY} has {} entries for {tokens} tokens",
        types.len()
    )))
}

fn token_id(
    origin: &Origin,
    gguf: &Gguf,
    key: &str,
    tokens: usize,
) -> Result<Option<u32>, ModelError> {
    match gguf.unsigned(key)? {
        None => Ok(None),
        Some(id) => u32::try_from(id)
            .ok()
            .filter(|_| id < tokens as u64)
            .map(Some)
            .ok_or_else(|| origin.invalid(format!("{key} is {id}, but there are {tokens} tokens"))),
    }
}
