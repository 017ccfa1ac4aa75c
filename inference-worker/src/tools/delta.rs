//! What becomes of the text of an answer.

/// A piece of an answer with calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolDelta {
    /// Text for the reader.
    Content(String),
    /// A call begins.
    Start {
        /// Its place among the calls of the answer.
        index: usize,
        /// What its result will name.
        id: String,
        /// The function.
        name: String,
    },
    /// The next piece of a call's arguments, which are JSON.
    Arguments {
        /// Which call.
        index: usize,
        /// The piece.
        json: String,
    },
    /// A call ends.
    End {
        /// Which call.
        index: usize,
        /// Whether its arguments are whole. They are not where the answer was cut
        /// or went astray.
        complete: bool,
    },
}

/// Deltas of one piece of text, neighbours joined.
#[derive(Debug)]
pub(super) struct Deltas {
    list: Vec<ToolDelta>,
    answer: String,
    begun: usize,
}

impl Deltas {
    /// None yet; ids of calls will hold `answer`.
    pub(super) fn new(answer: &str) -> Self {
        Self {
            list: Vec::new(),
            answer: answer.to_owned(),
            begun: 0,
        }
    }

    /// Number of calls that began.
    pub(super) fn begun(&self) -> usize {
        self.begun
    }

    pub(super) fn take(&mut self) -> Vec<ToolDelta> {
        std::mem::take(&mut self.list)
    }

    pub(super) fn content(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        match self.list.last_mut() {
            Some(ToolDelta::Content(before)) => before.push_str(text),
            _ => self.list.push(ToolDelta::Content(text.to_owned())),
        }
    }

    pub(super) fn character(&mut self, character: char) {
        self.content(character.encode_utf8(&mut [0; 4]));
    }

    pub(super) fn start(&mut self, name: &str) {
        self.list.push(ToolDelta::Start {
            index: self.begun,
            id: format!("call_{}_{}", self.answer, self.begun),
            name: name.to_owned(),
        });
        self.begun += 1;
    }

    /// Adds to the arguments of the call that began last.
    pub(super) fn arguments(&mut self, piece: &str) {
        if piece.is_empty() {
            return;
        }
        match self.list.last_mut() {
            Some(ToolDelta::Arguments { json, .. }) => json.push_str(piece),
            _ => self.list.push(ToolDelta::Arguments {
                index: self.begun.saturating_sub(1),
                json: piece.to_owned(),
            }),
        }
    }

    /// Ends the call that began last.
    pub(super) fn end(&mut self, complete: bool) {
        self.list.push(ToolDelta::End {
            index: self.begun.saturating_sub(1),
            complete,
        });
    }
}
