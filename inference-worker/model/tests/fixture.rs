//! Small random models: bad files, layouts, tensor parallel sizes, and the
//! forward pass against a plain one.

#![allow(clippy::expect_used, clippy::panic, reason = "tests may fail")]

mod common;
mod plain;

use std::path::PathBuf;
use std::time::SystemTime;

use common::{Setup, on_ranks, segment};
use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::fixture::{GgufWriter, TinyLlama};
use llama_model::gguf::{GgmlType, Value};
use llama_model::kernels::Format;
use llama_model::memory::{KvFormat, Target};
use llama_model::text::{ChatMessage, ChatTemplate, Conversation, Special, TextError, Tokenizer};
use llama_model::{
    Checkpoint, Gguf, Layout, Llama, LoadOptions, MemoryPlan, MemoryRequest, ModelError,
    ModelErrorCategory, StepError, StepModel,
};
use proptest::prelude::*;
use tempfile::TempDir;

fn write(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("writes");
    path
}

fn open(writer: &GgufWriter) -> Gguf {
    let folder = TempDir::new().expect("a folder");
    Gguf::open(&write(&folder, "tiny.gguf", &writer.to_bytes())).expect("opens")
}

/// A checkpoint whose file lives as long as the test needs it.
fn checkpoint(writer: &GgufWriter) -> (TempDir, Checkpoint) {
    let folder = TempDir::new().expect("a folder");
    let path = write(&folder, "tiny.gguf", &writer.to_bytes());
    let checkpoint = Checkpoint::open(&path, LoadFormat::Auto).expect("opens");
    (folder, checkpoint)
}

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

fn load(checkpoint: &Checkpoint) -> Result<Llama, ModelError> {
    Llama::load(checkpoint, &OPTIONS, &|_, _| {})
}

/// The sentence and category that loading `writer` ends with.
fn refusal(writer: &GgufWriter) -> (String, ModelErrorCategory) {
    let folder = TempDir::new().expect("a folder");
    let path = write(&folder, "tiny.gguf", &writer.to_bytes());
    let error = Checkpoint::open(&path, LoadFormat::Auto).expect_err("is refused");
    let text = error.to_string();
    let (_, message) = text.split_once("tiny.gguf: ").expect("names the file");
    (message.to_owned(), error.category())
}

#[test]
fn files_that_are_not_there_are_named_with_what_is() {
    let folder = TempDir::new().expect("a folder");
    let at = folder.path();
    let message = |path: PathBuf| {
        let error = Gguf::open(&path).expect_err("is refused");
        assert_eq!(error.category(), ModelErrorCategory::ModelNotFound);
        error.to_string()
    };
    let shown = at.display();
    assert_eq!(
        message(at.join("x.gguf")),
        format!("no file {shown}/x.gguf; the folder holds no .gguf file")
    );
    assert_eq!(
        message(at.join("no/x.gguf")),
        format!("no file {shown}/no/x.gguf; its folder does not exist either")
    );
    assert_eq!(
        message(at.to_owned()),
        format!("no .gguf file in the folder {shown}")
    );
    let bytes = TinyLlama::default().gguf().to_bytes();
    let only = write(&folder, "b.gguf", &bytes);
    assert_eq!(Gguf::open(at).expect("the only one").path(), only);
    write(&folder, "a.gguf", &bytes);
    assert_eq!(
        message(at.join("x.gguf")),
        format!("no file {shown}/x.gguf; the folder holds a.gguf, b.gguf")
    );
    assert_eq!(
        message(at.to_owned()),
        format!("the folder {shown} holds 2 .gguf files, name one of them: a.gguf, b.gguf")
    );
}

