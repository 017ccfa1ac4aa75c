//! The golden answer: what all ranks together make of a fixed text, before requests are
//! taken and again when there is time.
//!
//! The answer is greedy, and ranks compare their logits bit by bit in every step of it.
//! Its digest is that of its tokens and of their probabilities, so a weight that changed
//! by a bit, a rank that computes otherwise or a link that garbles shows. It depends on
//! the weights, their precision and the worker's build, and for layouts that sum in the
//! same order on nothing else.

use std::time::{Duration, Instant};

use llama_contract::{FailureCategory, SelfTestReport};
use llama_model::sample::SamplingParams;
use llama_model::text::{Special, Tokenizer};

use crate::comm::millis;
use crate::engine::{EngineClient, GenerationEvent, Submit, TokenLogprobs};
use crate::failure::Failure;

/// Of common words, so that every model has an opinion.
const TEXT: &str = "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday. The first month of the year is";
/// Tokens of the answer.
const ANSWER: usize = 8;
/// Probabilities that count besides those of the answer's own tokens.
const ALTERNATIVES: u32 = 8;
/// How long it may take; a step's own deadline comes first.
const DEADLINE: Duration = Duration::from_mins(10);

/// A text in tokens, and how many tokens answer it.
pub(super) type Question = (Vec<u32>, u32);

/// Why there is no answer.
enum NoAnswer {
    /// The ranks have not taken the question.
    NotTaken(String),
    /// They did not answer it.
    Failed(String),
}

/// The golden question for sequences of `max_tokens`.
///
/// # Errors
/// When the tokenizer cannot read it.
pub(super) fn question(tokenizer: &Tokenizer, max_tokens: u32) -> Result<Question, Failure> {
    let most = max_tokens as usize;
    let answer = ANSWER.min(most.saturating_sub(1)).max(1);
    let mut tokens = tokenizer
        .encode_prompt(TEXT, Special::Plain)
        .map_err(|error| Failure::from_error(FailureCategory::ModelInvalid, &error))?;
    tokens.truncate(most.saturating_sub(answer).max(1));
    Ok((tokens, u32::try_from(answer).unwrap_or(1)))
}

/// Has the ranks answer, and compares the answer with the one `expected`, if any.
///
/// # Errors
/// `SelfTestMismatch` when the answer is another one, none, or no numbers.
pub(super) async fn run(
    engine: &EngineClient,
    question: Question,
    expected: Option<&str>,
) -> Result<SelfTestReport, Failure> {
    let answered = answer(engine, question).await;
    let report =
        answered.map_err(|(NoAnswer::NotTaken(why) | NoAnswer::Failed(why))| mismatch(why))?;
    match expected.filter(|expected| *expected != report.answer) {
        None => Ok(report),
        Some(expected) => Err(mismatch(format!(
            "the golden answer is {}, expected {expected}: weights, precision, build or order of sums differ",
            report.answer
        ))),
    }
}

/// Has the ranks answer once more, and compares the answer with the `first`. Returns whether
/// they have: they may be too busy to take the question.
///
/// # Errors
/// `SelfTestMismatch` when the answer is another one, none, or no numbers.
pub(super) async fn again(
    engine: &EngineClient,
    question: Question,
    first: &str,
) -> Result<bool, Failure> {
    let report = match answer(engine, question).await {
        Ok(report) => report,
        Err(NoAnswer::NotTaken(why)) => {
            tracing::debug!(why, "the self-test has to wait");
            return Ok(false);
        }
        Err(NoAnswer::Failed(why)) => return Err(mismatch(why)),
    };
    if report.answer == first {
        return Ok(true);
    }
    Err(mismatch(format!(
        "the golden answer has changed: it is {} and was {first} when the group began to serve; \
         memory, a processor or a link does not work as it did",
        report.answer
    )))
}

async fn answer(
    engine: &EngineClient,
    (tokens, answer): Question,
) -> Result<SelfTestReport, NoAnswer> {
    let started = Instant::now();
    let asked = tokio::time::timeout(DEADLINE, ask(engine, tokens, answer)).await;
    let drawn = asked.unwrap_or_else(|_elapsed| {
        let seconds = DEADLINE.as_secs();
        let why = format!("no answer came within {seconds} seconds");
        Err(NoAnswer::Failed(why))
    })?;
    Ok(SelfTestReport {
        answer: digest(&drawn),
        tokens: u32::try_from(drawn.len()).unwrap_or(u32::MAX),
        millis: millis(started.elapsed()),
        repeats: 0,
    })
}

fn mismatch(message: impl Into<String>) -> Failure {
    let message = format!("the self-test failed: {}", message.into());
    Failure::new(FailureCategory::SelfTestMismatch, message)
}

/// The tokens of an answer with their probabilities.
async fn ask(
    engine: &EngineClient,
    tokens: Vec<u32>,
    answer: u32,
) -> Result<Vec<(u32, Option<TokenLogprobs>)>, NoAnswer> {
    let submit = Submit {
        id: 0,
        tokens,
        sampling: SamplingParams {
            logprobs: Some(ALTERNATIVES),
            ..SamplingParams::GREEDY
        },
        max_new_tokens: answer,
        stop_ids: Vec::new(),
        priority: i32::MIN,
        cache_salt: None,
        prompt_logprobs: None,
        adapter: None,
        form: None,
        is_compared: true,
    };
    let submitted = engine.submit(submit);
    let mut generation = submitted.map_err(|error| NoAnswer::NotTaken(error.to_string()))?;
    let mut drawn = Vec::new();
    loop {
        match generation.next().await {
            Some(GenerationEvent::Token {
                token, logprobs, ..
            }) => drawn.push((token, logprobs)),
            // Not asked for.
            Some(GenerationEvent::Prompt(_)) => {}
            Some(GenerationEvent::Finished { .. }) => return Ok(drawn),
            Some(GenerationEvent::Failed(message)) => return Err(NoAnswer::Failed(message)),
            Some(GenerationEvent::Refused(refusal)) => {
                return Err(NoAnswer::NotTaken(refusal.to_string()));
            }
            Some(GenerationEvent::GroupFailed(report)) => {
                return Err(NoAnswer::Failed(report.message.clone()));
            }
            None => {
                let why = "the ranks ended before they answered".to_owned();
                return Err(NoAnswer::Failed(why));
            }
        }
    }
}

/// Sixteen hexadecimal digits.
fn digest(drawn: &[(u32, Option<TokenLogprobs>)]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (token, logprobs) in drawn {
        hasher.update(&token.to_le_bytes());
        if let Some(logprobs) = logprobs {
            hasher.update(&logprobs.logprob.to_le_bytes());
            for (token, logprob) in &logprobs.top {
                hasher.update(&token.to_le_bytes());
                hasher.update(&logprob.to_le_bytes());
            }
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_sees_every_token_and_bit() {
        let logprobs = |logprob: f32| {
            Some(TokenLogprobs {
                logprob,
                top: vec![(1, logprob), (2, -3.0)],
            })
        };
        let answer = vec![(1, logprobs(-0.5)), (4, None)];
        let mut other = answer.clone();
        other[1].0 = 5;
        assert_eq!(digest(&answer).len(), 16);
        assert_ne!(digest(&answer), digest(&other));
        let next = f32::from_bits((-0.5_f32).to_bits() + 1);
        let other = vec![(1, logprobs(next)), (4, None)];
        assert_ne!(digest(&answer), digest(&other));
    }
}
