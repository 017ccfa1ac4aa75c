//! `LoRA` adapters: against PEFT, whose logits lie beside its files
//! (`reference/make_adapters.py` writes both), and against models whose weights the
//! adapters were merged into.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests may fail, and round"
)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::reference::{folder, open};
use common::{Setup, max_difference, on_threads, segment};
use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::device::{Device, Precision};
use llama_model::fixture::GgufWriter;
use llama_model::gguf::{GgmlType, Value};
use llama_model::memory::KvFormat;
use llama_model::{
    Checkpoint, Collective, DeviceLlama, Layout, Llama, LoadOptions, Segment, StepModel, Wanted,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

const ROOM: AdapterRoom = AdapterRoom {
    count: 32,
    rank: 40,
};

fn setup(layout: Layout, slots: usize) -> Setup {
    Setup {
        layout,
        slots,
        max_tokens: 64,
        kv: KvFormat::F32,
    }
}

/// Logits of every token of each sequence, which one step computes together, by the
/// adapter in its folder.
fn logits(
    checkpoint: &Checkpoint,
    layout: Layout,
    sequences: &[(Option<&Path>, &[u32])],
    load: impl Fn(&Checkpoint, &LoadOptions) -> Box<dyn StepModel> + Sync,
) -> Vec<Vec<f32>> {
    let found = on_threads(setup(layout, sequences.len()), |options, collective| {
        let options = LoadOptions {
            adapters: ROOM,
            ..*options
        };
        let mut model = load(checkpoint, &options);
        let loader = model.adapter_loader();
        let mut segments: Vec<Segment> = Vec::new();
        for (place, (adapter, tokens)) in (0_u32..).zip(sequences) {
            if let Some(adapter) = adapter {
                let adapter = loader(adapter).expect("loads");
                model.put_adapter(place, adapter).expect("fits");
            }
            segments.push(Segment {
                logits: Wanted::All,
                adapter: adapter.map(|_| place),
                ..segment(place, 0, tokens)
            });
        }
        step(model.as_mut(), &segments, collective)
    });
    let [first, others @ ..] = &found[..] else {
        panic!("no rank")
    };
    assert!(others.iter().all(|rows| rows == first));
    first.clone()
}

fn step(
    model: &mut dyn StepModel,
    segments: &[Segment],
    collective: &mut dyn Collective,
) -> Vec<Vec<f32>> {
    model.step(segments, collective).expect("steps")
}

fn on_cores(checkpoint: &Checkpoint, options: &LoadOptions) -> Box<dyn StepModel> {
    Box::new(Llama::load(checkpoint, options, &|_, _| {}).expect("loads"))
}

fn on_device(checkpoint: &Checkpoint, options: &LoadOptions) -> Box<dyn StepModel> {
    let place = (&Device::Cpu, Precision::Full);
    Box::new(DeviceLlama::load(checkpoint, options, place, &|_, _| {}).expect("loads"))
}

/// Tokens and logits of a fixture.
fn reference(name: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let bytes = std::fs::read(folder(name).join("reference.safetensors")).expect("is there");
    let tensors = SafeTensors::deserialize(&bytes).expect("reads");
    let tokens = tensors.tensor("tokens").expect("is there");
    let tokens = tokens.data().as_chunks().0.iter();
    let tokens = tokens.map(|id| u32::try_from(i64::from_le_bytes(*id)).expect("a token"));
    let logits = tensors.tensor("logits").expect("is there");
    let rows = floats(logits.data());
    let rows = rows.chunks(logits.shape()[1]).map(<[f32]>::to_vec);
    (tokens.collect(), rows.collect())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let values = bytes.as_chunks().0.iter();
    values.map(|value| f32::from_le_bytes(*value)).collect()
}

/// Logits are PEFT's, whatever else is in the batch and however ranks divide the model.
fn compare(base: &str, adapter: &str, layouts: &[Layout]) {
    let (checkpoint, (tokens, expected)) = (open(base), reference(adapter));
    let adapter = folder(adapter);
    let alone = [(Some(adapter.as_path()), &tokens[..])];
    let found = logits(&checkpoint, Layout::tensor(1), &alone, on_cores);
    let difference = max_difference(&found, &expected);
    assert!(difference < 1e-4, "{difference}");
    let tensors = logits(&checkpoint, Layout::tensor(1), &alone, on_device);
    let difference = max_difference(&tensors, &expected);
    assert!(difference < 1e-4, "on a device: {difference}");
    for layout in layouts {
        let mixed = [(None, &tokens[..7]), alone[0], (None, &tokens[3..9])];
        let rows = logits(&checkpoint, *layout, &mixed, on_cores);
        if checkpoint.config().agrees(layout.tensor) {
            assert!(rows[7..47] == found, "{layout:?}");
        }
        assert!(max_difference(&rows[7..47], &found) < 1e-4, "{layout:?}");
        let rows = logits(&checkpoint, *layout, &mixed, on_device);
        let difference = max_difference(&rows[7..47], &expected);
        assert!(difference < 1e-4, "{layout:?} on devices: {difference}");
    }
}

fn layout(tensor: usize, pipeline: usize) -> Layout {
    Layout { tensor, pipeline }
}

#[test]
fn every_matrix_of_llama() {
    compare(
        "llama-plain",
        "adapter-llama",
        &[layout(2, 1), layout(4, 1), layout(2, 2)],
    );
}

#[test]
fn a_higher_rank_with_a_scale_by_its_root() {
    compare("llama-plain", "adapter-llama-stable", &[layout(2, 1)]);
}

#[test]
fn every_matrix_of_llama_4_but_the_experts() {
    compare(
        "llama4-maverick",
        "adapter-llama4",
        &[layout(2, 1), layout(1, 2)],
    );
}

/// Random numbers between −1 and 1.
struct Noise(u64);

impl Noise {
    fn values(&mut self, count: usize) -> Vec<f32> {
        let next = |_| {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }
}

/// Writes a tensor file of f32 matrices.
fn write(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).expect("fits");
        (name, view)
    });
    safetensors::serialize_to_file(views, None, path).expect("writes");
}

