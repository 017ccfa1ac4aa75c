//! Texts to tokens of a BERT: the `WordPiece` (Wu et al. 2016) of a `tokenizer.json`.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::ModelError;

const JSON: &str = "tokenizer.json";
/// Largest `tokenizer.json` that is read, in bytes. That of BERT has half a megabyte.
const MAX_BYTES: u64 = 32 << 20;
/// The steps that are built in, by their names in the file.
const STEPS: [(&str, &[&str]); 4] = [
    ("model", &["WordPiece"]),
    ("normalizer", &["BertNormalizer"]),
    ("pre_tokenizer", &["BertPreTokenizer"]),
    ("post_processor", &["TemplateProcessing", "BertProcessing"]),
];

/// A text that could not become tokens.
#[derive(Debug, thiserror::Error)]
#[error("tokenize {bytes} bytes of text")]
pub struct TokenizeError {
    /// Length of the text.
    pub bytes: usize,
    /// What the tokenizer said.
    #[source]
    pub source: tokenizers::Error,
}

/// Turns texts into token ids.
#[derive(Debug)]
pub struct EmbeddingTokenizer {
    tokenizer: Tokenizer,
    vocab: usize,
    /// Tokens before a text, and behind it.
    around: [Vec<u32>; 2],
}

impl EmbeddingTokenizer {
    /// Reads the `tokenizer.json` in `folder`, for a model of `vocab` tokens.
    ///
    /// # Errors
    /// `ModelNotFound` without one, `ModelInvalid` when it is damaged or has more tokens
    /// than the model, `ModelUnsupported` when it is no `WordPiece` of a BERT.
    pub fn open(folder: &Path, vocab: usize) -> Result<Self, ModelError> {
        let path = folder.join(JSON);
        let file = path.display();
        let invalid = |what: String| ModelError::Invalid(format!("{file}: {what}"));
        let Some(bytes) = crate::text::read(&path, MAX_BYTES)? else {
            return Err(ModelError::NotFound(format!(
                "{} holds no {JSON}",
                folder.display()
            )));
        };
        let steps: Value = serde_json::from_slice(&bytes)
            .map_err(|error| invalid(format!("not a tokenizer.json: {error}")))?;
        for (step, built_in) in STEPS {
            let kind = steps[step]["type"].as_str().unwrap_or("none");
            if !built_in.contains(&kind) {
                return Err(ModelError::Unsupported(format!(
                    "{file}: the {step} is {}; {} is built in",
                    crate::text::excerpt(kind),
                    built_in.join(" or ")
                )));
            }
        }
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|error| invalid(format!("not a tokenizer.json: {error}")))?;
        // Texts are cut where a client asks for it, and never filled up.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| invalid(error.to_string()))?;
        let most = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        if most as usize >= vocab {
            return Err(invalid(format!(
                "it has a token {most}, but the model has {vocab} tokens"
            )));
        }
        let empty = tokenizer
            .encode_fast("", true)
            .map_err(|error| invalid(error.to_string()))?;
        let ids = empty.get_ids();
        // Of a text of no tokens, half of what is left stands before it: BERT has one of
        // each kind.
        let [before, behind] = match ids {
            [first, last] => [vec![*first], vec![*last]],
            _ => {
                return Err(ModelError::Unsupported(format!(
                    "{file}: the post_processor puts {} tokens around a text; two are built in",
                    ids.len()
                )));
            }
        };
        Ok(Self {
            tokenizer,
            vocab,
            around: [before, behind],
        })
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// Tokens that are put around a text.
    pub fn added(&self) -> usize {
        self.around.iter().map(Vec::len).sum()
    }

    /// Token ids of `text`; with `adds_special` those that the model wants around it. Of
    /// a longer text only the first tokens are kept, so that there are `most` in all.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(
        &self,
        text: &str,
        adds_special: bool,
        most: Option<usize>,
    ) -> Result<Vec<u32>, TokenizeError> {
        let encoded = self.tokenizer.encode_fast(text, false);
        let encoded = encoded.map_err(|source| TokenizeError {
            bytes: text.len(),
            source,
        })?;
        let ids = encoded.get_ids();
        let added = if adds_special { self.added() } else { 0 };
        let kept = most.map_or(ids.len(), |most| most.saturating_sub(added).min(ids.len()));
        let ids = &ids[..kept];
        let [before, behind] = &self.around;
        Ok(if adds_special {
            [before, ids, behind].concat()
        } else {
            ids.to_vec()
        })
    }

    /// How a token is written; empty for an id that stands for nothing.
    pub fn token_text(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }
}
