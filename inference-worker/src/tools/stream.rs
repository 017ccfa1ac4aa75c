//! Reads the calls of an answer as its text comes.

use std::collections::BTreeSet;

use super::delta::Deltas;
use super::json::JsonCalls;
use super::markers::{Mark, Markers};
use super::pythonic::PythonicCalls;
use super::{Tool, ToolDelta, ToolFormat};

/// Splits the text of one answer into content and calls.
///
/// Calls stand at the beginning of an answer or behind a marker, and call a function
/// that the request offers; everything else is content. Text that may begin a call is
/// held back until that is known. How the text is cut changes no delta but where
/// pieces of content and of arguments are cut.
#[derive(Debug)]
pub struct ToolStream {
    markers: Markers,
    notation: Notation,
    deltas: Deltas,
}

#[derive(Debug)]
enum Notation {
    Json(JsonCalls),
    Pythonic(PythonicCalls),
}

impl Notation {
    fn take(&mut self, mark: Mark, deltas: &mut Deltas) {
        match (self, mark) {
            (Self::Json(calls), Mark::Character(character)) => calls.character(character, deltas),
            (Self::Json(calls), Mark::Marker(marker)) => calls.marker(marker, deltas),
            (Self::Pythonic(calls), Mark::Character(character)) => {
                calls.character(character, deltas);
            }
            (Self::Pythonic(calls), Mark::Marker(marker)) => calls.marker(marker, deltas),
        }
    }
}

impl ToolStream {
    /// Reads calls of `tools` in the notation `format`. Ids of calls are made of
    /// `answer`, which no other answer may share.
    pub fn new(format: ToolFormat, tools: &[Tool], answer: &str) -> Self {
        let names: BTreeSet<String> = tools.iter().map(|tool| tool.name.clone()).collect();
        Self {
            markers: Markers::default(),
            notation: match format {
                ToolFormat::Json => Notation::Json(JsonCalls::new(names)),
                ToolFormat::Pythonic => Notation::Pythonic(PythonicCalls::new(names)),
            },
            deltas: Deltas::new(answer),
        }
    }

    /// Takes the next piece of text; control tokens of [`super::MARKERS`] belong in it.
    pub fn push(&mut self, text: &str) -> Vec<ToolDelta> {
        let Self {
            markers,
            notation,
            deltas,
        } = self;
        for character in text.chars() {
            markers.push(character, |mark| notation.take(mark, deltas));
        }
        deltas.take()
    }

    /// Takes the end of the answer.
    pub fn finish(&mut self) -> Vec<ToolDelta> {
        for character in self.markers.finish().chars() {
            let mark = Mark::Character(character);
            self.notation.take(mark, &mut self.deltas);
        }
        match &mut self.notation {
            Notation::Json(calls) => calls.finish(&mut self.deltas),
            Notation::Pythonic(calls) => calls.finish(&mut self.deltas),
        }
        self.deltas.take()
    }

    /// Number of calls that began so far.
    pub fn calls(&self) -> usize {
        self.deltas.begun()
    }
}
