//! A pod of three ranks with a real model: what clients see.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::time::Duration;

use harness::{MODEL, Worker, chat, model};
use llama_contract::{RankPhase, WorkerPhase};
use rustix::process::Signal;
use serde_json::{Value, json};

const QUESTION: &str = "What is the capital of France?";

#[test]
fn three_ranks_answer_as_one() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let prompts = [QUESTION, "Count from one to five.", "Name three colours."];
    let answers = |ranks: &str| {
        let worker = Worker::serving(&model, &["--tensor-parallel", ranks]);
        let body = json!({
            "model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0,
        });
        let (_, completion) = worker.post("/v1/completions", &body);
        let text = completion["choices"][0]["text"].as_str().unwrap();
        assert!(text.starts_with(" Paris."), "{completion}");
        prompts.map(|prompt| worker.chat(prompt, 32))
    };
    assert_eq!(answers("3"), answers("1"));
}

#[test]
fn answers_come_whole_or_in_pieces_and_end_at_stops() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    let whole = worker.chat(QUESTION, 32);

    let mut body = chat(QUESTION, 32);
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let (text, last) = worker.stream("/v1/chat/completions", &body).text();
    assert_eq!(text, whole);
    assert!(
        last["usage"]["completion_tokens"].as_u64().unwrap() > 0,
        "{last}"
    );

    let (before, stop) = whole.split_at(whole.char_indices().nth(9).unwrap().0);
    let mut body = chat(QUESTION, 32);
    body["stop"] = json!(["never", stop.chars().take(6).collect::<String>()]);
    let (_, stopped) = worker.post("/v1/chat/completions", &body);
    let choice = &stopped["choices"][0];
    assert_eq!(choice["message"]["content"], before);
    assert_eq!(choice["finish_reason"], "stop");

    let body =
        json!({"model": MODEL, "prompt": "One, two, three,", "max_tokens": 4, "temperature": 0});
    let (status, completion) = worker.post("/v1/completions", &body);
    assert_eq!(status, 200, "{completion}");
    assert_eq!(completion["choices"][0]["finish_reason"], "length");
    assert_eq!(completion["usage"]["completion_tokens"], 4);

    // The same seed draws the same answer.
    let mut body = chat("Tell me something.", 16);
    body["temperature"] = json!(1.0);
    body["seed"] = json!(11);
    let draws =
        [(); 2].map(|()| worker.post("/v1/chat/completions", &body).1["choices"][0].clone());
    assert_eq!(draws[0], draws[1]);

    let state = worker.state();
    assert_eq!(state.phase, WorkerPhase::Ready);
    assert_eq!(state.load.bytes_done, state.load.bytes_total);
    assert!(state.load.bytes_total > 0);
    let ranks: Vec<_> = state
        .ranks
        .iter()
        .map(|rank| (rank.rank, rank.phase))
        .collect();
    assert_eq!(ranks, [0, 1, 2].map(|rank| (rank, RankPhase::Ready)));
    // One of them may be seen just before it has finished the last step.
    assert!(state.ranks[1].step.abs_diff(state.ranks[2].step) <= 1);
    assert!(worker.metric("vllm:generation_tokens_total") > 20.0);
    assert!(worker.metric("llama_rank_step") > 0.0);
    for path in ["/health", "/livez"] {
        assert_eq!(worker.internal(path).unwrap().0, 200, "{path}");
    }
}

