//! The model in candle's own tensor operations, on candle's CPU device: against
//! Hugging Face's implementation, and against its twin on this crate's kernels.

#![allow(clippy::expect_used, clippy::panic, reason = "tests may fail")]

mod common;

use candle_core::Device;
use common::reference::{open, reference};
use common::{
    Setup, all_logits, argmax, greedy, max_difference, on_ranks, on_threads, segment,
    teacher_forced,
};
use llama_model::checkpoint::LoadFormat;
use llama_model::device::Precision::{self, Full, Stored};
use llama_model::fixture::TinyLlama;
use llama_model::kernels::Format;
use llama_model::memory::KvFormat;
use llama_model::{
    Checkpoint, Collective, DeviceLlama, Layout, LocalCollective, Segment, StepError, StepModel,
    Wanted,
};
use tempfile::TempDir;

const PROMPT: [u32; 9] = [70, 3, 199, 3, 250, 12, 0, 88, 41];
const REST: [u32; 5] = [17, 260, 4, 4, 133];

fn setup(layout: Layout, max_tokens: usize, kv: KvFormat) -> Setup {
    Setup {
        layout,
        slots: 3,
        max_tokens,
        kv,
    }
}

/// What `work` makes on each rank of a group that computes in tensor operations.
fn on_devices<R: Send>(
    checkpoint: &Checkpoint,
    (setup, precision): (Setup, Precision),
    work: impl Fn(&mut DeviceLlama, &mut dyn Collective) -> R + Sync,
) -> Vec<R> {
    on_threads(setup, |options, collective| {
        let model = DeviceLlama::load(checkpoint, options, (&Device::Cpu, precision), &|_, _| {});
        work(&mut model.expect("loads"), collective)
    })
}

/// The root mean square of the differences, as a part of that of the values.
fn relative_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut differences, mut values) = (0.0, 0.0);
    for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
        differences += f64::from(a - b).powi(2);
        values += f64::from(*b).powi(2);
    }
    (differences / values).sqrt()
}

/// All logits, at once and in steps of 7 tokens, and greedy tokens are those of the
/// reference.
fn is_exact(name: &str) {
    let (checkpoint, expected) = (open(name), reference(name));
    let setup = setup(Layout::tensor(1), 512, KvFormat::F32);
    on_devices(&checkpoint, (setup, Full), |model, ranks| {
        for step in [512, 7] {
            let logits = all_logits(model, ranks, &expected.tokens, step);
            let difference = max_difference(&logits, &expected.logits);
            assert!(difference < 1e-4, "{name} by {step}: {difference}");
        }
        let count = expected.greedy.len();
        let tokens = greedy(model, ranks, &expected.tokens, count);
        assert_eq!(tokens, expected.greedy, "{name}");
    });
}

macro_rules! models {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() {
            is_exact($name);
        })*
    };
}

models! {
    plain: "llama-plain",
    tied: "llama-tied",
    scaled: "llama-scaled",
    every_head: "llama-every-head",
    sharded: "llama-sharded",
    constants: "llama-constants",
    scout: "llama4-scout",
    maverick: "llama4-maverick",
    untuned: "llama4-untuned",
    eight_heads: "llama4-eight-heads",
    multimodal: "llama4-multimodal",
    unfused: "llama4-unfused",
    fp8_fbgemm: "llama-fp8-fbgemm",
    fp8_channel: "llama-fp8-channel",
}

/// Activations are as precise as the weights that they meet; the reference leaves them
/// as they are.
#[test]
fn products_in_stored_precision_come_close() {
    for name in [
        "llama-tied",
        "llama-scaled",
        "llama-fp8-fbgemm",
        "llama-fp8-channel",
        "llama-int8-channel",
        "llama-int4-group",
    ] {
        let (checkpoint, expected) = (open(name), reference(name));
        let setup = setup(Layout::tensor(1), 512, KvFormat::F32);
        on_devices(&checkpoint, (setup, Stored), |model, ranks| {
            let logits = all_logits(model, ranks, &expected.tokens, 512);
            let difference = relative_difference(&logits, &expected.logits);
            assert!(difference < 0.03, "{name}: {difference}");
        });
    }
}

#[test]
fn layouts_agree() {
    for name in ["llama-sharded", "llama4-eight-heads", "llama-tied"] {
        let (checkpoint, expected) = (open(name), reference(name));
        for (tensor, pipeline) in [(2, 1), (8, 1), (1, 2), (2, 2)] {
            if !checkpoint.config().heads.is_multiple_of(tensor) {
                continue;
            }
            let layout = Layout { tensor, pipeline };
            let ranks = on_devices(
                &checkpoint,
                (setup(layout, 512, KvFormat::F32), Full),
                |model, ranks| all_logits(model, ranks, &expected.tokens, 40),
            );
            for logits in &ranks {
                assert_eq!(logits, &ranks[0], "one result on all ranks");
            }
            let difference = max_difference(&ranks[0], &expected.logits);
            assert!(
                difference < 1e-4,
                "{name}, {tensor} × {pipeline}: {difference}"
            );
        }
    }
}

