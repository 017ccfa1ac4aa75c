//! The real model (SmolLM2-135M-Instruct, `Q4_1`) against what llama.cpp says of
//! it, and tensor parallel 1 against 3.

#![allow(clippy::expect_used, reason = "tests may fail")]

mod common;

use common::{Setup, argmax, greedy, on_ranks, real_model, segment, teacher_forced};
use llama_model::text::{Detokenizer, Special, Tokenizer};
use llama_model::{Segment, StepModel, Wanted};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    text: String,
}

const MAX_TOKENS: usize = 256;

fn golden() -> Vec<Case> {
    let golden: Golden =
        serde_json::from_str(include_str!("golden/smollm2-135m-q4_1.json")).expect("parses");
    golden.cases
}

/// Prompts whose greedy tokens two engines with other kernels (llama.cpp and
/// mistral.rs) agree on: "The capital of France is", "Question: What is 2+2?" and
/// "Name three colors." The other two, "It is a truth …" and "Write one sentence
/// about the sea.", have near ties: there the two likeliest tokens are closer
/// than the rounding of int8 activations, so every engine goes its own way.
///
/// The first of the three has such a tie as well (in exact arithmetic the golden
/// sixth token is 0.22 behind). Our products have the same bits on every CPU and
/// for tensor parallel 1 and 3, so what holds here holds everywhere.
const STABLE: [usize; 3] = [0, 1, 3];

#[test]
fn stable_prompts_give_the_golden_tokens() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    for world in [1, 3] {
        let ranks = on_ranks(
            &checkpoint,
            Setup::tensor(world, 1, MAX_TOKENS),
            |model, collective| {
                let cases = golden();
                STABLE.map(|number| {
                    let case = &cases[number];
                    greedy(model, collective, &case.prompt_ids, case.greedy_ids.len())
                })
            },
        );
        for tokens in ranks {
            for (number, tokens) in STABLE.into_iter().zip(tokens) {
                assert_eq!(
                    tokens,
                    golden()[number].greedy_ids,
                    "prompt {number}, tensor parallel {world}"
                );
            }
        }
    }
}

/// Where llama.cpp's token is not our likeliest, ours is hardly likelier.
#[test]
fn golden_tokens_are_never_far_from_the_likeliest() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    for case in golden() {
        let rows = on_ranks(
            &checkpoint,
            Setup::tensor(1, 1, MAX_TOKENS),
            |model, collective| {
                teacher_forced(model, collective, &case.prompt_ids, &case.greedy_ids)
            },
        );
        for (at, (row, token)) in rows[0].iter().zip(&case.greedy_ids).enumerate() {
            let behind = row[argmax(row) as usize] - row[*token as usize];
            assert!(
                behind < 0.35,
                "{:?}: token {at} is {behind} behind",
                case.prompt
            );
        }
    }
}

#[test]
fn logits_agree_over_tensor_parallel_sizes() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let of_world = |world| {
        on_ranks(
            &checkpoint,
            Setup::tensor(world, 1, MAX_TOKENS),
            |model, collective| {
                golden()
                    .iter()
                    .map(|case| {
                        teacher_forced(model, collective, &case.prompt_ids, &case.greedy_ids)
                    })
                    .collect::<Vec<_>>()
            },
        )
    };
    let one = of_world(1).remove(0);
    let three = of_world(3);
    for (rank, of_rank) in three.iter().enumerate() {
        assert_eq!(one, *of_rank, "rank {rank} of 3");
    }
}

#[test]
fn tokenizer_agrees_with_llama_cpp() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let tokenizer = Tokenizer::from_gguf(checkpoint.gguf().expect("is one")).expect("builds");
    for case in golden() {
        let ids = tokenizer
            .encode_prompt(&case.prompt, Special::Parse)
            .expect("encodes");
        assert_eq!(ids, case.prompt_ids);
        let mut detokenizer = Detokenizer::default();
        let mut text = String::new();
        for id in &case.greedy_ids {
            text += &detokenizer.push(&tokenizer, *id);
        }
        text += &detokenizer.finish();
        assert_eq!(text, case.text);
    }
}

#[test]
fn chunks_of_a_prompt_give_the_bits_of_the_whole() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let prompt = &golden()[4].prompt_ids;
    on_ranks(
        &checkpoint,
        Setup::tensor(1, 1, MAX_TOKENS),
        |model, collective| {
            let whole = model.step(&[segment(0, 0, prompt)], collective);
            let whole = whole.expect("prefill");
            for cut in [1, 2, 17, prompt.len() - 1] {
                let first = Segment {
                    logits: Wanted::None,
                    ..segment(0, 0, &prompt[..cut])
                };
                let none = model.step(&[first], collective).expect("prefill");
                assert!(none.is_empty());
                let rest = model.step(&[segment(0, cut, &prompt[cut..])], collective);
                assert_eq!(rest.expect("prefill"), whole, "cut at {cut}");
            }
        },
    );
}

#[test]
fn sequences_in_one_step_give_the_bits_of_each_alone() {
    let Some(checkpoint) = real_model() else {
        return;
    };
    let cases = golden();
    let of = |number: usize| {
        let case: &Case = &cases[number];
        (case.prompt_ids.as_slice(), &case.greedy_ids[..6])
    };
    on_ranks(
        &checkpoint,
        Setup::tensor(1, 3, MAX_TOKENS),
        |model, collective| {
            let (a, next_a) = of(0);
            let (b, next_b) = of(3);
            let alone_a = teacher_forced(model, collective, a, next_a);
            let alone_b = teacher_forced(model, collective, b, next_b);
            let mut rows = model
                .step(&[segment(2, 0, a), segment(1, 0, b)], collective)
                .expect("prefill");
            for at in 0..next_a.len() {
                let step = [
                    segment(1, b.len() + at, &next_b[at..=at]),
                    segment(2, a.len() + at, &next_a[at..=at]),
                ];
                let mut next = model.step(&step, collective).expect("decode");
                next.swap(0, 1);
                rows.extend(next);
            }
            for at in 0..=next_a.len() {
                assert_eq!(rows[2 * at], alone_a[at], "sequence a, token {at}");
                assert_eq!(rows[2 * at + 1], alone_b[at], "sequence b, token {at}");
            }
        },
    );
}
