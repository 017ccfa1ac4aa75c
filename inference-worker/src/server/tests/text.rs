use super::*;

async fn api() -> Api {
    Api::start(1, |_, _| Vec::new()).await
}

#[tokio::test]
async fn text_becomes_tokens_and_text_again() {
    let api = api().await;
    let reply = api
        .post(
            "/tokenize",
            &json!({"model": "m", "prompt": "the <|im_end|>é"}),
        )
        .await;
    let tokens = api.encode("the <|im_end|>é");
    assert_eq!(
        reply.json(),
        json!({
            "count": tokens.len(), "max_model_len": MAX_TOKENS, "tokens": tokens, "token_strs": null,
        })
    );
    let back = api.post("/detokenize", &json!({"tokens": tokens})).await;
    assert_eq!(back.json(), json!({"prompt": "the <|im_end|>é"}));
    let message = json!([{"role": "user", "content": "a"}]);
    let reply = api
        .post(
            "/tokenize",
            &json!({"messages": message, "return_token_strs": true}),
        )
        .await;
    let written = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(reply.json()["tokens"], json!(api.encode(written)));
    let texts: Vec<String> =
        serde_json::from_value(reply.json()["token_strs"].take()).expect("texts");
    assert_eq!(texts.concat(), written);
}

#[tokio::test]
async fn bad_input_is_named() {
    let api = api().await;
    for (path, body, field) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 7}), "prompt"),
        ("/tokenize", json!({"messages": []}), "messages"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/detokenize", json!({"tokens": [100_000]}), "tokens"),
        (
            "/detokenize",
            json!({"tokens": vec![0; MAX_TOKENS as usize + 1]}),
            "tokens",
        ),
    ] {
        assert_eq!(api.post(path, &body).await.field(), field);
    }
    let other = json!({"model": "other", "prompt": "x"});
    assert_eq!(api.post("/tokenize", &other).await.status, 404);
    assert_eq!(api.send("/tokenize", b"{").await.status, 400);
    assert_eq!(api.send("/version", b"{}").await.status, 405);
}

#[tokio::test]
async fn the_version_is_told() {
    let api = api().await;
    let mut stream = api.connect().await;
    stream
        .write_all(b"GET /version HTTP/1.0\r\n\r\n")
        .await
        .expect("writes");
    let reply = read(stream).await;
    assert_eq!(reply.json(), json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[tokio::test]
async fn clients_learn_what_begins_and_ends_a_text() {
    let api = api().await;
    let mut stream = api.connect().await;
    stream
        .write_all(b"GET /tokenizer_info HTTP/1.0\r\n\r\n")
        .await
        .expect("writes");
    let info = read(stream).await.json();
    assert_eq!(info["eos_token"], "<|im_end|>");
    assert_eq!(info["model_max_length"], MAX_TOKENS);
    let template = info["chat_template"].as_str().expect("has one");
    assert!(template.contains("<|im_start|>"), "{template}");
}