/// A checkpoint whose file lives as long as the test needs it.
fn tiny(format: Format) -> (TempDir, Checkpoint) {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("tiny.gguf");
    let shape = TinyLlama {
        format,
        ..TinyLlama::default()
    };
    shape.gguf().write(&path).expect("writes");
    let checkpoint = Checkpoint::open(&path, LoadFormat::Auto).expect("opens");
    (folder, checkpoint)
}

#[test]
fn both_twins_agree_for_every_format() {
    // The twin keeps activations of float weights in f32; those of quantised ones
    // are rounded to int8 by both, with scales of another precision: how many of them
    // come out differently depends on the order of sums in candle's products, and so on
    // the machine.
    for (format, limit) in [
        (Format::F32, 1e-3),
        (Format::F16, 3e-3),
        (Format::Bf16, 2e-2),
        (Format::Q8_0, 4e-2),
        (Format::Q4_0, 4e-2),
        (Format::Q4_1, 4e-2),
    ] {
        let (_folder, checkpoint) = tiny(format);
        let setup = setup(Layout::tensor(1), 64, KvFormat::F16);
        let expected = on_ranks(&checkpoint, setup, |model, ranks| {
            teacher_forced(model, ranks, &PROMPT, &REST)
        });
        let rows = on_devices(&checkpoint, (setup, Stored), |model, ranks| {
            teacher_forced(model, ranks, &PROMPT, &REST)
        });
        let difference = relative_difference(&rows[0], &expected[0]);
        assert!(difference < limit, "{format:?}: {difference}");
    }
}

#[test]
fn sequences_share_steps_and_prompts_are_cut_at_will() {
    let (_folder, checkpoint) = tiny(Format::F32);
    let long: Vec<u32> = (0..290).map(|i| i * 37 % 264).collect();
    let setup = setup(Layout::tensor(1), 300, KvFormat::F32);
    on_devices(&checkpoint, (setup, Stored), |model, ranks| {
        let mut alone = |tokens: &[u32]| {
            let rows = model.step(&[segment(2, 0, tokens)], ranks);
            rows.expect("computes").swap_remove(0)
        };
        let expected = [alone(&PROMPT), alone(&long)];
        let begins = Segment {
            logits: Wanted::None,
            ..segment(0, 0, &long[..100])
        };
        let rows = model.step(&[begins.clone(), segment(1, 0, &PROMPT[..3])], ranks);
        assert_eq!(rows.expect("computes").len(), 1);
        // Goes back over tokens that are there, and takes them again.
        let goes_on = [segment(1, 2, &PROMPT[2..]), segment(0, 60, &long[60..])];
        let rows = model.step(&goes_on, ranks).expect("computes");
        let difference = max_difference(&rows, &expected);
        assert!(difference < 1e-4, "{difference}");
        assert!(model.step(&[begins], ranks).expect("computes").is_empty());
    });
}

#[test]
fn steps_that_no_rank_may_begin_are_refused_by_name() {
    let (_folder, checkpoint) = tiny(Format::F32);
    let setup = setup(Layout::tensor(1), 300, KvFormat::F32);
    on_devices(&checkpoint, (setup, Stored), |model, _| {
        let mut refused = |segments: &[Segment]| match model.step(segments, &mut LocalCollective) {
            Err(StepError::Invalid(text)) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&[segment(3, 0, &[1])]), "slot 3 of 3");
        let twice = [segment(1, 0, &[1]), segment(1, 0, &[1])];
        assert_eq!(refused(&twice), "slot 1 occurs twice");
        assert_eq!(refused(&[segment(0, 0, &[])]), "no tokens for slot 0");
        assert_eq!(
            refused(&[segment(0, 4, &[1])]),
            "slot 0 goes on at position 4 but has 0 tokens"
        );
        assert_eq!(
            refused(&[segment(0, 0, &[1; 301])]),
            "slot 0 would have 301 tokens, the limit is 300"
        );
        assert_eq!(
            refused(&[segment(0, 0, &[264])]),
            "token 264 is not in the vocabulary of 264"
        );
        let nothing = model.step(&[], &mut LocalCollective);
        assert!(nothing.expect("nothing to do").is_empty());
    });
}

#[test]
fn the_real_model_says_the_same_on_both() {
    let Some(checkpoint) = common::real_model() else {
        return;
    };
    let prompt = [504, 3575, 282, 4649, 314];
    let setup = setup(Layout::tensor(1), 64, KvFormat::F16);
    let expected = on_ranks(&checkpoint, setup, |model, ranks| {
        model
            .step(&[segment(0, 0, &prompt)], ranks)
            .expect("computes")
    });
    for tensor in [1, 3] {
        let setup = Setup {
            layout: Layout::tensor(tensor),
            ..setup
        };
        let rows = on_devices(&checkpoint, (setup, Stored), |model, ranks| {
            model
                .step(&[segment(0, 0, &prompt)], ranks)
                .expect("computes")
        });
        assert_eq!(argmax(&rows[0][0]), argmax(&expected[0][0]));
        let difference = relative_difference(&rows[0], &expected[0]);
        assert!(difference < 0.1, "{tensor} ranks: {difference}");
    }
}
