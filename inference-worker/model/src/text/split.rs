//! How the Llama models split text before BPE.

use regex::Regex;

/// Llama 3, and all models with its tokenizer.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Llama 4: words end where their case says so, and keep their contraction.
pub(super) const LLAMA4: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The end of both patterns: white space leaves its last character to the word
/// behind it.
const TRAILING_SPACE: &str = r"|\s+(?!\S)|\s+";

/// One of the two patterns, in linear time: the part that looks ahead is done by
/// hand, so no text makes the search go back.
#[derive(Debug)]
pub(super) struct Splitter {
    pattern: Regex,
}

impl Splitter {
    /// A splitter by [`LLAMA3`] or [`LLAMA4`].
    ///
    /// # Errors
    /// When the pattern is not a regular expression.
    pub(super) fn new(pattern: &str) -> Result<Self, regex::Error> {
        let body = pattern.strip_suffix(TRAILING_SPACE).unwrap_or(pattern);
        Ok(Self {
            pattern: Regex::new(&format!(r"{body}|\s+"))?,
        })
    }

    /// The pieces of `text`, in order; together they are all of it.
    pub(super) fn pieces<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        let mut start = 0;
        std::iter::from_fn(move || {
            if start == text.len() {
                return None;
            }
            let end = self.end_of_piece(text, start);
            let piece = &text[start..end];
            start = end;
            Some(piece)
        })
    }

    fn end_of_piece(&self, text: &str, start: usize) -> usize {
        let end = match self.pattern.find_at(text, start) {
            Some(found) if found.start() == start => found.end(),
            Some(found) => found.start(),
            None => text.len(),
        };
        let last = text[start..end].chars().next_back();
        let last = last.filter(|last| last.is_whitespace() && !matches!(last, '\r' | '\n'));
        match last.map(|last| end - last.len_utf8()) {
            // Only the white space alternative ends like this, and it ran up to a
            // word or to the end of the text.
            Some(shorter) if end < text.len() && shorter > start => shorter,
            _ => end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::tokenizer::SplitDelimiterBehavior;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    /// A splitter and the pattern as it stands, searched by going back.
    type Both = (Splitter, Split);
    static BOTH: LazyLock<[Both; 2]> = LazyLock::new(|| [LLAMA3, LLAMA4].map(both));

    fn both(pattern: &str) -> Both {
        let whole = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(whole, SplitDelimiterBehavior::Isolated, false).expect("parses");
        (Splitter::new(pattern).expect("parses"), split)
    }

    fn backtracking(split: &Split, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        split.pre_tokenize(&mut pieces).expect("splits");
        pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(piece, ..)| piece.to_owned())
            .collect()
    }

    fn pieces<'a>(splitter: &'a Splitter, text: &'a str) -> Vec<&'a str> {
        splitter.pieces(text).collect()
    }

    #[test]
    fn white_space_leaves_its_last_character_to_the_word() {
        assert_eq!(
            pieces(&BOTH[0].0, "a   b \n\n c's  "),
            ["a", "  ", " b", " \n\n", " c", "'s", "  "]
        );
        assert_eq!(pieces(&BOTH[0].0, "\t\tx"), ["\t", "\tx"]);
        assert_eq!(
            pieces(&BOTH[1].0, "fooBarBAZ's/x"),
            ["foo", "Bar", "BAZ's", "/x"]
        );
    }

    proptest! {
        #[test]
        fn pieces_are_those_of_the_whole_pattern(
            text in r"([ \t\n\r\u{a0}\u{3000}]{1,3}|[a-zA-ZäßЖǅʰ中]{1,4}|[0-9²½]{1,4}|'(s|S|ll|ſ)|[!/…\u{301}🙂]{1,3}|.){0,12}"
        ) {
            for (splitter, split) in &*BOTH {
                prop_assert_eq!(pieces(splitter, &text), backtracking(split, &text));
            }
        }
    }
}
