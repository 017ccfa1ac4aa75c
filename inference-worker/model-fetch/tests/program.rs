//! The program against servers on loopback that behave, and ones that do not.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, Uri, header};
use futures::stream::{self, StreamExt};
use llama_contract::{
    CACHE_MODEL_FOLDER, FETCH_TOKEN_ENV, FailureCategory, FailureReport, FetchArgs, FetchSource,
    ModelFile, hex,
};
use sha2::{Digest, Sha256};

/// How a server answers.
#[derive(Clone, Copy, Debug, Default)]
struct Manner {
    /// Knows no parts of files.
    whole_only: bool,
    /// Breaks off each answer after so many bytes.
    breaks_after: Option<usize>,
    /// Wants this token.
    token: Option<&'static str>,
    /// Answers this many requests with 503 first.
    busy: usize,
}

#[derive(Default)]
struct Served {
    files: BTreeMap<String, Vec<u8>>,
    /// Paths that lead elsewhere.
    redirects: BTreeMap<String, String>,
    manner: Manner,
    /// Path and range of each request.
    asked: Mutex<Vec<String>>,
}

struct Server {
    url: String,
    served: Arc<Served>,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(served: Served) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let served = Arc::new(served);
        let app = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&served));
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self {
            url,
            served,
            _runtime: runtime,
        }
    }

    fn of(files: &[(&str, &[u8])], manner: Manner) -> Self {
        let files = files
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()))
            .collect();
        Self::start(Served {
            files,
            manner,
            ..Served::default()
        })
    }

    fn asked(&self) -> Vec<String> {
        self.served.asked.lock().unwrap().clone()
    }
}

