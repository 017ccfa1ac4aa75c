//! Models as ggml stores them: Llama 4 with all experts of a layer in one tensor,
//! and blocks that are quantised anew.

#![allow(clippy::expect_used, reason = "tests may fail")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Setup, all_logits, on_ranks};
use half::bf16;
use llama_model::checkpoint::LoadFormat;
use llama_model::fixture::GgufWriter;
use llama_model::gguf::{GgmlType, Value};
use llama_model::memory::KvFormat;
use llama_model::{Checkpoint, Layout};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use tempfile::TempDir;

/// Shape and values of every tensor of a Hugging Face checkpoint.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).expect("is there");
    let tensors = SafeTensors::deserialize(&bytes).expect("reads");
    let widen = |(name, tensor): (String, safetensors::tensor::TensorView<'_>)| {
        let values = if tensor.dtype() == Dtype::BF16 {
            let halves = tensor.data().as_chunks::<2>().0.iter();
            halves.map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
        } else {
            let words = tensor.data().as_chunks::<4>().0.iter();
            words.map(|b| f32::from_le_bytes(*b)).collect()
        };
        (name, (tensor.shape().to_vec(), values))
    };
    tensors.tensors().into_iter().map(widen).collect()
}

/// `[experts, inputs, outputs]` as `[experts, outputs, inputs]`, of which the
/// outputs from `first` on are kept, `count` of them.
fn turned(
    (shape, values): &(Vec<usize>, Vec<f32>),
    first: usize,
    count: usize,
) -> (Vec<usize>, Vec<f32>) {
    let [experts, inputs, outputs] = *shape.as_slice() else {
        unreachable!("experts have three dimensions")
    };
    let mut out = Vec::with_capacity(experts * count * inputs);
    for expert in 0..experts {
        for output in first..first + count {
            for input in 0..inputs {
                out.push(values[(expert * inputs + input) * outputs + output]);
            }
        }
    }
    (vec![experts, count, inputs], out)
}

/// Writes a tensor of outermost-first `shape`.
fn put(gguf: &mut GgufWriter, name: &str, (shape, values): &(Vec<usize>, Vec<f32>)) {
    let dims = shape.iter().rev().map(|dim| *dim as u64).collect();
    let bytes = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    gguf.tensors
        .push((name.to_owned(), dims, GgmlType::F32, bytes));
}

fn llama4_gguf(tensors: &Tensors) -> GgufWriter {
    let mut gguf = GgufWriter::default();
    gguf.set_text("general.architecture", "llama4");
    for (key, value) in [
        ("block_count", 5),
        ("context_length", 1024),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("expert_feed_forward_length", 64),
        ("expert_count", 4),
        ("expert_used_count", 1),
        ("interleave_moe_layer_step", 1),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 32),
        ("attention.value_length", 32),
        ("rope.dimension_count", 32),
    ] {
        gguf.set(&format!("llama4.{key}"), Value::Unsigned(value));
    }
    gguf.set("llama4.rope.freq_base", Value::Float(10_000.0));
    let epsilon = Value::Float(f64::from(1e-5_f32));
    gguf.set("llama4.attention.layer_norm_rms_epsilon", epsilon);
    let tokens = (0..96).map(|id| format!("token {id}"));
    gguf.set("tokenizer.ggml.tokens", Value::TextList(tokens.collect()));
    for (name, tensor) in tensors {
        let Some(rest) = name.strip_prefix("model.layers.") else {
            let name = match name.as_str() {
                "model.embed_tokens.weight" => "token_embd.weight",
                "model.norm.weight" => "output_norm.weight",
                _ => "output.weight",
            };
            put(&mut gguf, name, tensor);
            continue;
        };
        let (layer, part) = rest.split_once('.').expect("a layer and its part");
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        if part == "feed_forward.experts.gate_up_proj" {
            put(&mut gguf, &name("ffn_gate_exps"), &turned(tensor, 0, 64));
            put(&mut gguf, &name("ffn_up_exps"), &turned(tensor, 64, 64));
            continue;
        }
        let known = match part {
            "feed_forward.experts.down_proj" => {
                put(&mut gguf, &name("ffn_down_exps"), &turned(tensor, 0, 64));
                continue;
            }
            "input_layernorm.weight" => "attn_norm",
            "post_attention_layernorm.weight" => "ffn_norm",
            "self_attn.q_proj.weight" => "attn_q",
            "self_attn.k_proj.weight" => "attn_k",
            "self_attn.v_proj.weight" => "attn_v",
            "self_attn.o_proj.weight" => "attn_output",
            "feed_forward.router.weight" => "ffn_gate_inp",
            "feed_forward.shared_expert.gate_proj.weight" => "ffn_gate_shexp",
            "feed_forward.shared_expert.up_proj.weight" => "ffn_up_shexp",
            _ => "ffn_down_shexp",
        };
        put(&mut gguf, &name(known), tensor);
    }
    gguf
}

