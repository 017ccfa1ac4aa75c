//! Many connections, and clients that do not read.

use tokio::net::TcpSocket;

use super::*;

/// Far more than what buffers of sockets hold, in a few tokens.
const ALTERNATIVES: usize = 6_000;

/// To who asks for probabilities, megabytes without an end; to others a short answer.
fn flood(tokenizer: &Tokenizer, submit: &Submit) -> Vec<FromEngine> {
    if submit.sampling.logprobs.is_none() {
        return say(tokenizer, submit, "short");
    }
    let id = submit.id;
    let token = tokenizer.encode("a", Special::Parse).expect("encodes")[0];
    let logprobs = TokenLogprobs {
        logprob: -0.5,
        top: vec![(token, -0.5); ALTERNATIVES],
    };
    let said = (0..32).map(|_| FromEngine::Token {
        id,
        token,
        cached_tokens: 0,
        logprobs: Some(logprobs.clone()),
    });
    said.collect()
}

/// Asks for a flood on a connection that holds little, and reads nothing.
async fn open_slow(api: &Api) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("is set");
    let mut stream = socket.connect(api.address).await.expect("connects");
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "logprobs": true,
        "top_logprobs": 1, "stream": true, "max_tokens": 32,
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("writes");
    stream.write_all(body.as_bytes()).await.expect("writes");
    stream
}

#[tokio::test]
async fn a_thousand_connections_are_answered_while_all_are_open() {
    let limits = PortLimits {
        kept_for: PATIENCE,
        ..PortLimits::default()
    };
    let api = Api::with_limits(1, |_, _| Vec::new(), limits).await;
    let mut open = Vec::new();
    for _ in 0..1000 {
        open.push(api.connect().await);
    }
    // Twice, so that none was closed behind its first answer.
    for round in 0..2 {
        for (index, stream) in open.iter_mut().enumerate() {
            let path = ["/v1/models", "/health"][(index + round) % 2];
            let head = format!("GET {path} HTTP/1.1\r\nhost: m\r\n\r\n");
            stream.write_all(head.as_bytes()).await.expect("writes");
        }
        for stream in &mut open {
            let answer = tokio::time::timeout(PATIENCE, read_one(stream)).await;
            let answer = answer.expect("in time");
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
    }
}

/// Asks for the models on a connection that is kept, and gives the head of the answer.
async fn models(stream: &mut TcpStream) -> String {
    let head = b"GET /v1/models HTTP/1.1\r\nhost: m\r\n\r\n";
    stream.write_all(head).await.expect("writes");
    let answer = tokio::time::timeout(PATIENCE, read_one(stream)).await;
    answer.expect("in time")
}

#[tokio::test]
async fn a_connection_is_kept_for_a_while_and_its_last_answer_says_so() {
    let limits = PortLimits {
        kept_for: Duration::from_millis(300),
        ..PortLimits::default()
    };
    let api = Api::with_limits(1, |_, _| Vec::new(), limits).await;
    let mut stream = api.connect().await;
    let first = models(&mut stream).await;
    assert!(!first.contains("connection: close"), "{first}");
    tokio::time::sleep(limits.kept_for).await;
    let last = models(&mut stream).await;
    assert!(last.contains("connection: close"), "{last}");
    assert_eq!(stream.read(&mut [0]).await.expect("reads"), 0, "closed");
}

#[tokio::test]
async fn a_pod_that_is_about_to_end_keeps_no_connection() {
    let api = Api::start(1, |_, _| Vec::new()).await;
    let mut idle = api.connect().await;
    models(&mut idle).await;
    api.admit.send_replace(Admission::Draining);
    let closed = tokio::time::timeout(PATIENCE, idle.read(&mut [0])).await;
    assert_eq!(closed.expect("in time").expect("reads"), 0);
    // Who comes late is told why, and to try again elsewhere.
    let reply = api.completion(json!({})).await;
    assert_eq!(reply.status, 503, "{}", reply.body);
    let mut late = api.connect().await;
    let head = models(&mut late).await;
    assert!(head.contains("connection: close"), "{head}");
}

/// Reads one answer of a connection that stays open.
async fn read_one(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.expect("a head"));
    }
    let head = String::from_utf8(bytes).expect("text");
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a length"))];
    stream.read_exact(&mut body).await.expect("a body");
    head
}

#[tokio::test]
async fn a_client_that_does_not_read_keeps_nobody_waiting_and_loses_nothing() {
    let finite = |tokenizer: &Tokenizer, submit: &Submit| {
        let mut says = flood(tokenizer, submit);
        if submit.sampling.logprobs.is_some() {
            let (id, cached_tokens) = (submit.id, 0);
            let reason = Finish::Stop;
            says.push(FromEngine::Finished {
                id,
                reason,
                cached_tokens,
            });
        }
        says
    };
    let api = Api::start(1, finite).await;
    let slow = open_slow(&api).await;
    for _ in 0..2 * PLACES {
        let reply = api.completion(json!({})).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
    }
    // What waited comes whole once it is read.
    assert_eq!(read(slow).await.events().len(), 1 + 32 + 1);
}

#[tokio::test]
async fn a_client_that_never_reads_is_left() {
    let limits = PortLimits {
        write_deadline: Duration::from_millis(200),
        ..PortLimits::default()
    };
    let mut api = Api::with_limits(1, flood, limits).await;
    let _slow = open_slow(&api).await;
    let id = api.next_submit().await.id;
    assert_eq!(api.next().await, ToEngine::Cancel { id });
    // Who only waits, for an answer or for a question, is no such client.
    let mut idle = api.connect().await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    idle.write_all(b"GET /version HTTP/1.0\r\n\r\n")
        .await
        .expect("writes");
    assert_eq!(read(idle).await.status, 200);
}