async fn answer(State(served): State<Arc<Served>>, uri: Uri, headers: HeaderMap) -> Response<Body> {
    let range = headers
        .get(header::RANGE)
        .map(|value| value.to_str().unwrap());
    let count = {
        let mut asked = served.asked.lock().unwrap();
        asked.push(format!("{} {}", uri.path(), range.unwrap_or("all")));
        asked.len()
    };
    let manner = served.manner;
    let plain = |status: StatusCode| Response::builder().status(status);
    if count <= manner.busy {
        return plain(StatusCode::SERVICE_UNAVAILABLE)
            .body("later".into())
            .unwrap();
    }
    if let Some(to) = served.redirects.get(uri.path()) {
        let response = plain(StatusCode::FOUND).header(header::LOCATION, to);
        return response.body(Body::empty()).unwrap();
    }
    if let Some(token) = manner.token {
        let given = headers
            .get(header::AUTHORIZATION)
            .map(|v| v.to_str().unwrap());
        if given != Some(&format!("Bearer {token}")) {
            return plain(StatusCode::UNAUTHORIZED).body(Body::empty()).unwrap();
        }
    } else if headers.contains_key(header::AUTHORIZATION) {
        return plain(StatusCode::BAD_REQUEST)
            .body("a token came along".into())
            .unwrap();
    }
    let path = uri.path_and_query().unwrap().as_str();
    let file = served
        .files
        .get(path)
        .or_else(|| served.files.get(uri.path()));
    let Some(file) = file else {
        return plain(StatusCode::NOT_FOUND).body(Body::empty()).unwrap();
    };
    let (mut response, bytes) = match range.filter(|_| !manner.whole_only) {
        None => (plain(StatusCode::OK), file.clone()),
        Some(range) => {
            let (first, last) = range
                .strip_prefix("bytes=")
                .unwrap()
                .split_once('-')
                .unwrap();
            let first: usize = first.parse().unwrap();
            let last = last
                .parse()
                .map_or(file.len(), |last: usize| (last + 1).min(file.len()));
            let told = format!("bytes {first}-{}/{}", last - 1, file.len());
            let response = plain(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, told);
            (response, file[first..last].to_vec())
        }
    };
    response = response.header(header::CONTENT_LENGTH, bytes.len());
    if path.contains("/tree/") && !path.contains("page=2") && path.contains("paged") {
        let next = format!("<{path}&page=2>; rel=\"next\"");
        response = response.header(header::LINK, next);
    }
    let body = match manner.breaks_after {
        Some(count) if bytes.len() > count => {
            let start = Bytes::copy_from_slice(&bytes[..count]);
            let pieces = [Ok(start), Err(std::io::Error::other("cut"))];
            // The second piece comes when the first is on its way.
            Body::from_stream(stream::iter(pieces).then(|piece| async {
                if piece.is_err() {
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
                piece
            }))
        }
        _ => Body::from(bytes),
    };
    response.body(body).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn http(server: &Server, files: &[(&str, &[u8])]) -> FetchSource {
    FetchSource::Http {
        url: format!("{}/models", server.url),
        files: files
            .iter()
            .map(|(name, bytes)| ModelFile {
                name: (*name).to_owned(),
                sha256: sha256(bytes),
            })
            .collect(),
    }
}

fn args(source: FetchSource, to: &Path) -> FetchArgs {
    FetchArgs {
        source,
        to: to.to_owned(),
        heads: false,
        cache_bytes: None,
        state_port: None,
    }
}

fn fetch(args: &FetchArgs, environment: &[(&str, &str)]) -> (Output, Option<FailureReport>) {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    fs::write(&log, "").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_llama-model-fetch"))
        .args(args.to_args())
        .arg(format!("--termination-log={}", log.display()))
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let report = FailureReport::from_termination_message(&fs::read_to_string(&log).unwrap());
    (output, report)
}

fn fetched(args: &FetchArgs, environment: &[(&str, &str)]) {
    let (output, _) = fetch(args, environment);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

fn failed(args: &FetchArgs, environment: &[(&str, &str)]) -> FailureReport {
    let (output, report) = fetch(args, environment);
    let report = report.unwrap();
    let code = i32::from(report.category.exit_code());
    assert_eq!(output.status.code(), Some(code), "{report:?}");
    report
}

/// Bytes in which no two places look alike.
fn noise(count: usize) -> Vec<u8> {
    (0_u64..)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .take(count)
        .collect()
}

#[test]
fn files_arrive_whole_and_only_whole_ones_have_their_name() {
    let (big, small) = (noise(3_000_000), b"{}".to_vec());
    let files: [(&str, &[u8]); 2] = [("q/m.gguf", &big), ("config.json", &small)];
    let server = Server::of(
        &[("/models/q/m.gguf", &big), ("/models/config.json", &small)],
        Manner::default(),
    );
    let volume = tempfile::tempdir().unwrap();
    fetched(&args(http(&server, &files), volume.path()), &[]);
    assert!(fs::read(volume.path().join("q/m.gguf")).unwrap() == big);
    assert_eq!(fs::read(volume.path().join("config.json")).unwrap(), small);
    assert!(!volume.path().join("q/.m.gguf.part").exists());
}

#[test]
fn an_answer_that_breaks_off_is_continued() {
    let big = noise(1_000_000);
    let manner = Manner {
        breaks_after: Some(400_000),
        busy: 1,
        ..Manner::default()
    };
    let server = Server::of(&[("/models/m.gguf", &big)], manner);
    let volume = tempfile::tempdir().unwrap();
    let source = http(&server, &[("m.gguf", &big)]);
    fetched(&args(source, volume.path()), &[]);
    assert!(fs::read(volume.path().join("m.gguf")).unwrap() == big);
    let asked = server.asked();
    let last = asked.last().unwrap();
    assert!(
        last.contains("bytes=") && !last.contains("bytes=0-"),
        "{asked:?}"
    );
}

#[test]
fn what_a_former_start_left_is_used_and_what_is_wrong_of_it_is_not() {
    let big = noise(100_000);
    for (left, first_asked) in [
        (big[..60_000].to_vec(), "/models/m.gguf bytes=60000-"),
        (vec![7; 60_000], "/models/m.gguf bytes=60000-"),
    ] {
        let server = Server::of(&[("/models/m.gguf", &big)], Manner::default());
        let volume = tempfile::tempdir().unwrap();
        fs::write(volume.path().join(".m.gguf.part"), left).unwrap();
        let source = http(&server, &[("m.gguf", &big)]);
        fetched(&args(source, volume.path()), &[]);
        assert!(fs::read(volume.path().join("m.gguf")).unwrap() == big);
        // The first request asked for the length.
        assert_eq!(server.asked()[1], first_asked);
    }
}

#[test]
fn a_server_that_knows_no_parts_will_do() {
    let big = noise(100_000);
    let manner = Manner {
        whole_only: true,
        ..Manner::default()
    };
    let server = Server::of(&[("/models/m.gguf", &big)], manner);
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join(".m.gguf.part"), &big[..500]).unwrap();
    let source = http(&server, &[("m.gguf", &big)]);
    fetched(&args(source, volume.path()), &[]);
    assert!(fs::read(volume.path().join("m.gguf")).unwrap() == big);
}

#[test]
fn other_bytes_than_those_of_the_digest_are_refused() {
    let big = noise(10_000);
    let mut flipped = big.clone();
    flipped[5_000] ^= 1;
    let server = Server::of(&[("/models/m.gguf", &flipped)], Manner::default());
    let volume = tempfile::tempdir().unwrap();
    let source = http(&server, &[("m.gguf", &big)]);
    let report = failed(&args(source, volume.path()), &[]);
    assert_eq!(report.category, FailureCategory::DigestMismatch);
    for word in ["m.gguf", &sha256(&big), &sha256(&flipped), &server.url] {
        assert!(report.message.contains(word), "{}", report.message);
    }
    assert_eq!(fs::read_dir(volume.path()).unwrap().count(), 0);
}

#[test]
fn a_refusal_says_what_to_look_at() {
    let manner = Manner {
        token: Some("secret"),
        ..Manner::default()
    };
    let server = Server::of(&[("/models/m.gguf", b"model")], manner);
    let volume = tempfile::tempdir().unwrap();
    let wanted = args(http(&server, &[("m.gguf", b"model")]), volume.path());
    for (environment, words) in [
        (vec![], "none were given"),
        (vec![(FETCH_TOKEN_ENV, "wrong")], "does not accept"),
    ] {
        let report = failed(&wanted, &environment);
        assert_eq!(report.category, FailureCategory::SourceUnauthorized);
        assert!(report.message.contains(words), "{}", report.message);
        assert!(!report.message.contains("wrong"), "{}", report.message);
    }
    fetched(&wanted, &[(FETCH_TOKEN_ENV, "secret")]);
    let other = args(http(&server, &[("n.gguf", b"model")]), volume.path());
    let report = failed(&other, &[(FETCH_TOKEN_ENV, "secret")]);
    assert_eq!(report.category, FailureCategory::ModelNotFound);
    assert!(
        report.message.contains("/models/n.gguf"),
        "{}",
        report.message
    );
}

#[test]
fn a_token_does_not_follow_a_redirect_to_another_host() {
    let store = Server::of(&[("/blob", b"model")], Manner::default());
    let mut front = Served {
        manner: Manner {
            token: Some("secret"),
            ..Manner::default()
        },
        ..Served::default()
    };
    // Another host by its name, the same by its address.
    let other = store.url.replace("127.0.0.1", "localhost");
    front
        .redirects
        .insert("/models/m.gguf".to_owned(), format!("{other}/blob"));
    let server = Server::start(front);
    let volume = tempfile::tempdir().unwrap();
    let source = http(&server, &[("m.gguf", b"model")]);
    fetched(&args(source, volume.path()), &[(FETCH_TOKEN_ENV, "secret")]);
    assert!(store.asked().len() >= 2);
}

#[test]
fn a_server_that_is_gone_is_named() {
    let server = Server::of(&[], Manner::default());
    let mut source = http(&server, &[("m.gguf", b"model")]);
    let FetchSource::Http { url, .. } = &mut source else {
        unreachable!()
    };
    *url = "http://127.0.0.1:9/models".to_owned();
    let volume = tempfile::tempdir().unwrap();
    let report = failed(&args(source, volume.path()), &[]);
    assert_eq!(report.category, FailureCategory::SourceUnreachable);
    assert!(
        report.message.contains("http://127.0.0.1:9/models/m.gguf"),
        "{}",
        report.message
    );
    assert!(report.message.contains("5 attempts"), "{}", report.message);
}

fn hub(server: &Server, revision: &str, path: Option<&str>) -> FetchSource {
    FetchSource::HuggingFace {
        repo: "meta/llama".to_owned(),
        revision: revision.to_owned(),
        endpoint: server.url.clone(),
        path: path.map(str::to_owned),
    }
}

fn hub_server(manner: Manner) -> Server {
    let weights = noise(50_000);
    let first = format!(
        r#"[{{"type":"directory","path":"original","size":0,"oid":"0"}},
            {{"type":"file","path":"original/params.json","size":9,"oid":"0"}},
            {{"type":"file","path":"model.safetensors","size":50000,"oid":"0",
              "lfs":{{"oid":"{}","size":50000,"pointerSize":134}}}}]"#,
        sha256(&weights)
    );
    let second = r#"[{"type":"file","path":"config.json","size":6,
                      "oid":"ce013625030ba8dba906f756967f9e9ca394464a"}]"#;
    let tree = "/api/models/meta/llama/tree/paged?recursive=true";
    let file = |name: &str| format!("/meta/llama/resolve/paged/{name}");
    Server::of(
        &[
            (tree, first.as_bytes()),
            (&format!("{tree}&page=2"), second.as_bytes()),
            (&file("config.json"), b"hello\n"),
            (&file("model.safetensors"), &weights),
        ],
        manner,
    )
}

