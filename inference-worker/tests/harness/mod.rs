//! Starts real workers on loopback or in network namespaces and talks HTTP to them.
#![allow(dead_code, reason = "each test program uses its part of the harness")]

pub(crate) mod namespaces;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llama_contract::{FailureReport, RankPhase, StateReport};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use self::namespaces::Namespace;

/// Ports below those that the kernel gives to whoever asks for any, so that nobody else takes
/// one between this look and the worker's own.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 10_000;
/// Where this process began to look, and went on.
static NEXT_PORT: LazyLock<AtomicU16> = LazyLock::new(|| {
    let start = std::process::id() * 97 % u32::from(PORTS);
    AtomicU16::new(u16::try_from(start).unwrap_or_default())
});
/// Environment variable with the model that these tests run.
pub(crate) const MODEL_ENV: &str = "LLAMA_TEST_MODEL";
/// Name under which the tests serve it.
pub(crate) const MODEL: &str = "smollm2";
/// A hung worker fails its test after this; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(90);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The model file, and the right to start workers; `None` (with a note) where
/// there is no model.
pub(crate) fn model() -> Option<(PathBuf, MutexGuard<'static, ()>)> {
    let turn = turn();
    let model = std::env::var_os(MODEL_ENV).map(PathBuf::from);
    if model.is_none() {
        eprintln!("{MODEL_ENV} names no model: nothing was tested");
    }
    model.map(|model| (model, turn))
}

/// The right to start workers, for tests with a model of their own.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a pod is: one of the machine's own addresses, or one in a namespace.
#[derive(Clone, Debug)]
pub(crate) struct Net {
    ip: Ipv4Addr,
    namespace: Option<Arc<Namespace>>,
}

impl Net {
    pub(crate) fn loopback(last: u8) -> Self {
        Self {
            ip: Ipv4Addr::new(127, 0, 0, last),
            namespace: None,
        }
    }

    /// The `index`-th address of `namespace`.
    pub(crate) fn inside(namespace: &Arc<Namespace>, index: u8) -> Self {
        Self {
            ip: namespace.address(index),
            namespace: Some(Arc::clone(namespace)),
        }
    }

    pub(crate) fn ip(&self) -> Ipv4Addr {
        self.ip
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        match &self.namespace {
            Some(namespace) => namespace.command(program),
            None => Command::new(program),
        }
    }

    pub(crate) fn free_address(&self) -> SocketAddr {
        let free = || {
            let port = || FIRST_PORT + NEXT_PORT.fetch_add(1, Ordering::Relaxed) % PORTS;
            (0..PORTS)
                .map(|_| SocketAddr::from((self.ip, port())))
                .find(|address| TcpListener::bind(address).is_ok())
                .expect("a free port")
        };
        match &self.namespace {
            Some(namespace) => namespace.within(free),
            None => free(),
        }
    }

    fn connect(&self, address: SocketAddr) -> Option<TcpStream> {
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok();
        match &self.namespace {
            Some(namespace) => namespace.within(connect),
            None => connect(),
        }
    }

    fn get(&self, address: SocketAddr, path: &str) -> Option<(u16, String)> {
        let mut answer = request(self.connect(address)?, "GET", path, b"")?;
        let mut text = String::new();
        answer.body.read_to_string(&mut text).ok()?;
        Some((answer.status, text))
    }
}

/// A worker pod.
pub(crate) struct Worker {
    child: Child,
    net: Net,
    api: SocketAddr,
    internal: SocketAddr,
    folder: tempfile::TempDir,
}

impl Worker {
    /// Starts a pod of `model` on loopback with further `flags`.
    pub(crate) fn start(model: &Path, flags: &[&str]) -> Self {
        Self::start_at(&Net::loopback(1), model, flags, &[])
    }

