//! Indices of several safetensors files that name other files, or other tensors.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use std::process::Command;

use hostile::{Folder, INDEX, Invalid, NotFound, SINGLE, header_of};
use serde_json::{Value, json};

#[test]
fn an_index_names_files_beside_it() {
    for name in [
        "..",
        "../x.safetensors",
        "/",
        "/etc/passwd",
        "a/b",
        "a/",
        "./a",
        ".",
        "",
        ".a",
    ] {
        let folder = Folder::of("llama-sharded");
        folder.change(INDEX, |index| {
            index["weight_map"]["model.norm.weight"] = json!(name);
        });
        let what = format!("names the file \"{name}\", expected a name in the same folder");
        assert_eq!(folder.refusal(), (Invalid, format!("{INDEX} {what}")));
    }
    let folder = Folder::of("llama-sharded");
    let long = format!("a\n{}", "n".repeat(1 << 20));
    folder.change(INDEX, |index| {
        index["weight_map"]["model.norm.weight"] = json!(long);
    });
    let shown = format!("a\\n{}…", "n".repeat(58));
    let expected = format!("{INDEX} names {shown}, which does not exist");
    assert_eq!(folder.refusal(), (NotFound, expected));
}

#[test]
fn an_index_and_its_files_agree() {
    let first = "model-00001-of-00004.safetensors";
    let second = "model-00002-of-00004.safetensors";

    let folder = Folder::of("llama-sharded");
    folder.remove(second);
    let expected = format!("{INDEX} names {second}, which does not exist");
    assert_eq!(folder.refusal(), (NotFound, expected));

    let folder = Folder::of("llama-sharded");
    folder.change(INDEX, |index| {
        index["weight_map"]["model.norm.weight"] = json!(first);
    });
    let expected =
        format!("{INDEX} says that tensor model.norm.weight is in {first}, but it is not");
    assert_eq!(folder.refusal(), (Invalid, expected));

    let folder = Folder::of("llama-sharded");
    folder.change(INDEX, |index| index["weight_map"]["lora"] = json!(first));
    let expected = format!("{INDEX} says that tensor lora is in {first}, but it is not");
    assert_eq!(folder.refusal(), (Invalid, expected));

    let folder = Folder::of("llama-sharded");
    let (header, _) = header_of(&folder.path().join(first));
    let header: Value = serde_json::from_slice(&header).expect("is JSON");
    let (name, tensor) = header
        .as_object()
        .and_then(|header| header.iter().find(|(name, _)| *name != "__metadata__"))
        .expect("a tensor");
    folder.change_tensors(second, |tensors| {
        tensors.insert(name.clone(), tensor.clone());
    });
    let (category, sentence) = folder.refusal();
    let path = folder.path().display();
    let expected = format!("tensor {name} is in {first} and in {second}");
    assert_eq!((category, sentence), (Invalid, expected), "{path}");
}

#[test]
fn an_index_is_a_list_of_files() {
    let cases = [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{}", "missing field `weight_map` at line 1 column 2"),
        (
            "{\"weight_map\":[]}",
            "invalid type: sequence, expected an object with the names of tensors at line 1 column 14",
        ),
        (
            "{\"weight_map\":{\"a\":1}}",
            "invalid type: integer `1`, expected a string at line 1 column 20",
        ),
        (
            "{\"weight_map\":{\"a\":\"x\",\"a\":\"x\"}}",
            "tensor a occurs twice at line 1 column 26",
        ),
    ];
    for (text, what) in cases {
        let folder = Folder::of("llama-sharded");
        folder.put(INDEX, text);
        let expected = format!("{INDEX} is not an index: {what}");
        assert_eq!(folder.refusal(), (Invalid, expected));
    }
    let folder = Folder::of("llama-sharded");
    folder.put(INDEX, "{\"weight_map\":{}}");
    let (category, sentence) = folder.refusal();
    assert_eq!(category, Invalid);
    assert!(
        sentence.ends_with("tensor model.layers.0.input_layernorm.weight is missing"),
        "{sentence}"
    );
    folder.resize(INDEX, 1 << 30);
    let expected = format!("{INDEX} has 1073741841 bytes, more than 67108864");
    assert_eq!(folder.refusal(), (Invalid, expected));
    folder.put(INDEX, b"\xff");
    let expected = format!("{INDEX} is not text: invalid utf-8 sequence of 1 bytes from index 0");
    assert_eq!(folder.refusal(), (Invalid, expected));
}

/// Reading a pipe into which nobody writes would never end.
#[test]
fn what_is_no_file_is_not_read() {
    let folder = Folder::of("llama-sharded");
    let name = "model-00001-of-00004.safetensors";
    folder.remove(name);
    let pipe = Command::new("mkfifo")
        .arg(folder.path().join(name))
        .status();
    assert!(pipe.expect("starts").success());
    assert_eq!(folder.refusal(), (Invalid, format!("{name} is not a file")));
    folder.remove(name);
    std::fs::create_dir(folder.path().join(name)).expect("creates");
    assert_eq!(folder.refusal(), (Invalid, format!("{name} is not a file")));

    let folder = Folder::of("llama-plain");
    folder.remove(SINGLE);
    let path = folder.path().display();
    let expected = format!("the folder {path} holds config.json but neither {INDEX} nor {SINGLE}");
    assert_eq!(folder.refusal(), (NotFound, expected));
}