#[test]
fn several_answers_come_with_their_probabilities() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    let mut body = chat(QUESTION, 8);
    body["n"] = json!(2);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(3);
    let (status, answer) = worker.post("/v1/chat/completions", &body);
    assert_eq!(status, 200, "{answer}");
    let expected = worker.chat(QUESTION, 8);
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["message"]["content"], expected);
        let content = choice["logprobs"]["content"].as_array().unwrap();
        let text: String = content
            .iter()
            .filter_map(|one| one["token"].as_str())
            .collect();
        assert_eq!(text, expected);
        for one in content {
            // The likeliest token is taken.
            let top = one["top_logprobs"].as_array().unwrap();
            assert_eq!(top.len(), 3, "{one}");
            assert_eq!(
                (&top[0]["token"], &top[0]["logprob"]),
                (&one["token"], &one["logprob"])
            );
            let sum: f64 = top
                .iter()
                .map(|one| one["logprob"].as_f64().unwrap().exp())
                .sum();
            assert!((0.0..=1.0 + 1e-6).contains(&sum), "{one}");
        }
    }
    // A bias decides, and penalties make room for others.
    let (_, tokens) = worker.post("/tokenize", &json!({"prompt": " Paris"}));
    let paris = tokens["tokens"][0].as_u64().unwrap();
    let mut body = json!({"model": MODEL, "prompt": "One", "max_tokens": 3, "temperature": 0});
    body["logit_bias"] = json!({paris.to_string(): 60});
    let text = |body: &serde_json::Value| {
        worker.post("/v1/completions", body).1["choices"][0]["text"].clone()
    };
    assert_eq!(text(&body), " Paris Paris Paris");
    body["logit_bias"] = json!({paris.to_string(): 100});
    body["presence_penalty"] = json!(2.0);
    assert_eq!(text(&body), " Paris Paris Paris");
    body["repetition_penalty"] = json!(100.0);
    assert!(text(&body).as_str().unwrap().matches("Paris").count() == 1);
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--max-tokens=64"]);
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut body = chat(QUESTION, 8);
        change(&mut body);
        let (status, answer) = worker.post("/v1/chat/completions", &body);
        (status, answer["error"].clone())
    };
    for field in ["tools", "logprobs", "response_format", "made_up"] {
        let (status, error) = refused(&|body| body[field] = json!(2));
        assert_eq!((status, &error["param"]), (400, &json!(field)), "{error}");
    }
    let (status, error) = refused(&|body| body["model"] = json!("other"));
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    let (status, error) =
        refused(&|body| body["messages"][0]["content"] = json!("word ".repeat(80)));
    assert_eq!(status, 400);
    assert_eq!(error["code"], "context_length_exceeded", "{error}");

    assert_eq!(worker.open("/v1/chat/completions", b"{").status, 400);
    assert_eq!(worker.open("/v1/nothing", b"{}").status, 404);
    assert_eq!(worker.get("/v1/chat/completions").unwrap().0, 405);
    let (status, models) = worker.get("/v1/models").unwrap();
    assert!(status == 200 && models.contains(MODEL), "{models}");
}

#[test]
fn requests_beyond_the_queue_get_429_and_a_client_that_leaves_makes_room() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let flags = [
        "--tensor-parallel=3",
        "--max-sequences=1",
        "--max-waiting=1",
    ];
    let mut worker = Worker::serving(&model, &flags);
    let running = worker.long_stream();
    // The second waits; its headers come with its first token.
    let mut body = chat("Say something long.", 1000);
    body["stream"] = json!(true);
    let body = body.to_string();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| worker.open("/v1/chat/completions", body.as_bytes()).status);
        while worker.state().waiting == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        let refused = worker.open("/v1/chat/completions", chat("Hi", 4).to_string().as_bytes());
        assert_eq!(refused.status, 429);
        assert!(refused.header("retry-after").is_some());
        assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
        // The first client leaves: the second gets its place, then leaves too.
        drop(running);
        assert_eq!(waiting.join().unwrap(), 200);
    });
    wait_until_idle(&worker);
    // One that waits for a whole answer may leave as well.
    let whole = worker.send("/v1/chat/completions", &chat("Count to 900.", 2000));
    while worker.state().running == 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(whole);
    wait_until_idle(&worker);
    assert!(!worker.chat("Hi", 4).is_empty());
    worker.signal(Signal::TERM);
    assert_eq!(worker.wait().code(), Some(0));
}

