//! From what a request is to continue to tokens.

use std::sync::Arc;
use std::time::SystemTime;

use llama_model::text::{ChatMessage, Conversation, Rendered, Special, TextError};

use super::Front;
use crate::openai::request::TemplateOptions;
use crate::openai::{ApiError, Prompt};

/// Stands behind a message that the answer is to go on with, so that templates
/// neither trim it nor hide where it ends. From the private use area.
const MARK: &str = "\u{F8D0}\u{F8D1}\u{F8D0}";

/// How text becomes tokens.
#[derive(Clone, Debug)]
pub(super) struct Encoding {
    pub(super) template: TemplateOptions,
    /// Whether text gets the tokens that whole prompts begin with.
    pub(super) adds_lead: bool,
    /// Whether text is refused that cannot fit the context.
    pub(super) is_bounded: bool,
    /// The field to blame.
    pub(super) field: &'static str,
}

/// Text that could not become tokens.
enum Unread {
    Text(TextError),
    TooLong { bytes: usize },
}

impl From<TextError> for Unread {
    fn from(error: TextError) -> Self {
        Self::Text(error)
    }
}

/// Token ids of each prompt, computed off the threads that carry requests, and not
/// more at a time than the machine has cores.
pub(super) async fn encode(
    front: &Arc<Front>,
    prompts: Vec<Prompt>,
    encoding: Encoding,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let failed = || ApiError::failed("the tokenizer failed", "tokenizer_failed");
    let turn = Arc::clone(&front.tokenizing);
    let turn = turn.acquire_owned().await.map_err(|_closed| failed())?;
    let field = encoding.field;
    let worker = Arc::clone(front);
    let encoded = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let prompts = prompts.into_iter();
        prompts
            .map(|prompt| encode_one(&worker, prompt, &encoding))
            .collect::<Result<_, _>>()
    });
    encoded
        .await
        .map_err(|_ended| failed())?
        .map_err(|error| match error {
            Unread::TooLong { bytes } => {
                let limit = front.max_tokens;
                let message =
                    format!("the prompt has {bytes} bytes, more than {limit} tokens can stand for");
                ApiError::context_length(field, message)
            }
            Unread::Text(error @ (TextError::NoChatTemplate | TextError::Refused(_))) => {
                ApiError::invalid_field("messages", &error.to_string())
            }
            Unread::Text(error) => {
                ApiError::failed(crate::failure::chain(&error), "tokenizer_failed")
            }
        })
}

fn encode_one(front: &Front, prompt: Prompt, encoding: &Encoding) -> Result<Vec<u32>, Unread> {
    let check = |bytes: usize| {
        let most = front
            .longest_token
            .saturating_mul(front.max_tokens as usize);
        if encoding.is_bounded && bytes > most {
            return Err(Unread::TooLong { bytes });
        }
        Ok(())
    };
    match prompt {
        Prompt::Chat(messages) => {
            let rendered = render(front, messages, &encoding.template)?;
            check(rendered.text().len())?;
            Ok(rendered.encode(&front.tokenizer)?)
        }
        Prompt::Text(text) => {
            check(text.len())?;
            Ok(if encoding.adds_lead {
                front.tokenizer.encode_prompt(&text, Special::Parse)?
            } else {
                front.tokenizer.encode(&text, Special::Parse)?
            })
        }
        Prompt::Tokens(tokens) => Ok(tokens),
    }
}

fn render(
    front: &Front,
    mut messages: Vec<ChatMessage>,
    options: &TemplateOptions,
) -> Result<Rendered, TextError> {
    if options.continue_final_message
        && let Some(last) = messages.pop()
    {
        let content = last.field("content").and_then(|content| content.as_str());
        let marked = format!("{}{MARK}", content.unwrap_or_default());
        messages.push(last.with_content(marked));
    }
    let rendered = front.template.render(&Conversation {
        tools: options.tools.clone(),
        documents: options.documents.clone(),
        variables: options.variables.clone(),
        add_generation_prompt: options.add_generation_prompt,
        ..Conversation::new(messages, SystemTime::now())
    })?;
    if !options.continue_final_message {
        return Ok(rendered);
    }
    rendered.before(MARK).ok_or_else(|| {
        let why = "it does not show the last message, which is to be continued";
        TextError::Refused(why.to_owned())
    })
}

/// Refuses token ids that the model does not have.
pub(super) fn check_ids<'a>(
    front: &Front,
    field: &str,
    ids: impl IntoIterator<Item = &'a u32>,
) -> Result<(), ApiError> {
    let vocabulary = front.tokenizer.vocab_size();
    match ids.into_iter().find(|id| **id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => {
            let message = format!("token {id} is outside the vocabulary of {vocabulary}");
            Err(ApiError::invalid_field(field, &message))
        }
    }
}