/// An adapter of some matrices, and the same changes in the model itself.
fn adapter_and_merged(number: u64, root: &Path) -> (std::path::PathBuf, Checkpoint) {
    let base = folder("llama-plain");
    let bytes = std::fs::read(base.join("model.safetensors")).expect("is there");
    let weights = SafeTensors::deserialize(&bytes).expect("reads");
    let mut noise = Noise(number);
    let rank = [1, 4, 8, 16, 24, 32][usize::try_from(number).expect("small") % 6];
    let (mut merged, mut thin) = (BTreeMap::new(), BTreeMap::new());
    for (at, (name, weight)) in weights.tensors().into_iter().enumerate() {
        let mut values = floats(weight.data());
        let shape = weight.shape().to_vec();
        let is_changed = name.contains("_proj") && !(at as u64 + number).is_multiple_of(3);
        if let ([rows, columns], true) = (&shape[..], is_changed) {
            let part = name.trim_end_matches(".weight");
            let a = noise.values(rank * columns);
            let b: Vec<f32> = noise.values(rows * rank);
            let b: Vec<f32> = b.iter().map(|value| 0.02 * value).collect();
            for (row, values) in values.chunks_mut(*columns).enumerate() {
                for (column, value) in values.iter_mut().enumerate() {
                    let products = (0..rank)
                        .map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * columns + column]));
                    *value = (f64::from(*value) + 2.0 * products.sum::<f64>()) as f32;
                }
            }
            let name = |half: &str| format!("base_model.model.{part}.lora_{half}.weight");
            thin.insert(name("A"), (vec![rank, *columns], a));
            thin.insert(name("B"), (vec![*rows, rank], b));
        }
        merged.insert(name, (shape, values));
    }
    let adapter = root.join(format!("adapter-{number}"));
    std::fs::create_dir(&adapter).expect("writes");
    write(&adapter.join("adapter_model.safetensors"), &thin);
    let settings = format!(
        r#"{{"peft_type":"LORA","r":{rank},"lora_alpha":{}}}"#,
        2 * rank
    );
    std::fs::write(adapter.join("adapter_config.json"), settings).expect("writes");
    let model = root.join(format!("merged-{number}"));
    std::fs::create_dir(&model).expect("writes");
    std::fs::copy(base.join("config.json"), model.join("config.json")).expect("copies");
    write(&model.join("model.safetensors"), &merged);
    let merged = Checkpoint::open(&model, LoadFormat::Auto).expect("opens");
    (adapter, merged)
}

