//! Random answers that must be calls are read as calls that the schemas allow.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::{Tool, ToolDelta, ToolFormat, ToolShape, ToolStream};
use super::{RequiredCall, required_calls};
use crate::structured::{Grammar, Walk, tokenizers};

fn tools() -> Vec<Tool> {
    let list = json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string", "description": "where; {\"a\": 1}"},
            "unit": {"type": "string", "enum": ["celsius", "it's \"hot\""]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "exact": {"type": ["boolean", "null"]}}, "required": ["city"], "additionalProperties": false}}},
        {"type": "function", "function": {"name": "now"}},
        {"type": "function", "function": {"name": "plan-2", "parameters": {"type": "object", "properties": {
            "steps": {"type": "array", "items": {"type": "object", "properties": {
                "do": {"enum": ["go", 7, true, null]}, "at": {"anyOf": [{"type": "number"}, {"const": false}]}}, "required": ["at"]}},
            "tree": {"$ref": "#/$defs/node"},
            "day": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}}, "required": ["steps", "day"],
            "$defs": {"node": {"type": "object", "properties": {"left": {"$ref": "#/$defs/node"}, "is_leaf": {"type": "boolean"}},
                "required": ["is_leaf"], "additionalProperties": false}}}}},
    ]);
    Tool::list(list.as_array().expect("a list"), ToolShape::Nested).expect("valid")
}

/// The calls of `answer`: names and arguments.
fn calls(format: ToolFormat, answer: &str) -> Vec<(String, Value)> {
    let mut stream = ToolStream::new(format, &tools(), "x");
    let mut deltas = stream.push(answer);
    deltas.extend(stream.finish());
    let mut calls = Vec::new();
    let mut text = String::new();
    for delta in deltas {
        match delta {
            ToolDelta::Start { name, .. } => calls.push((name, Value::Null)),
            ToolDelta::Arguments { json, .. } => text += &json,
            ToolDelta::End { complete, .. } => {
                assert!(complete, "{answer}");
                // Numbers too great for a float are JSON all the same.
                let value = serde_json::from_str(&std::mem::take(&mut text));
                calls.last_mut().expect("began").1 = value.unwrap_or(Value::Null);
            }
            ToolDelta::Content(text) => panic!("{text:?} is content of {answer:?}"),
        }
    }
    calls
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn required_calls_are_calls(seed: u64, parallel: bool) {
        let tools = tools();
        for format in [ToolFormat::Json, ToolFormat::Pythonic] {
            for choice in [RequiredCall::Any, RequiredCall::Named("plan-2"), RequiredCall::Named("now")] {
                let grammar = required_calls(format, (&tools, ToolShape::Nested), choice, parallel).expect("compiles");
                for tokens in tokenizers() {
                    let (answer, _) = Walk::new(tokens, &grammar, seed).run();
                    let calls = calls(format, &answer);
                    prop_assert!(!calls.is_empty(), "{answer}");
                    prop_assert!(calls.len() == 1 || (parallel && choice == RequiredCall::Any));
                    for (name, arguments) in calls {
                        if let RequiredCall::Named(wanted) = choice {
                            prop_assert_eq!(&name, wanted);
                        }
                        let tool = tools.iter().find(|tool| tool.name == name).expect("is offered");
                        let validator = jsonschema::validator_for(&tool.parameters).expect("a schema");
                        let valid = arguments.is_null() || validator.is_valid(&arguments);
                        prop_assert!(valid, "{name} {arguments} in {answer}");
                    }
                }
            }
        }
    }
}

/// Whether `text` is an answer of `grammar`.
fn takes(grammar: &Grammar, text: &str) -> bool {
    let tokens = &tokenizers()[0];
    let ids = tokens
        .tokenizer
        .encode(text, llama_model::text::Special::Plain);
    let mut constraint = tokens.constraint(grammar);
    ids.expect("tokens")
        .into_iter()
        .all(|id| constraint.accept(id).is_ok())
        && constraint.may_end().expect("goes on")
}

#[test]
fn calls_are_written_as_the_model_writes_them() {
    let tools = tools();
    let any = |format, parallel| {
        required_calls(
            format,
            (&tools, ToolShape::Nested),
            RequiredCall::Any,
            parallel,
        )
        .expect("compiles")
    };
    let json = any(ToolFormat::Json, true);
    let python = any(ToolFormat::Pythonic, true);
    let weather = r#"{"name": "get_weather", "parameters": {"city": "Rome", "exact": true}}"#;
    let now = r#"{"name": "now", "parameters": {}}"#;
    assert!(takes(&json, weather));
    assert!(takes(&json, &format!("{weather}; {now}")));
    assert!(!takes(
        &any(ToolFormat::Json, false),
        &format!("{weather}; {now}")
    ));
    assert!(!takes(
        &json,
        r#"{"name": "get_weather", "parameters": {}}"#
    ));
    assert!(!takes(&json, "It is warm."));
    for (text, taken) in [
        (r#"[get_weather(city="Rome", exact=True)]"#, true),
        (r#"[get_weather(city="Rome"), now()]"#, true),
        (
            r#"[plan-2(steps=[{"do": True, "at": False}, {"at": 1.5}], tree={"is_leaf": false}, day="2026-11")]"#,
            true,
        ),
        (r#"[get_weather(city="Rome", exact=true)]"#, false),
        ("[get_weather(exact=True)]", false),
        ("[now(a=1)]", false),
        ("[]", false),
    ] {
        assert_eq!(takes(&python, text), taken, "{text}");
    }
}

#[test]
fn what_cannot_be_required_is_named() {
    let with = |parameters: Value| {
        let name = "f".to_owned();
        [tools()[1].clone(), Tool { name, parameters }]
    };
    let refused = |format, tools: &[Tool], choice| {
        let error = required_calls(format, (tools, ToolShape::Nested), choice, true)
            .expect_err("is refused");
        assert_eq!(error.status, 400);
        error.param.expect("names a field")
    };
    let (json, python) = (ToolFormat::Json, ToolFormat::Pythonic);
    assert_eq!(refused(json, &[], RequiredCall::Any), "tool_choice");
    assert_eq!(
        refused(json, &tools(), RequiredCall::Named("h")),
        "tool_choice"
    );
    let place = "tools[1].function.parameters";
    let not = with(json!({"type": "object", "not": {}}));
    assert_eq!(refused(json, &not, RequiredCall::Any), place);
    let spaced = with(json!({"type": "object", "properties": {"a b": {}}}));
    required_calls(json, (&spaced, ToolShape::Nested), RequiredCall::Any, true).expect("is JSON's");
    assert_eq!(refused(python, &spaced, RequiredCall::Any), place);
    let counted = with(json!({"type": "object", "minProperties": 1}));
    required_calls(json, (&counted, ToolShape::Nested), RequiredCall::Any, true)
        .expect("is JSON's");
    assert_eq!(refused(python, &counted, RequiredCall::Any), place);
    // What is wrong with a function that is not chosen does not matter.
    required_calls(
        json,
        (&not, ToolShape::Nested),
        RequiredCall::Named("now"),
        true,
    )
    .expect("compiles");

    let properties: serde_json::Map<_, _> = (0..1500)
        .map(|index| (format!("p{index}"), json!({"$ref": "#/$defs/a"})))
        .collect();
    let long = json!({"type": "object", "properties": properties,
        "$defs": {"a": {"const": "x".repeat(20_000)}}});
    assert_eq!(refused(python, &with(long), RequiredCall::Any), "tools");
}
