//! From what chats did to figures.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

use std::time::Duration;

use kubectl_llama::bench::figures::{Chat, Figures, Outcome};

fn chat(first: u64, between: u64, tokens: u64) -> Chat {
    Chat {
        texts: (0..tokens)
            .map(|place| Duration::from_millis(first + place * between))
            .collect(),
        prompt_tokens: 100,
        answer_tokens: tokens,
    }
}

#[test]
fn figures_of_a_run_with_errors() {
    let mut outcomes: Vec<Outcome> = (0..18).map(|extra| Ok(chat(100 + extra, 10, 11))).collect();
    outcomes.push(Ok(chat(1000, 10, 11)));
    outcomes.extend([
        Err("busy".to_owned()),
        Err("late".to_owned()),
        Err("late".to_owned()),
    ]);
    let figures = Figures::of(&outcomes, Duration::from_secs(2));
    insta::assert_snapshot!(figures.page());
    insta::assert_snapshot!(
        "figures_as_data",
        serde_json::to_string_pretty(&figures).expect("JSON")
    );
}

#[test]
fn nothing_answered_has_no_figures() {
    let figures = Figures::of(&[Err("busy".to_owned())], Duration::from_secs(1));
    assert_eq!(figures.first_text_ms, None);
    assert_eq!(figures.chat_tokens_per_second, None);
    assert!(
        figures
            .page()
            .contains("tokens/s of a chat       -     -     -")
    );
    Figures::of(&[], Duration::ZERO).page();
}
