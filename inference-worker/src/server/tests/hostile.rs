use super::*;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// An API whose engine no hostile request must reach.
async fn api(limits: PortLimits) -> Api {
    Api::with_limits(
        1,
        |_, submit| panic!("reached the engine: {submit:?}"),
        limits,
    )
    .await
}

#[tokio::test]
async fn bodies_that_are_no_request_are_refused() {
    let api = api(PortLimits::default()).await;
    let nested = "[".repeat(100_000);
    let nested_field = format!("{{\"model\": \"m\", \"messages\": {nested}");
    for path in [
        CHAT,
        COMPLETIONS,
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    ] {
        for body in [
            &b""[..],
            b"{",
            b"null",
            b"[]",
            b"\xFF\xFE{}",
            b"{\"model\": \"\xC3\"}",
            b"{\"model\": \"\\ud800\"}",
            nested.as_bytes(),
            nested_field.as_bytes(),
        ] {
            let reply = api.send(path, body).await;
            assert_eq!(reply.status, 400, "{}", reply.body);
            assert!(reply.body.len() < 4096);
            assert_eq!(reply.json()["error"]["type"], "invalid_request_error");
        }
    }
}

#[tokio::test]
async fn what_is_too_much_is_refused_by_name() {
    let api = api(PortLimits::default()).await;
    let tokens = api.completion(json!({"prompt": vec![1; 200_000]})).await;
    assert_eq!(tokens.json()["error"]["code"], "context_length_exceeded");
    assert_eq!(tokens.field(), "prompt");
    let text = api
        .completion(json!({"prompt": "a b".repeat(1 << 20)}))
        .await;
    assert_eq!(text.json()["error"]["code"], "context_length_exceeded");
    let message = json!([{"role": "user", "content": "x ".repeat(1 << 20)}]);
    let chat = api.chat(json!({"messages": message})).await;
    assert_eq!(chat.json()["error"]["code"], "context_length_exceeded");
    assert_eq!(chat.field(), "messages");
    assert_eq!(
        api.chat(json!({"stop": vec!["x"; 10_000]})).await.field(),
        "stop"
    );
    let biases: serde_json::Map<_, _> = (0..5000).map(|id| (id.to_string(), json!(1))).collect();
    assert_eq!(
        api.chat(json!({"logit_bias": biases})).await.field(),
        "logit_bias"
    );
    let huge = "m".repeat(4 << 20);
    let reply = api.chat(json!({"model": huge})).await;
    assert_eq!(reply.status, 404);
    assert!(
        reply.body.len() < 4096,
        "sends {} bytes back",
        reply.body.len()
    );
    let reply = api.chat(json!({"temperature": huge})).await;
    assert!(reply.field() == "temperature" && reply.body.len() < 4096);
}

#[tokio::test]
async fn a_gigabyte_is_refused_before_it_is_sent() {
    let api = api(PortLimits::default()).await;
    let mut stream = api.connect().await;
    let head = format!(
        "POST {CHAT} HTTP/1.0\r\ncontent-length: {}\r\n\r\n",
        1 << 30
    );
    stream.write_all(head.as_bytes()).await.expect("writes");
    assert_eq!(read(stream).await.status, 413);
}

#[tokio::test]
async fn an_endless_body_is_refused_on_its_way() {
    let api = api(PortLimits::default()).await;
    let stream = api.connect().await;
    let (mut reader, mut writer) = stream.into_split();
    let sending = tokio::spawn(async move {
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: m\r\ntransfer-encoding: chunked\r\n\r\n");
        writer.write_all(head.as_bytes()).await.expect("writes");
        let chunk = [b"10000\r\n".as_slice(), &vec![b' '; 1 << 16], b"\r\n"].concat();
        // Far more than may come; the server closes before.
        for _ in 0..1 << 14 {
            if writer.write_all(&chunk).await.is_err() {
                return true;
            }
        }
        false
    });
    let mut first = [0; 12];
    reader.read_exact(&mut first).await.expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 413");
    assert!(sending.await.expect("joins"), "a gigabyte was taken");
}

#[tokio::test]
async fn headers_come_in_time_or_not_at_all() {
    let limits = PortLimits {
        header_deadline: Duration::from_millis(100),
        ..PortLimits::default()
    };
    let api = api(limits).await;
    let whole = b"GET /version HTTP/1.1\r\nhost: m\r\n\r\n".as_slice();
    // Silent, slow, and silent after an answer.
    for sent in [
        b"".as_slice(),
        b"POST /v1/chat/completions HTTP/1.1\r\nhost:",
        whole,
    ] {
        let mut stream = api.connect().await;
        stream.write_all(sent).await.expect("writes");
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        ended.expect("in time").expect("closed");
        assert_eq!(rest.starts_with(b"HTTP/1.1 200"), sent == whole);
    }
    let mut long = api.connect().await;
    let head = format!(
        "GET /version HTTP/1.0\r\nx: {}\r\n\r\n",
        "y".repeat(1 << 20)
    );
    // The server may close while this is being written.
    let _ = long.write_all(head.as_bytes()).await;
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, long.read_to_end(&mut rest))
        .await
        .expect("in time");
    assert!(!rest.starts_with(b"HTTP/1.0 200"));
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_a_place() {
    let limits = PortLimits {
        connections: 2,
        ..PortLimits::default()
    };
    let api = api(limits).await;
    let first = api.connect().await;
    let _second = api.connect().await;
    let mut third = api.connect().await;
    third
        .write_all(b"GET /version HTTP/1.0\r\n\r\n")
        .await
        .expect("writes");
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(200), third.peek(&mut byte)).await;
    assert!(early.is_err(), "a third connection was answered");
    drop(first);
    assert_eq!(read(third).await.status, 200);
}

#[tokio::test]
async fn idle_connections_do_not_hold_the_end() {
    let api = api(PortLimits::default()).await;
    let mut idle = api.connect().await;
    idle.write_all(b"GET /version HTTP/1.1\r\nhost: m\r\n\r\n")
        .await
        .expect("writes");
    let mut some = [0; 15];
    idle.read_exact(&mut some).await.expect("an answer");
    api.closing.cancel();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, idle.read_to_end(&mut rest)).await;
    ended.expect("in time").expect("closed");
}
