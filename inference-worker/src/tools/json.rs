//! Calls that are JSON objects.

use std::collections::BTreeSet;

use super::delta::Deltas;
use super::scanner::{JsonScanner, Next};
use super::{MAX_ARGUMENT_BYTES, MAX_CALLS, MAX_HELD};

/// Reads calls that are JSON objects.
#[derive(Debug)]
pub(super) struct JsonCalls {
    names: BTreeSet<String>,
    state: State,
    /// Text that belongs to nothing yet.
    held: String,
    listed: bool,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space came.
    Begin,
    /// Behind a call, or behind the `[` of a list.
    Between,
    /// In an object that may be a call.
    Members(Members),
    /// In the arguments of a call, of which so many bytes came.
    Arguments(Box<JsonScanner>, usize),
    /// In text.
    Content,
}

/// The members of a call outside its arguments.
#[derive(Debug, Default)]
struct Members {
    expect: Expect,
    key: String,
    /// The string that is being read, as it is written.
    text: String,
    name: Option<String>,
    /// Whether the arguments came.
    argued: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    KeyOrEnd,
    Key,
    Colon,
    Value,
    Text {
        key: bool,
        escaped: bool,
    },
    CommaOrEnd,
}

enum Member {
    GoesOn,
    /// The arguments begin with this character.
    Arguments,
    End,
    NoCall,
}

impl JsonCalls {
    /// Reads calls of the functions `names`.
    pub(super) fn new(names: BTreeSet<String>) -> Self {
        Self {
            names,
            state: State::Begin,
            held: String::new(),
            listed: false,
        }
    }

    pub(super) fn character(&mut self, character: char, deltas: &mut Deltas) {
        match &mut self.state {
            State::Content => deltas.character(character),
            State::Arguments(..) => self.argument(character, deltas),
            State::Begin | State::Between => self.outside(character, deltas),
            State::Members(members) => {
                self.held.push(character);
                let member = if self.held.len() > MAX_HELD {
                    Member::NoCall
                } else {
                    members.push(character, &self.names)
                };
                self.member(member, deltas);
            }
        }
    }

    /// Takes a control token that stands before or behind calls.
    pub(super) fn marker(&mut self, marker: &str, deltas: &mut Deltas) {
        match self.state {
            State::Arguments(..) => marker
                .chars()
                .for_each(|character| self.character(character, deltas)),
            State::Begin | State::Between => {}
            State::Members(_) | State::Content => {
                self.give_up(deltas);
                self.state = State::Begin;
            }
        }
    }

    pub(super) fn finish(&mut self, deltas: &mut Deltas) {
        match &self.state {
            State::Arguments(..) => deltas.end(false),
            // Between calls and behind the last there is nothing to read.
            State::Between if !self.held.contains('[') => self.held.clear(),
            State::Members(members) if members.argued => self.held.clear(),
            _ => {}
        }
        self.give_up(deltas);
    }

    fn outside(&mut self, character: char, deltas: &mut Deltas) {
        self.held.push(character);
        let between = matches!(self.state, State::Between);
        match character {
            _ if self.held.len() > MAX_HELD => self.give_up(deltas),
            ' ' | '\n' | '\r' | '\t' => {}
            '{' if deltas.begun() < MAX_CALLS => self.state = State::Members(Members::default()),
            '[' if !self.listed => {
                self.listed = true;
                self.state = State::Between;
            }
            ',' | ';' if between => {}
            ']' if between && self.listed => self.listed = false,
            _ => self.give_up(deltas),
        }
    }

    fn member(&mut self, member: Member, deltas: &mut Deltas) {
        match (member, &self.state) {
            (Member::Arguments, State::Members(members)) => {
                deltas.start(members.name.as_deref().unwrap_or_default());
                self.held.clear();
                self.state = State::Arguments(Box::new(JsonScanner::new()), 0);
                self.argument('{', deltas);
            }
            (Member::End, State::Members(members)) => {
                if !members.argued {
                    deltas.start(members.name.as_deref().unwrap_or_default());
                    deltas.arguments("{}");
                    deltas.end(true);
                }
                self.held.clear();
                self.state = State::Between;
            }
            (Member::NoCall, _) => self.give_up(deltas),
            _ => {}
        }
    }

    fn argument(&mut self, character: char, deltas: &mut Deltas) {
        let State::Arguments(scanner, bytes) = &mut self.state else {
            return;
        };
        let mut piece = String::new();
        let next = scanner.push(character, &mut piece);
        *bytes += piece.len();
        if next == Next::Wrong || *bytes > MAX_ARGUMENT_BYTES {
            deltas.end(false);
            self.held.push(character);
            return self.give_up(deltas);
        }
        let complete = scanner.is_complete();
        deltas.arguments(&piece);
        if complete {
            // Models forget what closes the call itself.
            deltas.end(true);
            self.state = State::Members(Members {
                expect: Expect::CommaOrEnd,
                argued: true,
                ..Members::default()
            });
        }
    }

    /// What is held and all that follows is content.
    fn give_up(&mut self, deltas: &mut Deltas) {
        deltas.content(&std::mem::take(&mut self.held));
        self.listed = false;
        self.state = State::Content;
    }
}

impl Members {
    fn push(&mut self, character: char, names: &BTreeSet<String>) -> Member {
        self.expect = match (self.expect, character) {
            (Expect::Text { key, escaped: true }, _) => {
                self.text.push(character);
                Expect::Text {
                    key,
                    escaped: false,
                }
            }
            (Expect::Text { key, .. }, '"') => {
                let Some(text) = unquoted(&self.text) else {
                    return Member::NoCall;
                };
                self.text.clear();
                if key {
                    self.key = text;
                    Expect::Colon
                } else if self.string(text, names) {
                    Expect::CommaOrEnd
                } else {
                    return Member::NoCall;
                }
            }
            (Expect::Text { key, .. }, _) => {
                self.text.push(character);
                let escaped = character == '\\';
                Expect::Text { key, escaped }
            }
            (waiting, ' ' | '\n' | '\r' | '\t') => waiting,
            (Expect::KeyOrEnd | Expect::Key, '"') => Expect::Text {
                key: true,
                escaped: false,
            },
            (Expect::Colon, ':') => Expect::Value,
            (Expect::Value, '"') => Expect::Text {
                key: false,
                escaped: false,
            },
            (Expect::Value, '{') if self.takes_arguments() => return Member::Arguments,
            (Expect::CommaOrEnd, ',') => Expect::Key,
            (Expect::CommaOrEnd, '}') if self.argued || self.name.is_some() => return Member::End,
            _ => return Member::NoCall,
        };
        Member::GoesOn
    }

    /// Takes the value of a member that is a string; `false` if a call has none such.
    fn string(&mut self, text: String, names: &BTreeSet<String>) -> bool {
        match self.key.as_str() {
            "name" if self.name.is_none() && !self.argued && names.contains(&text) => {
                self.name = Some(text);
                true
            }
            "type" => text == "function",
            "id" => true,
            _ => false,
        }
    }

    fn takes_arguments(&self) -> bool {
        !self.argued
            && self.name.is_some()
            && matches!(self.key.as_str(), "parameters" | "arguments")
    }
}

/// The text of a JSON string without its quotes.
fn unquoted(written: &str) -> Option<String> {
    serde_json::from_str(&format!("\"{written}\"")).ok()
}
