//! A byte-level BPE as a `tokenizer.json` or a GGUF writes it: tokens and merges
//! in the byte alphabet.

use ahash::AHashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

use super::added::AddedToken;
use super::bytes::{byte_of_char, char_of_byte};
use super::origin::{Origin, excerpt};
use super::tokenizer::{Engine, MAX_TOKENS};
use crate::error::ModelError;

/// Bytes that every byte-level vocabulary has. Real ones lack a few of the others;
/// then text loses them, as it does in the library that made the vocabulary.
fn required_bytes() -> impl Iterator<Item = u8> {
    std::iter::once(b'\n').chain(b' '..=b'~')
}

/// What such a file says of its BPE.
#[derive(Debug)]
pub(super) struct WrittenBpe {
    /// Tokens with their ids, added ones too where the file lists them here.
    pub(super) tokens: Vec<(String, u32)>,
    /// Pairs to join, the first ones first.
    pub(super) merges: Vec<(String, String)>,
    /// Whether a piece that is a token as a whole is taken without merging.
    pub(super) ignore_merges: bool,
    /// How text becomes pieces in the byte alphabet.
    pub(super) splitting: PreTokenizerWrapper,
}

impl WrittenBpe {
    /// The engine, and the bytes of each token by id.
    ///
    /// # Errors
    /// `ModelInvalid` when tokens, ids and merges contradict each other.
    pub(super) fn build(
        self,
        origin: &Origin,
        added: &[AddedToken],
    ) -> Result<(Engine, Vec<Vec<u8>>), ModelError> {
        let bytes = bytes_by_id(origin, &self.tokens, added)?;
        let mut vocabulary = AHashMap::with_capacity(self.tokens.len());
        for (text, id) in self.tokens {
            if vocabulary.contains_key(&text) {
                return Err(origin.invalid(format!("the token {} is listed twice", excerpt(&text))));
            }
            vocabulary.insert(text, id);
        }
        // No text may become a control token by merging.
        for token in added.iter().filter(|token| token.control) {
            vocabulary.remove(&token.text);
        }
        check_alphabet(origin, &vocabulary)?;
        check_merges(origin, &vocabulary, &self.merges)?;
        let bpe = BPE::builder()
            .vocab_and_merges(vocabulary, self.merges)
            .ignore_merges(self.ignore_merges)
            .build()
            .map_err(|error| {
                origin.invalid(format!("the vocabulary and merges disagree: {error}"))
            })?;
        let mut pipeline = tokenizers::Tokenizer::new(bpe);
        pipeline.with_pre_tokenizer(Some(self.splitting));
        Ok((Engine::Pipeline(Box::new(pipeline)), bytes))
    }
}

fn bytes_by_id(
    origin: &Origin,
    tokens: &[(String, u32)],
    added: &[AddedToken],
) -> Result<Vec<Vec<u8>>, ModelError> {
    let highest = tokens.iter().map(|(_, id)| *id);
    let highest = highest.chain(added.iter().map(|token| token.id)).max();
    let len = highest.map_or(0, |id| id as usize + 1);
    if len > MAX_TOKENS {
        return Err(origin.invalid(format!(
            "the highest token id is {}; at most {MAX_TOKENS} tokens are supported",
            len - 1
        )));
    }
    let mut texts: Vec<Option<&str>> = vec![None; len];
    let mut bytes = vec![Vec::new(); len];
    for (text, id) in tokens {
        place(origin, &mut texts, text, *id)?;
        bytes[*id as usize] = match text.chars().map(byte_of_char).collect() {
            Some(decoded) => decoded,
            None => text.clone().into_bytes(),
        };
    }
    for token in added {
        place(origin, &mut texts, &token.text, token.id)?;
        bytes[token.id as usize] = token.text.clone().into_bytes();
    }
    Ok(bytes)
}

fn place<'a>(
    origin: &Origin,
    texts: &mut [Option<&'a str>],
    text: &'a str,
    id: u32,
) -> Result<(), ModelError> {
    match texts[id as usize].replace(text) {
        Some(other) if other != text => Err(origin.invalid(format!(
            "token id {id} is given to {} and to {}",
            excerpt(other),
            excerpt(text)
        ))),
        _ => Ok(()),
    }
}

fn check_alphabet(origin: &Origin, vocabulary: &AHashMap<String, u32>) -> Result<(), ModelError> {
    let mut required = required_bytes();
    let missing =
        required.find(|byte| !vocabulary.contains_key(char_of_byte(*byte).to_string().as_str()));
    match missing {
        None => Ok(()),
        Some(byte) => Err(origin.unsupported(format!(
            "there is no token for the byte 0x{byte:02X}; only byte-level vocabularies are built in"
        ))),
    }
}

/// Merges that make a token longer than any other would break the builder; it
/// names the others itself.
fn check_merges(
    origin: &Origin,
    vocabulary: &AHashMap<String, u32>,
    merges: &[(String, String)],
) -> Result<(), ModelError> {
    let longest = vocabulary.keys().map(String::len).max().unwrap_or(0);
    match merges
        .iter()
        .find(|(left, right)| left.len() + right.len() > longest)
    {
        None => Ok(()),
        Some((left, right)) => Err(origin.invalid(format!(
            "the merge of {} and {} makes no token of the vocabulary",
            excerpt(left),
            excerpt(right)
        ))),
    }
}
