//! Python's literals, turned into JSON character by character.

use super::MAX_DEPTH;

/// Longest number or word, in bytes.
const MAX_WORD: usize = 400;

/// What the scanner makes of a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Literal {
    /// It belongs to the value.
    Taken,
    /// The value ended before it.
    Ended,
    /// It cannot stand there.
    Wrong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    Key,
    Colon,
    CommaOrEnd,
    /// In a number or in `True` and the like, which is held.
    Word,
    /// Behind one quote.
    Quote,
    /// Behind two quotes.
    Quotes,
    /// In a string; so many quotes in a row came of the three that end it.
    Text {
        closing: u8,
    },
    Escape,
    /// So many digits of a character's number are missing.
    Hex {
        missing: u8,
    },
    /// So many more octal digits may come.
    Octal {
        more: u8,
    },
    Nothing,
}

/// Follows one literal: a string, a number, `True`, `False`, `None`, a list, or a
/// dictionary whose keys are strings. JSON's words for the three are taken too.
#[derive(Clone, Debug)]
pub(super) struct LiteralScanner {
    /// For each open bracket whether it is that of a dictionary.
    open: Vec<bool>,
    /// Whether the innermost bracket has items.
    items: Vec<bool>,
    expect: Expect,
    /// What is not written yet.
    held: String,
    quote: char,
    triple: bool,
    key: bool,
    /// Number of the character that is being escaped.
    code: u32,
    /// First half of a character that is written as two.
    surrogate: Option<u32>,
}

impl LiteralScanner {
    /// A scanner that waits for the value.
    pub(super) fn new() -> Self {
        Self {
            open: Vec::new(),
            items: Vec::new(),
            expect: Expect::Value,
            held: String::new(),
            quote: '"',
            triple: false,
            key: false,
            code: 0,
            surrogate: None,
        }
    }

    /// What was taken and is not written yet.
    pub(super) fn held(&self) -> &str {
        &self.held
    }

    /// Takes the next character and writes what is known to `out`.
    pub(super) fn push(&mut self, character: char, out: &mut String) -> Literal {
        match self.expect {
            Expect::Text { .. }
            | Expect::Escape
            | Expect::Hex { .. }
            | Expect::Octal { .. }
            | Expect::Quote
            | Expect::Quotes => match self.text(character, out) {
                Some(true) => return Literal::Taken,
                Some(false) => {}
                None => return Literal::Wrong,
            },
            Expect::Word if is_word(&self.held, character) => {
                if self.held.len() == MAX_WORD {
                    return Literal::Wrong;
                }
                self.held.push(character);
                return Literal::Taken;
            }
            Expect::Word => {
                let Some(json) = word(&self.held) else {
                    return Literal::Wrong;
                };
                self.held.clear();
                out.push_str(&json);
                self.expect = self.behind_value();
            }
            _ => {}
        }
        self.outside(character, out)
    }

    /// Takes a character outside strings and words.
    fn outside(&mut self, character: char, out: &mut String) -> Literal {
        match (self.expect, character) {
            (_, ' ' | '\n' | '\r' | '\t') => {}
            (Expect::Nothing, _) => return Literal::Ended,
            (Expect::Colon, ':') => {
                out.push_str(": ");
                self.expect = Expect::Value;
            }
            (Expect::CommaOrEnd, ',') => {
                let dictionary = self.open.last() == Some(&true);
                self.expect = if dictionary {
                    Expect::Key
                } else {
                    Expect::Value
                };
            }
            (Expect::CommaOrEnd | Expect::Value | Expect::Key, ']' | '}') => {
                return self.close(character, out);
            }
            (Expect::Value | Expect::Key, '"' | '\'') => {
                self.comma(out);
                self.key = self.expect == Expect::Key;
                self.quote = character;
                out.push('"');
                self.expect = Expect::Quote;
            }
            (Expect::Value, '[' | '{') if self.open.len() < MAX_DEPTH => {
                self.comma(out);
                out.push(character);
                let dictionary = character == '{';
                self.open.push(dictionary);
                self.items.push(false);
                self.expect = if dictionary {
                    Expect::Key
                } else {
                    Expect::Value
                };
            }
            (Expect::Value, _) if is_word("", character) => {
                self.comma(out);
                self.held.push(character);
                self.expect = Expect::Word;
            }
            _ => return Literal::Wrong,
        }
        Literal::Taken
    }

    /// Writes the comma before an item that is not the first. Values of a dictionary
    /// have none.
    fn comma(&mut self, out: &mut String) {
        let dictionary = self.open.last() == Some(&true);
        if dictionary && self.expect == Expect::Value {
            return;
        }
        if let Some(items) = self.items.last_mut() {
            if *items {
                out.push_str(", ");
            }
            *items = true;
        }
    }

    fn close(&mut self, bracket: char, out: &mut String) -> Literal {
        let dictionary = bracket == '}';
        // A value is missing behind the colon of a dictionary.
        let missing = dictionary && self.expect == Expect::Value;
        if self.open.last() != Some(&dictionary) || missing {
            return Literal::Wrong;
        }
        self.open.pop();
        self.items.pop();
        out.push(bracket);
        self.expect = self.behind_value();
        Literal::Taken
    }

