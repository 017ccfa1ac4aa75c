use super::*;
use crate::openai::request::ToolChoice;
use crate::openai::request::messages::MAX_MESSAGES as MAX_ITEMS;
use crate::structured::Grammar;

fn read(mut change: Value) -> Result<ResponsesRequest, ApiError> {
    let mut body = json!({"model": "m", "input": "hi"});
    for (name, value) in change.as_object_mut().expect("an object") {
        body[name.as_str()] = value.take();
    }
    ResponsesRequest::read(body.to_string().as_bytes())
}

fn messages(change: Value) -> Vec<Value> {
    let request = read(change).expect("valid").request;
    let [Prompt::Chat(messages)] = request.prompts.as_slice() else {
        panic!("{:?} is no chat", request.prompts);
    };
    let names = ["role", "content", "tool_calls", "tool_call_id"];
    let messages = messages.iter().map(|message| {
        let fields = names
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), message.field(name)?.clone())));
        Value::Object(fields.collect())
    });
    messages.collect()
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "name": name, "parameters": {"type": "object"}, "strict": true})
}

#[test]
fn input_is_the_conversation_of_a_chat() {
    let user = json!({"role": "user", "content": "hi"});
    assert_eq!(messages(json!({})), std::slice::from_ref(&user));
    let system = json!({"role": "system", "content": "be brief"});
    assert_eq!(
        messages(json!({"instructions": "be brief"})),
        [system, user]
    );
    let part = |kind: &str, text: &str| json!({"type": kind, "text": text});
    let call = |name: &str| {
        json!({"type": "function_call", "id": "fc_1", "status": "completed",
            "call_id": format!("call_{name}"), "name": name, "arguments": "{\"a\": 1}"})
    };
    let output = |output: Value| json!({"type": "function_call_output", "call_id": "call_f", "output": output});
    let input = json!([
        {"role": "developer", "content": "s"},
        {"type": "message", "role": "user", "content": [part("input_text", "a"), part("input_text", "b")]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [
            {"type": "output_text", "text": "x", "annotations": [], "logprobs": []}]},
        call("f"),
        call("g"),
        output(json!("1")),
        output(json!([part("input_text", "2")])),
        call("h"),
    ]);
    let written = |name: &str| {
        json!({"id": format!("call_{name}"), "type": "function",
            "function": {"name": name, "arguments": {"a": 1}}})
    };
    assert_eq!(
        messages(json!({"input": input})),
        [
            json!({"role": "system", "content": "s"}),
            json!({"role": "user", "content": "ab"}),
            json!({"role": "assistant", "content": "x", "tool_calls": [written("f"), written("g")]}),
            json!({"role": "tool", "content": "1", "tool_call_id": "call_f"}),
            json!({"role": "tool", "content": "2", "tool_call_id": "call_f"}),
            json!({"role": "assistant", "content": "", "tool_calls": [written("h")]}),
        ]
    );
}

#[test]
fn every_supported_field_arrives_and_is_repeated() {
    let schema = json!({"type": "object"});
    let text =
        json!({"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": true}});
    let sent = json!({
        "instructions": "be brief", "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.25,
        "include": ["message.output_text.logprobs"], "top_logprobs": 3, "tools": [tool("f")],
        "tool_choice": "auto", "parallel_tool_calls": false, "text": text, "stream": true,
        "metadata": {"a": "b"}, "user": "u", "priority": -4, "cache_salt": "s", "store": true,
        "truncation": "disabled", "background": false, "reasoning": {"effort": null},
        "service_tier": "auto", "previous_response_id": null, "seed": 5, "stop": "x",
        "stream_options": {"include_obfuscation": false}, "prompt_cache_key": "k",
    });
    let ResponsesRequest { request, repeated } = read(sent.clone()).expect("valid");
    assert_eq!((request.max_tokens, request.priority), (Some(7), -4));
    assert_eq!(
        (request.sampling.temperature, request.sampling.top_p),
        (0.5, 0.25)
    );
    assert_eq!(
        (request.sampling.logprobs, request.seed),
        (Some(3), Some(5))
    );
    assert_eq!(request.cache_salt.as_deref(), Some("s"));
    assert!(request.shown.stream);
    let form = request.form.expect("a form");
    assert_eq!(
        (form.field, form.grammar),
        ("text.format", Grammar::JsonSchema(schema))
    );
    let tool_use = request.tool_use.expect("tools");
    assert_eq!(
        (tool_use.choice, tool_use.parallel),
        (ToolChoice::Auto, false)
    );
    // Templates know the form of chats.
    let function = json!({"name": "f", "parameters": {"type": "object"}, "strict": true});
    assert_eq!(
        request.template.tools,
        Some(vec![json!({"type": "function", "function": function})])
    );
    for name in [
        "instructions",
        "max_output_tokens",
        "temperature",
        "tools",
        "text",
        "metadata",
    ] {
        assert_eq!(repeated[name], sent[name], "{name}");
    }
    assert_eq!(repeated["store"], false);
}