#[test]
fn a_batch_of_32_adapters_computes_what_merged_weights_do() {
    let root = TempDir::new().expect("a folder");
    let all: Vec<_> = (0..32)
        .map(|number| adapter_and_merged(number, root.path()))
        .collect();
    let prompts: Vec<Vec<u32>> = (0..33)
        .map(|number| {
            (0..5 + number % 7)
                .map(|at| (number * 31 + at * 17) % 96)
                .collect()
        })
        .collect();
    let mut batch: Vec<(Option<&Path>, &[u32])> = all
        .iter()
        .zip(&prompts)
        .map(|((adapter, _), prompt)| (Some(adapter.as_path()), &prompt[..]))
        .collect();
    batch.push((None, &prompts[32]));
    let checkpoint = open("llama-plain");
    let together = logits(&checkpoint, Layout::tensor(1), &batch, on_cores);
    for layout in [layout(2, 1), layout(4, 2)] {
        let rows = logits(&checkpoint, layout, &batch, on_cores);
        assert!(rows == together, "{layout:?}");
    }
    let mut rest = &together[..];
    for (number, (adapter, prompt)) in batch.iter().enumerate() {
        let (rows, behind) = rest.split_at(prompt.len());
        rest = behind;
        let alone = [(*adapter, *prompt)];
        let alone = logits(&checkpoint, Layout::tensor(1), &alone, on_cores);
        assert!(alone == rows, "adapter {number} in a batch");
        let merged = all.get(number).map_or(&checkpoint, |(_, merged)| merged);
        let expected = logits(merged, Layout::tensor(1), &[(None, prompt)], on_cores);
        let difference = max_difference(rows, &expected);
        assert!(difference < 1e-4, "adapter {number}: {difference}");
        if adapter.is_some() {
            let plain = logits(&checkpoint, Layout::tensor(1), &[(None, prompt)], on_cores);
            assert!(
                max_difference(rows, &plain) > 0.1,
                "adapter {number} does nothing"
            );
        }
    }
}

/// The fixture as a GGUF: rows of query and key projections whose halves of a head turn
/// together lie side by side there, as ggml's converter puts them.
fn as_gguf(path: &Path) -> Checkpoint {
    let bytes = std::fs::read(folder("llama-plain").join("model.safetensors"));
    let bytes = bytes.expect("is there");
    let weights = SafeTensors::deserialize(&bytes).expect("reads");
    let mut gguf = GgufWriter::default();
    gguf.set_text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 2),
        ("context_length", 1024),
        ("embedding_length", 128),
        ("feed_forward_length", 160),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 32),
        ("attention.value_length", 32),
        ("rope.dimension_count", 32),
    ] {
        gguf.set(&format!("llama.{key}"), Value::Unsigned(value));
    }
    let epsilon = Value::Float(f64::from(1e-5_f32));
    gguf.set("llama.attention.layer_norm_rms_epsilon", epsilon);
    let tokens = (0..96).map(|id| format!("token {id}"));
    gguf.set("tokenizer.ggml.tokens", Value::TextList(tokens.collect()));
    for (name, weight) in weights.tensors() {
        let mut name = name.replace("model.layers.", "blk.");
        for (from, to) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            name = name.replace(from, to);
        }
        let mut data = weight.data().to_vec();
        if name.contains("attn_q.") || name.contains("attn_k.") {
            let row = weight.shape()[1] * 4;
            for (number, out) in data.chunks_exact_mut(row).enumerate() {
                let (head, at) = (number / 32, number % 32);
                let from = head * 32 + at / 2 + at % 2 * 16;
                out.copy_from_slice(&weight.data()[from * row..(from + 1) * row]);
            }
        }
        let dims = weight.shape().iter().rev().map(|size| *size as u64);
        gguf.tensors
            .push((name, dims.collect(), GgmlType::F32, data));
    }
    gguf.write(path).expect("writes");
    Checkpoint::open(path, LoadFormat::Auto).expect("opens")
}

