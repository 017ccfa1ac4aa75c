//! Calls that are a list of Python's.

use std::collections::BTreeSet;

use super::delta::Deltas;
use super::literal::{Literal, LiteralScanner};
use super::tool::{MAX_NAME_BYTES, is_name};
use super::{MAX_ARGUMENT_BYTES, MAX_CALLS, MAX_HELD};

/// Most arguments of one call.
const MAX_ARGUMENTS: usize = 256;

/// Reads calls that are a list of Python's.
#[derive(Debug)]
pub(super) struct PythonicCalls {
    names: BTreeSet<String>,
    state: State,
    /// Text that belongs to nothing yet.
    held: String,
    /// The name that is being read.
    word: String,
    call: Call,
}

/// The call that is being read.
#[derive(Debug, Default)]
struct Call {
    function: String,
    /// Names of the arguments so far. None before it is certain that this is a call.
    arguments: Vec<String>,
    bytes: usize,
    begun: bool,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space came.
    Begin,
    /// Behind `[` or a comma between calls.
    Open,
    /// In the name of a function.
    Function,
    /// Behind `(` or a comma between arguments.
    Argument,
    /// In the name of an argument.
    Name,
    /// Behind the name of an argument.
    Equals,
    Value(Box<LiteralScanner>),
    /// Behind a call: a comma or the end of the list.
    CommaOrEnd,
    /// Behind the list.
    Behind,
    /// In text.
    Content,
}

impl PythonicCalls {
    /// Reads calls of the functions `names`.
    pub(super) fn new(names: BTreeSet<String>) -> Self {
        Self {
            names,
            state: State::Begin,
            held: String::new(),
            word: String::new(),
            call: Call::default(),
        }
    }

    pub(super) fn character(&mut self, character: char, deltas: &mut Deltas) {
        if matches!(self.state, State::Content) {
            return deltas.character(character);
        }
        if matches!(self.state, State::Value(_)) {
            return self.value(character, deltas);
        }
        self.held.push(character);
        if self.held.len() > MAX_HELD {
            return self.give_up(deltas);
        }
        match (&self.state, character) {
            (State::Function | State::Name, _) => self.named(character, deltas),
            (_, ' ' | '\n' | '\r' | '\t') => {}
            // A comma may stand behind the last call.
            (State::Begin | State::Behind, '[') | (State::CommaOrEnd, ',') => {
                self.state = State::Open;
            }
            (State::Open, _) if is_name(character) && deltas.begun() < MAX_CALLS => {
                self.word = character.to_string();
                self.state = State::Function;
            }
            (State::CommaOrEnd | State::Open, ']') if self.is_behind_call() => {
                self.held.clear();
                self.state = State::Behind;
            }
            (State::Argument, ')') => self.close(deltas),
            (State::Argument, _) if is_argument(character) && !character.is_numeric() => {
                self.word = character.to_string();
                self.state = State::Name;
            }
            (State::Equals, '=') => self.begin_value(deltas),
            _ => self.give_up(deltas),
        }
    }

    /// Takes a control token that stands before or behind calls.
    pub(super) fn marker(&mut self, marker: &str, deltas: &mut Deltas) {
        match self.state {
            _ if self.call.begun => marker
                .chars()
                .for_each(|character| self.character(character, deltas)),
            State::Begin | State::Behind => {}
            _ => {
                self.give_up(deltas);
                self.state = State::Begin;
            }
        }
    }

    pub(super) fn finish(&mut self, deltas: &mut Deltas) {
        match self.state {
            // It goes with the call that was cut.
            _ if self.call.begun => self.held.clear(),
            // Behind calls there is nothing to read.
            State::CommaOrEnd | State::Behind => self.held.clear(),
            State::Open if self.is_behind_call() => self.held.clear(),
            _ => {}
        }
        self.give_up(deltas);
    }

    /// Whether a list is open whose last call was taken.
    fn is_behind_call(&self) -> bool {
        !self.held.contains('[')
    }

    /// Takes a character in or behind a name.
    fn named(&mut self, character: char, deltas: &mut Deltas) {
        let function = matches!(self.state, State::Function);
        match character {
            _ if self.word.len() > MAX_NAME_BYTES => self.give_up(deltas),
            _ if function && is_name(character) => self.word.push(character),
            _ if !function && is_argument(character) => self.word.push(character),
            '(' if function && self.names.contains(&self.word) => {
                self.call = Call {
                    function: std::mem::take(&mut self.word),
                    ..Call::default()
                };
                self.state = State::Argument;
            }
            '=' if !function => self.begin_value(deltas),
            ' ' if !function => self.state = State::Equals,
            _ => self.give_up(deltas),
        }
    }

    fn begin(&mut self, deltas: &mut Deltas) {
        if !self.call.begun {
            deltas.start(&self.call.function);
            deltas.arguments("{");
            self.call.begun = true;
        }
        self.held.clear();
    }

    fn begin_value(&mut self, deltas: &mut Deltas) {
        let name = std::mem::take(&mut self.word);
        let arguments = &mut self.call.arguments;
        if arguments.contains(&name) || arguments.len() == MAX_ARGUMENTS {
            return self.give_up(deltas);
        }
        let comma = if arguments.is_empty() { "" } else { ", " };
        let key = format!("{comma}{}: ", serde_json::Value::from(name.as_str()));
        arguments.push(name);
        self.begin(deltas);
        self.write(&key, deltas);
        self.state = State::Value(Box::new(LiteralScanner::new()));
    }

    fn write(&mut self, piece: &str, deltas: &mut Deltas) {
        self.call.bytes += piece.len();
        deltas.arguments(piece);
    }

    fn value(&mut self, character: char, deltas: &mut Deltas) {
        let State::Value(scanner) = &mut self.state else {
            return;
        };
        let mut piece = String::new();
        let literal = scanner.push(character, &mut piece);
        if literal == Literal::Wrong || self.call.bytes + piece.len() > MAX_ARGUMENT_BYTES {
            self.held.push_str(scanner.held());
            self.held.push(character);
            return self.give_up(deltas);
        }
        self.write(&piece, deltas);
        if literal == Literal::Ended {
            match character {
                ',' => self.state = State::Argument,
                ')' => self.close(deltas),
                _ => {
                    self.held.push(character);
                    self.give_up(deltas);
                }
            }
        }
    }

    fn close(&mut self, deltas: &mut Deltas) {
        self.begin(deltas);
        deltas.arguments("}");
        deltas.end(true);
        self.call = Call::default();
        self.state = State::CommaOrEnd;
    }

    /// A call that began ends here; what is held and all that follows is content.
    fn give_up(&mut self, deltas: &mut Deltas) {
        if self.call.begun {
            deltas.end(false);
            self.call = Call::default();
        }
        deltas.content(&std::mem::take(&mut self.held));
        self.word.clear();
        self.state = State::Content;
    }
}

/// Whether `character` may stand in the name of an argument. Python has no `-`
/// there; schemas do.
pub(super) fn is_argument(character: char) -> bool {
    character.is_alphanumeric() || matches!(character, '_' | '-')
}
