//! From a checked request to answers on their way.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use futures::stream::SelectAll;
use llama_model::sample::SamplingParams;
use tokio::sync::OwnedSemaphorePermit;

use super::choice::{Choice, ChoiceParts, ShownPrompt};
use super::prompt::{self, Encoding};
use super::writer::{self, Writer};
use super::{Front, group_failed};
use crate::adapters::AdapterUse;
use crate::engine::{Submit, SubmitError};
use crate::openai::request::{Form, ToolChoice, ToolUse};
use crate::openai::{ApiError, Prompt, ValidRequest};
use crate::structured::Grammar;
use crate::tools::ToolStream;

/// The answers of one request on their way, each prompt's together.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) choices: SelectAll<Choice>,
    /// How many there are.
    pub(super) count: usize,
    /// Tokens of each prompt.
    pub(super) prompts: Vec<Arc<[u32]>>,
    /// What stands before the answers to each prompt, unless the answers bring it.
    pub(super) echoes: Vec<String>,
}

/// Hands `request` to the engine; `field` brought its prompt.
///
/// # Errors
/// When it names another model or tokens that there are not, does not fit the
/// context, or too many requests are open.
pub(super) async fn start(
    front: &Arc<Front>,
    field: &'static str,
    mut request: ValidRequest,
) -> Result<Started, ApiError> {
    let begun = Instant::now();
    let adapter = front.check_model(&request.model)?;
    check_ids(front, &request)?;
    let places = Places::take(front, &request)?;
    let form = required_form(front, &request).await?;
    let prompts = std::mem::take(&mut request.prompts);
    let encoding = Encoding {
        template: request.template.clone(),
        adds_lead: request.adds_lead,
        is_bounded: request.last_tokens.is_none(),
        field,
    };
    let texts: Vec<Option<String>> = prompts
        .iter()
        .map(|prompt| match prompt {
            Prompt::Text(text) if request.shown.echo => Some(text.clone()),
            _ => None,
        })
        .collect();
    let mut tokens = prompt::encode(front, prompts, encoding).await?;
    let mut echoes = Vec::new();
    let mut limits = Vec::new();
    for (tokens, text) in tokens.iter_mut().zip(texts) {
        let surplus = request
            .last_tokens
            .map_or(0, |last| tokens.len().saturating_sub(last));
        tokens.drain(..surplus);
        limits.push(answer_limit(
            tokens.len(),
            // The engine answers with one token at least.
            request.max_tokens.map(|most| most.max(1)),
            front.max_tokens,
            field,
        )?);
        if request.shown.echo {
            let shown = text.filter(|_| surplus == 0);
            echoes.push(
                shown.unwrap_or_else(|| writer::text_of(&front.tokenizer, tokens, request.shown)),
            );
        }
    }
    let prompts: Vec<Arc<[u32]>> = tokens.into_iter().map(Arc::from).collect();
    let choices = submit(
        front,
        &request,
        (&prompts, &echoes),
        &limits,
        places,
        (field, begun, form, adapter),
    )?;
    if request.prompt_logprobs().is_some() {
        echoes.clear();
    }
    for prompt in &prompts {
        front.metrics.prompt(prompt.len());
    }
    Ok(Started {
        count: choices.len(),
        choices: choices.into_iter().collect(),
        prompts,
        echoes,
    })
}

fn check_ids(front: &Front, request: &ValidRequest) -> Result<(), ApiError> {
    for prompt in &request.prompts {
        if let Prompt::Tokens(tokens) = prompt {
            prompt::check_ids(front, "prompt", tokens)?;
        }
    }
    prompt::check_ids(front, "stop_token_ids", &request.ending.ids)?;
    let biased = request.sampling.logit_bias.iter().map(|(token, _)| token);
    prompt::check_ids(front, "logit_bias", biased)
}

/// What the answer must be, by the client's form or because it must call a tool. Compiling
/// it, to see what is wrong with it, takes a while.
async fn required_form(
    front: &Arc<Front>,
    request: &ValidRequest,
) -> Result<Option<Grammar>, ApiError> {
    let (form, tool_use) = (request.form.clone(), request.tool_use.clone());
    let is_auto = |tool_use: &ToolUse| tool_use.choice == ToolChoice::Auto;
    if tool_use.as_ref().is_some_and(is_auto) && !front.takes_tools {
        return Err(ApiError::invalid_field(
            "tools",
            "cannot be shown to this model, whose chat template takes none; a tool_choice of \
             \"required\" or of a function works",
        ));
    }
    if form.is_none() && tool_use.is_none() {
        return Ok(None);
    }
    let format = front.tool_format;
    tokio::task::spawn_blocking(move || {
        if let Some(Form { field, grammar }) = form {
            grammar.check_field(field)?;
            return Ok(Some(grammar));
        }
        tool_use.map_or(Ok(None), |tool_use| tool_use.form(format))
    })
    .await
    .map_err(|_ended| ApiError::failed("the form could not be checked", "internal"))?
}

/// The places that a request's answers take.
struct Places(OwnedSemaphorePermit);

