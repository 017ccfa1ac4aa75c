//! Small random models against Hugging Face's implementation, whose logits lie
//! beside them (`reference/make_fixtures.py` writes both).

#![allow(clippy::expect_used, reason = "tests may fail")]

mod common;

use common::reference::{folder, open, reference};
use common::{Setup, all_logits, greedy, max_difference, on_ranks};
use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::cut::write_shards;
use llama_model::memory::KvFormat;
use llama_model::shard::possible_tensor_sizes;
use llama_model::slices::ModelSlices;
use llama_model::{Checkpoint, Layout, Llama, LoadOptions, Shard};
use tempfile::TempDir;

fn exact(layout: Layout) -> Setup {
    Setup {
        layout,
        slots: 1,
        max_tokens: 512,
        kv: KvFormat::F32,
    }
}

/// The logits of all tokens and 256 greedy ones are those of the reference.
fn compare(name: &str, tolerance: f32) {
    let (checkpoint, expected) = (open(name), reference(name));
    let found = on_ranks(&checkpoint, exact(Layout::tensor(1)), |model, ranks| {
        let whole = all_logits(model, ranks, &expected.tokens, 512);
        let pieces = all_logits(model, ranks, &expected.tokens, 7);
        assert_eq!(whole, pieces, "steps of 7 tokens give the same bits");
        let count = expected.greedy.len();
        (whole, greedy(model, ranks, &expected.tokens, count))
    });
    let (logits, tokens) = &found[0];
    let difference = max_difference(logits, &expected.logits);
    assert!(difference < tolerance, "{name}: {difference}");
    assert_eq!(*tokens, expected.greedy, "{name}");
}

macro_rules! models {
    ($($test:ident: $name:literal within $tolerance:literal,)*) => {
        $(#[test]
        fn $test() {
            compare($name, $tolerance);
        })*
    };
}

models! {
    plain: "llama-plain" within 1e-4,
    tied: "llama-tied" within 1e-4,
    scaled: "llama-scaled" within 1e-4,
    every_head: "llama-every-head" within 1e-4,
    sharded: "llama-sharded" within 1e-4,
    constants: "llama-constants" within 1e-4,
    scout: "llama4-scout" within 1e-4,
    maverick: "llama4-maverick" within 1e-4,
    untuned: "llama4-untuned" within 1e-4,
    eight_heads: "llama4-eight-heads" within 1e-4,
    multimodal: "llama4-multimodal" within 1e-4,
    unfused: "llama4-unfused" within 1e-4,
    fp8_fbgemm: "llama-fp8-fbgemm" within 1e-4,
    fp8_channel: "llama-fp8-channel" within 1e-4,
}

/// Weights of 4 and 8 bits meet activations rounded to 8 bits, which the reference
/// leaves as they are.
fn compare_rounded(name: &str, tolerance: f32) {
    compare_near(name, KvFormat::F32, tolerance);
}

/// Logits are near those of the reference, and the same with steps of other lengths and
/// on two ranks.
fn compare_near(name: &str, kv: KvFormat, tolerance: f32) {
    let (checkpoint, expected) = (open(name), reference(name));
    let of = |tensor: usize, step: usize| {
        let setup = Setup {
            kv,
            ..exact(Layout::tensor(tensor))
        };
        let logits = on_ranks(&checkpoint, setup, |model, ranks| {
            all_logits(model, ranks, &expected.tokens, step)
        });
        logits.into_iter().next().expect("a rank")
    };
    let found = of(1, 512);
    assert!(found == of(1, 7), "{name} in steps of 7");
    if checkpoint.config().agrees(2) {
        assert!(found == of(2, 33), "{name} on two ranks");
    }
    let squares = |rows: &[Vec<f32>]| -> f32 { rows.iter().flatten().map(|x| x * x).sum() };
    let differences: Vec<Vec<f32>> = found
        .iter()
        .zip(&expected.logits)
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a - b).collect())
        .collect();
    let relative = (squares(&differences) / squares(&expected.logits)).sqrt();
    assert!(relative < tolerance, "{name}: {relative}");
}

#[test]
fn int8_by_channel() {
    compare_rounded("llama-int8-channel", 0.03);
}

#[test]
fn keys_and_values_in_8_bits() {
    for (name, tolerance) in [
        ("llama-plain", 0.03),
        ("llama-scaled", 0.03),
        // Where a router is near a tie, another expert is another answer.
        ("llama4-scout", 0.2),
        ("llama4-eight-heads", 0.2),
    ] {
        compare_near(name, KvFormat::Int8, tolerance);
    }
}

#[test]
fn int4_by_group() {
    compare_rounded("llama-int4-group", 0.03);
}

