use super::*;
use crate::scheduler::Refusal;

fn hello(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    say(tokenizer, submit, "Hé END x")
}

/// Each sequence says its own number.
fn numbered(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    say(tokenizer, submit, &format!("a{}z", submit.id))
}

fn nothing(_: &Tokenizer, _: &Submit) -> Vec<FromEngine> {
    Vec::new()
}

fn contents(reply: &Reply, field: &str) -> Vec<String> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    let body = reply.json();
    let choices = body["choices"].as_array().expect("choices");
    let texts = choices.iter().enumerate().map(|(index, choice)| {
        assert_eq!(choice["index"], index);
        choice
            .pointer(field)
            .expect("a text")
            .as_str()
            .expect("a text")
            .to_owned()
    });
    texts.collect()
}

#[tokio::test]
async fn every_choice_is_a_sequence_of_its_own() {
    let mut api = Api::start(3, numbered).await;
    let reply = api
        .chat(json!({"n": 3, "seed": 5, "priority": 2, "cache_salt": "s"}))
        .await;
    assert_eq!(contents(&reply, "/message/content"), ["a0z", "a1z", "a2z"]);
    for choice in 0..3 {
        let submit = api.next_submit().await;
        assert_eq!(submit.sampling.seed, 5 + choice);
        assert_eq!(
            (submit.priority, submit.cache_salt.as_deref()),
            (2, Some("s"))
        );
        assert_eq!(submit.stop_ids, api.tokenizer.eos_ids());
    }
    let usage = &reply.json()["usage"];
    assert_eq!(usage["completion_tokens"], 9);
    let prompt = api
        .encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        .len();
    assert_eq!(usage["prompt_tokens"], prompt);
    assert_eq!(usage["total_tokens"], prompt + 9);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2);
}

#[tokio::test]
async fn a_batch_of_prompts_is_answered_in_order_and_echoed() {
    let mut api = Api::start(4, numbered).await;
    let prompts = json!([api.encode("the <|im_end|>"), api.encode("in")]);
    let change = json!({
        "prompt": prompts, "n": 2, "echo": true, "return_token_ids": true, "max_tokens": 5,
        "ignore_eos": true, "stop_token_ids": [7], "min_tokens": 1, "temperature": 0.5,
    });
    let reply = api.completion(change).await;
    assert_eq!(
        contents(&reply, "/text"),
        ["the a0z", "the a1z", "ina2z", "ina3z"]
    );
    let body = reply.json();
    assert_eq!(body["choices"][3]["prompt_token_ids"], prompts[1]);
    assert_eq!(body["choices"][3]["token_ids"], json!(api.encode("a3z")));
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
    let submit = api.next_submit().await;
    assert_eq!((submit.stop_ids, submit.max_new_tokens), (vec![7], 5));
    assert_eq!(
        (submit.sampling.end_ids, submit.sampling.min_tokens),
        (vec![7], 1)
    );
    let all = api
        .completion(json!({"prompt": ["in", "the", "a", "b"], "echo": true}))
        .await;
    assert_eq!(contents(&all, "/text"), ["ina4z", "thea5z", "aa6z", "ba7z"]);
}

