//! The program against a real S3-compatible store on loopback.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use llama_contract::{
    FETCH_CA_ENV, FetchArgs, FetchSource, ModelFile, S3_KEY_ID_ENV, S3_SECRET_KEY_ENV, hex,
};
use sha2::{Digest, Sha256};

/// Folder with the programs of real services; without it these tests do not run.
const COMPONENTS_VARIABLE: &str = "LLAMA_COMPONENTS_DIR";
const STARTS_WITHIN: Duration = Duration::from_secs(20);
const KEY: (&str, &str) = ("reader", "a-secret-of-tests");

struct Store {
    child: Child,
    endpoint: String,
    /// Holds a folder for each bucket.
    buckets: tempfile::TempDir,
    /// Certificates that whoever asks it trusts.
    trusted: Option<String>,
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A store with a bucket `models`; `None`, with a line that says so, without components.
fn store() -> Option<Store> {
    store_with(&[])
}

fn store_with(arguments: &[&str]) -> Option<Store> {
    let Some(components) = std::env::var_os(COMPONENTS_VARIABLE) else {
        eprintln!("skipped: {COMPONENTS_VARIABLE} is not set; `make unit` sets it");
        return None;
    };
    let program = PathBuf::from(components).join("versitygw");
    let buckets = tempfile::tempdir().unwrap();
    fs::create_dir(buckets.path().join("models")).unwrap();
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let child = Command::new(program)
        .args(["--port", &address.to_string()])
        .args(arguments)
        .arg("posix")
        .arg(buckets.path())
        .env("ROOT_ACCESS_KEY", KEY.0)
        .env("ROOT_SECRET_KEY", KEY.1)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let store = Store {
        child,
        endpoint: format!("http://{address}"),
        buckets,
        trusted: None,
    };
    let started = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(
            started.elapsed() < STARTS_WITHIN,
            "the store does not start"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Some(store)
}

impl Store {
    fn put(&self, name: &str, bytes: &[u8]) {
        let path = self.buckets.path().join("models").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn fetch(&self, uri: &str, files: &[(&str, &[u8])], to: &Path, secret: &str) -> Output {
        let args = FetchArgs {
            source: FetchSource::S3 {
                uri: uri.to_owned(),
                endpoint: Some(self.endpoint.clone()),
                region: "us-east-1".to_owned(),
                files: files
                    .iter()
                    .map(|(name, bytes)| ModelFile {
                        name: (*name).to_owned(),
                        sha256: hex(&Sha256::digest(bytes)),
                    })
                    .collect(),
            },
            to: to.to_owned(),
            heads: false,
            cache_bytes: None,
            state_port: None,
        };
        Command::new(env!("CARGO_BIN_EXE_llama-model-fetch"))
            .args(args.to_args())
            .env(S3_KEY_ID_ENV, KEY.0)
            .env(S3_SECRET_KEY_ENV, secret)
            .envs(self.trusted.as_ref().map(|text| (FETCH_CA_ENV, text)))
            .output()
            .unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_prefix_is_listed_and_what_is_of_the_model_arrives() {
    let Some(store) = store() else { return };
    let weights: Vec<u8> = (0_u32..700_000).flat_map(u32::to_le_bytes).collect();
    // More objects than one page of a listing holds.
    for n in 0..1100 {
        store.put(&format!("llama/notes/{n}.md"), b"x");
    }
    store.put("llama/config.json", b"{}");
    store.put("llama/model.safetensors", &weights);
    store.put("llama-other/config.json", b"[]");
    let volume = tempfile::tempdir().unwrap();
    let output = store.fetch("s3://models/llama", &[], volume.path(), KEY.1);
    assert!(output.status.success(), "{}", said(&output));
    let mut names: Vec<_> = fs::read_dir(volume.path())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
    assert!(fs::read(volume.path().join("model.safetensors")).unwrap() == weights);
    assert_eq!(fs::read(volume.path().join("config.json")).unwrap(), b"{}");
}

#[test]
fn one_object_and_named_files_are_checked_by_their_digests() {
    let Some(store) = store() else { return };
    store.put("q/m.gguf", b"model");
    let volume = tempfile::tempdir().unwrap();
    let output = store.fetch("s3://models/q/m.gguf", &[], volume.path(), KEY.1);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(fs::read(volume.path().join("m.gguf")).unwrap(), b"model");
    for (bytes, is_good) in [(b"model", true), (b"other", false)] {
        let files: [(&str, &[u8]); 1] = [("m.gguf", bytes)];
        let output = store.fetch("s3://models/q", &files, volume.path(), KEY.1);
        assert_eq!(output.status.success(), is_good, "{}", said(&output));
        let mismatch = said(&output).contains("DigestMismatch: m.gguf");
        assert_eq!(mismatch, !is_good, "{}", said(&output));
    }
}

#[test]
fn a_certificate_of_ones_own_must_be_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (folder.path().join("c.pem"), folder.path().join("k.pem"));
    fs::write(&certificate, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let [certificate, key] = [&certificate, &key].map(|path| path.to_str().unwrap());
    let Some(mut store) = store_with(&["--cert", certificate, "--key", key]) else {
        return;
    };
    store.endpoint = store.endpoint.replace("http://", "https://");
    store.put("m.gguf", b"model");
    let volume = tempfile::tempdir().unwrap();
    let output = store.fetch("s3://models/m.gguf", &[], volume.path(), KEY.1);
    let text = said(&output);
    assert!(
        text.contains("InvalidConfiguration: https://") && text.contains("caConfigMapRef"),
        "{text}"
    );
    store.trusted = Some(made.cert.pem());
    let output = store.fetch("s3://models/m.gguf", &[], volume.path(), KEY.1);
    assert!(output.status.success(), "{}", said(&output));
    store.trusted = Some("no certificate".to_owned());
    let output = store.fetch("s3://models/m.gguf", &[], volume.path(), KEY.1);
    assert!(said(&output).contains(FETCH_CA_ENV), "{}", said(&output));
}

#[test]
fn a_wrong_key_and_a_missing_bucket_are_named() {
    let Some(store) = store() else { return };
    let volume = tempfile::tempdir().unwrap();
    let output = store.fetch("s3://models/llama", &[], volume.path(), "wrong");
    assert!(
        said(&output).contains("SourceUnauthorized: "),
        "{}",
        said(&output)
    );
    assert!(!said(&output).contains("X-Amz"), "{}", said(&output));
    let output = store.fetch("s3://nowhere/llama", &[], volume.path(), KEY.1);
    let text = said(&output);
    assert!(
        text.contains("ModelNotFound: ") && text.contains("/nowhere/"),
        "{text}"
    );
    let output = store.fetch("s3://models/llama", &[], volume.path(), KEY.1);
    let text = said(&output);
    assert!(
        text.contains("s3://models/llama holds no file of a model"),
        "{text}"
    );
}
