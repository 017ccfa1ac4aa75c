//! Models cut for ranks, of which parts are damaged or missing.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use hostile::{Folder, Invalid, NotFound, Truncated, Unsupported};
use llama_checkpoint::checkpoint::{SHARDS, ShardManifest, cut_name, cut_scales_name};
use llama_checkpoint::slices::ModelSlices;
use llama_checkpoint::{Checkpoint, Layout, ModelErrorCategory, Shard};
use serde_json::{Map, Value, json};

/// The parts of the checkpoint `name`, as they would be written.
fn cut(name: &str, layout: Layout) -> Folder {
    let whole = Folder::of(name).opens();
    let folder = Folder::empty();
    let manifest = ShardManifest::new(&whole, layout);
    let text = serde_json::to_vec(&manifest).expect("serialises");
    folder.put(SHARDS, text);
    for (rank, file) in manifest.files.iter().enumerate() {
        folder.put_tensors(file, b"{}", 0);
        folder.change_tensors(file, |tensors| *tensors = part(&whole, layout, rank));
    }
    folder
}

fn part(whole: &Checkpoint, layout: Layout, rank: usize) -> Map<String, Value> {
    let shard = Shard::new(whole.config(), layout, rank).expect("splits");
    let slices = ModelSlices::locate(whole, &shard).expect("locates");
    let mut tensors = Map::new();
    for matrix in slices.matrices() {
        let shape = [matrix.rows, matrix.format.row_bytes(matrix.columns)];
        let name = cut_name(&matrix.name, matrix.format);
        tensors.insert(name, json!({"dtype": "U8", "shape": shape}));
        if matrix.scales.is_some() {
            let scales = json!({"dtype": "F32", "shape": [matrix.rows]});
            tensors.insert(cut_scales_name(&matrix.name), scales);
        }
    }
    for vector in slices.vectors() {
        let name = vector.name.clone();
        tensors.insert(name, json!({"dtype": "F32", "shape": [vector.len]}));
    }
    tensors
}

const LAYOUT: Layout = Layout {
    tensor: 2,
    pipeline: 2,
};

#[test]
fn what_is_broken_below_opens() {
    let checkpoint = cut("llama-plain", LAYOUT).opens();
    assert_eq!(checkpoint.cut_for(), Some(LAYOUT));
    let one = Layout::tensor(1);
    assert_eq!(cut("llama-fp8-channel", one).opens().cut_for(), Some(one));
}

