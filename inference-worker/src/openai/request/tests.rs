use super::*;
use proptest::prelude::*;
use serde_json::json;

fn chat(mut change: Value) -> Result<ValidRequest, ApiError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in change.as_object_mut().expect("an object") {
        body[name.as_str()] = value.take();
    }
    ValidRequest::chat(body.to_string().as_bytes())
}

fn refused(change: Value) -> String {
    let error = chat(change).expect_err("refused");
    assert_eq!(error.status, 400);
    error.param.expect("names a field")
}

fn completion(mut change: Value) -> Result<ValidRequest, ApiError> {
    let mut body = json!({"model": "m", "prompt": "x"});
    for (name, value) in change.as_object_mut().expect("an object") {
        body[name.as_str()] = value.take();
    }
    ValidRequest::completion(body.to_string().as_bytes())
}

#[test]
fn defaults_are_openais() {
    let request = chat(json!({})).expect("valid");
    let expected = SamplingParams {
        temperature: 1.0,
        ..SamplingParams::GREEDY
    };
    assert_eq!(request.sampling, expected);
    assert_eq!(request.shown, Shown::default());
    assert_eq!(request.ending, Ending::default());
    assert_eq!(request.template, TemplateOptions::default());
    assert_eq!(
        (request.max_tokens, request.choices, request.seed),
        (None, 1, None)
    );
    assert_eq!((request.priority, request.cache_salt), (0, None));
    let request = completion(json!({})).expect("valid");
    assert_eq!((request.max_tokens, request.adds_lead), (Some(16), true));
}

#[test]
fn every_supported_field_arrives() {
    let request = chat(json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.25, "presence_penalty": -1,
        "frequency_penalty": 2.0, "repetition_penalty": 1.5, "logit_bias": {"7": -100, "8": 0.5},
        "min_tokens": 2, "logprobs": true, "top_logprobs": 20, "seed": -1,
        "max_completion_tokens": 7, "stop": ["a", "b"], "include_stop_str_in_output": true,
        "stop_token_ids": [5], "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true}, "n": 3, "best_of": 3, "priority": -4,
        "cache_salt": "s", "continue_final_message": true, "skip_special_tokens": false,
        "return_token_ids": true, "return_tokens_as_token_ids": true,
        "truncate_prompt_tokens": 9, "chat_template_kwargs": {"thinking": true},
        "documents": [{"text": "t"}], "user": "u", "metadata": {"a": "b"}, "store": false,
        "service_tier": "auto", "tools": [], "response_format": {"type": "text"},
        "tool_choice": "auto", "echo": false, "audio": null,
    }))
    .expect("valid");
    assert_eq!(
        request.sampling,
        SamplingParams {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 3,
            min_p: 0.25,
            presence_penalty: -1.0,
            frequency_penalty: 2.0,
            repetition_penalty: 1.5,
            logit_bias: vec![(7, -100.0), (8, 0.5)],
            min_tokens: 2,
            logprobs: Some(20),
            ..SamplingParams::GREEDY
        }
    );
    assert_eq!(request.seed, Some(u64::MAX));
    assert_eq!(request.sampling(2, 5).seed, 1, "each choice has its own");
    assert_eq!((request.max_tokens, request.choices), (Some(7), 3));
    let ending = Ending {
        strings: vec!["a".to_owned(), "b".to_owned()],
        includes_string: true,
        ids: vec![5],
        ignores_end: true,
    };
    assert_eq!(request.ending, ending);
    let shown = Shown {
        stream: true,
        include_usage: true,
        echo: false,
        control_tokens: true,
        token_ids: true,
        ids_for_text: true,
    };
    assert_eq!(request.shown, shown);
    assert_eq!((request.priority, request.last_tokens), (-4, Some(9)));
    assert_eq!(request.cache_salt.as_deref(), Some("s"));
    let template = request.template;
    assert!(template.continue_final_message && !template.add_generation_prompt);
    assert_eq!(template.variables["thinking"], json!(true));
    assert_eq!(template.documents, Some(vec![json!({"text": "t"})]));

    let request = completion(json!({
        "echo": true, "add_special_tokens": false, "top_k": -1, "suffix": "",
    }))
    .expect("valid");
    assert!(request.shown.echo && !request.adds_lead);
    assert_eq!(request.sampling.top_k, 0);
    assert_eq!(request.prompt_logprobs(), None);
    let request = completion(json!({"echo": true, "logprobs": 3, "max_tokens": 0}));
    let request = request.expect("valid");
    assert_eq!(
        (request.prompt_logprobs(), request.max_tokens),
        (Some(3), Some(0))
    );
    let request = completion(json!({"logprobs": 0})).expect("valid");
    assert_eq!(request.sampling.logprobs, Some(0));
    let request = chat(json!({"logprobs": true, "add_generation_prompt": false})).expect("valid");
    assert_eq!(request.sampling.logprobs, Some(0));
    assert!(!request.template.add_generation_prompt);
}

