//! The real model (SmolLM2-135M-Instruct, Q4_1) against what llama.cpp says of
//! it, and tensor parallel 1 against 3.

mod common;

use common::{argmax, max_difference, on_ranks, real_model, segment, teacher_forced};
use llama_model::text::{Detokenizer, Special, Tokenizer};
use llama_model::{Collective, Llama, StepModel};
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

/// Most likely tokens one after another.
fn greedy(model: &mut Llama, collective: &mut dyn Collective, case: &Case) -> Vec<u32> {
    let mut tokens = case.prompt_ids.clone();
    let mut cached = 0;
    while tokens.len() < case.prompt_ids.len() + case.greedy_ids.len() {
        let rows = model
            .step(&[segment(0, cached, &tokens[cached..])], collective)
            .expect("steps");
        cached = tokens.len();
        tokens.push(argmax(&rows[0]));
    }
    tokens.split_off(case.prompt_ids.len())
}

#[test]
fn greedy_report() {
    let Some(gguf) = real_model() else { return };
    for world in [1, 3] {
        let all = on_ranks(&gguf, world, (1, MAX_TOKENS), |model, collective| {
            golden()
                .iter()
                .map(|case| greedy(model, collective, case))
                .collect::<Vec<_>>()
        });
        for (number, case) in golden().iter().enumerate() {
            if world == 1 && all[0][number] != case.greedy_ids {
                let at = all[0][number]
                    .iter()
                    .zip(&case.greedy_ids)
                    .position(|(a, b)| a != b)
                    .expect("differs");
                let rows = on_ranks(&gguf, 1, (1, MAX_TOKENS), |model, collective| {
                    teacher_forced(model, collective, &case.prompt_ids, &case.greedy_ids)
                });
                for at in 0..case.greedy_ids.len() {
                    let row = &rows[0][at];
                    let (ours, theirs) = (argmax(row), case.greedy_ids[at]);
                    if ours != theirs {
                        println!(
                            "  at {at}: ours {ours} {} theirs {theirs} {}",
                            row[ours as usize], row[theirs as usize]
                        );
                    }
                }
                println!("case {number}: differs from {at} on");
            }
            let same = all
                .iter()
                .map(|ids| ids[number] == case.greedy_ids)
                .collect::<Vec<_>>();
            println!("world {world} case {number}: {same:?} {:?}", case.text);
        }
    }
}

#[test]
fn logits_agree_over_tensor_parallel_sizes() {
    let Some(gguf) = real_model() else { return };
    let of_world = |world| {
        on_ranks(&gguf, world, (1, MAX_TOKENS), |model, collective| {
            golden()
                .iter()
                .map(|case| teacher_forced(model, collective, &case.prompt_ids, &case.greedy_ids))
                .collect::<Vec<_>>()
        })
    };
    let one = of_world(1).remove(0);
    let three = of_world(3);
    assert_eq!(three[0], three[1], "ranks hold equal logits");
    assert_eq!(three[0], three[2], "ranks hold equal logits");
    for (number, (one, three)) in one.iter().zip(&three[0]).enumerate() {
        let difference = max_difference(one, three);
        println!(
            "case {number}: {} rows, max difference {difference:e}",
            one.len()
        );
        assert!(difference <= 1e-4, "case {number}: {difference}");
    }
}

#[test]
fn tokenizer_agrees_with_llama_cpp() {
    let Some(gguf) = real_model() else { return };
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("builds");
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