#[test]
fn a_commit_of_a_hub_is_listed_to_its_end_and_checked() {
    let manner = Manner {
        token: Some("hf"),
        ..Manner::default()
    };
    let server = hub_server(manner);
    let volume = tempfile::tempdir().unwrap();
    let wanted = args(hub(&server, "paged", None), volume.path());
    fetched(&wanted, &[(FETCH_TOKEN_ENV, "hf")]);
    let mut names: Vec<_> = fs::read_dir(volume.path())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
    let missing = args(hub(&server, "other", None), volume.path());
    let report = failed(&missing, &[(FETCH_TOKEN_ENV, "hf")]);
    assert_eq!(report.category, FailureCategory::ModelNotFound);
    let wrong = args(hub(&server, "paged", Some("m.gguf")), volume.path());
    let report = failed(&wrong, &[(FETCH_TOKEN_ENV, "hf")]);
    assert!(report.message.contains("config.json"), "{}", report.message);
}

#[test]
fn heads_are_as_long_as_their_files_and_little_of_them_is_asked_for() {
    let mut tensors = 1000_u64.to_le_bytes().to_vec();
    tensors.extend(noise(3_000_000));
    for whole_only in [false, true] {
        let manner = Manner {
            whole_only,
            ..Manner::default()
        };
        let server = Server::of(&[("/models/m.safetensors", &tensors)], manner);
        let volume = tempfile::tempdir().unwrap();
        let wanted = FetchArgs {
            heads: true,
            ..args(http(&server, &[("m.safetensors", &tensors)]), volume.path())
        };
        fetched(&wanted, &[]);
        let head = fs::read(volume.path().join("m.safetensors")).unwrap();
        assert_eq!(head.len(), tensors.len());
        assert!(head[..1008] == tensors[..1008]);
        assert!(head[1008..].iter().all(|byte| *byte == 0));
        assert!(server.asked().iter().all(|asked| !asked.ends_with("all")));
    }
}

