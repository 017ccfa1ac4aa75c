//! Calls in whole answers.

use std::fmt::Write;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{MARKERS, MAX_ARGUMENT_BYTES, MAX_CALLS, Tool, ToolDelta, ToolFormat, ToolStream};

const NAMES: [&str; 3] = ["f", "get_weather", "g-2"];

fn tools() -> Vec<Tool> {
    NAMES
        .iter()
        .map(|name| Tool {
            name: (*name).to_owned(),
            parameters: json!({"type": "object"}),
        })
        .collect()
}

fn read<'a>(format: ToolFormat, pieces: impl IntoIterator<Item = &'a str>) -> Vec<ToolDelta> {
    let mut stream = ToolStream::new(format, &tools(), "x");
    let mut deltas: Vec<_> = pieces
        .into_iter()
        .flat_map(|piece| stream.push(piece))
        .collect();
    deltas.extend(stream.finish());
    joined(deltas)
}

fn joined(deltas: Vec<ToolDelta>) -> Vec<ToolDelta> {
    let mut all: Vec<ToolDelta> = Vec::new();
    for delta in deltas {
        match (all.last_mut(), delta) {
            (Some(ToolDelta::Content(before)), ToolDelta::Content(text)) => before.push_str(&text),
            (
                Some(ToolDelta::Arguments { json, index }),
                ToolDelta::Arguments {
                    json: more,
                    index: same,
                },
            ) if *index == same => json.push_str(&more),
            (_, delta) => all.push(delta),
        }
    }
    all
}

/// Content, and calls with their arguments: whole, or cut as text.
#[derive(Debug, PartialEq)]
enum Part {
    Text(String),
    Call(String, Value),
    Cut(String, String),
}

/// The parts of an answer; panics where deltas do not follow each other as they must.
fn parts(deltas: Vec<ToolDelta>) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut calls = 0;
    let mut deltas = deltas.into_iter();
    while let Some(delta) = deltas.next() {
        match delta {
            ToolDelta::Content(text) => parts.push(Part::Text(text)),
            ToolDelta::Start { index, id, name } => {
                assert_eq!((index, id), (calls, format!("call_x_{calls}")));
                let mut text = String::new();
                let complete = loop {
                    match deltas.next().expect("a call ends") {
                        ToolDelta::Arguments { index, json } if index == calls => text += &json,
                        ToolDelta::End { index, complete } if index == calls => break complete,
                        other => panic!("{other:?} in a call"),
                    }
                };
                calls += 1;
                parts.push(if complete {
                    let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
                    Part::Call(name, value)
                } else {
                    Part::Cut(name, text)
                });
            }
            other => panic!("{other:?} outside a call"),
        }
    }
    parts
}

fn call(name: &str, arguments: Value) -> Part {
    Part::Call(name.to_owned(), arguments)
}

fn text(text: &str) -> Part {
    Part::Text(text.to_owned())
}

fn cut(name: &str, arguments: &str) -> Part {
    Part::Cut(name.to_owned(), arguments.to_owned())
}