#[tokio::test]
async fn streams_interleave_choices_and_end_with_the_counts() {
    let api = Api::start(2, numbered).await;
    let options = json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let events = api.chat(options).await.events();
    let (usage, events) = events.split_last().expect("events");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 6);
    assert!(events.iter().all(|event| event["usage"].is_null()));
    let of = |index: usize| {
        let of_choice = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(move |choice| choice["index"] == index);
        of_choice.collect::<Vec<_>>()
    };
    for index in 0..2 {
        let chunks = of(index);
        assert_eq!(chunks[0]["delta"]["role"], "assistant");
        let text: String = chunks
            .iter()
            .filter_map(|choice| choice["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, format!("a{index}z"));
        let last = chunks.last().expect("chunks");
        assert_eq!(last["finish_reason"], "stop");
        assert!(
            chunks[..chunks.len() - 1]
                .iter()
                .all(|choice| choice["finish_reason"].is_null())
        );
    }
    let order: Vec<u64> = events
        .iter()
        .filter_map(|event| event["choices"][0]["index"].as_u64())
        .collect();
    assert!(!order.is_sorted(), "one after the other: {order:?}");
}

#[tokio::test]
async fn completions_stream_their_echo_and_ids_first() {
    let api = Api::start(1, numbered).await;
    let options = json!({"stream": true, "echo": true, "return_token_ids": true});
    let events = api.completion(options).await.events();
    let first = &events[0]["choices"][0];
    assert_eq!(first["prompt_token_ids"], json!(api.encode("hi")));
    assert_eq!(events[1]["choices"][0]["text"], "hi");
    let ids: Vec<Value> = events
        .iter()
        .flat_map(|event| {
            event["choices"][0]["token_ids"]
                .as_array()
                .expect("ids")
                .clone()
        })
        .collect();
    assert_eq!(json!(ids), json!(api.encode("a0z")));
}

#[tokio::test]
async fn logprobs_have_the_shape_of_each_endpoint() {
    let api = Api::start(1, hello).await;
    let chat = api
        .chat(json!({"logprobs": true, "top_logprobs": 1}))
        .await
        .json();
    let content = chat["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("content");
    let tokens: Vec<_> = content
        .iter()
        .map(|entry| entry["token"].as_str())
        .collect();
    let halves = Some("\u{FFFD}");
    assert_eq!(tokens[..3], [Some("H"), halves, halves]);
    assert_eq!(content[1]["bytes"], json!(["é".as_bytes()[0]]));
    assert_eq!(
        content[0]["top_logprobs"],
        json!([{"token": "H", "logprob": -0.5, "bytes": [72]}])
    );
    let plain = api.chat(json!({"logprobs": true})).await.json();
    assert_eq!(
        plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
        json!([])
    );

    let asked = json!({"logprobs": 2, "return_tokens_as_token_ids": true});
    let text = api.completion(asked).await.json();
    let logprobs = &text["choices"][0]["logprobs"];
    let h = api.encode("H")[0];
    assert_eq!(logprobs["tokens"][0], format!("token_id:{h}"));
    assert_eq!(logprobs["token_logprobs"][0], -0.5);
    assert_eq!(
        logprobs["top_logprobs"][0],
        json!({format!("token_id:{h}"): -0.5, "token_id:0": -1.5})
    );
    assert_eq!(
        logprobs["text_offset"].as_array().expect("offsets")[..4],
        [0, 1, 1, 2]
    );
    let streamed = api
        .completion(json!({"logprobs": 0, "stream": true}))
        .await
        .events();
    let told: Vec<Value> = streamed
        .iter()
        .filter_map(|event| {
            event["choices"][0]["logprobs"]["tokens"]
                .as_array()
                .cloned()
        })
        .flatten()
        .collect();
    assert_eq!(json!(told), plain_tokens(&plain));
}

/// The tokens of a chat's logprobs.
fn plain_tokens(body: &Value) -> Value {
    let content = body["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("content");
    content.iter().map(|entry| entry["token"].clone()).collect()
}

#[tokio::test]
async fn stop_strings_span_tokens() {
    let api = Api::start(1, hello).await;
    let reply = api.completion(json!({"stop": ["END", "x"]})).await;
    assert_eq!(contents(&reply, "/text"), ["Hé "]);
    assert_eq!(reply.json()["choices"][0]["finish_reason"], "stop");
    let reply = api
        .completion(json!({"stop": "END", "include_stop_str_in_output": true}))
        .await;
    assert_eq!(contents(&reply, "/text"), ["Hé END"]);
    // H and the first half of é are the two tokens in which nothing stops.
    let reply = api
        .completion(json!({"stop": ["H", "D"], "min_tokens": 2}))
        .await;
    assert_eq!(contents(&reply, "/text"), ["Hé EN"]);
    let streamed = api
        .completion(json!({"stop": "END", "stream": true}))
        .await
        .events();
    let text: String = streamed
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(text, "Hé ");
}

#[tokio::test]
async fn a_choice_that_stops_is_cancelled_while_others_go_on() {
    let endless = |tokenizer: &Tokenizer, submit: &Submit| {
        let mut says = say(tokenizer, submit, &format!("a {} b", submit.id));
        says.pop();
        says
    };
    let mut api = Api::start(2, endless).await;
    let body = json!({"model": "m", "prompt": "hi", "n": 2, "stop": "1", "stream": true});
    let _stream = api
        .open("/v1/completions", body.to_string().as_bytes())
        .await;
    api.next_submit().await;
    let id = api.next_submit().await.id;
    assert_eq!(api.next().await, ToEngine::Cancel { id });
    assert!(api.heard.try_recv().is_err(), "the other goes on");
}

#[tokio::test]
async fn control_tokens_are_shown_on_demand() {
    let api = Api::start(1, |tokenizer, submit| {
        say(tokenizer, submit, "a<|im_start|>b")
    })
    .await;
    assert_eq!(contents(&api.completion(json!({})).await, "/text"), ["ab"]);
    let shown = api.completion(json!({"skip_special_tokens": false})).await;
    assert_eq!(contents(&shown, "/text"), ["a<|im_start|>b"]);
}

#[tokio::test]
async fn prompts_are_written_as_asked() {
    let mut api = Api::start(1, numbered).await;
    let messages = json!([
        {"role": "developer", "content": "s"},
        {"role": "assistant", "content": " yes "},
    ]);
    let cases = [
        (
            json!({"continue_final_message": true}),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\n yes ",
        ),
        (
            json!({"add_generation_prompt": false}),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\n yes <|im_end|>\n",
        ),
    ];
    for (change, expected) in cases {
        let change = changed(change, json!({"messages": messages}));
        assert_eq!(api.chat(change).await.status, 200);
        assert_eq!(api.next_submit().await.tokens, api.encode(expected));
    }
    let change = json!({"prompt": "a b c", "truncate_prompt_tokens": 2, "echo": true});
    assert_eq!(contents(&api.completion(change).await, "/text"), [" ca2z"]);
    assert_eq!(api.next_submit().await.tokens, api.encode(" c"));
}

#[tokio::test]
async fn one_choice_that_fails_fails_the_request() {
    let script = |tokenizer: &Tokenizer, submit: &Submit| match submit.id {
        1 => vec![FromEngine::Refused {
            id: 1,
            refusal: Refusal::QueueFull { waiting: 9 },
        }],
        _ => say(tokenizer, submit, "long"),
    };
    let api = Api::start(2, script).await;
    let reply = api.chat(json!({"n": 2})).await;
    assert_eq!(
        (reply.status, reply.json()["error"]["code"].as_str()),
        (429, Some("rate_limit_exceeded"))
    );
}

#[tokio::test]
async fn a_client_that_leaves_frees_all_its_places() {
    let mut api = Api::start(1, nothing).await;
    let body = json!({"model": "m", "prompt": "hi", "n": PLACES, "stream": true}).to_string();
    let stream = api.open("/v1/completions", body.as_bytes()).await;
    let mut open = Vec::new();
    for _ in 0..PLACES {
        open.push(api.next_submit().await.id);
    }
    assert_eq!(api.completion(json!({})).await.status, 429);
    drop(stream);
    for _ in 0..PLACES {
        let ToEngine::Cancel { id } = api.next().await else {
            panic!("no cancel")
        };
        open.retain(|known| *known != id);
    }
    assert!(open.is_empty());
    let body = json!({"model": "m", "prompt": "hi", "n": PLACES}).to_string();
    let _stream = api.open("/v1/completions", body.as_bytes()).await;
    api.next_submit().await;
}

#[tokio::test]
async fn more_than_can_ever_be_computed_is_refused() {
    let api = Api::start(1, numbered).await;
    assert_eq!(api.chat(json!({"n": PLACES + 1})).await.field(), "n");
    let prompts = vec!["x"; PLACES + 1];
    assert_eq!(
        api.completion(json!({"prompt": prompts})).await.field(),
        "prompt"
    );
    assert_eq!(
        api.completion(json!({"prompt": ""})).await.field(),
        "prompt"
    );
    let beyond = api.tokenizer.vocab_size();
    for (field, value) in [
        ("prompt", json!([beyond])),
        ("stop_token_ids", json!([beyond])),
        ("logit_bias", json!({beyond.to_string(): 1})),
    ] {
        let mut change = json!({});
        change[field] = value;
        assert_eq!(api.completion(change).await.field(), field);
    }
    let reply = api.chat(json!({"model": "other"})).await;
    assert_eq!(reply.status, 404);
}

/// The prompt's probabilities in two parts, then an answer.
fn with_prompt(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    let asked = submit.prompt_logprobs.expect("were asked for");
    let one = |token: &u32| TokenLogprobs {
        logprob: -0.25,
        top: vec![(*token, -0.25); asked.min(1) as usize],
    };
    let prompt = |logprobs| FromEngine::Prompt {
        id: submit.id,
        logprobs,
    };
    let all: Vec<_> = submit.tokens[1..].iter().map(one).collect();
    let (first, second) = all.split_at(all.len() / 2);
    let parts = [prompt(first.to_vec()), prompt(second.to_vec())];
    let text = if submit.max_new_tokens == 1 {
        "a"
    } else {
        "a b"
    };
    let answer = say(tokenizer, submit, text);
    parts.into_iter().chain(answer).collect()
}

#[tokio::test]
async fn an_echo_tells_the_probabilities_of_the_prompt() {
    let mut api = Api::start(1, with_prompt).await;
    let ask = json!({
        "prompt": "h\u{e9} the", "echo": true, "logprobs": 1, "return_token_ids": true,
    });
    let whole = api.completion(ask.clone()).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "h\u{e9} thea b");
    let prompt = api.next_submit().await.tokens;
    let answer = api.encode("a b");
    assert_eq!(choice["prompt_token_ids"], json!(prompt));
    assert_eq!(choice["token_ids"], json!(answer));
    let logprobs = &choice["logprobs"];
    let list = |name: &str| logprobs[name].as_array().expect("a list").clone();
    let count = prompt.len() + answer.len();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), count, "{name}");
    }
    let values = list("token_logprobs");
    let first = (&values[0], &list("top_logprobs")[0]);
    assert_eq!(first, (&Value::Null, &Value::Null));
    assert!(values[1..prompt.len()].iter().all(|value| *value == -0.25));
    assert_eq!(values[prompt.len()], -0.5);
    let offsets = list("text_offset");
    assert_eq!(
        (&offsets[0], &offsets[prompt.len()]),
        (&json!(0), &json!(6))
    );
    assert_eq!(whole["usage"]["completion_tokens"], answer.len());

    let mut streamed = ask;
    streamed["stream"] = json!(true);
    let events = api.completion(streamed).await.events();
    let texts = events
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str());
    assert_eq!(texts.collect::<String>(), "h\u{e9} thea b");
    let told = events.iter().filter_map(|event| {
        let tokens = &event["choices"][0]["logprobs"]["tokens"];
        tokens.as_array().map(Vec::len)
    });
    assert_eq!(told.sum::<usize>(), count);
}

