//! Weights that are no numbers, which only loading meets.

#![allow(clippy::expect_used, clippy::panic, reason = "tests may fail")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::fixture::TinyLlama;
use llama_model::gguf::GgmlType;
use llama_model::memory::KvFormat;
use llama_model::{Checkpoint, Layout, Llama, LoadOptions, ModelErrorCategory};
use tempfile::TempDir;

const OPTIONS: LoadOptions = LoadOptions {
    layout: Layout {
        tensor: 1,
        pipeline: 1,
    },
    rank: 0,
    threads: 1,
    slots: 1,
    blocks: None,
    max_tokens: 64,
    kv: KvFormat::F16,
    verify: false,
    adapters: AdapterRoom::NONE,
};

/// The sentence and category that loading ends with.
fn refusal(checkpoint: &Checkpoint) -> (ModelErrorCategory, String) {
    match Llama::load(checkpoint, &OPTIONS, &|_, _| {}) {
        Ok(_) => panic!("{} loads", checkpoint.path().display()),
        Err(error) => (error.category(), error.to_string()),
    }
}

/// A copy of a reference model.
fn copy(name: &str) -> (TempDir, Checkpoint) {
    let folder = TempDir::new().expect("a folder");
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(name);
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), folder.path().join(file)).expect("copies");
    }
    let checkpoint = Checkpoint::open(folder.path(), LoadFormat::Auto).expect("opens");
    (folder, checkpoint)
}

/// Overwrites the value number `at` of a tensor.
fn put(checkpoint: &Checkpoint, tensor: &str, at: usize, value: &[u8]) {
    let stored = &checkpoint.tensors()[tensor];
    let path: &PathBuf = &checkpoint.files()[stored.file].path;
    let file = File::options().write(true).open(path).expect("opens");
    let place = stored.start + (at * value.len()) as u64;
    assert!(place < stored.start + stored.bytes, "{tensor} has no {at}");
    file.write_all_at(value, place).expect("writes");
}

#[test]
fn scales_and_norms_that_are_no_numbers() {
    const Q: &str = "model.layers.1.self_attn.q_proj";
    let bf16 = |value: f32| bf16::from_f32(value).to_le_bytes().to_vec();
    let f32 = |value: f32| value.to_le_bytes().to_vec();
    let scale = format!("{Q}.weight_scale");
    let norm = "model.layers.1.input_layernorm.weight";
    let gate = "model.layers.1.mlp.gate_proj.weight_scale";
    for (model, tensor, value, what) in [
        (
            "llama-fp8-channel",
            scale.as_str(),
            bf16(f32::NAN),
            format!("{Q}.weight_scale holds NaN, expected numbers"),
        ),
        (
            "llama-fp8-channel",
            &scale,
            bf16(f32::INFINITY),
            format!("{Q}.weight_scale holds inf, expected numbers"),
        ),
        (
            "llama-fp8-fbgemm",
            gate,
            f32(f32::NEG_INFINITY),
            format!("{gate} holds -inf, expected numbers"),
        ),
        (
            "llama-int8-channel",
            &scale,
            f32(f32::NAN),
            format!("{Q}.weight_scale holds NaN, expected numbers"),
        ),
        (
            "llama-int4-group",
            &scale,
            bf16(f32::NAN),
            format!("{Q}.weight has the scale NaN, expected a number that fits half precision"),
        ),
        (
            "llama-int4-group",
            &scale,
            bf16(131_072.0),
            format!("{Q}.weight has the scale 131072, expected a number that fits half precision"),
        ),
        (
            "llama-plain",
            norm,
            f32(f32::NAN),
            format!("{norm} holds NaN, expected numbers"),
        ),
    ] {
        let (_folder, checkpoint) = copy(model);
        put(&checkpoint, tensor, 5, &value);
        let expected = (ModelErrorCategory::ModelInvalid, format!("tensor {what}"));
        assert_eq!(refusal(&checkpoint), expected, "{model}");
    }
}

#[test]
fn divisors_of_rotary_frequencies_are_positive() {
    for (value, what) in [
        (f32::NAN, "holds NaN, expected numbers"),
        (0.0, "holds 0, expected positive numbers"),
        (-2.0, "holds -2, expected positive numbers"),
    ] {
        let model = TinyLlama {
            rope_factors: true,
            ..TinyLlama::default()
        };
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, model.gguf().to_bytes()).expect("writes");
        let checkpoint = Checkpoint::open(&path, LoadFormat::Auto).expect("opens");
        put(&checkpoint, "rope_freqs.weight", 3, &value.to_le_bytes());
        let expected = format!("tensor rope_freqs.weight {what}");
        let category = ModelErrorCategory::ModelInvalid;
        assert_eq!(refusal(&checkpoint), (category, expected));
    }
}

/// Blocks that are quantised anew when they are loaded.
#[test]
fn blocks_whose_values_fit_no_block() {
    const NAME: &str = "blk.0.attn_q.weight";
    const BLOCK_BYTES: usize = 144;
    let model = TinyLlama {
        hidden: 256,
        ..TinyLlama::default()
    };
    for (scale, rest, shown) in [
        (f16::NAN, 0x11, "inf"),
        (f16::INFINITY, 0, "inf"),
        (f16::MAX, 0xFF, "48741"),
    ] {
        let mut gguf = model.gguf();
        let tensor = gguf
            .tensors
            .iter_mut()
            .find(|(name, ..)| name == NAME)
            .expect("is there");
        let blocks = usize::try_from(tensor.1.iter().product::<u64>() / 256).expect("fits");
        let mut block = vec![rest; BLOCK_BYTES];
        block[..2].copy_from_slice(&scale.to_le_bytes());
        block[2..4].fill(0);
        let mut bytes = vec![0; (blocks - 1) * BLOCK_BYTES];
        bytes.extend(block);
        (tensor.2, tensor.3) = (GgmlType::Q4_K, bytes);
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, gguf.to_bytes()).expect("writes");
        let checkpoint = Checkpoint::open(&path, LoadFormat::Auto).expect("opens");
        let (category, said) = refusal(&checkpoint);
        assert_eq!(category, ModelErrorCategory::ModelInvalid, "{scale}");
        // The last digits of the scale depend on the instructions that widen blocks.
        let start = format!("tensor {NAME} has the scale {shown}");
        assert!(said.starts_with(&start), "{said}");
        let end = ", expected a number that fits half precision";
        assert!(said.ends_with(end), "{said}");
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_read() {
    let (folder, checkpoint) = copy("llama-plain");
    let path = folder.path().join("model.safetensors");
    let file = File::options().write(true).open(&path).expect("opens");
    file.set_len(100_000).expect("cuts");
    let (category, sentence) = refusal(&checkpoint);
    assert_eq!(category, ModelErrorCategory::ModelTruncated);
    let start = format!("{} became shorter while it was read: ", path.display());
    assert!(sentence.starts_with(&start), "{sentence}");
    std::fs::remove_file(&path).expect("removes");
    let expected = format!("read {}", path.display());
    assert_eq!(
        refusal(&checkpoint),
        (ModelErrorCategory::ModelNotFound, expected)
    );
}