#[test]
fn an_adapter_from_hugging_face_fits_a_gguf() {
    let root = TempDir::new().expect("a folder");
    let gguf = as_gguf(&root.path().join("model.gguf"));
    let (tokens, expected) = reference("adapter-llama");
    let adapter = folder("adapter-llama");
    for layout in [layout(1, 1), layout(2, 1)] {
        let found = logits(&gguf, layout, &[(Some(&adapter), &tokens)], on_cores);
        let difference = max_difference(&found, &expected);
        assert!(difference < 1e-4, "{layout:?}: {difference}");
    }
}

/// What loading the adapter in `folder` into `base` is refused with.
fn refusal(base: &str, folder: &Path, room: AdapterRoom) -> String {
    let checkpoint = open(base);
    let found = on_threads(setup(Layout::tensor(1), 1), |options, _| {
        let options = LoadOptions {
            adapters: room,
            ..*options
        };
        let model = on_cores(&checkpoint, &options);
        let loaded = (model.adapter_loader())(folder);
        loaded.expect_err("does not fit").to_string()
    });
    found[0].clone()
}

#[test]
fn what_does_not_fit_is_named() {
    let adapter = folder("adapter-llama");
    let small = AdapterRoom { count: 1, rank: 4 };
    let error = refusal("llama-plain", &adapter, small);
    assert!(error.ends_with("an adapter of rank 8, the highest that there is room for is 4"));
    let error = refusal("llama-tied", &adapter, ROOM);
    assert!(error.contains("has the shape ["), "{error}");
    let error = refusal("llama4-maverick", &adapter, ROOM);
    assert!(
        error.contains("changes no matrix that adapters may change"),
        "{error}"
    );
    let error = refusal("llama-plain", Path::new("/nowhere"), ROOM);
    assert!(
        error.starts_with("/nowhere/adapter_config.json does not exist"),
        "{error}"
    );

    let root = TempDir::new().expect("a folder");
    let damaged = |name: &str, damage: &dyn Fn(&mut Vec<u8>)| {
        let copy = root.path().join(name);
        std::fs::create_dir(&copy).expect("writes");
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(adapter.join(file), copy.join(file)).expect("copies");
        }
        let path = copy.join("adapter_model.safetensors");
        let mut bytes = std::fs::read(&path).expect("reads");
        damage(&mut bytes);
        std::fs::write(&path, bytes).expect("writes");
        refusal("llama-plain", &copy, ROOM)
    };
    let error = damaged("short", &|bytes| bytes.truncate(bytes.len() - 4));
    assert!(error.contains("is cut short"), "{error}");
    let error = damaged("nan", &|bytes| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(
        error.contains("holds values that are no numbers"),
        "{error}"
    );
}

#[test]
fn a_step_that_names_no_loaded_adapter_is_refused() {
    let checkpoint = open("llama-plain");
    on_threads(setup(Layout::tensor(1), 1), |options, collective| {
        let mut model = on_cores(&checkpoint, options);
        let named = Segment {
            adapter: Some(3),
            ..segment(0, 0, &[1, 2])
        };
        let error = model.step(&[named], collective).expect_err("not there");
        assert_eq!(
            error.to_string(),
            "invalid step: no adapter is loaded at place 3"
        );
    });
}