#[test]
fn cut_and_foreign_files_are_named() {
    let folder = TempDir::new().expect("a folder");
    let bytes = TinyLlama::default().gguf().to_bytes();
    let refused = |bytes: &[u8]| {
        let error = Gguf::open(&write(&folder, "x.gguf", bytes)).expect_err("is refused");
        let text = error.to_string();
        let name = text.find("x.gguf").expect("names the file");
        (text[name..].to_owned(), error.category())
    };
    let cut = bytes.len() - 1;
    assert_eq!(
        refused(&bytes[..cut]),
        (
            format!(
                "x.gguf is cut short: tensor output_norm.weight ends at byte {} but the file has {cut} bytes",
                bytes.len()
            ),
            ModelErrorCategory::ModelTruncated
        )
    );
    assert_eq!(refused(&bytes[..100]).1, ModelErrorCategory::ModelTruncated);
    assert_eq!(refused(b"").1, ModelErrorCategory::ModelTruncated);
    assert_eq!(
        refused(b"<!doctype html>"),
        (
            "x.gguf is not a GGUF file: it starts with \"<!do\"".to_owned(),
            ModelErrorCategory::ModelInvalid
        )
    );
    let mut old = bytes;
    old[4] = 1;
    assert_eq!(
        refused(&old),
        (
            "x.gguf is GGUF version 1; this worker reads versions 2 and 3, little-endian"
                .to_owned(),
            ModelErrorCategory::ModelUnsupported
        )
    );
}

#[test]
fn models_that_this_crate_does_not_compute_are_refused_by_name() {
    let with = |change: &dyn Fn(&mut GgufWriter)| {
        let mut writer = TinyLlama::default().gguf();
        change(&mut writer);
        refusal(&writer)
    };
    let unsupported = ModelErrorCategory::ModelUnsupported;
    let invalid = ModelErrorCategory::ModelInvalid;
    assert_eq!(
        with(&|w| w.set_text("general.architecture", "qwen2")),
        (
            "general.architecture is \"qwen2\"; this worker runs \"llama\" and \"llama4\""
                .to_owned(),
            unsupported
        )
    );
    assert_eq!(
        with(&|w| w.set("llama.expert_count", Value::Unsigned(8))),
        (
            "llama.expert_count is 8, which this worker does not compute".to_owned(),
            unsupported
        )
    );
    assert_eq!(
        with(&|w| w.set_text("llama.rope.scaling.type", "yarn")),
        (
            "llama.rope.scaling.type is \"yarn\"; \"none\", \"linear\" and Llama 3's rope_freqs.weight are built in"
                .to_owned(),
            unsupported
        )
    );
    assert_eq!(
        with(&|w| {
            let (_, dims, ggml_type, bytes) = &mut w.tensors[2];
            *ggml_type = GgmlType(20);
            bytes.truncate(usize::try_from(dims[0] * dims[1] / 32 * 18).expect("small"));
        }),
        (
            "tensor blk.0.attn_q.weight is stored as IQ4_NL; this worker computes with F32, F16, BF16, F8_E4M3, Q4_0, Q4_1, Q8_0, I8 with scales, packed 4-bit integers, and ggml's K-quants"
                .to_owned(),
            unsupported
        )
    );
    assert_eq!(
        with(&|w| w.tensors.push((
            "blk.0.attn_q.bias".to_owned(),
            vec![1],
            GgmlType::F32,
            vec![0; 4]
        ))),
        (
            "1 tensor is not part of a Llama model that this worker computes: blk.0.attn_q.bias"
                .to_owned(),
            unsupported
        )
    );
    assert_eq!(
        with(&|w| w.tensors.retain(|t| t.0 != "blk.1.ffn_up.weight")),
        ("tensor blk.1.ffn_up.weight is missing".to_owned(), invalid)
    );
    assert_eq!(
        with(&|w| w.set("llama.attention.head_count", Value::Unsigned(16))),
        (
            "tensor blk.0.attn_q.weight has the shape [256, 128], expected [512, 128]".to_owned(),
            invalid
        )
    );
    assert_eq!(
        with(&|w| w.metadata.retain(|(key, _)| key != "llama.block_count")),
        ("metadata llama.block_count is missing".to_owned(), invalid)
    );
}

fn request(world: usize, max_tokens: usize) -> MemoryRequest {
    MemoryRequest {
        layout: Layout::tensor(world),
        ranks: 0..world,
        target: Target::Cpu { threads: 1 },
        max_tokens,
        step_tokens: 64,
        kv: KvFormat::F16,
        adapters: AdapterRoom::NONE,
    }
}