    pub(crate) fn start_at(
        net: &Net,
        model: &Path,
        flags: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let (api, internal) = (net.free_address(), net.free_address());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("termination"), "").unwrap();
        let child = net
            .command(env!("CARGO_BIN_EXE_llama-worker"))
            .args(["serve", "--log-format=text", "--node-name=test-node"])
            .arg(format!("--model={}", model.display()))
            .arg(format!("--served-name={MODEL}"))
            .arg(format!("--bind={}", api.ip()))
            .arg(format!("--pod-ip={}", api.ip()))
            .arg(format!("--api-port={}", api.port()))
            .arg(format!("--internal-port={}", internal.port()))
            .arg(format!(
                "--termination-log={}",
                folder.path().join("termination").display()
            ))
            .args(flags)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Self {
            child,
            net: net.clone(),
            api,
            internal,
            folder,
        }
    }

    /// Starts a pod and waits until it serves.
    pub(crate) fn serving(model: &Path, flags: &[&str]) -> Self {
        let mut worker = Self::start(model, flags);
        worker.wait_until_ready();
        worker
    }

    pub(crate) fn wait_until_ready(&mut self) {
        let (net, internal) = (self.net.clone(), self.internal);
        self.wait_for("readiness", || {
            net.get(internal, "/health")
                .is_some_and(|(status, _)| status == 200)
        });
    }

    /// Waits until `reached`, or fails with the worker's log.
    pub(crate) fn wait_for(&mut self, what: &str, mut reached: impl FnMut() -> bool) {
        let started = Instant::now();
        while !reached() {
            let exit = self.child.try_wait().unwrap();
            assert!(
                exit.is_none(),
                "ended ({exit:?}) before {what}\n{}",
                self.log()
            );
            assert!(started.elapsed() < PATIENCE, "no {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    pub(crate) fn state(&self) -> StateReport {
        let (status, body) = self.net.get(self.internal, "/state").expect("state");
        assert_eq!(status, 200);
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) fn metric(&self, line_start: &str) -> f64 {
        let (_, text) = self.net.get(self.internal, "/metrics").expect("metrics");
        let line = text.lines().find(|line| line.starts_with(line_start));
        let line = line.unwrap_or_else(|| panic!("no {line_start} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub(crate) fn internal(&self, path: &str) -> Option<(u16, String)> {
        self.net.get(self.internal, path)
    }

    /// Puts `body` on the internal port, and returns the status.
    pub(crate) fn put_internal(&self, path: &str, body: &Value) -> u16 {
        let stream = self.net.connect(self.internal).expect("the port listens");
        let answer = request(stream, "PUT", path, body.to_string().as_bytes());
        answer.expect("it answers").status
    }

    /// Waits until the pod tells a state as `reached` wants it.
    pub(crate) fn wait_for_state(&mut self, what: &str, reached: impl Fn(&StateReport) -> bool) {
        let (net, internal) = (self.net.clone(), self.internal);
        self.wait_for(what, || {
            let state = net.get(internal, "/state");
            let state = state.and_then(|(_, body)| serde_json::from_str(&body).ok());
            state.is_some_and(|state| reached(&state))
        });
    }

    /// Tells the internal port something; its status.
    pub(crate) fn order(&self, path: &str) -> u16 {
        let stream = self.net.connect(self.internal).expect("it listens");
        request(stream, "POST", path, b"")
            .expect("it answers")
            .status
    }

    pub(crate) fn get(&self, path: &str) -> Option<(u16, String)> {
        self.net.get(self.api, path)
    }

    /// Sends `body` and reads the whole answer.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let mut answer = self.open(path, body.to_string().as_bytes());
        let mut text = String::new();
        answer.body.read_to_string(&mut text).unwrap();
        let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        (answer.status, json)
    }

    /// Sends `body` and reads as far as the headers.
    pub(crate) fn open(&self, path: &str, body: &[u8]) -> Answer {
        let stream = self.net.connect(self.api).expect("the API listens");
        request(stream, "POST", path, body).expect("the API answers")
    }

    /// Sends `body` on a connection that the caller may drop.
    pub(crate) fn send(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = self.net.connect(self.api).expect("the API listens");
        send(&mut stream, "POST", path, body.to_string().as_bytes()).unwrap();
        stream
    }

    /// The whole answer to a chat message, greedy.
    pub(crate) fn chat(&self, message: &str, max_tokens: u32) -> String {
        let (status, body) = self.post("/v1/chat/completions", &chat(message, max_tokens));
        assert_eq!(status, 200, "{body}");
        body["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// Opens a streamed answer that takes long and reads its first pieces.
    pub(crate) fn long_stream(&self) -> Stream {
        let mut body = chat("Tell me everything you know about trees.", 2000);
        body["stream"] = json!(true);
        // Past the natural end of any answer.
        body["temperature"] = json!(1.0);
        body["seed"] = json!(5);
        let mut stream = self.stream("/v1/chat/completions", &body);
        for _ in 0..3 {
            stream.next().expect("a first piece");
        }
        stream
    }

    pub(crate) fn stream(&self, path: &str, body: &Value) -> Stream {
        let answer = self.open(path, body.to_string().as_bytes());
        assert_eq!(answer.status, 200);
        Stream(answer.body)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.child.id(), signal);
    }

    pub(crate) fn signal_rank(&self, local: usize, signal: Signal) {
        let state = self.state();
        assert_eq!(state.ranks[local].phase, RankPhase::Ready);
        kill(state.ranks[local].pid, signal);
    }

    /// Waits for the pod's end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "does not end\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the pod's end; its exit code and termination message.
    pub(crate) fn failure(&mut self) -> (i32, FailureReport) {
        let code = self.wait().code().expect("an exit code");
        let text = std::fs::read_to_string(self.folder.path().join("termination")).unwrap();
        let report = FailureReport::from_termination_message(&text);
        (
            code,
            report.unwrap_or_else(|| panic!("{text:?} is no report\n{}", self.log())),
        )
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a process is stopped.
pub(crate) fn is_stopped(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| status.contains("State:\tT"))
}

pub(crate) fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// A greedy chat request.
pub(crate) fn chat(message: &str, max_tokens: u32) -> Value {
    json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": message}],
        "max_tokens": max_tokens,
        "temperature": 0,
    })
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<String>,
    pub(crate) body: Box<dyn BufRead>,
}

impl Answer {
    pub(crate) fn json(mut self) -> Value {
        let mut text = String::new();
        self.body.read_to_string(&mut text).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Server-sent events. `next` gives each event's data.
pub(crate) struct Stream(Box<dyn BufRead>);

impl Stream {
    /// Text of the pieces up to the end, and the last JSON event.
    pub(crate) fn text(self) -> (String, Value) {
        let (mut text, mut last, mut done) = (String::new(), Value::Null, false);
        for data in self {
            if data == "[DONE]" {
                done = true;
                continue;
            }
            last = serde_json::from_str(&data).unwrap();
            let choice = &last["choices"][0];
            let piece = choice["delta"]["content"]
                .as_str()
                .or_else(|| choice["text"].as_str());
            text.push_str(piece.unwrap_or_default());
        }
        assert!(done, "the stream ended without [DONE]: {last}");
        (text, last)
    }

    /// Text of the pieces up to the error that ends a failed stream, and the error.
    pub(crate) fn text_and_error(self) -> (String, Value) {
        let mut text = String::new();
        for data in self {
            let event: Value =
                serde_json::from_str(&data).unwrap_or_else(|_| panic!("ended with {data}"));
            if event["error"].is_object() {
                return (text, event["error"].clone());
            }
            text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
        }
        panic!("the stream ended without an error after {text}");
    }

    /// The error that ends a failed stream.
    pub(crate) fn error(self) -> Value {
        let last = self.last().expect("an event");
        let event: Value =
            serde_json::from_str(&last).unwrap_or_else(|_| panic!("ended with {last}"));
        assert!(event["error"].is_object(), "{event}");
        event["error"].clone()
    }
}

impl Iterator for Stream {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).expect("the stream goes on") == 0 {
                return None;
            }
            if let Some(data) = line.trim_end().strip_prefix("data: ") {
                return Some(data.to_owned());
            }
        }
    }
}

/// One HTTP request on a connection of its own; `None` when it breaks.
fn request(mut stream: TcpStream, method: &str, path: &str, body: &[u8]) -> Option<Answer> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    send(&mut stream, method, path, body).ok()?;
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end() {
            "" if lines.is_empty() => return None,
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let status = lines[0].split(' ').nth(1)?.parse().ok()?;
    let is_chunked = lines
        .iter()
        .any(|line| line.eq_ignore_ascii_case("transfer-encoding: chunked"));
    let body: Box<dyn BufRead> = if is_chunked {
        Box::new(BufReader::new(Chunked { reader, left: 0 }))
    } else {
        Box::new(reader)
    };
    Some(Answer {
        status,
        headers: lines,
        body,
    })
}

fn send(stream: &mut TcpStream, method: &str, path: &str, body: &[u8]) -> std::io::Result<()> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

/// Takes the chunk sizes out of a chunked body.
struct Chunked {
    reader: BufReader<TcpStream>,
    left: usize,
}

impl Read for Chunked {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            let mut line = String::new();
            while line.trim().is_empty() {
                line.clear();
                if self.reader.read_line(&mut line)? == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
            }
            self.left = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let limit = self.left.min(buffer.len());
        let count = self.reader.read(&mut buffer[..limit])?;
        self.left -= count;
        Ok(count)
    }
}
