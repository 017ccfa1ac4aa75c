//! Byte-level BPE from the vocabulary and merges of a GGUF.

use std::collections::BTreeSet;

use ahash::AHashMap;
use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::TextError;
use super::bytes::byte_of_char;
use crate::error::ModelError;
use crate::gguf::{Gguf, Value};

const MODEL_KEY: &str = "tokenizer.ggml.model";
const PRE_KEY: &str = "tokenizer.ggml.pre";
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const TYPES_KEY: &str = "tokenizer.ggml.token_type";
const MERGES_KEY: &str = "tokenizer.ggml.merges";
const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";
const EOS_KEY: &str = "tokenizer.ggml.eos_token_id";
const EOT_KEY: &str = "tokenizer.ggml.eot_token_id";
const ADD_BOS_KEY: &str = "tokenizer.ggml.add_bos_token";

/// Token types of `tokenizer.ggml.token_type`.
const TYPE_CONTROL: i64 = 3;
const TYPE_USER_DEFINED: i64 = 4;

/// Control tokens that end an answer whatever the metadata says.
const END_TOKENS: [&str; 6] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
];

/// How Llama 3 splits text before BPE (its model card's tokenizer).
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What to do with the text of special tokens inside a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// `<|im_end|>` is the control token.
    Parse,
    /// `<|im_end|>` is ten characters.
    Plain,
}

/// Turns text into token ids and ids into bytes.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    /// Bytes of each token.
    bytes: Vec<Vec<u8>>,
    /// Finds the tokens that are matched as a whole; `special_ids` are theirs.
    special: AhoCorasick,
    special_ids: Vec<u32>,
    control: BTreeSet<u32>,
    eos: Vec<u32>,
    bos: Option<u32>,
    add_bos: bool,
}

impl Tokenizer {
    /// Builds the tokenizer that the GGUF describes.
    ///
    /// # Errors
    /// `ModelUnsupported` for a kind of tokenizer that is not byte-level BPE or
    /// that splits text in an unknown way, `ModelInvalid` when parts are missing
    /// or contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let model = gguf.text(MODEL_KEY)?.unwrap_or_default();
        if model != "gpt2" {
            return Err(gguf.unsupported(&format!(
                "{MODEL_KEY} is \"{model}\"; only \"gpt2\" (byte-level BPE) is built in"
            )));
        }
        let tokens = required_texts(gguf, TOKENS_KEY)?;
        let types = token_types(gguf, tokens.len())?;
        let (splitting, ignore_merges) = pre_tokenizer(gguf)?;
        let mut bpe = tokenizers::Tokenizer::new(byte_pair_encoding(gguf, tokens, ignore_merges)?);
        bpe.with_pre_tokenizer(Some(splitting));

        let mut special = Vec::new();
        let mut control = BTreeSet::new();
        let mut bytes = Vec::with_capacity(tokens.len());
        for (id, (token, kind)) in (0_u32..).zip(tokens.iter().zip(types)) {
            let is_special = kind == TYPE_CONTROL || kind == TYPE_USER_DEFINED;
            if is_special && !token.is_empty() {
                special.push((token.clone(), id));
            }
            if kind == TYPE_CONTROL {
                control.insert(id);
            }
            bytes.push(match token.chars().map(byte_of_char).collect() {
                Some(decoded) if !is_special => decoded,
                _ => token.clone().into_bytes(),
            });
        }
        let matcher = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(special.iter().map(|(token, _)| token))
            .map_err(|error| gguf.unsupported(&format!("special tokens: {error}")))?;

        Ok(Self {
            eos: end_ids(gguf, &special, &control, tokens.len())?,
            bos: token_id(gguf, BOS_KEY, tokens.len())?,
            // Llama 3's prompts begin with it whether or not the file says so.
            add_bos: gguf.bool(ADD_BOS_KEY)?.unwrap_or(ignore_merges),
            bpe,
            bytes,
            special: matcher,
            special_ids: special.into_iter().map(|(_, id)| id).collect(),
            control,
        })
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// Tokens that end an answer, in rising order.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The token that begins a text, if the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Whether `id` steers the model and is never shown.
    pub fn is_control(&self, id: u32) -> bool {
        self.control.contains(&id)
    }