#[test]
fn twenty_at_once_fetch_into_a_cache_once() {
    let big = noise(2_000_000);
    let server = Server::of(&[("/models/m.gguf", &big)], Manner::default());
    let volume = tempfile::tempdir().unwrap();
    let source = http(&server, &[("m.gguf", &big)]);
    let identity = source.identity().unwrap();
    let wanted = FetchArgs {
        cache_bytes: Some(3_000_000),
        ..args(source, volume.path())
    };
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| fetched(&wanted, &[]));
        }
    });
    let model = volume
        .path()
        .join(identity)
        .join(CACHE_MODEL_FOLDER)
        .join("m.gguf");
    assert!(fs::read(model).unwrap() == big);
    let asked = server.asked();
    let whole = asked.iter().filter(|asked| !asked.ends_with("bytes=0-0"));
    assert_eq!(whole.count(), 1, "{asked:?}");
}

#[test]
fn a_model_greater_than_the_cache_is_refused() {
    let big = noise(2_000_000);
    let server = Server::of(&[("/models/m.gguf", &big)], Manner::default());
    let volume = tempfile::tempdir().unwrap();
    let wanted = FetchArgs {
        cache_bytes: Some(1 << 20),
        ..args(http(&server, &[("m.gguf", &big)]), volume.path())
    };
    let report = failed(&wanted, &[]);
    assert_eq!(report.category, FailureCategory::InsufficientStorage);
    assert!(
        report.message.contains("may hold 1.0 MiB"),
        "{}",
        report.message
    );
}
