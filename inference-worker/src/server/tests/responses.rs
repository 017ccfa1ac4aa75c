use super::*;

fn hello(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    say(tokenizer, submit, "Hé END x")
}

fn call(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    say(
        tokenizer,
        submit,
        "{\"name\": \"f\", \"parameters\": {\"a\": 1}} so",
    )
}

/// Says a little and fails.
fn broken(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    let mut says = say(tokenizer, submit, "ab");
    says.pop();
    says.push(FromEngine::Failed {
        id: submit.id,
        message: "the mask".to_owned(),
    });
    says
}

impl Api {
    async fn respond(&self, change: Value) -> Reply {
        let body = json!({"model": "m", "input": "hi"});
        self.post("/v1/responses", &changed(body, change)).await
    }
}

/// The events of a stream, which must be named as they say.
fn named_events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    let events = reply.body.split("\n\n").filter(|event| !event.is_empty());
    let read = |event: &str| {
        let (name, data) = event.split_once('\n').expect("two lines");
        let data: Value =
            serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        data
    };
    events.map(read).collect()
}

/// A response without what differs from one to the next.
fn plain(mut response: Value) -> Value {
    response["id"] = Value::Null;
    for item in response["output"].as_array_mut().expect("items") {
        item["id"] = Value::Null;
        item["call_id"] = Value::Null;
    }
    response["created_at"] = Value::Null;
    response
}

#[tokio::test]
async fn a_response_is_a_chat_in_other_words() {
    let mut api = Api::start(1, hello).await;
    let options = json!({"instructions": "s", "max_output_tokens": 9, "seed": 3, "priority": 2, "cache_salt": "c", "stop": "END"});
    let reply = api.respond(options.clone()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let body = reply.json();
    assert_eq!(body["output"][0]["content"][0]["text"], "Hé ");
    assert_eq!(
        (&body["status"], &body["store"]),
        (&json!("completed"), &json!(false))
    );
    assert_eq!(body["instructions"], "s");
    let of_response = api.next_submit().await;
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]);
    let chat = json!({"messages": messages, "max_tokens": 9, "seed": 3, "priority": 2, "cache_salt": "c", "stop": "END"});
    assert_eq!(api.chat(chat).await.status, 200);
    let of_chat = loop {
        if let ToEngine::Submit(submit) = api.next().await {
            break *submit;
        }
    };
    assert_eq!(
        Submit {
            id: of_response.id,
            ..of_chat
        },
        of_response
    );

    let streamed = api.respond(changed(options, json!({"stream": true}))).await;
    let events = named_events(&streamed);
    let deltas: String = events
        .iter()
        .filter_map(|event| event["delta"].as_str())
        .collect();
    assert_eq!(deltas, "Hé ");
    let last = events.last().expect("events");
    assert_eq!(last["type"], "response.completed");
    assert_eq!(plain(last["response"].clone()), plain(body));
}

#[tokio::test]
async fn calls_are_items_and_what_stands_behind_them_too() {
    let api = Api::start(1, call).await;
    let tool = json!({"type": "function", "name": "f"});
    let change = json!({"tools": [tool], "tool_choice": "required"});
    let body = api.respond(change.clone()).await.json();
    let output = &body["output"];
    assert_eq!(
        (&output[0]["type"], &output[0]["arguments"]),
        (&json!("function_call"), &json!("{\"a\": 1}")),
        "{body}"
    );
    assert_eq!(output[1]["content"][0]["text"], " so");
    assert_eq!(body["tools"], json!([tool]));
    let events = named_events(&api.respond(changed(change, json!({"stream": true}))).await);
    let last = events.last().expect("events");
    assert_eq!(plain(last["response"].clone()), plain(body));
}

#[tokio::test]
async fn probabilities_come_where_they_are_included() {
    let api = Api::start(1, hello).await;
    let include = json!(["message.output_text.logprobs"]);
    let body = api
        .respond(json!({"include": include, "top_logprobs": 1}))
        .await
        .json();
    let logprobs = body["output"][0]["content"][0]["logprobs"]
        .as_array()
        .expect("a list");
    assert_eq!(
        logprobs[0],
        json!({"token": "H", "logprob": -0.5, "bytes": [72],
            "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}]})
    );
}

#[tokio::test]
async fn failures_have_a_status_or_end_the_stream() {
    let api = Api::start(1, broken).await;
    let reply = api.respond(json!({})).await;
    assert_eq!(
        (reply.status, &reply.json()["error"]["message"]),
        (500, &json!("the mask"))
    );
    let events = named_events(&api.respond(json!({"stream": true})).await);
    let last = events.last().expect("events");
    assert_eq!(last["type"], "response.failed");
    assert_eq!(last["response"]["error"]["message"], "the mask");
    assert_eq!(api.respond(json!({"model": "other"})).await.status, 404);
    assert_eq!(
        api.respond(json!({"input": "x".repeat(1 << 20)}))
            .await
            .field(),
        "input"
    );
    assert_eq!(
        api.respond(json!({"background": true})).await.field(),
        "background"
    );
    let schema =
        json!({"type": "json_schema", "name": "n", "schema": {"type": "string", "pattern": "("}});
    assert_eq!(
        api.respond(json!({"text": {"format": schema}}))
            .await
            .field(),
        "text.format"
    );
    let tool = json!({"type": "function", "name": "f", "parameters": {"properties": {"a": {"pattern": "("}}}});
    let change = json!({"tools": [tool], "tool_choice": "required"});
    assert_eq!(api.respond(change).await.field(), "tools[0].parameters");
}