/// A change of one field, and its name.
fn sent(field: &str, value: Value) -> (Value, String) {
    let mut change = json!({});
    change[field] = value;
    (change, field.to_owned())
}

#[test]
fn fields_out_of_range_are_named() {
    for (change, field) in [
        sent("temperature", json!(3)),
        sent("temperature", json!("hot")),
        sent("top_p", json!(-0.1)),
        sent("top_k", json!(-2)),
        sent("top_k", json!(1.5)),
        sent("min_p", json!(1.1)),
        sent("presence_penalty", json!(-2.1)),
        sent("frequency_penalty", json!(1e300)),
        sent("repetition_penalty", json!(0)),
        sent("logit_bias", json!({"a": 1})),
        sent("logit_bias", json!({"-1": 1})),
        sent("logit_bias", json!({"1": 101})),
        sent("logit_bias", json!([1])),
        sent("max_tokens", json!(0)),
        sent("max_tokens", json!(-1)),
        sent("max_completion_tokens", json!(0)),
        sent("min_tokens", json!(-1)),
    ] {
        assert_eq!(refused(change), field);
    }
}

#[test]
fn fields_that_are_not_built_in_are_refused_by_name() {
    for (change, field) in [
        sent("n", json!(0)),
        sent("n", json!(129)),
        sent("best_of", json!(2)),
        sent("seed", json!(1_u64 << 63)),
        sent("tools", json!({})),
        sent("tool_choice", json!("required")),
        sent("logprobs", json!(1)),
        sent("top_logprobs", json!(1)),
        sent("response_format", json!({"type": "xml"})),
        sent("structured_outputs", json!({})),
        sent("guided_json", json!("{")),
        sent("reasoning_effort", json!("low")),
        sent("store", json!(true)),
        sent("service_tier", json!("priority")),
        sent("echo", json!(true)),
        sent("suffix", json!("s")),
        sent("prompt_logprobs", json!(1)),
        sent("add_special_tokens", json!(true)),
        sent("chat_template", json!("{{ x }}")),
        sent("chat_template_kwargs", json!({"messages": []})),
        sent("tempratur", json!(1)),
    ] {
        assert_eq!(refused(change), field);
    }
    assert!(ValidRequest::chat(b"[]").is_err());
    assert!(ValidRequest::chat(b"{").is_err());
}

#[test]
fn lists_and_texts_are_bounded() {
    for (change, field) in [
        sent("stop", json!(vec!["x"; 65])),
        sent("stop", json!("x".repeat(1025))),
        sent("stop", json!("")),
        sent("stop", json!({})),
        sent("stop_token_ids", json!(vec![1; 129])),
        sent("stop_token_ids", json!([-1])),
        sent("cache_salt", json!("")),
        sent("cache_salt", json!("x".repeat(257))),
        sent("priority", json!(1_u64 << 40)),
        sent("truncate_prompt_tokens", json!(0)),
        sent("stream_options", json!({})),
        sent("messages", json!([])),
        sent("messages", json!("hi")),
        sent("model", json!(7)),
    ] {
        assert_eq!(refused(change), field);
    }
}