#[test]
fn defaults_are_openais() {
    let ResponsesRequest { request, repeated } = read(json!({})).expect("valid");
    assert_eq!(request.max_tokens, None);
    assert_eq!(request.sampling.logprobs, None);
    assert_eq!((request.form, request.tool_use), (None, None));
    assert_eq!(repeated["text"], json!({"format": {"type": "text"}}));
    assert_eq!(repeated["tool_choice"], "auto");
    assert_eq!(repeated["temperature"], 1.0);
    assert!(read(json!({"text": {"format": {"type": "text"}, "verbosity": "medium"}})).is_ok());
    assert!(read(json!({"include": [], "top_logprobs": 0, "tools": []})).is_ok());
    assert!(read(json!({"reasoning": {"effort": "none"}})).is_ok());
    let named =
        read(json!({"tools": [tool("f")], "tool_choice": {"type": "function", "name": "f"}}));
    let choice = named
        .expect("valid")
        .request
        .tool_use
        .expect("tools")
        .choice;
    assert_eq!(choice, ToolChoice::Named("f".to_owned()));
}

#[test]
fn what_is_not_built_in_is_refused_by_name() {
    for (field, value) in [
        ("background", json!(true)),
        ("conversation", json!("conv_1")),
        ("previous_response_id", json!("resp_1")),
        ("prompt", json!({"id": "p"})),
        ("truncation", json!("auto")),
        ("max_tool_calls", json!(1)),
        ("service_tier", json!("priority")),
        ("include", json!(["reasoning.encrypted_content"])),
        ("top_logprobs", json!(2)),
        ("top_logprobs", json!(21)),
        ("reasoning.effort", json!({"effort": "low"})),
        ("reasoning.summary", json!({"summary": "auto"})),
        ("text.verbosity", json!({"verbosity": "low"})),
        ("text", json!({"format": {"type": "xml"}})),
        (
            "text",
            json!({"format": {"type": "json_schema", "name": "n"}}),
        ),
        ("tools[0].type", json!([{"type": "web_search"}])),
        ("tools[0].type", json!([{"type": "custom", "name": "f"}])),
        ("tools[0].name", json!([tool("a b")])),
        (
            "tools[0].parameters",
            json!([{"type": "function", "name": "f", "parameters": {"type": "string"}}]),
        ),
        (
            "tools[0]",
            json!([{"type": "function", "function": {"name": "f"}}]),
        ),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({"type": "file_search"})),
        ("tool_choice", json!({"type": "function", "name": "f"})),
        ("metadata", json!({"a": 1})),
        ("metadata", json!({"a": "x".repeat(513)})),
        ("stream_options", json!({"include_usage": true})),
        ("max_output_tokens", json!(0)),
        ("temperature", json!(3)),
        ("n", json!(2)),
        ("messages", json!([])),
        ("max_tokens", json!(1)),
        ("response_format", json!({"type": "text"})),
        ("return_token_ids", json!(true)),
        ("tempratur", json!(1)),
    ] {
        let mut change = json!({"stream": true});
        change[field.split(['.', '[']).next().expect("a name")] = value;
        let error = read(change).expect_err(field);
        assert_eq!(error.status, 400);
        assert_eq!(error.param.as_deref(), Some(field), "{error}");
    }
    let both =
        json!({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}});
    let error = read(both).expect_err("two forms");
    assert_eq!(error.param.as_deref(), Some("structured_outputs"));
}

#[test]
fn items_are_refused_by_their_place() {
    let part = |part: Value| json!({"role": "user", "content": [part]});
    let call = |arguments: Value| json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments});
    for (item, field) in [
        (json!("hi"), "input[1]"),
        (json!({"role": "tool", "content": "x"}), "input[1].role"),
        (json!({"content": "x"}), "input[1].role"),
        (json!({"role": "user"}), "input[1].content"),
        (
            json!({"role": "user", "content": "x", "name": "n"}),
            "input[1].name",
        ),
        (
            part(json!({"type": "input_image", "image_url": "u"})),
            "input[1].content[0].type",
        ),
        (
            part(json!({"type": "input_file", "file_id": "f"})),
            "input[1].content[0].type",
        ),
        (
            part(json!({"type": "input_text"})),
            "input[1].content[0].text",
        ),
        (
            part(json!({"type": "input_text", "text": "x", "y": 1})),
            "input[1].content[0].y",
        ),
        (part(json!("x")), "input[1].content[0]"),
        (
            json!({"type": "item_reference", "id": "msg_1"}),
            "input[1].type",
        ),
        (json!({"type": "reasoning", "summary": []}), "input[1].type"),
        (json!({"type": 7}), "input[1].type"),
        (call(json!("[]")), "input[1].arguments"),
        (call(json!({})), "input[1].arguments"),
        (
            json!({"type": "function_call", "call_id": "c", "arguments": "{}"}),
            "input[1].name",
        ),
        (
            json!({"type": "function_call_output", "call_id": "c"}),
            "input[1].output",
        ),
        (
            json!({"type": "function_call_output", "output": "x"}),
            "input[1].call_id",
        ),
        (
            json!({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}),
            "input[1].output[0].type",
        ),
    ] {
        let error = read(json!({"input": [{"role": "user", "content": "x"}, item]}));
        let error = error.expect_err(field);
        assert_eq!(error.param.as_deref(), Some(field), "{error}");
    }
    for input in [json!([]), json!({}), json!(vec![json!({}); MAX_ITEMS + 1])] {
        let error = read(json!({"input": input})).expect_err("refused");
        assert_eq!(error.param.as_deref(), Some("input"));
    }
}