fn one_token(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    say(tokenizer, submit, "a")
}

#[tokio::test]
async fn a_prompt_alone_can_be_shown() {
    let mut api = Api::start(1, with_prompt).await;
    let ask = json!({"echo": true, "max_tokens": 0, "logprobs": 0});
    let shown = api.completion(ask).await;
    assert_eq!(contents(&shown, "/text"), ["hi"]);
    assert_eq!(contents(&shown, "/finish_reason"), ["length"]);
    let submit = api.next_submit().await;
    assert_eq!(submit.max_new_tokens, 1);
    let tokens = &shown.json()["choices"][0]["logprobs"]["tokens"];
    assert_eq!(tokens.as_array().map(Vec::len), Some(submit.tokens.len()));
    assert_eq!(shown.json()["usage"]["completion_tokens"], 0);
    let api = Api::start(1, one_token).await;
    let shown = api.completion(json!({"echo": true, "max_tokens": 0})).await;
    assert_eq!(contents(&shown, "/text"), ["hi"]);
    let embeddings = json!({"model": "m", "input": "a"});
    let refused = api.post("/v1/embeddings", &embeddings).await;
    assert_eq!(refused.field(), "model");
}

#[tokio::test]
async fn cached_tokens_are_told_of_answers_that_a_stop_ends() {
    let api = Api::start(1, |tokenizer, submit| {
        say(tokenizer, submit, "one two three")
    })
    .await;
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stop": "two",
    });
    let answer = api.post("/v1/chat/completions", &body).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "one ");
    let details = &answer["usage"]["prompt_tokens_details"];
    assert_eq!(details["cached_tokens"], 2);
}