    fn behind_value(&self) -> Expect {
        if self.open.is_empty() {
            Expect::Nothing
        } else {
            Expect::CommaOrEnd
        }
    }

    /// Takes a character in a string: `Some(false)` where the string ended before it.
    fn text(&mut self, character: char, out: &mut String) -> Option<bool> {
        match self.expect {
            Expect::Quote if character == self.quote => self.expect = Expect::Quotes,
            Expect::Quotes if character == self.quote => {
                self.triple = true;
                self.expect = Expect::Text { closing: 0 };
            }
            Expect::Quotes => {
                self.end_text(out);
                return Some(false);
            }
            Expect::Escape => return self.escape(character, out),
            Expect::Hex { missing } => {
                self.code = self.code << 4 | character.to_digit(16)?;
                self.held.push(character);
                self.expect = Expect::Hex {
                    missing: missing - 1,
                };
                if missing == 1 {
                    self.end_escape(out);
                }
            }
            Expect::Octal { more } => match character.to_digit(8) {
                Some(digit) if more > 0 => {
                    self.held.push(character);
                    self.code = self.code << 3 | digit;
                    self.expect = Expect::Octal { more: more - 1 };
                }
                _ => {
                    self.end_escape(out);
                    return self.text(character, out);
                }
            },
            _ => self.plain(character, out),
        }
        Some(true)
    }

    /// Takes a character of the text itself.
    fn plain(&mut self, character: char, out: &mut String) {
        let closing = match self.expect {
            Expect::Text { closing } => closing,
            _ => 0,
        };
        self.expect = Expect::Text { closing: 0 };
        if character == self.quote && self.triple {
            self.expect = Expect::Text {
                closing: closing + 1,
            };
            if closing == 2 {
                self.end_text(out);
            }
            return;
        }
        // Quotes that ended nothing.
        for _ in 0..closing {
            self.write(u32::from(self.quote), out);
        }
        if character == self.quote {
            self.end_text(out);
        } else if character == '\\' {
            self.held.push(character);
            self.expect = Expect::Escape;
        } else {
            self.write(u32::from(character), out);
        }
    }

    fn end_text(&mut self, out: &mut String) {
        self.flush_surrogate(out);
        out.push('"');
        self.triple = false;
        self.expect = if self.key {
            Expect::Colon
        } else {
            self.behind_value()
        };
    }

    fn escape(&mut self, character: char, out: &mut String) -> Option<bool> {
        self.code = match character {
            '\n' => {
                self.held.clear();
                self.expect = Expect::Text { closing: 0 };
                return Some(true);
            }
            'n' => 0x0A,
            't' => 0x09,
            'r' => 0x0D,
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0C,
            'v' => 0x0B,
            '\\' | '\'' | '"' => u32::from(character),
            'x' | 'u' | 'U' | '0'..='7' => {
                self.held.push(character);
                self.code = character.to_digit(8).unwrap_or(0);
                self.expect = match character {
                    'x' => Expect::Hex { missing: 2 },
                    'u' => Expect::Hex { missing: 4 },
                    'U' => Expect::Hex { missing: 8 },
                    _ => Expect::Octal { more: 2 },
                };
                return Some(true);
            }
            // Names of characters are not known here.
            'N' => return None,
            other => {
                self.write(u32::from('\\'), out);
                u32::from(other)
            }
        };
        self.end_escape(out);
        Some(true)
    }

    fn end_escape(&mut self, out: &mut String) {
        self.held.clear();
        self.expect = Expect::Text { closing: 0 };
        self.write(self.code, out);
    }

    /// Writes a character of a string; halves of a character are put together.
    fn write(&mut self, code: u32, out: &mut String) {
        match (self.surrogate.take(), code) {
            (Some(high), 0xDC00..=0xDFFF) => {
                write_character(0x1_0000 + ((high - 0xD800) << 10) + (code - 0xDC00), out);
            }
            (None, 0xD800..=0xDBFF) => self.surrogate = Some(code),
            (None, _) => write_character(code, out),
            (Some(_), _) => {
                out.push(char::REPLACEMENT_CHARACTER);
                self.write(code, out);
            }
        }
    }