fn wait_until_idle(worker: &Worker) {
    for _ in 0..500 {
        let state = worker.state();
        if (state.running, state.waiting) == (0, 0) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{:?}", worker.state());
}

#[test]
fn sigterm_finishes_running_answers_and_takes_no_more() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    let mut body = chat("Count from one to thirty.", 60);
    body["stream"] = json!(true);
    let mut stream = worker.stream("/v1/chat/completions", &body);
    stream.next().unwrap();
    worker.signal(Signal::TERM);
    while worker.state().phase != WorkerPhase::Draining {
        std::thread::sleep(Duration::from_millis(5));
    }
    let late = worker.open("/v1/chat/completions", chat("Hi", 4).to_string().as_bytes());
    assert_eq!(late.status, 503);
    assert!(late.header("retry-after").is_some());
    assert_eq!(worker.internal("/health").unwrap().0, 503);
    let (text, _) = stream.text();
    assert!(!text.is_empty());
    assert_eq!(worker.wait().code(), Some(0), "{}", worker.log());
}

#[test]
fn a_second_sigterm_ends_unfinished_answers_with_an_error() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    let stream = worker.long_stream();
    worker.signal(Signal::TERM);
    while worker.state().phase != WorkerPhase::Draining {
        std::thread::sleep(Duration::from_millis(5));
    }
    worker.signal(Signal::TERM);
    let error = stream.error();
    assert!(
        error["message"].as_str().unwrap().contains("shutting down"),
        "{error}"
    );
    assert_eq!(worker.wait().code(), Some(0), "{}", worker.log());
}

#[test]
fn what_the_grace_cannot_finish_ends_with_an_error_that_can_be_tried_again() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let flags = ["--tensor-parallel=3", "--drain-seconds=600"];
    let mut worker = Worker::serving(&model, &flags);
    assert_eq!(worker.order("/drain?seconds=soon"), 400);
    assert_eq!(worker.order("/drain?seconds=900"), 204);
    assert_eq!(worker.order("/drain?seconds=1"), 204);
    assert!(!worker.chat(QUESTION, 4).is_empty(), "it serves on");
    let mut body = chat("Tell me everything you know about trees.", 8000);
    body["ignore_eos"] = json!(true);
    let whole = body.to_string();
    body["stream"] = json!(true);
    let stream = worker.stream("/v1/chat/completions", &body);
    std::thread::scope(|scope| {
        let whole = scope.spawn(|| {
            let answer = worker.open("/v1/chat/completions", whole.as_bytes());
            let again = answer.header("retry-after").map(str::to_owned);
            (answer.status, again, answer.json())
        });
        while worker.state().running < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        worker.signal(Signal::TERM);
        let error = stream.error();
        assert_eq!(error["code"], "shutting_down", "{error}");
        assert_eq!(error["type"], "service_unavailable", "{error}");
        let told = error["message"].as_str().unwrap();
        assert!(told.contains("send the request again"), "{error}");
        let (status, again, answer) = whole.join().unwrap();
        assert_eq!((status, again.as_deref()), (503, Some("2")), "{answer}");
        assert_eq!(answer["error"]["code"], "shutting_down");
    });
    assert_eq!(worker.wait().code(), Some(0), "{}", worker.log());
}

#[test]
fn answers_keep_to_a_required_form() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--tensor-parallel=3", "--speculative-tokens=4"]);
    let answer = |fields: serde_json::Value| {
        let mut body = chat("Describe a cat of your choice.", 120);
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        let (status, answer) = worker.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{answer}");
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{answer}");
        choice["message"]["content"].as_str().unwrap().to_owned()
    };
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 30},
            "colour": {"enum": ["black", "white", "ginger"]},
        },
        "required": ["name", "age", "colour"],
        "additionalProperties": false,
    });
    for seed in 0..4 {
        let format =
            json!({"type": "json_schema", "json_schema": {"name": "cat", "schema": schema}});
        let fields = json!({"response_format": format, "temperature": 1.2, "seed": seed});
        let cat: serde_json::Value = serde_json::from_str(&answer(fields)).unwrap();
        assert!(cat["name"].as_str().unwrap().chars().count() <= 12, "{cat}");
        assert!((0..=30).contains(&cat["age"].as_i64().unwrap()), "{cat}");
        assert!(["black", "white", "ginger"].contains(&cat["colour"].as_str().unwrap()));
        assert_eq!(cat.as_object().unwrap().len(), 3, "{cat}");
    }
    let code = answer(json!({"guided_regex": "[A-Z]{2}-[0-9]{3}", "temperature": 1.5}));
    assert!(code.len() == 6 && code.as_bytes()[2] == b'-', "{code}");
    let choice = answer(json!({"structured_outputs": {"choice": ["tabby", "manx"]}}));
    assert!(["tabby", "manx"].contains(&choice.as_str()), "{choice}");

    let mut body = chat("x", 5);
    body["guided_regex"] = json!("(");
    let (status, refused) = worker.post("/v1/chat/completions", &body);
    assert_eq!(
        (status, &refused["error"]["param"]),
        (400, &json!("guided_regex"))
    );
}