#[test]
fn fields_that_contradict_each_other_are_named() {
    for (change, field) in [
        (
            json!({"max_tokens": 1, "max_completion_tokens": 2}),
            "max_tokens",
        ),
        (json!({"max_tokens": 1, "min_tokens": 2}), "min_tokens"),
        (json!({"n": 2, "best_of": 3}), "best_of"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
        ),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        ),
        (
            json!({"stream": true, "stream_options": {"x": 1}}),
            "stream_options",
        ),
        (
            json!({"stream": true, "stream_options": {"include_obfuscation": true}}),
            "stream_options",
        ),
    ] {
        assert_eq!(refused(change), field);
    }
}

#[test]
fn messages_are_refused_by_their_place() {
    let text = |role: &str| json!({"role": role, "content": "x"});
    let mut named = text("user");
    named["name"] = json!("n");
    let mut calling = text("assistant");
    calling["tool_calls"] = json!([{}]);
    let mut odd = text("tool");
    odd["tool_call_id"] = json!(7);
    for (message, field) in [
        (text("robot"), "messages[1].role"),
        (json!({"content": "x"}), "messages[1].role"),
        (json!({"role": "user"}), "messages[1].content"),
        (
            json!({"role": "user", "content": [{"type": "image_url"}]}),
            "messages[1].content",
        ),
        (named, "messages[1].name"),
        (calling, "messages[1].tool_calls[0].function"),
        (odd, "messages[1].tool_call_id"),
        (json!("hi"), "messages[1]"),
    ] {
        assert_eq!(refused(json!({"messages": [text("user"), message]})), field);
    }
}

#[test]
fn completions_name_their_own_fields() {
    for (change, field) in [
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"suffix": "s"}), "suffix"),
        (json!({"messages": []}), "messages"),
        (json!({"max_completion_tokens": 1}), "max_completion_tokens"),
        (json!({"min_tokens": 17}), "min_tokens"),
        (json!({"prompt": null}), "prompt"),
    ] {
        let error = completion(change).expect_err("refused");
        assert_eq!(error.param.as_deref(), Some(field), "{error}");
    }
}

#[test]
fn tokenizing_takes_a_prompt_or_messages() {
    let read = |body: Value| TokenizeRequest::read(body.to_string().as_bytes());
    let prompt = read(json!({"prompt": "x", "return_token_strs": true})).expect("valid");
    assert_eq!(prompt.prompt, Prompt::Text("x".to_owned()));
    assert!(prompt.adds_lead && prompt.token_texts && prompt.model.is_none());
    let message = json!([{"role": "user", "content": "x"}]);
    let chat = read(json!({"messages": message, "model": "m", "add_generation_prompt": false}));
    assert!(!chat.expect("valid").template.add_generation_prompt);
    for (body, field) in [
        (json!({}), "prompt"),
        (json!({"prompt": ["x", "y"]}), "prompt"),
        (json!({"prompt": [1]}), "prompt"),
        (json!({"prompt": "x", "messages": message}), "prompt"),
        (
            json!({"prompt": "x", "add_generation_prompt": true}),
            "add_generation_prompt",
        ),
        (json!({"messages": message, "tools": [{}]}), "tools"),
    ] {
        assert_eq!(
            read(body).expect_err("refused").param.as_deref(),
            Some(field)
        );
    }
    let read = |body: Value| DetokenizeRequest::read(body.to_string().as_bytes(), 3);
    assert_eq!(
        read(json!({"tokens": [1, 2]})).expect("valid").tokens,
        [1, 2]
    );
    for body in [
        json!({}),
        json!({"tokens": [1, 2, 3, 4]}),
        json!({"tokens": "x"}),
    ] {
        assert_eq!(
            read(body).expect_err("refused").param.as_deref(),
            Some("tokens")
        );
    }
}