    fn flush_surrogate(&mut self, out: &mut String) {
        if self.surrogate.take().is_some() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

fn write_character(code: u32, out: &mut String) {
    let character = char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
    let quoted = serde_json::Value::from(character.to_string()).to_string();
    out.push_str(&quoted[1..quoted.len() - 1]);
}

/// Whether `character` may follow `before` in a number or a word.
fn is_word(before: &str, character: char) -> bool {
    let exponent = before.ends_with(['e', 'E']) && !before.contains('x');
    character.is_ascii_alphanumeric()
        || matches!(character, '_' | '.')
        || (matches!(character, '+' | '-') && (before.is_empty() || exponent))
}

/// A number or a word as JSON.
fn word(text: &str) -> Option<String> {
    match text {
        "True" | "true" => return Some("true".to_owned()),
        "False" | "false" => return Some("false".to_owned()),
        "None" | "null" => return Some("null".to_owned()),
        _ => {}
    }
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let between =
        |part: &str| !part.starts_with('_') && !part.ends_with('_') && !part.contains("__");
    let plain = |part: &str| {
        let digits = part
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'_');
        (digits && between(part)).then(|| part.replace('_', ""))
    };
    if let Some((base, rest)) = radix(digits) {
        let number = u128::from_str_radix(&rest.replace('_', ""), base).ok()?;
        return between(rest).then(|| format!("{sign}{number}"));
    }
    let (number, exponent) = match digits.split_once(['e', 'E']) {
        Some((number, exponent)) => (number, Some(exponent)),
        None => (digits, None),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(plain(fraction)?)),
        None => (number, None),
    };
    let whole = plain(whole)?;
    let float = fraction.is_some() || exponent.is_some();
    if whole.is_empty() && fraction.as_deref().is_none_or(str::is_empty) {
        return None;
    }
    let trimmed = whole.trim_start_matches('0');
    if !float && trimmed.len() < whole.len() && !trimmed.is_empty() {
        return None;
    }
    let mut json = format!("{sign}{}", if trimmed.is_empty() { "0" } else { trimmed });
    if let Some(fraction) = fraction {
        json.push('.');
        json.push_str(if fraction.is_empty() { "0" } else { &fraction });
    }
    if let Some(exponent) = exponent {
        let sign = exponent.starts_with(['+', '-']).then(|| &exponent[..1]);
        let power = plain(exponent.trim_start_matches(['+', '-']))?;
        if power.is_empty() {
            return None;
        }
        json.push('e');
        json.push_str(sign.unwrap_or_default());
        json.push_str(&power);
    }
    Some(json)
}

/// The base of a number that names one, and its digits.
fn radix(digits: &str) -> Option<(u32, &str)> {
    let mut characters = digits.chars();
    let base = match (characters.next()?, characters.next()?.to_ascii_lowercase()) {
        ('0', 'x') => 16,
        ('0', 'o') => 8,
        ('0', 'b') => 2,
        _ => return None,
    };
    Some((base, characters.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(literal: &str) -> Option<String> {
        let mut scanner = LiteralScanner::new();
        let mut out = String::new();
        for character in literal.chars() {
            if scanner.push(character, &mut out) != Literal::Taken {
                return None;
            }
        }
        (scanner.push(')', &mut out) == Literal::Ended).then_some(out)
    }

    #[test]
    fn literals_become_json() {
        for (python, expected) in [
            ("1", "1"),
            ("-0", "-0"),
            ("+12", "12"),
            ("1_000", "1000"),
            ("000", "0"),
            (".5", "0.5"),
            ("-1.", "-1.0"),
            ("00.5", "0.5"),
            ("1E+5", "1e+5"),
            ("0x1F", "31"),
            ("0b101", "5"),
            (
                "123456789012345678901234567890",
                "123456789012345678901234567890",
            ),
            ("True", "true"),
            ("None", "null"),
            ("false", "false"),
            ("''", "\"\""),
            ("'a\"b'", "\"a\\\"b\""),
            ("\"it's\"", "\"it's\""),
            (
                r"'\n\x41\u00e9\U0001F600\101\q\0'",
                "\"\\nAé😀A\\\\q\\u0000\"",
            ),
            (r"'\ud83d\ude00 \ud83d'", "\"😀 \u{FFFD}\""),
            ("'a\\\nb\nc'", "\"ab\\nc\""),
            ("'''a'b''c\n'''", "\"a'b''c\\n\""),
            ("[]", "[]"),
            ("[1, 'a',[ ], ]", "[1, \"a\", []]"),
            (
                "{'a': 1, \"b\": {'c': [None]},}",
                "{\"a\": 1, \"b\": {\"c\": [null]}}",
            ),
            ("{}", "{}"),
        ] {
            assert_eq!(json(python).as_deref(), Some(expected), "{python}");
            let _: serde_json::Value = serde_json::from_str(expected).expect("is JSON");
        }
    }

    #[test]
    fn what_is_no_literal_is_refused() {
        for python in [
            "",
            "x",
            "f(1)",
            "01",
            "1__0",
            "1_",
            "_1",
            "0x",
            "0x_1",
            "1.2.3",
            "1e",
            "--1",
            ".",
            "-",
            "'a' 'b'",
            "r'a'",
            "(1, 2)",
            "[1",
            "[,]",
            "[1 2]",
            "{1: 2}",
            "{'a'}",
            "{'a':}",
            "{'a' 1}",
            "]",
            "[}",
            r"'\N{DASH}'",
            r"'\xZZ'",
            "1 2",
            "Tru",
            "nan",
            "1j",
        ] {
            assert_eq!(json(python), None, "{python}");
        }
        assert_eq!(json(&"[".repeat(MAX_DEPTH + 1)), None);
        assert_eq!(json(&"1".repeat(MAX_WORD + 1)), None);
    }
}
