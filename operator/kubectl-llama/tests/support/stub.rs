//! A server that gives fixed answers, in place of an API server.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// The answer to requests whose method and path begin with `begins`.
#[derive(Clone)]
pub(crate) struct Answer {
    pub(crate) begins: &'static str,
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// The server; it ends with the test's runtime.
pub(crate) struct Stub {
    pub(crate) address: std::net::SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Stub {
    /// Starts one that gives the first of `answers` that matches, else 404.
    pub(crate) async fn start(answers: Vec<Answer>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answers, log) = (answers.clone(), Arc::clone(&log));
                tokio::spawn(async move { serve(stream, &answers, &log).await });
            }
        });
        Ok(Self { address, asked })
    }

    /// Method, path and body of each request so far.
    pub(crate) fn asked(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.clone()
    }
}

async fn serve(
    stream: TcpStream,
    answers: &[Answer],
    log: &Mutex<Vec<String>>,
) -> anyhow::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut first = String::new();
    stream.read_line(&mut first).await?;
    let asked = first.rsplit_once(' ').context("no request")?.0.to_owned();
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let body = String::from_utf8_lossy(&body);
    log.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(format!("{asked} {body}"));
    let found = answers
        .iter()
        .find(|answer| asked.starts_with(answer.begins));
    let missing = r#"{"kind":"Status","status":"Failure","message":"it is not there","reason":"NotFound","code":404}"#;
    let (status, text) = found.map_or((404, missing), |answer| (answer.status, &*answer.body));
    let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n\r\n");
    let mut stream = stream.into_inner();
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await?;
    Ok(())
}