#[test]
fn layouts_that_do_not_divide_are_refused() {
    let (_folder, checkpoint) = checkpoint(&TinyLlama::default().gguf());
    let refused = |world: usize, max_tokens: usize| {
        let error =
            MemoryPlan::new(&checkpoint, &request(world, max_tokens)).expect_err("is refused");
        assert_eq!(error.category(), ModelErrorCategory::InvalidLayout);
        error.to_string()
    };
    assert_eq!(
        refused(3, 64),
        "tensor parallel 3 does not divide 8 attention heads (4 KV heads); 1, 2, 4 or 8 would"
    );
    assert_eq!(
        refused(2, 513),
        "sequences of 513 tokens: the model takes 1 to 512"
    );
}

#[test]
fn room_for_adapters_is_planned() {
    let (_folder, checkpoint) = checkpoint(&TinyLlama::default().gguf());
    let plan = |adapters| {
        let request = MemoryRequest {
            adapters,
            ..request(2, 512)
        };
        MemoryPlan::new(&checkpoint, &request).expect("plans")
    };
    let (none, some) = (
        plan(AdapterRoom::NONE),
        plan(AdapterRoom {
            count: 1000,
            rank: 64,
        }),
    );
    assert_eq!(none.adapters(), 0);
    assert!(some.adapters() > 1 << 20);
    for sequences in [0, 3] {
        assert_eq!(
            some.total(sequences),
            none.total(sequences) + some.adapters()
        );
    }
    let limit = none.total(1);
    assert_eq!(none.sequences_within(limit, 512), 1);
    let error = some.check(limit).expect_err("no room").to_string();
    let adapters = some.adapters().div_ceil(1 << 20);
    assert!(
        error.contains(&format!("adapters {adapters} MiB")),
        "{error}"
    );
}

#[test]
fn a_memory_plan_says_what_would_fit() {
    let (_folder, checkpoint) = checkpoint(&TinyLlama::default().gguf());
    let plan = |world| MemoryPlan::new(&checkpoint, &request(world, 512)).expect("plans");
    let (one, four, eight) = (plan(1), plan(4), plan(8));
    // Keys and values of 2 layers, 4 heads of 32, in f16.
    assert_eq!(one.kv_bytes(64), 64 * 2 * 2 * 4 * 32 * 2);
    assert_eq!(four.kv_bytes(64), one.kv_bytes(64));
    // Two ranks each hold the same KV head.
    assert_eq!(eight.kv_bytes(64), 2 * one.kv_bytes(64));
    assert_eq!((four.kv_replicas, eight.kv_replicas), (1, 2));
    // Every rank has the norms: 5 vectors of 128 floats.
    assert_eq!(four.weights(), one.weights() + 3 * 5 * 128 * 4);
    let loaded = std::sync::Mutex::new((0, 0));
    Llama::load(&checkpoint, &OPTIONS, &|done, total| {
        assert!(done <= total);
        let mut most = loaded.lock().expect("no panic");
        *most = (most.0.max(done), total);
    })
    .expect("loads");
    let (done, total) = loaded.into_inner().expect("no panic");
    assert_eq!(done, total);
    assert_eq!(total, one.weights() - 5 * 128 * 4);

    assert_eq!(one.check(one.total(3)).expect("fits"), 3);
    assert_eq!(one.check(one.total(1)).expect("fits"), 1);
    let error = one.check(one.total(1) - 1).expect_err("is refused");
    assert_eq!(error.category(), ModelErrorCategory::InsufficientMemory);
    assert!(
        error
            .to_string()
            .ends_with(" or lower spec.context.maxTokens to 480"),
        "{error}"
    );
    let error = one.check(1 << 20).expect_err("is refused").to_string();
    let needed = one.total(1).div_ceil(1 << 20);
    assert!(
        error.starts_with(&format!("needs {needed} MiB (1 rank: weights ")),
        "{error}"
    );
    assert!(
        error.ends_with(&format!(
            "the limit is 1 MiB; raise spec.resources.memory to {needed}Mi"
        )),
        "{error}"
    );
}

