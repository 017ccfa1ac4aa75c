//! JSON as the API server itself would write it. Pure.
//!
//! The data of a `ControllerRevision` must never change, and the API server compares its
//! bytes. Whoever patches something else of the object, such as the garbage collector that
//! takes owners away, has them written anew on the way: with sorted keys, and with some
//! characters escaped. Bytes that are so from the start stay the same.

use serde_json::{Map, Value};

/// `value` with the keys of every map in order.
pub fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            let entries = entries.into_iter();
            Value::Object(
                entries
                    .map(|(key, value)| (key, sorted(value)))
                    .collect::<Map<_, _>>(),
            )
        }
        Value::Array(list) => Value::Array(list.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// `json` with the characters escaped that Go's encoder escapes. They stand only within
/// texts, so the value stays the same.
pub fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' => text.push_str("\\u003c"),
            '>' => text.push_str("\\u003e"),
            '&' => text.push_str("\\u0026"),
            '\u{2028}' => text.push_str("\\u2028"),
            '\u{2029}' => text.push_str("\\u2029"),
            other => text.push(other),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sorted_at_every_depth() {
        let value = serde_json::json!({"b": [{"d": 1, "c": 2}], "a": {"f": 3, "e": 4}});
        let text = sorted(value).to_string();
        assert_eq!(text, r#"{"a":{"e":4,"f":3},"b":[{"c":2,"d":1}]}"#);
    }

    #[test]
    fn escapes_do_not_change_the_value() {
        let value = serde_json::json!({"a<b": "x & y > \u{2028} ä"});
        let text = escaped(&value.to_string());
        assert!(!text.contains(['<', '>', '&', '\u{2028}']), "{text}");
        let back: Value = serde_json::from_str(&text).unwrap_or_default();
        assert_eq!(back, value);
    }
}
