//! The parts of a `tokenizer.json` that matter here, read without an intermediate
//! tree: the vocabulary and merges are nine tenths of the file.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::Value;

#[derive(Deserialize)]
pub(super) struct TokenizerFile {
    #[serde(default)]
    pub(super) added_tokens: Vec<FileToken>,
    pub(super) normalizer: Option<Value>,
    pub(super) pre_tokenizer: Option<Value>,
    #[serde(default)]
    pub(super) post_processor: Value,
    pub(super) model: Model,
}

#[derive(Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "these are the flags of the file"
)]
pub(super) struct FileToken {
    pub(super) id: u32,
    pub(super) content: String,
    #[serde(default)]
    pub(super) single_word: bool,
    #[serde(default)]
    pub(super) lstrip: bool,
    #[serde(default)]
    pub(super) rstrip: bool,
    #[serde(default)]
    pub(super) special: bool,
}

#[derive(Deserialize)]
pub(super) struct Model {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) vocab: Vocabulary,
    #[serde(default)]
    pub(super) merges: Merges,
    pub(super) dropout: Option<f64>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub(super) byte_fallback: bool,
    #[serde(default)]
    pub(super) ignore_merges: bool,
}

/// Tokens with their ids, in the order of the file.
pub(super) enum Vocabulary {
    /// Of BPE and the like.
    Ids(Vec<(String, u32)>),
    /// A list of tokens with scores, as other models have it.
    Scores,
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tokens;
        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocabulary;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = map.next_entry()? {
                    tokens.push(token);
                }
                Ok(Vocabulary::Ids(tokens))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vocabulary, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocabulary::Scores)
            }
        }
        deserializer.deserialize_any(Tokens)
    }
}

/// Pairs of tokens, written as a list of two or as one text with a space.
#[derive(Default, Deserialize)]
#[serde(transparent)]
pub(super) struct Merges(#[serde(deserialize_with = "merges")] pub(super) Vec<(String, String)>);

fn merges<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, String)>, D::Error> {
    struct Merge(String, String);
    impl<'de> Deserialize<'de> for Merge {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(Pair)
        }
    }
    struct Pair;
    impl<'de> Visitor<'de> for Pair {
        type Value = Merge;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a merge of two tokens")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Merge, E> {
            match text.split_once(' ') {
                Some((left, right)) => Ok(Merge(left.to_owned(), right.to_owned())),
                None => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
            }
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
            let mut next = || seq.next_element::<Cow<'de, str>>();
            match (next()?, next()?, next()?) {
                (Some(left), Some(right), None) => Ok(Merge(left.into(), right.into())),
                (left, right, _) => {
                    let count = usize::from(left.is_some()) + usize::from(right.is_some());
                    Err(A::Error::invalid_length(count, &self))
                }
            }
        }
    }
    let merges = Vec::<Merge>::deserialize(deserializer)?;
    Ok(merges
        .into_iter()
        .map(|Merge(left, right)| (left, right))
        .collect())
}
