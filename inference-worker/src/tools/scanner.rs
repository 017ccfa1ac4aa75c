//! JSON that is followed character by character.

use std::fmt::Write;

use super::MAX_DEPTH;

/// What a scanner makes of a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It belongs to the value.
    Taken,
    /// It cannot stand there; nothing changed.
    Wrong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    /// Directly behind `[`.
    ValueOrEnd,
    /// Directly behind `{`.
    KeyOrEnd,
    Key,
    Colon,
    CommaOrEnd,
    Text {
        key: bool,
    },
    Escape {
        key: bool,
    },
    /// So many digits of `\u` are missing.
    Hex {
        key: bool,
        missing: u8,
    },
    Word(&'static str),
    Number(Number),
    Nothing,
}

/// Follows one JSON object.
#[derive(Clone, Debug)]
pub(super) struct JsonScanner {
    /// For each open bracket whether it is that of an object.
    open: Vec<bool>,
    expect: Expect,
}

impl JsonScanner {
    /// A scanner that waits for the object.
    pub(super) fn new() -> Self {
        Self {
            open: Vec::new(),
            expect: Expect::Value,
        }
    }

    /// Whether the object is whole.
    pub(super) fn is_complete(&self) -> bool {
        self.expect == Expect::Nothing
    }

    /// Takes the next character and writes it to `out`. Raw control characters in
    /// strings, which JSON forbids and models write, come out escaped.
    pub(super) fn push(&mut self, character: char, out: &mut String) -> Next {
        if let Expect::Number(number) = self.expect {
            match number.next(character) {
                Some(number) => {
                    self.expect = Expect::Number(number);
                    out.push(character);
                    return Next::Taken;
                }
                None if number.may_end() => self.expect = Expect::CommaOrEnd,
                None => return Next::Wrong,
            }
        }
        let Some(expect) = self.after(character) else {
            return Next::Wrong;
        };
        self.expect = expect;
        if character < ' ' && matches!(expect, Expect::Text { .. }) {
            // Writing to a string cannot fail.
            let _ = write!(out, "\\u{:04x}", u32::from(character));
        } else {
            out.push(character);
        }
        Next::Taken
    }

    /// What is expected behind `character`.
    fn after(&mut self, character: char) -> Option<Expect> {
        match (self.expect, character) {
            (Expect::Text { key }, '"') => Some(if key {
                Expect::Colon
            } else {
                Expect::CommaOrEnd
            }),
            (Expect::Text { key }, '\\') => Some(Expect::Escape { key }),
            (text @ Expect::Text { .. }, _) => Some(text),
            (Expect::Escape { key }, 'u') => Some(Expect::Hex { key, missing: 4 }),
            (Expect::Escape { key }, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => {
                Some(Expect::Text { key })
            }
            (Expect::Hex { key, missing }, digit) if digit.is_ascii_hexdigit() => {
                Some(if missing == 1 {
                    Expect::Text { key }
                } else {
                    Expect::Hex {
                        key,
                        missing: missing - 1,
                    }
                })
            }
            (Expect::Word(rest), _) => {
                let rest = rest.strip_prefix(character)?;
                Some(if rest.is_empty() {
                    Expect::CommaOrEnd
                } else {
                    Expect::Word(rest)
                })
            }
            (Expect::Nothing | Expect::Escape { .. } | Expect::Hex { .. }, _) => None,
            (waiting, ' ' | '\n' | '\r' | '\t') => Some(waiting),
            (Expect::Colon, ':') => Some(Expect::Value),
            (Expect::KeyOrEnd | Expect::Key, '"') => Some(Expect::Text { key: true }),
            (Expect::CommaOrEnd, ',') => Some(if *self.open.last()? {
                Expect::Key
            } else {
                Expect::Value
            }),
            (Expect::KeyOrEnd | Expect::CommaOrEnd, '}') => self.close(true),
            (Expect::ValueOrEnd | Expect::CommaOrEnd, ']') => self.close(false),
            (Expect::Value | Expect::ValueOrEnd, _) => self.value(character),
            _ => None,
        }
    }

    fn value(&mut self, first: char) -> Option<Expect> {
        if self.open.is_empty() && first != '{' {
            return None;
        }
        match first {
            '{' | '[' if self.open.len() < MAX_DEPTH => {
                let object = first == '{';
                self.open.push(object);
                Some(if object {
                    Expect::KeyOrEnd
                } else {
                    Expect::ValueOrEnd
                })
            }
            '"' => Some(Expect::Text { key: false }),
            't' => Some(Expect::Word("rue")),
            'f' => Some(Expect::Word("alse")),
            'n' => Some(Expect::Word("ull")),
            '-' => Some(Expect::Number(Number::Minus)),
            '0' => Some(Expect::Number(Number::Zero)),
            '1'..='9' => Some(Expect::Number(Number::Whole)),
            _ => None,
        }
    }

    fn close(&mut self, object: bool) -> Option<Expect> {
        if *self.open.last()? != object {
            return None;
        }
        self.open.pop();
        Some(if self.open.is_empty() {
            Expect::Nothing
        } else {
            Expect::CommaOrEnd
        })
    }
}

impl Number {
    fn next(self, character: char) -> Option<Self> {
        match (self, character) {
            (Self::Minus, '0') => Some(Self::Zero),
            (Self::Minus, '1'..='9') | (Self::Whole, '0'..='9') => Some(Self::Whole),
            (Self::Zero | Self::Whole, '.') => Some(Self::Point),
            (Self::Point | Self::Fraction, '0'..='9') => Some(Self::Fraction),
            (Self::Zero | Self::Whole | Self::Fraction, 'e' | 'E') => Some(Self::Exponent),
            (Self::Exponent, '+' | '-') => Some(Self::Sign),
            (Self::Exponent | Self::Sign | Self::Power, '0'..='9') => Some(Self::Power),
            _ => None,
        }
    }

    fn may_end(self) -> bool {
        matches!(
            self,
            Self::Zero | Self::Whole | Self::Fraction | Self::Power
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text as it comes out, `None` where it is no object.
    fn scan(text: &str) -> Option<String> {
        let mut scanner = JsonScanner::new();
        let mut out = String::new();
        for character in text.chars() {
            if scanner.push(character, &mut out) == Next::Wrong {
                return None;
            }
        }
        scanner.is_complete().then_some(out)
    }

    proptest! {
        /// Whatever is taken, `serde_json` takes too, and the other way round.
        #[test]
        fn objects_are_those_of_the_library(
            text in r#"\{("[a\\"u0]{0,5}"[:,] ?|[-0-9.eE+]{1,4}|[\[\]{}, ]|true|null|fals){0,8}\}"#,
        ) {
            let by_library = serde_json::from_str::<serde_json::Value>(&text);
            // The library looks at the meaning of numbers and surrogates too.
            let strange = by_library.as_ref().is_err_and(|error| {
                let error = error.to_string();
                error.starts_with("number out of range") || error.contains("surrogate")
            });
            prop_assert!(strange || by_library.is_ok() == scan(&text).is_some(), "{text}");
        }
    }

    #[test]
    fn raw_control_characters_are_escaped() {
        assert_eq!(
            scan("{\n\"a\":\"b\nc\"}").as_deref(),
            Some("{\n\"a\":\"b\\u000ac\"}")
        );
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| {
            format!(
                "{{\"a\":{}{}}}",
                "[".repeat(depth - 1),
                "]".repeat(depth - 1)
            )
        };
        assert!(scan(&nested(MAX_DEPTH)).is_some());
        assert!(scan(&nested(MAX_DEPTH + 1)).is_none());
    }
}
