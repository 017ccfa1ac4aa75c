//! Control tokens in text that comes in pieces.

use super::format::MARKERS;

/// What comes of one character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// It, or one that was held, is a character of the text.
    Character(char),
    /// It was the last of this marker.
    Marker(&'static str),
}

/// Finds markers; holds back what may be the beginning of one.
#[derive(Clone, Debug, Default)]
pub(super) struct Markers {
    held: String,
}

impl Markers {
    /// Takes the next character and calls `each` with what is known now.
    pub(super) fn push(&mut self, character: char, mut each: impl FnMut(Mark)) {
        self.held.push(character);
        while let Some(first) = self.held.chars().next() {
            if let Some(marker) = MARKERS.iter().find(|marker| **marker == self.held) {
                each(Mark::Marker(marker));
                self.held.clear();
            } else if MARKERS.iter().any(|marker| marker.starts_with(&self.held)) {
                return;
            } else {
                each(Mark::Character(first));
                self.held.drain(..first.len_utf8());
            }
        }
    }

    /// What is held back when the text ends.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