    /// The bytes that `id` stands for; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        usize::try_from(id)
            .ok()
            .and_then(|index| self.bytes.get(index))
            .map_or(&[], Vec::as_slice)
    }

    /// The text of `id`, for templates; empty for an id outside the vocabulary.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Token ids of `text`, with nothing added.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        let mut plain_from = 0;
        if special == Special::Parse {
            for found in self.special.find_iter(text) {
                self.encode_plain(&text[plain_from..found.start()], &mut ids)?;
                ids.push(self.special_ids[found.pattern().as_usize()]);
                plain_from = found.end();
            }
        }
        self.encode_plain(&text[plain_from..], &mut ids)?;
        Ok(ids)
    }

    /// Token ids of a whole prompt: [`Tokenizer::encode`], led by the begin
    /// token where the model wants one and the text does not bring it.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode_prompt(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        let mut ids = self.encode(text, special)?;
        if let (true, Some(bos)) = (self.add_bos, self.bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding = self
            .bpe
            .encode_fast(text, false)
            .map_err(|source| TextError::Tokenize {
                bytes: text.len(),
                source,
            })?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

fn byte_pair_encoding(
    gguf: &Gguf,
    tokens: &[String],
    ignore_merges: bool,
) -> Result<BPE, ModelError> {
    let merges: Vec<(String, String)> = required_texts(gguf, MERGES_KEY)?
        .iter()
        .map(|merge| {
            merge
                .split_once(' ')
                .map(|(left, right)| (left.to_owned(), right.to_owned()))
                .ok_or_else(|| gguf.invalid(&format!("merge \"{merge}\" is not two tokens")))
        })
        .collect::<Result<_, _>>()?;
    let vocab: AHashMap<String, u32> = tokens.iter().cloned().zip(0_u32..).collect();
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|error| gguf.invalid(&format!("the vocabulary and merges disagree: {error}")))
}

/// How text is split before BPE, and whether whole words of the vocabulary are
/// taken without merging.
fn pre_tokenizer(gguf: &Gguf) -> Result<(PreTokenizerWrapper, bool), ModelError> {
    let name = gguf.text(PRE_KEY)?.unwrap_or_default();
    match name {
        "smollm" => Ok((
            PreTokenizerWrapper::Sequence(Sequence::new(vec![
                PreTokenizerWrapper::Digits(Digits::new(true)),
                PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true)),
            ])),
            false,
        )),
        "gpt-2" => Ok((
            PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true)),
            false,
        )),
        "llama-bpe" | "llama3" | "llama-v3" => {
            let split = Split::new(
                SplitPattern::Regex(LLAMA3_PATTERN.to_owned()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(|error| gguf.unsupported(&format!("{PRE_KEY} \"{name}\": {error}")))?;
            Ok((
                PreTokenizerWrapper::Sequence(Sequence::new(vec![
                    PreTokenizerWrapper::Split(split),
                    PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)),
                ])),
                true,
            ))
        }
        other => Err(gguf.unsupported(&format!(
            "{PRE_KEY} is \"{other}\"; \"smollm\", \"gpt-2\" and \"llama-bpe\" are built in"
        ))),
    }
}

fn required_texts<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [String], ModelError> {
    gguf.texts(key)?
        .ok_or_else(|| gguf.invalid(&format!("metadata {key} is missing")))
}

fn token_types(gguf: &Gguf, tokens: usize) -> Result<Vec<i64>, ModelError> {
    let types = match gguf.metadata().get(TYPES_KEY) {
        None => return Ok(vec![1; tokens]),
        Some(Value::SignedList(types)) => types.clone(),
        Some(Value::UnsignedList(types)) => types
            .iter()
            .map(|&kind| i64::try_from(kind).unwrap_or(0))
            .collect(),
        Some(other) => {
            return Err(gguf.invalid(&format!(
                "metadata {TYPES_KEY} is {}, expected a list of integers",
                other.kind()
            )));
        }
    };
    if types.len() == tokens {
        return Ok(types);
    }
    Err(gguf.invalid(&format!(
        "{TYPES_KEY} has {} entries for {tokens} tokens",
        types.len()
    )))
}

fn token_id(gguf: &Gguf, key: &str, tokens: usize) -> Result<Option<u32>, ModelError> {
    match gguf.unsigned(key)? {
        None => Ok(None),
        Some(id) => u32::try_from(id)
            .ok()
            .filter(|_| id < tokens as u64)
            .map(Some)
            .ok_or_else(|| gguf.invalid(&format!("{key} is {id}, but there are {tokens} tokens"))),
    }
}

fn end_ids(
    gguf: &Gguf,
    special: &[(String, u32)],
    control: &BTreeSet<u32>,
    tokens: usize,
) -> Result<Vec<u32>, ModelError> {
    let mut ids = BTreeSet::new();
    for key in [EOS_KEY, EOT_KEY] {
        ids.extend(token_id(gguf, key, tokens)?);
    }
    ids.extend(
        special
            .iter()
            .filter(|(token, id)| END_TOKENS.contains(&token.as_str()) && control.contains(id))
            .map(|(_, id)| *id),
    );
    Ok(ids.into_iter().collect())
}
