//! Text to tokens and tokens to bytes, whatever file the vocabulary came from.

use std::collections::BTreeSet;

use super::TextError;
use super::added::{AddedToken, AddedTokens};
use super::origin::Origin;
use super::ranks::RankedBpe;
use crate::error::ModelError;

/// Most token ids that a tokenizer may have.
pub(super) const MAX_TOKENS: usize = 1 << 20;

/// Control tokens that end an answer whatever the files say.
const END_TOKENS: [&str; 8] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
];

/// What to do with the text of control tokens inside a prompt. Added tokens that
/// are ordinary words are matched either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// `<|im_end|>` is the control token.
    Parse,
    /// `<|im_end|>` is ten characters.
    Plain,
}

/// What makes tokens of text between added tokens.
#[derive(Debug)]
pub(super) enum Engine {
    /// The steps that a `tokenizer.json` or a GGUF names, with a list of merges.
    Pipeline(Box<tokenizers::Tokenizer>),
    /// A tiktoken file.
    Ranked(RankedBpe),
}

/// What every source of a tokenizer tells.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) engine: Engine,
    /// Bytes of each token, by id; empty for ids that stand for nothing.
    pub(super) bytes: Vec<Vec<u8>>,
    pub(super) added: Vec<AddedToken>,
    /// The token that begins a text, for templates and whole prompts.
    pub(super) bos: Option<u32>,
    /// The token that templates know as the end.
    pub(super) eos: Option<u32>,
    /// Tokens that end an answer besides it.
    pub(super) ends: Vec<u32>,
    /// Tokens that whole prompts begin with.
    pub(super) lead: Vec<u32>,
}

/// Turns text into token ids and ids into bytes.
#[derive(Debug)]
pub struct Tokenizer {
    engine: Engine,
    bytes: Vec<Vec<u8>>,
    added: AddedTokens,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: Vec<u32>,
    lead: Vec<u32>,
}

impl Tokenizer {
    /// Puts a tokenizer together.
    ///
    /// # Errors
    /// `ModelInvalid` when an id stands for no token, `ModelUnsupported` when
    /// there are too many added tokens.
    pub(super) fn assemble(origin: &Origin, parts: Parts) -> Result<Self, ModelError> {
        let added = AddedTokens::new(&parts.added)
            .map_err(|error| origin.unsupported(format!("added tokens: {error}")))?;
        let mut ends: BTreeSet<u32> = parts.ends.into_iter().chain(parts.eos).collect();
        for (what, id) in ends
            .iter()
            .map(|id| ("end", id))
            .chain(parts.bos.iter().map(|id| ("begin", id)))
            .chain(parts.lead.iter().map(|id| ("leading", id)))
        {
            if *id as usize >= parts.bytes.len() {
                return Err(origin.invalid(format!(
                    "the {what} token is {id}, but there are {} tokens",
                    parts.bytes.len()
                )));
            }
        }
        ends.extend(
            parts
                .added
                .iter()
                .filter(|token| token.control && END_TOKENS.contains(&token.text.as_str()))
                .map(|token| token.id),
        );
        Ok(Self {
            engine: parts.engine,
            bytes: parts.bytes,
            added,
            bos: parts.bos,
            eos: parts.eos,
            ends: ends.into_iter().collect(),
            lead: parts.lead,
        })
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// Tokens that end an answer, in rising order.
    pub fn eos_ids(&self) -> &[u32] {
        &self.ends
    }

    /// The token that begins a text, if the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The one end token that templates are told of, if the model names one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `id` steers the model and is never shown.
    pub fn is_control(&self, id: u32) -> bool {
        self.added.control().contains(&id)
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
        for (start, end, id) in self.added.find(text, special) {
            self.encode_plain(&text[plain_from..start], &mut ids)?;
            ids.push(id);
            plain_from = end;
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
        if !ids.starts_with(&self.lead) {
            ids.splice(..0, self.lead.iter().copied());
        }
        Ok(ids)
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        if text.is_empty() {
            return Ok(());
        }
        match &self.engine {
            Engine::Ranked(bpe) => bpe.encode(text, ids),
            Engine::Pipeline(pipeline) => {
                let encoding =
                    pipeline
                        .encode_fast(text, false)
                        .map_err(|source| TextError::Tokenize {
                            bytes: text.len(),
                            source,
                        })?;
                ids.extend_from_slice(encoding.get_ids());
            }
        }
        Ok(())
    }
}
