//! Tokens that are matched as a whole, before the text around them is split.

use std::collections::BTreeSet;

use aho_corasick::{AhoCorasick, BuildError, MatchKind};

use super::Special;

/// A token outside the BPE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AddedToken {
    /// What stands for it in a text.
    pub(super) text: String,
    /// Its id.
    pub(super) id: u32,
    /// Whether it steers the model and is never shown. The others are words that
    /// users may write.
    pub(super) control: bool,
}

/// All added tokens of a tokenizer.
#[derive(Debug)]
pub(super) struct AddedTokens {
    all: Matcher,
    words: Matcher,
    control: BTreeSet<u32>,
}

impl AddedTokens {
    /// Prepares the search for `tokens`.
    ///
    /// # Errors
    /// When there are too many for one automaton.
    pub(super) fn new(tokens: &[AddedToken]) -> Result<Self, BuildError> {
        let control = tokens
            .iter()
            .filter(|token| token.control)
            .map(|token| token.id)
            .collect();
        Ok(Self {
            all: Matcher::new(tokens.iter())?,
            words: Matcher::new(tokens.iter().filter(|token| !token.control))?,
            control,
        })
    }

    /// Ids of control tokens.
    pub(super) fn control(&self) -> &BTreeSet<u32> {
        &self.control
    }

    /// Where `text` holds added tokens: start, end and id of each, from left to
    /// right, the longest where several begin.
    pub(super) fn find<'a>(
        &'a self,
        text: &'a str,
        special: Special,
    ) -> impl Iterator<Item = (usize, usize, u32)> + 'a {
        match special {
            Special::Parse => &self.all,
            Special::Plain => &self.words,
        }
        .find(text)
    }
}

#[derive(Debug)]
struct Matcher {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

impl Matcher {
    fn new<'a>(tokens: impl Iterator<Item = &'a AddedToken> + Clone) -> Result<Self, BuildError> {
        let tokens = tokens.filter(|token| !token.text.is_empty());
        Ok(Self {
            ids: tokens.clone().map(|token| token.id).collect(),
            automaton: AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.map(|token| &token.text))?,
        })
    }

    fn find<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, usize, u32)> + 'a {
        self.automaton.find_iter(text).map(|found| {
            (
                found.start(),
                found.end(),
                self.ids[found.pattern().as_usize()],
            )
        })
    }
}