fn logits(checkpoint: &Checkpoint, tensor: usize) -> Vec<Vec<f32>> {
    let tokens: Vec<u32> = (0..60).map(|i| i * 41 % 96).collect();
    let setup = Setup {
        layout: Layout::tensor(tensor),
        slots: 1,
        max_tokens: 64,
        kv: KvFormat::F32,
    };
    on_ranks(checkpoint, setup, |model, ranks| {
        all_logits(model, ranks, &tokens, 64)
    })
    .swap_remove(0)
}

/// The same weights give the same bits from a GGUF and from a Hugging Face folder,
/// with the constants of Llama 4 that ggml does not store.
#[test]
fn llama4_from_a_gguf_is_that_of_hugging_face() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/llama4-scout");
    let tensors = read(&source.join("model.safetensors"));
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("model.gguf");
    llama4_gguf(&tensors).write(&path).expect("writes");
    let gguf = Checkpoint::open(&path, LoadFormat::Auto).expect("opens");

    let other = TempDir::new().expect("a folder");
    let text = std::fs::read_to_string(source.join("config.json")).expect("is there");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
    config["attention_chunk_size"] = json!(8192);
    config["floor_scale"] = json!(8192);
    config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10_000.0});
    std::fs::write(other.path().join("config.json"), config.to_string()).expect("writes");
    let weights = other.path().join("model.safetensors");
    std::fs::copy(source.join("model.safetensors"), weights).expect("copies");
    let hugging_face = Checkpoint::open(other.path(), LoadFormat::Auto).expect("opens");

    assert_eq!(gguf.config(), hugging_face.config());
    let expected = logits(&hugging_face, 1);
    assert_eq!(logits(&gguf, 1), expected);
    assert_eq!(logits(&gguf, 2), expected);
}

/// K-quants become `Q8_0` with a warning, and change little.
#[test]
fn k_quants_are_quantised_anew() {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};
    use llama_model::fixture::TinyLlama;
    use llama_model::kernels::Format;

    let tiny = TinyLlama {
        hidden: 256,
        ffn: 512,
        format: Format::F32,
        ..TinyLlama::default()
    };
    let folder = TempDir::new().expect("a folder");
    let open = |writer: &GgufWriter, name: &str| {
        let path = folder.path().join(name);
        writer.write(&path).expect("writes");
        Checkpoint::open(&path, LoadFormat::Auto).expect("opens")
    };
    let mut writer = tiny.gguf();
    let exact = open(&writer, "exact.gguf");
    for (name, dims, kind, bytes) in &mut writer.tensors {
        let quantized = match name.split('.').nth(2) {
            Some("attn_q" | "ffn_gate" | "ffn_down") => (GgmlDType::Q6K, GgmlType::Q6_K),
            Some("attn_output") => (GgmlDType::Q5K, GgmlType::Q5_K),
            _ => continue,
        };
        let values: Vec<f32> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|value| f32::from_le_bytes(*value))
            .collect();
        let size = |dim: u64| usize::try_from(dim).expect("small");
        let shape = (size(dims[1]), size(dims[0]));
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor");
        let blocks = QTensor::quantize(&tensor, quantized.0).expect("quantises");
        *bytes = blocks.data().expect("in memory").into_owned();
        *kind = quantized.1;
    }
    let rounded = open(&writer, "rounded.gguf");
    assert!(exact.warnings().is_empty());
    let warnings = rounded.warnings().join("\n");
    assert!(
        warnings.contains("6 tensors are stored as Q6_K"),
        "{warnings}"
    );
    assert!(
        warnings.contains("2 tensors are stored as Q5_K"),
        "{warnings}"
    );
    let (one, expected) = (logits(&rounded, 1), logits(&exact, 1));
    let squares = |rows: &[Vec<f32>]| -> f32 { rows.iter().flatten().map(|x| x * x).sum() };
    let differences: Vec<Vec<f32>> = one
        .iter()
        .zip(&expected)
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a - b).collect())
        .collect();
    let relative = (squares(&differences) / squares(&expected)).sqrt();
    assert!(relative > 0.0 && relative < 0.1, "{relative}");
    // Blocks of 256 do not divide among the ranks, whose parts are of 32.
    assert_eq!(logits(&rounded, 4), one);
}