/// What is wrong with the list, and what it is refused with.
type Case = (fn(&mut Value), ModelErrorCategory, &'static str);

#[test]
fn lists_that_are_damaged() {
    let cases: [Case; 20] = [
        (
            |m| m["version"] = json!(2),
            Unsupported,
            " has version 2; this worker reads version 1",
        ),
        (
            |m| *m = json!({"version": 2, "parts": []}),
            Unsupported,
            " has version 2; this worker reads version 1",
        ),
        (
            |m| *m = json!([]),
            Invalid,
            " is damaged: invalid length 0, expected struct Version with 1 element at line 1 column 2",
        ),
        (
            |m| *m = json!({"version": 1}),
            Invalid,
            " is damaged: missing field `layout` at line 1 column 13",
        ),
        (
            |m| m["layout"]["tensor"] = json!(0),
            Invalid,
            " names 4 files for tensor parallel 0 and pipeline parallel 2",
        ),
        (
            |m| m["layout"] = json!({"tensor": 1_u64 << 63 | 2, "pipeline": 2}),
            Invalid,
            " names 4 files for tensor parallel 9223372036854775810 and pipeline parallel 2",
        ),
        (
            |m| m["layout"] = json!({"tensor": 4, "pipeline": 4}),
            Invalid,
            " names 4 files for tensor parallel 4 and pipeline parallel 4",
        ),
        (
            |m| m["files"] = json!([]),
            Invalid,
            " names 0 files for tensor parallel 2 and pipeline parallel 2",
        ),
        (
            |m| {
                m["layout"] = json!({"tensor": 5000, "pipeline": 1});
                m["files"] = json!(vec!["x"; 5000]);
            },
            Invalid,
            " names 5000 files for tensor parallel 5000 and pipeline parallel 1",
        ),
        (
            |m| m["layout"] = json!({"tensor": 1, "pipeline": 4}),
            Invalid,
            ": pipeline parallel 4 does not divide 2 layers; 1 to 2 would",
        ),
        (
            |m| m["files"][1] = json!("../rank-00001.safetensors"),
            Invalid,
            " names the file \"../rank-00001.safetensors\", expected a name in the same folder",
        ),
        (
            |m| m["files"][1] = json!("/"),
            Invalid,
            " names the file \"/\", expected a name in the same folder",
        ),
        (
            |m| m["files"][1] = json!("rank-00009.safetensors"),
            NotFound,
            " names rank-00009.safetensors, which does not exist",
        ),
        (
            |m| m["config"]["kv_heads"] = json!(0),
            Invalid,
            ": 0 KV heads, expected 1 to 1024",
        ),
        (
            |m| m["config"]["hidden"] = json!(u64::MAX),
            Invalid,
            ": 18446744073709551615 hidden dimensions, expected 1 to 16777216",
        ),
        (
            |m| m["config"]["layers"] = json!([]),
            Invalid,
            ": 0 layers, expected 1 to 1024",
        ),
        (
            |m| m["config"]["layers"][0]["experts"] = json!(true),
            Invalid,
            ": layers have experts, but their sizes are missing",
        ),
        (
            |m| m["config"]["layers"][0]["chunked"] = json!(true),
            Invalid,
            ": layers attend in chunks, but their size is missing",
        ),
        (
            |m| m["config"]["rope"]["base"] = json!(-1.0),
            Invalid,
            ": the base of rotary frequencies is -1, expected a positive number",
        ),
        (
            |m| m["config"]["rope"]["dim"] = json!(0),
            Invalid,
            ": rotary embedding of 0 dimensions in heads of 32",
        ),
    ];
    for (change, category, what) in cases {
        let folder = cut("llama-plain", LAYOUT);
        folder.change(SHARDS, change);
        let (found, sentence) = folder.refusal();
        // A layout that does not divide the model is the folder's, not the list's.
        let path = folder.path().display().to_string();
        let sentence = sentence.replace(&path, SHARDS);
        assert_eq!((found, sentence), (category, format!("{SHARDS}{what}")));
    }
    let folder = cut("llama-plain", LAYOUT);
    folder.put(SHARDS, "[".repeat(1 << 16));
    let what = "invalid type: sequence, expected u32 at line 1 column 1";
    let expected = format!("{SHARDS} is damaged: {what}");
    assert_eq!(folder.refusal(), (Invalid, expected));
}

#[test]
fn parts_that_are_damaged() {
    let file = "rank-00001.safetensors";
    let folder = cut("llama-plain", LAYOUT);
    folder.remove(file);
    let expected = format!("{SHARDS} names {file}, which does not exist");
    assert_eq!(folder.refusal(), (NotFound, expected));

    let folder = cut("llama-plain", LAYOUT);
    folder.resize(file, -1);
    let (category, sentence) = folder.refusal();
    assert_eq!(category, Truncated);
    assert!(
        sentence.starts_with(&format!("{file} is cut short: tensor")),
        "{sentence}"
    );

    // The parts of two ranks exchanged.
    let folder = cut("llama-plain", LAYOUT);
    folder.change(SHARDS, |m| m["files"][3] = json!("rank-00000.safetensors"));
    let (category, sentence) = folder.refusal();
    assert_eq!(category, Invalid);
    let what = "tensor model.layers.1.input_layernorm.weight is missing";
    assert!(sentence.ends_with(what), "{sentence}");
}

/// What is wrong with a rank's tensors, and what it is refused with.
type PartCase = (
    fn(&mut Map<String, Value>),
    ModelErrorCategory,
    &'static str,
);

#[test]
fn tensors_of_parts_are_checked() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let cases: [PartCase; 6] = [
        (
            |t| drop(t.remove(&format!("{Q}:F8_E4M3"))),
            Invalid,
            "the part of rank 0 of tensor model.layers.0.self_attn.q_proj.weight, or its scales, is missing",
        ),
        (
            |t| drop(t.remove(&format!("{Q}:scales"))),
            Invalid,
            "the part of rank 0 of tensor model.layers.0.self_attn.q_proj.weight, or its scales, is missing",
        ),
        (
            |t| t[&format!("{Q}:scales")]["shape"] = json!([64]),
            Invalid,
            "tensor model.layers.0.self_attn.q_proj.weight:scales has the shape [64], expected [128]",
        ),
        (
            |t| t[&format!("{Q}:scales")]["dtype"] = json!("U8"),
            Unsupported,
            "tensor model.layers.0.self_attn.q_proj.weight:scales is stored as U8; this worker computes with F32, F16, BF16, F8_E4M3, Q4_0, Q4_1, Q8_0, I8 with scales, packed 4-bit integers, and ggml's K-quants",
        ),
        (
            |t| t[&format!("{Q}:F8_E4M3")]["shape"] = json!([128, 32]),
            Invalid,
            "tensor model.layers.0.self_attn.q_proj.weight:F8_E4M3 has the shape [128, 32], expected [128, 64]",
        ),
        (
            |t| drop(t.remove("model.layers.1.input_layernorm.weight")),
            Invalid,
            "tensor model.layers.1.input_layernorm.weight is missing",
        ),
    ];
    for (change, category, what) in cases {
        let folder = cut("llama-fp8-channel", Layout::tensor(1));
        folder.change_tensors("rank-00000.safetensors", change);
        let expected = format!("{}: {what}", folder.path().display());
        assert_eq!(folder.refusal(), (category, expected));
    }
}
