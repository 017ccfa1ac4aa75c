//! The model's tokens as the compiler of grammars wants them.

use std::fmt;
use std::sync::Arc;

use llama_model::text::{Special, Tokenizer};
use llguidance::ParserFactory;
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::compile::compiler;
use super::error::VocabularyError;

/// Longest token that an answer of a required form may hold, in bytes: the depth of
/// the compiler's tree.
const MAX_TOKEN_BYTES: usize = 1000;
/// Most bytes of all tokens together: the size of that tree.
const MAX_BYTES: usize = 4_000_000;

/// The tokens of a model, prepared for grammars. Making one takes tenths of a second
/// and tens of megabytes, and one serves all sequences.
pub struct Vocabulary {
    factory: ParserFactory,
    ends: Vec<u32>,
    width: usize,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("ends", &self.ends)
            .field("width", &self.width)
            .finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// Prepares the tokens of `tokenizer` for a model that gives `width` logits. Ids
    /// that have no bytes are never allowed.
    ///
    /// # Errors
    /// When no token ends an answer, or the tokens are too long.
    pub fn new(tokenizer: Arc<Tokenizer>, width: usize) -> Result<Self, VocabularyError> {
        let ends: Vec<u32> = tokenizer
            .eos_ids()
            .iter()
            .copied()
            .filter(|&id| (id as usize) < width)
            .collect();
        let words = words(&tokenizer, &ends, width);
        let trie = trie(&words, &ends)?;
        let environment: TokEnv = Arc::new(ModelTokens { tokenizer, trie });
        Ok(Self {
            factory: compiler(&environment)?,
            ends,
            width,
        })
    }

    /// Number of 32-bit words of a mask.
    pub fn mask_words(&self) -> usize {
        self.width.div_ceil(32)
    }

    /// Whether there is a logit for `token`.
    pub(super) fn holds(&self, token: u32) -> bool {
        (token as usize) < self.width
    }

    /// Tokens that end an answer.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    pub(super) fn factory(&self) -> &ParserFactory {
        &self.factory
    }
}

/// The bytes that each token adds to an answer. Control tokens add none; behind the
/// marker stands their name. So do bytes that no text holds: they are left out.
fn words(tokenizer: &Tokenizer, ends: &[u32], width: usize) -> Vec<Vec<u8>> {
    (0..width)
        .map(|index| {
            let Ok(id) = u32::try_from(index) else {
                return Vec::new();
            };
            let bytes = tokenizer.token_bytes(id);
            if bytes.len() > MAX_TOKEN_BYTES {
                return Vec::new();
            }
            if ends.contains(&id) || tokenizer.is_control(id) {
                return [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
            }
            if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
                return Vec::new();
            }
            bytes.to_vec()
        })
        .collect()
}

fn trie(words: &[Vec<u8>], ends: &[u32]) -> Result<TokTrie, VocabularyError> {
    let bytes: usize = words.iter().map(Vec::len).sum();
    let count = u32::try_from(words.len()).ok();
    let (Some(count), true) = (count, bytes <= MAX_BYTES) else {
        return Err(VocabularyError::TooLong {
            bytes,
            limit: MAX_BYTES,
        });
    };
    let first = ends.first().ok_or(VocabularyError::NoEnd)?;
    let trie = TokTrie::from(&TokRxInfo::new(count, *first), words);
    Ok(trie.with_eos_tokens(ends))
}

/// What the compiler asks of a tokenizer.
struct ModelTokens {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl ModelTokens {
    /// The tokens that the model knows `text` by; the longest that fit where one of
    /// them is outside the trie.
    fn tokens(&self, text: &str) -> Vec<TokenId> {
        match self.tokenizer.encode(text, Special::Plain) {
            Ok(ids) if ids.iter().all(|&id| !self.trie.token(id).is_empty()) => ids,
            _ => self.trie.greedy_tokenize(text.as_bytes()),
        }
    }
}

impl TokenizerEnv for ModelTokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie
            .tokenize_with_greedy_fallback(bytes, |text| self.tokens(text))
    }
}

/// Single bytes and one end, for checks without a model.
struct ByteTokens(TokTrie);

impl TokenizerEnv for ByteTokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(bytes)
    }
}

/// A vocabulary of single bytes.
pub(super) fn byte_tokens() -> TokEnv {
    let mut words: Vec<Vec<u8>> = (0..u8::MAX).map(|byte| vec![byte]).collect();
    words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], b"<end>".as_slice()].concat());
    let end = u32::from(u8::MAX);
    Arc::new(ByteTokens(TokTrie::from(
        &TokRxInfo::new(end + 1, end),
        &words,
    )))
}