#[tokio::test]
async fn answers_and_faults_are_counted_and_nothing_that_clients_do() {
    let script = |tokenizer: &Tokenizer, submit: &Submit| {
        let mut said = say(tokenizer, submit, "abc");
        let id = submit.id;
        match submit.max_new_tokens {
            // Before the first token, and behind it.
            1 => said = vec![failed(id)],
            2 => said.splice(1.., [failed(id)]).for_each(drop),
            _ => {}
        }
        said
    };
    let api = Api::start(1, script).await;
    for stream in [true, false] {
        assert_eq!(api.chat(json!({"stream": stream})).await.status, 200);
        assert_eq!(api.chat(json!({"n": -1})).await.status, 400);
        let early = json!({"stream": stream, "max_tokens": 1});
        assert_eq!(api.chat(early).await.status, 500);
        let late = json!({"stream": stream, "max_tokens": 2});
        assert_eq!(api.chat(late).await.status, if stream { 200 } else { 500 });
    }
    // Nobody waits for this one.
    let message = json!([{"role": "user", "content": "hi"}]);
    let body = json!({"model": "m", "messages": message, "stream": true}).to_string();
    drop(api.open("/v1/chat/completions", body.as_bytes()).await);
    api.admit.send_replace(Admission::Draining);
    assert_eq!(api.chat(json!({})).await.status, 503);
    let answers = api.metrics.answers(PATIENCE);
    assert_eq!(answers.failed, 4);
    // What was left alone may have come to its end before.
    assert!((2..=3).contains(&answers.finished), "{answers:?}");
    assert_eq!(answers.first_token.count(), answers.finished);
    assert_eq!(answers.between_tokens.count(), answers.finished);
}

fn failed(id: u64) -> FromEngine {
    let message = "no numbers".to_owned();
    FromEngine::Failed { id, message }
}
