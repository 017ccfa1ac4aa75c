//! Runs the program the way init containers do.

#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use llama_contract::{FailureCategory, FailureReport};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_llama-model-copy");

/// A folder that stands for the image, one for the volume, and a termination log.
struct Pod {
    folder: TempDir,
}

impl Pod {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("image")).unwrap();
        fs::create_dir(folder.path().join("volume")).unwrap();
        fs::write(folder.path().join("log"), "").unwrap();
        Self { folder }
    }

    fn image(&self, name: &str) -> PathBuf {
        self.folder.path().join("image").join(name)
    }

    fn volume(&self, name: &str) -> PathBuf {
        self.folder.path().join("volume").join(name)
    }

    fn copy_command(&self, from: &Path) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("copy").arg("--from").arg(from);
        command.arg("--to").arg(self.folder.path().join("volume"));
        command.arg("--termination-log").arg(self.log());
        command
    }

    fn copy(&self, from: &Path) -> Output {
        self.copy_command(from).output().unwrap()
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn report(&self) -> FailureReport {
        let text = fs::read_to_string(self.log()).unwrap();
        FailureReport::from_termination_message(&text).unwrap()
    }

    fn volume_names(&self) -> Vec<String> {
        self.names_in("")
    }

    fn names_in(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.volume(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Bytes that differ from place to place, over several pieces and a bit.
fn model() -> Vec<u8> {
    (0..9_000_001_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0])
        .collect()
}

#[test]
fn a_file_arrives_whole_under_its_own_name() {
    let pod = Pod::new();
    fs::write(pod.image("m.gguf"), model()).unwrap();
    let output = pod.copy(&pod.image("m.gguf"));
    assert!(output.status.success(), "{}", words(&output));
    assert!(fs::read(pod.volume("m.gguf")).unwrap() == model());
    assert_eq!(pod.volume_names(), ["m.gguf"]);
    assert!(
        words(&output).contains("9000001 of 9000001 bytes (100 %)"),
        "{}",
        words(&output)
    );
    assert_eq!(fs::read_to_string(pod.log()).unwrap(), "");
}

#[test]
fn a_second_start_replaces_what_the_first_left() {
    let pod = Pod::new();
    fs::write(pod.image("m.gguf"), "new").unwrap();
    fs::write(pod.volume("m.gguf"), "older").unwrap();
    fs::write(pod.volume(".m.gguf.part"), "half a mod").unwrap();
    let output = pod.copy(&pod.image("m.gguf"));
    assert!(output.status.success(), "{}", words(&output));
    assert_eq!(fs::read_to_string(pod.volume("m.gguf")).unwrap(), "new");
    assert_eq!(pod.volume_names(), ["m.gguf"]);
}

#[test]
fn a_folder_keeps_its_name_and_its_files() {
    let pod = Pod::new();
    fs::create_dir(pod.image("models")).unwrap();
    fs::write(pod.image("models/a.gguf"), "aaa").unwrap();
    fs::write(pod.image("models/b.json"), "{}").unwrap();
    fs::create_dir(pod.image("models/sub")).unwrap();
    let output = pod.copy(&pod.image("models"));
    assert!(output.status.success(), "{}", words(&output));
    assert_eq!(pod.volume_names(), ["models"]);
    assert_eq!(pod.names_in("models"), ["a.gguf", "b.json"]);
}

#[test]
fn a_wrong_path_is_reported_with_what_is_there() {
    let pod = Pod::new();
    fs::write(pod.image("right.gguf"), "x").unwrap();
    let output = pod.copy(&pod.image("wrong.gguf"));
    let category = FailureCategory::ModelNotFound;
    assert_eq!(output.status.code(), Some(category.exit_code().into()));
    let report = pod.report();
    assert_eq!(report.category, category);
    assert!(report.message.contains("image/wrong.gguf"), "{report:?}");
    assert!(
        report.message.ends_with("image holds right.gguf"),
        "{report:?}"
    );
    assert!(
        words(&output).contains("ModelNotFound"),
        "{}",
        words(&output)
    );
}

#[test]
fn a_model_larger_than_the_volume_is_refused_before_copying() {
    let pod = Pod::new();
    let sparse = fs::File::create(pod.image("m.gguf")).unwrap();
    let bytes = 1 << 42;
    if sparse.set_len(bytes).is_err() {
        eprintln!("skipped: the file system of the temporary folder has no large sparse files");
        return;
    }
    let output = pod.copy(&pod.image("m.gguf"));
    let report = pod.report();
    assert_eq!(output.status.code(), Some(64), "{}", words(&output));
    assert_eq!(report.category, FailureCategory::InsufficientStorage);
    assert!(report.message.contains(&bytes.to_string()), "{report:?}");
    assert!(report.message.contains("free"), "{report:?}");
    assert!(pod.volume_names().is_empty());
}

#[test]
fn a_model_that_the_volume_hides_is_refused_and_kept() {
    let pod = Pod::new();
    fs::write(pod.volume("m.gguf"), "model").unwrap();
    let output = pod.copy(&pod.volume("m.gguf"));
    assert_eq!(output.status.code(), Some(64), "{}", words(&output));
    assert_eq!(pod.report().category, FailureCategory::InvalidConfiguration);
    assert_eq!(fs::read_to_string(pod.volume("m.gguf")).unwrap(), "model");
}

#[test]
fn wrong_flags_end_with_the_code_for_wrong_input() {
    let output = Command::new(PROGRAM).arg("copy").output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(words(&output).contains("--from"), "{}", words(&output));
}

#[test]
fn the_installed_program_works() {
    let pod = Pod::new();
    let tools = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let output = Command::new(PROGRAM)
            .args(["install", "--to"])
            .arg(tools.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", words(&output));
    }
    let program = tools.path().join("llama-model-copy");
    let mode = fs::metadata(&program).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
    assert_eq!(fs::read_dir(tools.path()).unwrap().count(), 1);

    fs::write(pod.image("m.gguf"), "model").unwrap();
    let output = Command::new(&program)
        .arg("copy")
        .arg("--from")
        .arg(pod.image("m.gguf"))
        .arg("--to")
        .arg(pod.volume(""))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", words(&output));
    assert_eq!(fs::read_to_string(pod.volume("m.gguf")).unwrap(), "model");
}

#[test]
fn installing_where_no_folder_is_names_it() {
    let pod = Pod::new();
    let output = Command::new(PROGRAM)
        .args(["install", "--to", "/nowhere/at/all", "--termination-log"])
        .arg(pod.log())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(pod.report().message.contains("/nowhere/at/all"));
}

#[test]
fn sigterm_ends_a_copy_and_removes_its_part() {
    let pod = Pod::new();
    let sparse = fs::File::create(pod.image("m.gguf")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    // The signal can come after the last byte; then that try shows nothing.
    let output = (0..10)
        .map(|_| terminated_while_copying(&pod))
        .find(|output| !output.status.success())
        .unwrap();
    assert_eq!(output.status.signal(), None);
    assert_eq!(output.status.code(), Some(143), "{}", words(&output));
    assert!(pod.volume_names().is_empty());
    assert_eq!(fs::read_to_string(pod.log()).unwrap(), "");
}

fn terminated_while_copying(pod: &Pod) -> Output {
    let mut command = pod.copy_command(&pod.image("m.gguf"));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !pod.volume(".m.gguf.part").exists()
        && child.try_wait().unwrap().is_none()
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    let id = child.id().to_string();
    // It fails when the copy has just ended, which the exit status tells too.
    Command::new("kill").arg(id).output().unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn heads_are_sparse_files_of_the_whole_length() {
    use std::os::unix::fs::MetadataExt;
    let pod = Pod::new();
    let header = br#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#;
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header);
    let mut file = fs::File::create(pod.image("m.safetensors")).unwrap();
    std::io::Write::write_all(&mut file, &start).unwrap();
    let whole = 5 << 30;
    file.set_len(whole).unwrap();
    fs::write(pod.image("config.json"), "{}").unwrap();
    let output = pod
        .copy_command(&pod.image(""))
        .arg("--heads")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", words(&output));
    assert_eq!(pod.names_in("image"), ["config.json", "m.safetensors"]);
    let config = fs::read_to_string(pod.volume("image/config.json")).unwrap();
    assert_eq!(config, "{}");
    let copy = fs::metadata(pod.volume("image/m.safetensors")).unwrap();
    assert_eq!(copy.len(), whole);
    assert!(copy.blocks() * 512 < 1 << 20, "{} blocks", copy.blocks());
    let mut read = vec![0; start.len()];
    let mut file = fs::File::open(pod.volume("image/m.safetensors")).unwrap();
    std::io::Read::read_exact(&mut file, &mut read).unwrap();
    assert_eq!(read, start);
}