#[test]
fn text_goes_through_the_file_s_own_tokenizer_and_template() {
    let mut writer = TinyLlama::default().gguf();
    let gguf = open(&writer);
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("builds");
    let plain = tokenizer
        .encode("in the <|im_end|>", Special::Plain)
        .expect("encodes");
    let parsed = tokenizer
        .encode("in the <|im_end|>", Special::Parse)
        .expect("encodes");
    assert_eq!(parsed.last(), tokenizer.eos_ids().last());
    assert!(plain.len() > parsed.len());
    let bytes = |ids: &[u32]| -> Vec<u8> {
        ids.iter()
            .flat_map(|id| tokenizer.token_bytes(*id).to_vec())
            .collect()
    };
    assert_eq!(bytes(&plain), b"in the <|im_end|>");
    assert_eq!(bytes(&plain), bytes(&parsed));
    let messages = vec![ChatMessage::new("user", "the")];
    let conversation = Conversation::new(messages, SystemTime::UNIX_EPOCH);
    let chat = ChatTemplate::from_gguf(&gguf, &tokenizer).expect("parses");
    assert_eq!(
        chat.render(&conversation).expect("renders").text(),
        "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    );

    writer
        .metadata
        .retain(|(key, _)| key != "tokenizer.chat_template");
    let none = ChatTemplate::from_gguf(&open(&writer), &tokenizer).expect("builds");
    let error = none.render(&conversation).expect_err("has no template");
    assert!(matches!(error, TextError::NoChatTemplate));

    writer.set_text("tokenizer.ggml.pre", "deepseek-llm");
    let error = Tokenizer::from_gguf(&open(&writer)).expect_err("is refused");
    assert_eq!(error.category(), ModelErrorCategory::ModelUnsupported);
    assert!(error.to_string().contains("\"deepseek-llm\""), "{error}");
}

#[test]
fn steps_out_of_range_are_refused_before_they_begin() {
    let mut model = load(&checkpoint(&TinyLlama::default().gguf()).1).expect("loads");
    let collective = &mut llama_model::LocalCollective;
    let mut refused = |segments: &[llama_model::Segment]| match model
        .step(segments, collective)
        .expect_err("is refused")
    {
        StepError::Invalid(text) => text,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&[segment(1, 0, &[1])]), "slot 1 of 1");
    assert_eq!(refused(&[segment(0, 0, &[])]), "no tokens for slot 0");
    assert_eq!(
        refused(&[segment(0, 3, &[1])]),
        "slot 0 goes on at position 3 but has 0 tokens"
    );
    assert_eq!(
        refused(&[segment(0, 0, &[1; 65])]),
        "slot 0 would have 65 tokens, the limit is 64"
    );
    assert_eq!(
        refused(&[segment(0, 0, &[999])]),
        "token 999 is not in the vocabulary of 264"
    );
    assert_eq!(
        refused(&[segment(0, 0, &[1]), segment(0, 0, &[1])]),
        "slot 0 occurs twice"
    );
    assert!(model.step(&[], collective).expect("nothing").is_empty());
}

#[test]
fn every_layout_gives_the_same_bits_in_every_format() {
    let prompt: Vec<u32> = (0..70).map(|i| i * 37 % 264).collect();
    for format in Format::ALL {
        if GgmlType::of(format).is_none() {
            continue;
        }
        let tiny = TinyLlama {
            layers: 3,
            format,
            own_output: format != Format::Q8_0,
            rope_factors: format == Format::F16,
            ..TinyLlama::default()
        };
        let (_folder, checkpoint) = checkpoint(&tiny.gguf());
        let of_layout = |tensor, pipeline| {
            let setup = Setup {
                layout: Layout { tensor, pipeline },
                ..Setup::tensor(1, 1, 128)
            };
            let mut ranks = on_ranks(&checkpoint, setup, |model, collective| {
                common::teacher_forced(model, collective, &prompt, &[5, 6, 7])
            });
            for other in &ranks[1..] {
                assert_eq!(&ranks[0], other, "{format:?}: ranks of {setup:?} differ");
            }
            ranks.swap_remove(0)
        };
        let one = of_layout(1, 1);
        for (tensor, pipeline) in [
            (2, 1),
            (4, 1),
            (8, 1),
            (1, 2),
            (2, 2),
            (4, 2),
            (8, 2),
            (1, 3),
        ] {
            let other = of_layout(tensor, pipeline);
            assert_eq!(
                one, other,
                "{format:?}: tensor {tensor}, pipeline {pipeline}"
            );
        }
    }
}