#[test]
fn calls_in_json() {
    let f = || call("f", json!({"a": 1}));
    for (answer, expected) in [
        (r#"{"name": "f", "parameters": {"a": 1}}"#, vec![f()]),
        (
            "\n <|python_tag|>{\"name\":\"f\",\"parameters\":{\"a\":1}}\n",
            vec![f()],
        ),
        (
            r#"{"type": "function", "name": "f", "arguments": {"a": 1}, "id": "7"}"#,
            vec![f()],
        ),
        (
            r#"{"name": "f", "parameters": {"a": ";}{\"\\"}}; {"name": "g-2", "parameters": {}}"#,
            vec![call("f", json!({"a": ";}{\"\\"})), call("g-2", json!({}))],
        ),
        (
            "{\"name\":\"f\",\"parameters\":{\"a\":1}}\n{\"name\":\"f\",\"parameters\":{\"a\":1}}",
            vec![f(), f()],
        ),
        (
            r#"[{"name":"f","parameters":{"a":1}}, {"name":"f","parameters":{"a":1}}]"#,
            vec![f(), f()],
        ),
        (
            r#"{"name": "get_weather"}"#,
            vec![call("get_weather", json!({}))],
        ),
        (
            r#"<|python_start|>{"name":"f","parameters":{"a":1}}<|python_end|>"#,
            vec![f()],
        ),
        (
            r#"I call.<|python_tag|>{"name":"f","parameters":{"a":1}}"#,
            vec![text("I call."), f()],
        ),
        (
            r#"{"name":"f","parameters":{"a":1}} and more"#,
            vec![f(), text(" and more")],
        ),
        (r#"{"name":"f","parameters":{"a":1}"#, vec![f()]),
        (
            r#"{"name":"f","parameters":{"a":1}; x"#,
            vec![f(), text("; x")],
        ),
        (
            r#"{"name":"f","parameters":{"a":1"#,
            vec![cut("f", r#"{"a":1"#)],
        ),
        (
            r#"{"name":"f","parameters":{"a":True}}"#,
            vec![cut("f", r#"{"a":"#), text("True}}")],
        ),
    ] {
        assert_eq!(
            parts(read(ToolFormat::Json, [answer])),
            expected,
            "{answer}"
        );
    }
}

#[test]
fn text_that_is_no_call_is_content() {
    for (answer, expected) in [
        (
            r#"{"name": "h", "parameters": {}}"#,
            vec![text(r#"{"name": "h", "parameters": {}}"#)],
        ),
        (
            r#"{"name": "f", "parameters": 7}"#,
            vec![text(r#"{"name": "f", "parameters": 7}"#)],
        ),
        (r#"{"answer": 42}"#, vec![text(r#"{"answer": 42}"#)]),
        (
            r#"{"name": "f", "para"#,
            vec![text(r#"{"name": "f", "para"#)],
        ),
        ("[1, 2]", vec![text("[1, 2]")]),
        ("[]", vec![text("[]")]),
        (" \n", vec![text(" \n")]),
        (
            r#"See {"name": "f", "parameters": {}}"#,
            vec![text(r#"See {"name": "f", "parameters": {}}"#)],
        ),
        ("<|python_tag|>print(1)", vec![text("print(1)")]),
        ("<|pyth", vec![text("<|pyth")]),
        ("", vec![]),
    ] {
        assert_eq!(
            parts(read(ToolFormat::Json, [answer])),
            expected,
            "{answer}"
        );
    }
}

#[test]
fn calls_in_python() {
    let f = || call("f", json!({"a": 1, "b": "x"}));
    for (answer, expected) in [
        (r#"[f(a=1, b="x")]"#, vec![f()]),
        ("<|python_start|>[f(a=1,b='x',)]<|python_end|>", vec![f()]),
        (
            "\n[ f( a = 1 , b = 'x' ) , g-2() , ] \n",
            vec![f(), call("g-2", json!({}))],
        ),
        (
            "[f(a=\"),]\", b={'k': [True, None]})]",
            vec![call("f", json!({"a": "),]", "b": {"k": [true, null]}}))],
        ),
        ("[f(a=1, b='x')", vec![f()]),
        (
            "[f(a=1, b='x')]\n[g-2()]",
            vec![f(), call("g-2", json!({}))],
        ),
        ("[f(a=1, b='x')] done", vec![f(), text(" done")]),
        ("[f(a=1, a=2)]", vec![cut("f", "{\"a\": 1"), text(" a=2)]")]),
        ("[f(a=1, 2)]", vec![cut("f", "{\"a\": 1"), text(" 2)]")]),
        ("[f(a=g())]", vec![cut("f", "{\"a\": "), text("g())]")]),
        ("[f(a=12", vec![cut("f", "{\"a\": ")]),
        ("[f(1)]", vec![text("[f(1)]")]),
        ("[f(x)]", vec![text("[f(x)]")]),
        ("[f(**a)]", vec![text("[f(**a)]")]),
        ("[h(a=1)]", vec![text("[h(a=1)]")]),
        ("[1, 2]", vec![text("[1, 2]")]),
        ("[f", vec![text("[f")]),
        ("f(a=1)", vec![text("f(a=1)")]),
        ("See [f(a=1)]", vec![text("See [f(a=1)]")]),
        ("[]", vec![text("[]")]),
    ] {
        assert_eq!(
            parts(read(ToolFormat::Pythonic, [answer])),
            expected,
            "{answer}"
        );
    }
}

#[test]
fn what_an_answer_may_hold_is_bounded() {
    let many = r#"{"name":"f","parameters":{}};"#.repeat(MAX_CALLS + 1);
    let read_many = parts(read(ToolFormat::Json, [many.as_str()]));
    assert_eq!(read_many.len(), MAX_CALLS + 1);
    assert_eq!(
        read_many.last(),
        Some(&text(r#";{"name":"f","parameters":{}};"#))
    );
    let many = format!("[{}]", ["f()"; MAX_CALLS + 1].join(","));
    let read_many = parts(read(ToolFormat::Pythonic, [many.as_str()]));
    assert_eq!(read_many.last(), Some(&text(",f()]")));

    let long = "a".repeat(MAX_ARGUMENT_BYTES);
    for (format, answer) in [
        (
            ToolFormat::Json,
            format!(r#"{{"name":"f","parameters":{{"a":"{long}"}}}}"#),
        ),
        (ToolFormat::Pythonic, format!("[f(a='{long}')]")),
    ] {
        let parts = parts(read(format, [answer.as_str()]));
        assert!(
            matches!(&parts[..], [Part::Cut(..), Part::Text(_)]),
            "{format:?}"
        );
    }
    for (format, begin) in [(ToolFormat::Json, "{\"name\""), (ToolFormat::Pythonic, "[")] {
        let mut stream = ToolStream::new(format, &tools(), "x");
        assert_eq!(stream.push(begin), []);
        assert_ne!(
            stream.push(&" ".repeat(2000)),
            [],
            "{format:?} holds all back"
        );
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e300..1e300).prop_map(Value::from),
        "\\PC{0,6}|[\"'\\\\;{}\\[\\]()=,\n\t\u{0}é😀<|]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map("[a-z\"' ]{0,4}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

type Called = (&'static str, Map<String, Value>);

fn calls() -> impl Strategy<Value = Vec<Called>> {
    let arguments = proptest::collection::btree_map("[a-z_][a-z0-9_]{0,6}", value(), 0..4)
        .prop_map(|map| map.into_iter().collect::<Map<_, _>>());
    let name = proptest::sample::select(NAMES.to_vec());
    proptest::collection::vec((name, arguments), 1..4)
}

fn expected(calls: &[Called]) -> Vec<Part> {
    let part = |(name, arguments): &Called| call(name, Value::Object(arguments.clone()));
    calls.iter().map(part).collect()
}

/// `value` as Python writes it, in one of several ways.
fn python(value: &Value, style: u8) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if style == 0 => Value::from(text.as_str()).to_string(),
        Value::String(text) if style == 1 => {
            let mut out = String::from("'");
            for character in text.chars() {
                match character {
                    '\'' | '\\' => out.extend(['\\', character]),
                    ' '..='~' => out.push(character),
                    '\0'..='\u{ff}' => {
                        write!(out, "\\x{:02x}", u32::from(character)).expect("writes");
                    }
                    _ => write!(out, "\\U{:08X}", u32::from(character)).expect("writes"),
                }
            }
            out + "'"
        }
        Value::String(text) => {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"");
            format!("\"\"\"{text}\"\"\"")
        }
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| python(item, style)).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| {
                format!(
                    "{}: {}",
                    python(&key.as_str().into(), style),
                    python(value, style)
                )
            };
            let fields: Vec<_> = fields.iter().map(field).collect();
            format!("{{{}}}", fields.join(","))
        }
    }
}

fn written(format: ToolFormat, calls: &[Called], style: u8) -> String {
    match format {
        ToolFormat::Json => {
            let object = |(name, arguments): &Called| {
                let call = json!({"type": "function", "name": name, "parameters": arguments});
                if style == 2 {
                    serde_json::to_string_pretty(&call).expect("is JSON")
                } else {
                    call.to_string()
                }
            };
            let objects: Vec<String> = calls.iter().map(object).collect();
            match style {
                0 => format!("<|python_tag|>{}", objects.join("; ")),
                1 => objects.join("\n"),
                _ => format!("[{}]", objects.join(", ")),
            }
        }
        ToolFormat::Pythonic => {
            let one = |(name, arguments): &Called| {
                let each =
                    |(name, value): (&String, &Value)| format!("{name}={}", python(value, style));
                format!(
                    "{name}({})",
                    arguments.iter().map(each).collect::<Vec<_>>().join(", ")
                )
            };
            let list = calls.iter().map(one).collect::<Vec<_>>().join(", ");
            if style == 0 {
                format!("<|python_start|>[{list}]<|python_end|>")
            } else {
                format!("[{list}]")
            }
        }
    }
}

fn format() -> impl Strategy<Value = ToolFormat> {
    proptest::sample::select(vec![ToolFormat::Json, ToolFormat::Pythonic])
}

/// Text that is often nearly a call.
fn soup() -> impl Strategy<Value = String> {
    let bits = vec![
        "{\"name\": \"f\", \"parameters\": {",
        "\"a\": ",
        "1",
        ".5e",
        "}",
        "{",
        "[",
        "]",
        "(",
        ")",
        ",",
        ";",
        " ",
        "\n",
        "\"",
        "'",
        "'''",
        "\\",
        "\\u12",
        "x",
        "é",
        "f",
        "f(",
        "[f(",
        "a=",
        "=",
        ":",
        "True",
        "null",
        "[g-2(a='",
        "\"name\"",
        "\"type\"",
        "<|python_tag|>",
        "<|python_end|>",
        "<|py",
        "<",
    ];
    proptest::collection::vec(proptest::sample::select(bits), 0..24).prop_map(|bits| bits.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn calls_are_read_as_they_were_written(format in format(), calls in calls(), style in 0_u8..3) {
        let answer = written(format, &calls, style);
        prop_assert_eq!(parts(read(format, [answer.as_str()])), expected(&calls), "{}", answer);
    }

    /// Every cut of a text in two, and into characters, gives the same deltas.
    #[test]
    fn cuts_do_not_matter(format in format(), calls in calls(), style in 0_u8..3, soup in soup(), which: bool) {
        let answer = if which { soup } else { written(format, &calls, style) };
        let whole = read(format, [answer.as_str()]);
        for (at, _) in answer.char_indices() {
            let (head, tail) = answer.split_at(at);
            prop_assert_eq!(&read(format, [head, tail]), &whole, "{} | {}", head, tail);
        }
        let characters: Vec<String> = answer.chars().map(String::from).collect();
        prop_assert_eq!(read(format, characters.iter().map(String::as_str)), whole);
    }

    /// Deltas follow each other as they must, whole arguments are JSON, and an answer
    /// without calls is its own content.
    #[test]
    fn anything_is_read(format in format(), soup in soup(), noise in "\\PC{0,40}", which: bool) {
        let answer = if which { soup } else { noise };
        let parts = parts(read(format, [answer.as_str()]));
        let mut only = String::new();
        for part in &parts {
            match part {
                Part::Text(text) => only += text,
                Part::Call(_, arguments) => prop_assert!(arguments.is_object(), "{:?}", parts),
                Part::Cut(..) => {}
            }
        }
        if parts.iter().all(|part| matches!(part, Part::Text(_))) {
            let plain = MARKERS.iter().fold(answer, |text, marker| text.replace(marker, ""));
            prop_assert_eq!(only, plain);
        }
    }

    /// Whatever is cut off a call, its end or its text stays behind.
    #[test]
    fn a_cut_call_loses_nothing_that_was_read(format in format(), calls in calls(), at in 0_usize..400) {
        let answer = written(format, &calls, 1);
        let at = answer.char_indices().map(|(at, _)| at).nth(at).unwrap_or(answer.len());
        let read = parts(read(format, [&answer[..at]]));
        for (part, whole) in read.iter().zip(expected(&calls)) {
            match (part, &whole) {
                (Part::Cut(name, _), Part::Call(wanted, _)) => prop_assert_eq!(name, wanted),
                (Part::Text(text), _) => prop_assert!(answer[..at].ends_with(text.as_str())),
                _ => prop_assert_eq!(part, &whole),
            }
        }
    }
}