impl Places {
    fn take(front: &Front, request: &ValidRequest) -> Result<Self, ApiError> {
        let wanted = request.prompts.len() * request.choices as usize;
        let all = front.open_requests;
        if wanted > all {
            let field = if request.choices > 1 { "n" } else { "prompt" };
            let message = format!("{wanted} answers were asked for, at most {all} are computed");
            return Err(ApiError::invalid_field(field, &message));
        }
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        Arc::clone(&front.permits)
            .try_acquire_many_owned(wanted)
            .map(Self)
            .map_err(|_none_left| {
                ApiError::overloaded("too many requests are open; try again soon")
            })
    }

    fn next(&mut self) -> Result<OwnedSemaphorePermit, ApiError> {
        self.0
            .split(1)
            .ok_or_else(|| ApiError::failed("an answer has no place", "internal"))
    }
}

fn submit(
    front: &Front,
    request: &ValidRequest,
    (prompts, echoes): (&[Arc<[u32]>], &[String]),
    limits: &[u32],
    mut places: Places,
    (field, begun, form, adapter): (&'static str, Instant, Option<Grammar>, Option<AdapterUse>),
) -> Result<Vec<Choice>, ApiError> {
    let stop_ids = stop_ids(front, request);
    let mut choices = Vec::new();
    for (number, (prompt, limit)) in prompts.iter().zip(limits).enumerate() {
        for choice in 0..request.choices {
            let fallback = RandomState::new().hash_one(choices.len());
            let sampling = request.sampling(choice, fallback);
            let min_tokens = sampling.min_tokens;
            let end_ids = match min_tokens {
                0 => Vec::new(),
                _ => stop_ids.clone(),
            };
            let submit = Submit {
                id: 0,
                tokens: prompt.to_vec(),
                sampling: SamplingParams {
                    end_ids,
                    ..sampling
                },
                max_new_tokens: *limit,
                stop_ids: stop_ids.clone(),
                priority: request.priority,
                prompt_logprobs: request.prompt_logprobs(),
                cache_salt: request.cache_salt.clone(),
                adapter,
                form: form.clone(),
                is_compared: false,
            };
            let generation = front.engine.submit(submit).map_err(|error| match error {
                SubmitError::GroupFailed(report) => group_failed(&report),
                SubmitError::Busy => ApiError::overloaded(error.to_string()),
                SubmitError::Closed => ApiError::shutting_down(""),
            })?;
            let tokenizer = Arc::clone(&front.tokenizer);
            let mut shown = request.shown;
            // Calls stand behind control tokens.
            shown.control_tokens |= request.tool_use.is_some();
            let calls = request.tool_use.as_ref().map(|tool_use| {
                let answer = format!("{:016x}", RandomState::new().hash_one(choices.len()));
                ToolStream::new(front.tool_format, &tool_use.tools, &answer)
            });
            let parts = ChoiceParts {
                index: choices.len(),
                writer: Writer::new(tokenizer, &request.ending, shown, min_tokens),
                prompt: request.prompt_logprobs().map(|_| ShownPrompt {
                    tokens: Arc::clone(prompt),
                    text: echoes.get(number).cloned().unwrap_or_default(),
                    logprobs: Vec::new(),
                }),
                hides_answer: request.max_tokens == Some(0),
                calls,
                metrics: Arc::clone(&front.metrics),
                prompt_field: field,
                begun,
                permit: places.next()?,
            };
            choices.push(Choice::new(generation, parts));
        }
    }
    Ok(choices)
}

/// Tokens that end an answer.
fn stop_ids(front: &Front, request: &ValidRequest) -> Vec<u32> {
    let mut ids = request.ending.ids.clone();
    if !request.ending.ignores_end {
        ids.extend_from_slice(front.tokenizer.eos_ids());
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Most tokens that the answer may have.
fn answer_limit(
    prompt: usize,
    wanted: Option<u32>,
    max_tokens: u32,
    field: &str,
) -> Result<u32, ApiError> {
    if prompt == 0 {
        return Err(ApiError::invalid_field(field, "is empty"));
    }
    let room = u32::try_from(prompt)
        .ok()
        .and_then(|prompt| max_tokens.checked_sub(prompt));
    let message = match (room, wanted) {
        (None | Some(0), _) => {
            format!(
                "the prompt has {prompt} tokens; with the answer a sequence may have {max_tokens}"
            )
        }
        (Some(room), Some(wanted)) if wanted > room => format!(
            "the prompt has {prompt} tokens and max_tokens is {wanted}; together a sequence may have {max_tokens}"
        ),
        (Some(room), wanted) => return Ok(wanted.unwrap_or(room)),
    };
    Err(ApiError::context_length(field, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_gets_the_room_that_is_left() {
        let limit = |prompt, wanted| answer_limit(prompt, wanted, 16, "messages");
        assert_eq!(limit(10, None), Ok(6));
        assert_eq!(limit(10, Some(6)), Ok(6));
        let too_much = limit(10, Some(7)).expect_err("refused");
        assert_eq!(too_much.code, Some("context_length_exceeded"));
        assert!(
            too_much.message.contains("10 tokens and max_tokens is 7"),
            "{too_much}"
        );
        assert_eq!(limit(16, None).expect_err("refused").status, 400);
        assert_eq!(limit(0, None).expect_err("refused").status, 400);
    }
}
