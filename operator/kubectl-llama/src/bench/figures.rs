//! From what each chat did to figures, as a table or as data. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::words::{NONE, Table, count};

/// What a chat that went well did. Times are from the moment it was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chat {
    /// When each piece of text came.
    pub texts: Vec<Duration>,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub answer_tokens: u64,
}

/// What a chat did, or why it failed.
pub type Outcome = Result<Chat, String>;

/// The half, and the best of the worst 5 and 1 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Half of the values are no worse.
    pub p50: f64,
    /// 95 % are no worse.
    pub p95: f64,
    /// 99 % are no worse.
    pub p99: f64,
}

/// Failures that said the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failures {
    /// How many.
    pub count: usize,
    /// What they said.
    pub message: String,
}

/// What all chats did.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Chats that were sent.
    pub requests: usize,
    /// Those that went well.
    pub answered: usize,
    /// Why others failed, the most frequent first.
    pub errors: Vec<Failures>,
    /// From the first sent to the last end.
    pub wall_seconds: f64,
    /// Tokens of prompts, on average.
    pub prompt_tokens: f64,
    /// Tokens of answers, on average.
    pub answer_tokens: f64,
    /// Tokens of answers a second, all chats together.
    pub tokens_per_second: f64,
    /// Milliseconds to the first text.
    pub first_text_ms: Option<Quantiles>,
    /// Milliseconds between two texts.
    pub between_texts_ms: Option<Quantiles>,
    /// Tokens of an answer a second, over the chat's whole time.
    pub chat_tokens_per_second: Option<Quantiles>,
}

impl Figures {
    /// Of `outcomes`, which took `wall` together.
    pub fn of(outcomes: &[Outcome], wall: Duration) -> Self {
        let chats: Vec<&Chat> = outcomes
            .iter()
            .filter_map(|one| one.as_ref().ok())
            .collect();
        let tokens: u64 = chats.iter().map(|chat| chat.answer_tokens).sum();
        let prompts: u64 = chats.iter().map(|chat| chat.prompt_tokens).sum();
        let mean = |sum: u64| sum as f64 / chats.len().max(1) as f64;
        let between = chats.iter().flat_map(|chat| {
            let pairs = chat.texts.windows(2);
            pairs.map(|pair| millis(pair[1].saturating_sub(pair[0])))
        });
        let speeds = chats.iter().filter_map(|chat| {
            let end = chat.texts.last().filter(|end| !end.is_zero())?;
            Some(chat.answer_tokens as f64 / end.as_secs_f64())
        });
        let first = chats.iter().filter_map(|chat| chat.texts.first());
        Self {
            requests: outcomes.len(),
            answered: chats.len(),
            errors: failures(outcomes),
            wall_seconds: wall.as_secs_f64(),
            prompt_tokens: mean(prompts),
            answer_tokens: mean(tokens),
            tokens_per_second: if wall.is_zero() {
                0.0
            } else {
                tokens as f64 / wall.as_secs_f64()
            },
            first_text_ms: quantiles(first.map(|time| millis(*time)).collect()),
            between_texts_ms: quantiles(between.collect()),
            // The worst are the slowest.
            chat_tokens_per_second: quantiles(speeds.map(|speed| -speed).collect())
                .map(Quantiles::negated),
        }
    }

    /// As a table.
    pub fn page(&self) -> String {
        let mut page = format!(
            "{} of {} answered in {:.1} s: {:.1} tokens/s together\n\
             prompts of {:.0} tokens, answers of {:.0} tokens on average\n\n",
            self.answered,
            count(i64::try_from(self.requests).unwrap_or(i64::MAX), "chat"),
            self.wall_seconds,
            self.tokens_per_second,
            self.prompt_tokens,
            self.answer_tokens
        );
        let mut table = Table::new(&["", "p50", "p95", "p99"]);
        for (title, values) in [
            ("time to first text, ms", self.first_text_ms),
            ("time between texts, ms", self.between_texts_ms),
            ("tokens/s of a chat", self.chat_tokens_per_second),
        ] {
            let shown = |of: fn(Quantiles) -> f64| {
                values.map_or_else(|| NONE.to_owned(), |values| format!("{:.1}", of(values)))
            };
            table.row([
                title.to_owned(),
                shown(|values| values.p50),
                shown(|values| values.p95),
                shown(|values| values.p99),
            ]);
        }
        page.push_str(&table.text(""));
        if !self.errors.is_empty() {
            page.push_str("\nErrors\n");
        }
        for failures in &self.errors {
            let times = i64::try_from(failures.count).unwrap_or(i64::MAX);
            let _ = writeln!(page, "  {}: {}", count(times, "time"), failures.message);
        }
        page
    }
}

impl Quantiles {
    fn negated(self) -> Self {
        Self {
            p50: -self.p50,
            p95: -self.p95,
            p99: -self.p99,
        }
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// By the nearest rank; `None` of nothing.
fn quantiles(mut values: Vec<f64>) -> Option<Quantiles> {
    values.sort_by(f64::total_cmp);
    let at = |percent: usize| {
        let rank = (values.len() * percent).div_ceil(100);
        values.get(rank.saturating_sub(1)).copied()
    };
    Some(Quantiles {
        p50: at(50)?,
        p95: at(95)?,
        p99: at(99)?,
    })
}

fn failures(outcomes: &[Outcome]) -> Vec<Failures> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for message in outcomes.iter().filter_map(|one| one.as_ref().err()) {
        *counts.entry(message).or_default() += 1;
    }
    let mut all: Vec<Failures> = counts
        .into_iter()
        .map(|(message, count)| Failures {
            count,
            message: message.to_owned(),
        })
        .collect();
    all.sort_by_key(|failures| std::cmp::Reverse(failures.count));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let hundred = (1..=100).rev().map(f64::from).collect();
        let found = quantiles(hundred).expect("values");
        assert_eq!((found.p50, found.p95, found.p99), (50.0, 95.0, 99.0));
        let one = quantiles(vec![7.0]).expect("a value");
        assert_eq!((one.p50, one.p95, one.p99), (7.0, 7.0, 7.0));
        assert_eq!(quantiles(Vec::new()), None);
    }
}
