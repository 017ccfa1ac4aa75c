//! JSON as Python's `json.dumps` writes it, to the byte.

use std::fmt::Write;

use serde_json::{Number, Value};

/// How it is written.
#[derive(Clone, Debug, Default)]
pub(super) struct Style {
    /// Spaces for each level, each item on a line of its own; all on one line when
    /// absent.
    pub(super) indent: Option<usize>,
    /// Whether other than ASCII characters are escaped.
    pub(super) ensure_ascii: bool,
    /// Whether keys are sorted.
    pub(super) sort_keys: bool,
    /// What stands between items, and between a key and its value.
    pub(super) separators: Option<(String, String)>,
}

/// `value` as JSON.
pub(super) fn to_json(value: &Value, style: &Style) -> String {
    let mut writer = Writer {
        out: String::new(),
        style,
        depth: 0,
    };
    writer.value(value);
    writer.out
}

struct Writer<'a> {
    out: String,
    style: &'a Style,
    depth: usize,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(true) => self.out.push_str("true"),
            Value::Bool(false) => self.out.push_str("false"),
            Value::Number(number) => self.out.push_str(&number_text(number)),
            Value::String(text) => self.text(text),
            Value::Array(items) => self.items(('[', ']'), items, |writer, item| {
                writer.value(item);
            }),
            Value::Object(fields) => {
                let mut entries: Vec<_> = fields.iter().collect();
                if self.style.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.items(('{', '}'), &entries, |writer, (key, value)| {
                    writer.text(key);
                    let separator = writer.style.separators.as_ref();
                    writer.out.push_str(separator.map_or(": ", |(_, key)| key));
                    writer.value(value);
                });
            }
        }
    }

    fn items<T>(&mut self, (open, close): (char, char), items: &[T], each: fn(&mut Self, &T)) {
        self.out.push(open);
        self.depth += 1;
        for (number, item) in items.iter().enumerate() {
            if number > 0 {
                let usual = if self.style.indent.is_some() {
                    ","
                } else {
                    ", "
                };
                let separator = self.style.separators.as_ref();
                self.out.push_str(separator.map_or(usual, |(item, _)| item));
            }
            self.new_line();
            each(self, item);
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.new_line();
        }
        self.out.push(close);
    }

    fn new_line(&mut self) {
        if let Some(width) = self.style.indent {
            self.out.push('\n');
            self.out
                .extend(std::iter::repeat_n(' ', width * self.depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\u{1f}' => self.escape(character),
                '\u{7f}'.. if self.style.ensure_ascii => self.escape(character),
                other => self.out.push(other),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            // Writing to a string cannot fail.
            let _ = write!(self.out, "\\u{unit:04x}");
        }
    }
}

fn number_text(number: &Number) -> String {
    match number.as_f64() {
        Some(float) if number.is_f64() => float_text(float),
        _ => number.to_string(),
    }
}

/// The shortest digits that give `float` again; an exponent from 1e16 upwards and
/// below 1e-4.
pub(super) fn float_text(float: f64) -> String {
    let scientific = format!("{float:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    match exponent.parse::<i32>() {
        Ok(exponent) if (-4..16).contains(&exponent) => {
            let text = float.to_string();
            if text.contains('.') {
                text
            } else {
                text + ".0"
            }
        }
        Ok(exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        Err(_infinite) => scientific,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn floats_are_pythons() {
        for (float, text) in [
            (1.0, "1.0"),
            (-0.5, "-0.5"),
            (0.1, "0.1"),
            (0.0001, "0.0001"),
            (0.000_012_5, "1.25e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float_text(float), text);
        }
    }

    #[test]
    fn styles_are_pythons() {
        let value = json!({"b": [], "a": {"ü": "🙂\u{7f}\u{1}", "n": [1, 2.0, null]}});
        assert_eq!(
            to_json(&value, &Style::default()),
            "{\"b\": [], \"a\": {\"ü\": \"🙂\u{7f}\\u0001\", \"n\": [1, 2.0, null]}}"
        );
        let style = Style {
            indent: Some(1),
            ensure_ascii: true,
            sort_keys: true,
            separators: None,
        };
        assert_eq!(
            to_json(&value, &style),
            "{\n \"a\": {\n  \"n\": [\n   1,\n   2.0,\n   null\n  ],\n  \"\\u00fc\": \"\\ud83d\\ude42\\u007f\\u0001\"\n },\n \"b\": []\n}"
        );
    }
}
