//! Many answers of a real model that must have a form or be calls, each checked by the
//! schema that it was held to.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use harness::{Worker, chat, model};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

/// Answers held to schemas.
const ANSWERS: usize = 500;
/// Pairs of answers that are calls, of each of two notations: one comes whole, the other,
/// which must be the same, in pieces.
const CALLS: usize = 50;
/// Requests that are open at once.
const OPEN: usize = 24;
/// Far more than an answer takes: one that is as long has gone astray.
const MAX_TOKENS: u32 = 600;

/// Does `work` with each number below `count`, as many at once as may be open.
fn each(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..OPEN {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    work(index);
                }
            });
        }
    });
}

/// A schema whose values are short. What is `closed` refers to nothing else.
fn schema(random: &mut SmallRng, depth: u32, closed: bool) -> Value {
    let kinds = if depth == 0 { 8 } else { 11 };
    match random.random_range(0..kinds) {
        0 => json!({"type": "string", "maxLength": random.random_range(1..5)}),
        1 => {
            let patterns = [
                "^[A-Z]{2}-[0-9]{1,3}$",
                "^(yes|no|[a-c]+x)$",
                "^#[0-9a-f]{3}$",
            ];
            json!({"type": "string", "pattern": patterns.choose(random), "maxLength": 6})
        }
        2 => {
            let least = random.random_range(-20..20);
            json!({"type": "integer", "minimum": least, "maximum": least + random.random_range(0..50)})
        }
        3 => json!({"type": "number", "minimum": 0, "exclusiveMaximum": 4, "multipleOf": 0.25}),
        4 => json!({"enum": ["red", 7, null, "deep blue", true]}),
        5 => json!({"const": "fixed"}),
        6 => json!({"type": ["boolean", "null"]}),
        7 if closed => json!({"type": "boolean"}),
        7 => json!({"$ref": "#/$defs/part"}),
        8 => {
            let least = random.random_range(0..3);
            let most = least + random.random_range(0..2);
            json!({"type": "array", "items": schema(random, 0, closed), "minItems": least, "maxItems": most})
        }
        9 => json!({"anyOf": [schema(random, 0, closed), schema(random, depth - 1, closed)]}),
        _ => object(random, depth - 1, closed),
    }
}

/// Objects with some fields that may lack.
fn object(random: &mut SmallRng, depth: u32, closed: bool) -> Value {
    let names = ["name", "size"];
    let count = random.random_range(1..3);
    let fields: Map<String, Value> = names[..count]
        .iter()
        .map(|name| ((*name).to_owned(), schema(random, depth, closed)))
        .collect();
    let required: Vec<&str> = names[..count]
        .iter()
        .copied()
        .filter(|_| random.random_bool(0.7))
        .collect();
    json!({"type": "object", "properties": fields, "required": required, "additionalProperties": false})
}

#[test]
fn answers_are_valid_by_their_schemas() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &[]);
    let (begun, tokens) = (Instant::now(), AtomicUsize::new(0));
    each(ANSWERS, |index| {
        let mut random = SmallRng::seed_from_u64(index as u64);
        let mut schema = object(&mut random, 2, false);
        schema["$defs"] = json!({"part": self::schema(&mut random, 1, true)});
        let mut body = chat("Describe a thing as JSON.", MAX_TOKENS);
        body["temperature"] = json!([0.0, 0.7, 1.0, 1.3][index % 4]);
        body["seed"] = json!(index);
        let named = json!({"name": "thing", "schema": schema, "strict": true});
        body["response_format"] = json!({"type": "json_schema", "json_schema": named});
        let (status, answer) = worker.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{answer} by {schema}");
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{answer} by {schema}");
        let text = choice["message"]["content"].as_str().unwrap();
        check(&schema, text);
        let count = answer["usage"]["completion_tokens"].as_u64().unwrap();
        tokens.fetch_add(usize::try_from(count).unwrap(), Ordering::Relaxed);
    });
    eprintln!(
        "{ANSWERS} answers of {tokens:?} tokens in {:?}",
        begun.elapsed()
    );
}

fn check(schema: &Value, text: &str) {
    let value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let validator = jsonschema::validator_for(schema).expect("a schema");
    if let Err(error) = validator.validate(&value) {
        panic!("{error}: {text} by {schema}");
    }
}

/// Templates that show a model its tools, and an example of a call.
const TEMPLATES: [&str; 2] = [
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
     {% for t in tools or [] %}{\"name\": \"{{ t.function.name }}\", \"parameters\": {}}\n\
     {% endfor %}<|im_start|>assistant\n",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
     {% for t in tools or [] %}[{{ t.function.name + '(' }})]\n{% endfor %}<|im_start|>assistant\n",
];

