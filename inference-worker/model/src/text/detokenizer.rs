//! Bytes of tokens to text, as they come.

use super::Tokenizer;

/// Turns a stream of tokens into text, byte for byte. A character whose bytes
/// are spread over several tokens appears with its last byte.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
    shows_control: bool,
}

impl Detokenizer {
    /// A detokenizer that shows control tokens too.
    pub fn showing_control() -> Self {
        Self {
            shows_control: true,
            ..Self::default()
        }
    }

    /// The text that `id` completes; empty for tokens that end inside a character,
    /// and for control tokens unless they are shown.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        if self.shows_control || !tokenizer.is_control(id) {
            self.pending.extend_from_slice(tokenizer.token_bytes(id));
        }
        self.take_complete()
    }

    /// What is left when the stream ends: a replacement character if it ends
    /// inside a character.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (valid, rest) = self.pending.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(broken) = error.error_len() else {
                        self.pending = rest.to_vec();
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending = rest[broken..].to_vec();
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_gives_the_same_text(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            cuts in proptest::collection::vec(1_usize..8, 0..64),
        ) {
            let mut detokenizer = Detokenizer::default();
            let mut text = String::new();
            let mut rest = bytes.as_slice();
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                text += &detokenizer.push_bytes(head);
                rest = tail;
            }
            text += &detokenizer.push_bytes(rest);
            text += &detokenizer.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn a_character_appears_with_its_last_byte() {
        let mut detokenizer = Detokenizer::default();
        let euro = "€".as_bytes();
        assert_eq!(detokenizer.push_bytes(&euro[..2]), "");
        assert_eq!(detokenizer.push_bytes(&euro[2..]), "€");
        assert_eq!(detokenizer.finish(), "");
    }
}