#[test]
fn tools_are_called_where_a_call_is_required() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &[]);
    let tools = json!([{
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": false,
            },
        },
    }]);
    let ask = |choice: serde_json::Value| {
        let mut body = chat("What is the weather in Paris?", 120);
        body["tools"] = tools.clone();
        body["tool_choice"] = choice;
        body["parallel_tool_calls"] = json!(false);
        body
    };
    let check = |arguments: &str| {
        let arguments: serde_json::Value = serde_json::from_str(arguments).unwrap();
        assert!(arguments["city"].is_string(), "{arguments}");
        let unit = arguments["unit"].as_str().unwrap();
        assert!(["celsius", "fahrenheit"].contains(&unit), "{arguments}");
    };
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    for choice in [json!("required"), named] {
        let (status, answer) = worker.post("/v1/chat/completions", &ask(choice));
        assert_eq!(status, 200, "{answer}");
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
        let call = &choice["message"]["tool_calls"][0];
        assert_eq!(call["function"]["name"], "get_weather");
        check(call["function"]["arguments"].as_str().unwrap());
    }
    // This model's template has no place for tools.
    let (status, refused) = worker.post("/v1/chat/completions", &ask(json!("auto")));
    assert_eq!((status, &refused["error"]["param"]), (400, &json!("tools")));
    // The call and its result go back as messages.
    let mut body = chat("And now?", 4);
    body["messages"] = json!([
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": null, "tool_calls": [{
            "id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"},
        }]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]);
    let (status, answer) = worker.post("/v1/chat/completions", &body);
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn a_prompt_is_as_likely_as_its_tokens_one_by_one() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--tensor-parallel=3", "--max-sequences=8"]);
    let text = "The capital of France is Paris, and the capital of Italy is Rome.";
    let (_, tokens) = worker.post("/tokenize", &json!({"prompt": text}));
    let tokens = tokens["tokens"].as_array().unwrap().clone();
    let ask = |prompt: &[Value], rest: Value| {
        let mut body = json!({"model": MODEL, "prompt": prompt, "temperature": 0});
        for (name, value) in rest.as_object().unwrap() {
            body[name] = value.clone();
        }
        let (status, answer) = worker.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        answer
    };
    let whole = json!({"max_tokens": 1, "echo": true, "logprobs": 1, "n": 2});
    let echoed = ask(&tokens, whole.clone());
    // In the prefix cache by now, which must not matter.
    assert_eq!(ask(&tokens, whole)["choices"], echoed["choices"]);
    assert_eq!(
        echoed["choices"][1]["logprobs"],
        echoed["choices"][0]["logprobs"]
    );
    let told = &echoed["choices"][0]["logprobs"];
    assert_eq!(told["tokens"].as_array().unwrap().len(), tokens.len() + 1);
    for at in [1, 2, 5, tokens.len() - 1] {
        let one = json!({"max_tokens": 1, "logprobs": 20, "return_tokens_as_token_ids": true});
        let one = ask(&tokens[..at], one);
        let name = format!("token_id:{}", tokens[at]);
        let alone = &one["choices"][0]["logprobs"]["top_logprobs"][0][&name];
        // Not every word is among the likeliest.
        assert!(
            alone.is_null() || *alone == told["token_logprobs"][at],
            "{at}: {one}"
        );
        let likeliest = &one["choices"][0]["logprobs"]["token_logprobs"][0];
        let top = told["top_logprobs"][at].as_object().unwrap();
        assert!(top.values().any(|value| value == likeliest), "{at}: {one}");
    }
}