/// A copy of `model` with another chat template, which must not be longer than its own.
fn with_template(model: &Path, folder: &Path, template: &str) -> PathBuf {
    const KEY: &[u8] = b"tokenizer.chat_template";
    let mut bytes = std::fs::read(model).unwrap();
    let header = &bytes[..bytes.len().min(64 << 20)];
    let key = header.windows(KEY.len()).position(|window| window == KEY);
    // Behind the key: the type of the value, its length, the value.
    let length = key.expect("the model has a template") + KEY.len() + 4;
    let (start, count) = (length + 8, bytes[length..length + 8].try_into().unwrap());
    let count = usize::try_from(u64::from_le_bytes(count)).unwrap();
    let padding = count
        .checked_sub(template.len() + "{##}".len())
        .expect("fits");
    let padded = format!("{template}{{#{}#}}", " ".repeat(padding));
    bytes[start..start + count].copy_from_slice(padded.as_bytes());
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 5},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "days"], "additionalProperties": false,
        }}},
        {"type": "function", "function": {"name": "now", "parameters": {
            "type": "object", "properties": {}, "additionalProperties": false}}},
        {"type": "function", "function": {"name": "pick", "parameters": {
            "type": "object",
            "properties": {
                "list": {"type": "array", "items": {"enum": ["a", "b\"c", 3]}, "minItems": 1, "maxItems": 2},
                "deep": {"type": "object", "properties": {"on": {"type": "boolean"}},
                    "required": ["on"], "additionalProperties": false},
            },
            "required": ["list"], "additionalProperties": false,
        }}},
    ])
}

/// How many calls an answer must have at least, by the way it is asked for.
fn asked(body: &mut Value, index: usize, pythonic: bool) {
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    body["parallel_tool_calls"] = json!(index.is_multiple_of(8));
    match index % 4 {
        0 => body["tool_choice"] = json!("required"),
        1 => body["tool_choice"] = named(["get_weather", "now", "pick"][index / 4 % 3]),
        // So small a model calls nothing by itself; what it is to write is a call.
        _ if pythonic => {
            let calls = r#"\[(now\(\), )?get_weather\(city="[A-Z][a-z]{1,4}", days=[1-9]\)\]"#;
            body["guided_regex"] = json!(calls);
        }
        _ => {
            let call = json!({"type": "object", "properties": {
                "name": {"const": "get_weather"}, "parameters": tools()[0]["function"]["parameters"]},
                "required": ["name", "parameters"], "additionalProperties": false});
            body["guided_json"] = call;
        }
    }
}

/// Names and arguments of the calls of an answer that came whole.
fn whole_calls(answer: &Value) -> Vec<(String, String)> {
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    let calls = choice["message"]["tool_calls"].as_array().expect("calls");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let calls = calls.iter().map(|call| {
        let function = &call["function"];
        (text(&function["name"]), text(&function["arguments"]))
    });
    calls.collect()
}

/// The same of an answer that came in pieces.
fn streamed_calls(worker: &Worker, body: &Value) -> Vec<(String, String)> {
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut reason = Value::Null;
    for data in worker.stream("/v1/chat/completions", body) {
        if data == "[DONE]" {
            continue;
        }
        let event: Value = serde_json::from_str(&data).unwrap();
        let choice = &event["choices"][0];
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
        for delta in choice["delta"]["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let function = &delta["function"];
            if let Some(name) = function["name"].as_str() {
                assert_eq!(delta["index"], calls.len(), "{event}");
                calls.push((name.to_owned(), String::new()));
            }
            let arguments = &mut calls.last_mut().expect("a call").1;
            *arguments += function["arguments"].as_str().unwrap_or_default();
        }
    }
    assert_eq!(reason, "tool_calls");
    calls
}

fn calls_are_read(pythonic: bool) {
    let Some((model, _turn)) = model() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let template = TEMPLATES[usize::from(pythonic)];
    let model = with_template(&model, folder.path(), template);
    let worker = Worker::serving(&model, &[]);
    let (begun, count) = (Instant::now(), AtomicUsize::new(0));
    let schemas = tools();
    each(CALLS, |index| {
        let mut body = chat("Weather in Paris?", MAX_TOKENS);
        body["tools"] = schemas.clone();
        body["temperature"] = json!([0.0, 0.8, 1.2][index % 3]);
        body["seed"] = json!(index);
        asked(&mut body, index, pythonic);
        let (status, answer) = worker.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{answer}");
        let calls = whole_calls(&answer);
        for (name, arguments) in &calls {
            let mut tools = schemas.as_array().unwrap().iter();
            let tool = tools.find(|tool| tool["function"]["name"] == **name);
            check(&tool.expect("a tool")["function"]["parameters"], arguments);
        }
        count.fetch_add(calls.len(), Ordering::Relaxed);
        body["stream"] = json!(true);
        assert_eq!(streamed_calls(&worker, &body), calls, "{body}");
    });
    eprintln!(
        "{CALLS} answers of {count:?} calls in {:?}",
        begun.elapsed()
    );
}

#[test]
fn calls_in_json_are_read() {
    calls_are_read(false);
}

#[test]
fn calls_in_pythons_notation_are_read() {
    calls_are_read(true);
}