#[test]
fn text_parts_are_joined_and_developers_are_the_system() {
    let request = chat(json!({"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]}))
    .expect("valid");
    let system = ChatMessage::new("system", "ab");
    assert_eq!(request.prompts, [Prompt::Chat(vec![system])]);
}

#[test]
fn prompts_are_texts_or_tokens_or_lists_of_them() {
    let prompts =
        |value: Value| completion(json!({"prompt": value})).map(|request| request.prompts);
    let text = |text: &str| Prompt::Text(text.to_owned());
    assert_eq!(prompts(json!("x")), Ok(vec![text("x")]));
    assert_eq!(prompts(json!(["x", "y"])), Ok(vec![text("x"), text("y")]));
    assert_eq!(prompts(json!([1, 2])), Ok(vec![Prompt::Tokens(vec![1, 2])]));
    let both = vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])];
    assert_eq!(prompts(json!([[1], [2, 3]])), Ok(both));
    for bad in [
        json!([]),
        json!([1, "x"]),
        json!([[1], 2]),
        json!([[1.5]]),
        json!([-1]),
        json!([[[1]]]),
        json!(vec!["x"; 1025]),
        json!(7),
    ] {
        let error = prompts(bad).expect_err("refused");
        assert_eq!(error.param.as_deref(), Some("prompt"));
    }
}

#[test]
fn trees_of_values_are_bounded() {
    let many = |count: usize| json!({"chat_template_kwargs": {"x": vec![0; count]}});
    assert!(chat(many(1000)).is_ok());
    assert_eq!(refused(many(70_000)), "chat_template_kwargs");
    // Lists of tokens are no trees.
    assert!(completion(json!({"prompt": vec![0; 70_000]})).is_ok());
}

/// Names of fields, with some that there are not.
const NAMES: [&str; 48] = [
    "model",
    "messages",
    "prompt",
    "tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "best_of",
    "logprobs",
    "top_logprobs",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "stream",
    "stream_options",
    "echo",
    "priority",
    "cache_salt",
    "add_generation_prompt",
    "continue_final_message",
    "skip_special_tokens",
    "return_token_ids",
    "truncate_prompt_tokens",
    "chat_template_kwargs",
    "documents",
    "response_format",
    "tools",
    "add_special_tokens",
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "include",
    "reasoning",
    "tool_choice",
    "metadata",
    "nonsense",
];

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3_i64..3).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z\u{0}é]{0,4}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::hash_map(
                "[a-z]{0,3}|role|content|text|type|output|arguments|name",
                inner,
                0..3
            )
            .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever is sent, a refusal names one of the fields that were sent or are missing.
    #[test]
    fn refusals_name_a_field(
        fields in proptest::collection::vec((proptest::sample::select(&NAMES[..]), any_json()), 0..3),
    ) {
        for path in 0..5 {
            let mut body = json!({"model": "m"});
            let needed = ["messages", "prompt", "prompt", "tokens", "input"][path];
            body[needed] = match path {
                0 => json!([{"role": "user", "content": "x"}]),
                3 => json!([1]),
                _ => json!("x"),
            };
            for (name, value) in &fields {
                body[*name] = value.clone();
            }
            let text = body.to_string();
            let error = match path {
                0 => ValidRequest::chat(text.as_bytes()).err(),
                1 => ValidRequest::completion(text.as_bytes()).err(),
                2 => TokenizeRequest::read(text.as_bytes()).err(),
                4 => ResponsesRequest::read(text.as_bytes()).err(),
                _ => DetokenizeRequest::read(text.as_bytes(), 4).err(),
            };
            if let Some(error) = error {
                prop_assert_eq!(error.status, 400);
                let param = error.param.clone().unwrap_or_default();
                let field = param.split(['[', '.']).next().unwrap_or_default();
                prop_assert!(body.get(field).is_some(), "{} of {}", error, text);
            }
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let error = ValidRequest::chat(&body).expect_err("no request");
        prop_assert_eq!(error.status, 400);
    }
}