/// Every way to spread the models over ranks gives the bits of one rank.
#[test]
fn layouts_agree_to_the_bit() {
    for name in [
        "llama-sharded",
        "llama4-eight-heads",
        "llama4-scout",
        "llama-fp8-fbgemm",
        "llama-int4-group",
    ] {
        let (checkpoint, expected) = (open(name), reference(name));
        let of = |layout| {
            on_ranks(&checkpoint, exact(layout), |model, ranks| {
                all_logits(model, ranks, &expected.tokens, 40)
            })
        };
        let one = of(Layout::tensor(1)).swap_remove(0);
        let mut compared = 0;
        for (tensor, pipeline) in [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (8, 2)] {
            if !checkpoint.config().agrees(tensor)
                || !possible_tensor_sizes(checkpoint.config()).contains(&tensor)
            {
                continue;
            }
            for (rank, logits) in of(Layout { tensor, pipeline }).into_iter().enumerate() {
                assert_eq!(one, logits, "{name}: {tensor} × {pipeline}, rank {rank}");
            }
            compared += 1;
        }
        let wanted = if checkpoint.config().heads == 8 { 7 } else { 1 };
        assert!(compared >= wanted, "{name}: {compared} layouts");
    }
}

/// A model cut for its ranks computes the bits of the whole one.
#[test]
fn cut_models_compute_the_same() {
    for (name, tensor, pipeline) in [
        ("llama-sharded", 4, 2),
        ("llama-tied", 1, 2),
        ("llama4-multimodal", 2, 1),
        ("llama-fp8-channel", 2, 1),
        ("llama-int8-channel", 1, 1),
    ] {
        let (checkpoint, expected) = (open(name), reference(name));
        let layout = Layout { tensor, pipeline };
        let folder = TempDir::new().expect("a folder");
        let out = folder.path().join("cut");
        let mut last = (0, 0);
        write_shards(&checkpoint, layout, &out, &mut |done, total| {
            last = (done, total);
        })
        .expect("writes");
        assert_eq!(last.0, last.1, "{name}");
        let again = write_shards(&checkpoint, layout, &out, &mut |_, _| {}).expect_err("is full");
        assert!(
            again.to_string().ends_with("is not empty; name a new one"),
            "{again}"
        );

        let cut = Checkpoint::open(&out, LoadFormat::Auto).expect("opens");
        assert_eq!(cut.cut_for(), Some(layout));
        let logits = |checkpoint: &Checkpoint| {
            on_ranks(checkpoint, exact(layout), |model, ranks| {
                all_logits(model, ranks, &expected.tokens, 512)
            })
        };
        assert_eq!(logits(&cut), logits(&checkpoint), "{name}");
        let other = Shard::new(cut.config(), Layout::tensor(tensor * 2), 0);
        if let Ok(other) = other {
            let error = ModelSlices::locate(&cut, &other).expect_err("another layout");
            assert_eq!(
                error.to_string(),
                format!(
                    "the model was cut for tensor parallel {tensor} and pipeline parallel {pipeline}, not for {} and 1",
                    tensor * 2
                )
            );
        }
    }
}

/// Half-precision keys and values, which serving uses, change little.
#[test]
fn half_precision_keys_and_values_change_little() {
    for name in ["llama-plain", "llama4-scout"] {
        let (checkpoint, expected) = (open(name), reference(name));
        let setup = Setup {
            kv: KvFormat::F16,
            ..exact(Layout::tensor(1))
        };
        let found = on_ranks(&checkpoint, setup, |model, ranks| {
            all_logits(model, ranks, &expected.tokens, 512)
        });
        let difference = max_difference(&found[0], &expected.logits);
        assert!(difference < 0.1, "{name}: {difference}");
        assert!(difference > 0.0, "{name}: not rounded at all");
    }
}

/// Random weights depend on the name and the place alone.
#[test]
fn dummy_weights_do_not_depend_on_the_layout() {
    for name in ["llama-sharded", "llama4-eight-heads"] {
        let checkpoint = Checkpoint::open(&folder(name), LoadFormat::Dummy).expect("opens");
        let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 90).collect();
        let of = |layout| {
            on_ranks(&checkpoint, exact(layout), |model, ranks| {
                all_logits(model, ranks, &tokens, 512)
            })
            .swap_remove(0)
        };
        let one = of(Layout::tensor(1));
        assert!(one.iter().flatten().all(|logit| logit.is_finite()));
        assert_ne!(one[0], one[1]);
        let (tensor, pipeline) = (2, 2);
        assert_eq!(one, of(Layout { tensor, pipeline }), "{name}");
    }
}

/// Damage to a part is found by its digest.
#[test]
fn damaged_parts_do_not_have_their_digests() {
    let layout = Layout::tensor(1);
    let options = LoadOptions {
        layout,
        rank: 0,
        threads: 1,
        slots: 1,
        blocks: None,
        max_tokens: 8,
        kv: KvFormat::F16,
        verify: true,
        adapters: AdapterRoom::NONE,
    };
    let whole = open("llama-sharded");
    let error = Llama::load(&whole, &options, &|_, _| {}).expect_err("has none");
    assert!(error.to_string().contains("has no digest"), "{error}");

    let folder = TempDir::new().expect("a folder");
    let out = folder.path().join("cut");
    write_shards(&whole, layout, &out, &mut |_, _| {}).expect("writes");
    let load = || {
        let cut = Checkpoint::open(&out, LoadFormat::Auto).expect("opens");
        Llama::load(&cut, &options, &|_, _| {})
    };
    load().expect("is whole");
    let file = out.join("rank-00000.safetensors");
    let mut bytes = std::fs::read(&file).expect("is there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).expect("writes");
    let error = load().expect_err("is damaged").to_string();
    assert!(
        error.contains("is damaged: its bytes do not have the digest"),
        "{error}"
    );
}