#[test]
fn threads_do_not_change_the_bits() {
    let tiny = TinyLlama {
        hidden: 512,
        ffn: 1536,
        format: Format::Q4_1,
        ..TinyLlama::default()
    };
    let (_folder, checkpoint) = checkpoint(&tiny.gguf());
    let prompt: Vec<u32> = (0..90).map(|i| i * 31 % 264).collect();
    let of_threads = |threads| {
        let options = LoadOptions {
            threads,
            max_tokens: 128,
            ..OPTIONS
        };
        let mut model = Llama::load(&checkpoint, &options, &|_, _| {}).expect("loads");
        common::teacher_forced(&mut model, &mut llama_model::LocalCollective, &prompt, &[1])
    };
    assert_eq!(of_threads(1), of_threads(3));
}

#[test]
fn the_forward_pass_is_that_of_a_plain_one() {
    let plain = TinyLlama::default();
    let shapes = [
        (plain.clone(), None),
        (
            TinyLlama {
                heads: 3,
                kv_heads: 1,
                head_dim: 64,
                hidden: 96,
                own_output: false,
                rope_factors: true,
                seed: 2,
                ..plain.clone()
            },
            None,
        ),
        (
            TinyLlama {
                heads: 10,
                kv_heads: 2,
                seed: 3,
                ..plain
            },
            Some(("llama.rope.dimension_count", Value::Unsigned(16))),
        ),
    ];
    for (tiny, change) in shapes {
        let mut writer = tiny.gguf();
        if let Some((key, value)) = change {
            writer.set(key, value);
            writer.set_text("llama.rope.scaling.type", "linear");
            writer.set("llama.rope.scaling.factor", Value::Float(4.0));
        }
        let (_folder, checkpoint) = checkpoint(&writer);
        let config = checkpoint.config();
        let tokens: Vec<u32> = (0..40).map(|i| i * 101 % 264).collect();
        let expected = plain::logits(&writer, config, &tokens);
        let mut model = load(&checkpoint).expect("loads");
        let rows = model
            .step(&[segment(0, 0, &tokens)], &mut llama_model::LocalCollective)
            .expect("steps");
        // Keys, values and queries have the eleven bits of f16.
        for (found, expected) in rows[0].iter().zip(&expected) {
            assert!(
                (f64::from(*found) - expected).abs() < 5e-3,
                "{found} for {expected}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_are_refused_or_read_but_never_end_the_process(
        cut in 0.0_f64..1.0,
        flips in proptest::collection::vec((0.0_f64..1.0, 1_u8..), 0..6),
        header_only in any::<bool>(),
    ) {
        let tiny = TinyLlama { layers: 1, hidden: 32, ffn: 32, heads: 1, kv_heads: 1, ..TinyLlama::default() };
        let mut bytes = tiny.gguf().to_bytes();
        let len = bytes.len() as f64;
        // Most of what can go wrong is in the first eight thousandths of a file.
        let range = if header_only { 12_000.0_f64.min(len) } else { len };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in the file")]
        let at = |share: f64| (share * range) as usize;
        for (share, flip) in flips {
            bytes[at(share)] ^= flip;
        }
        if cut > 0.5 {
            bytes.truncate(at(2.0 * cut - 1.0));
        }
        let folder = TempDir::new().expect("a folder");
        let path = write(&folder, "x.gguf", &bytes);
        if let Ok(gguf) = Gguf::open(&path)
            && let Ok(tokenizer) = Tokenizer::from_gguf(&gguf)
        {
            let _ = tokenizer.encode("in the <|im_end|>", Special::Parse);
            let _ = ChatTemplate::from_gguf(&gguf, &tokenizer);
        }
        if let Ok(checkpoint) = Checkpoint::open(&path, LoadFormat::Auto) {
            let _ = MemoryPlan::new(&checkpoint, &request(1, 64));
            if let Ok(mut model) = load(&checkpoint) {
                let _ = model.step(&[segment(0, 0, &[1, 2])], &mut llama_model::LocalCollective);
            }
        }
    }
}
