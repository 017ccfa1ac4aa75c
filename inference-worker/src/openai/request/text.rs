//! What clients send to `/tokenize` and `/detokenize`, checked.

use super::fields::Fields;
use super::{Prompt, TemplateOptions, messages};
use crate::openai::ApiError;

/// The body of `/tokenize`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizeRequest {
    /// The model asked for, if one was named.
    pub model: Option<String>,
    /// What is to become tokens.
    pub prompt: Prompt,
    /// How a conversation becomes text.
    pub template: TemplateOptions,
    /// Whether text gets the tokens that whole prompts begin with.
    pub adds_lead: bool,
    /// Whether the text of each token is told.
    pub token_texts: bool,
}

impl TokenizeRequest {
    /// Reads a body: either `prompt` or `messages`.
    ///
    /// # Errors
    /// 400, naming the field that is wrong, unknown or not supported.
    pub fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let mut template = TemplateOptions::default();
        let mut adds_lead = false;
        let prompt = if fields.has("messages") {
            template = TemplateOptions::read(&mut fields)?;
            Prompt::Chat(messages::read(fields.required("messages")?)?)
        } else {
            adds_lead = fields.take("add_special_tokens")?.unwrap_or(true);
            let mut prompts = fields.prompts()?;
            match (prompts.len(), prompts.pop()) {
                (1, Some(text @ Prompt::Text(_))) => text,
                _ => return Err(ApiError::invalid_field("prompt", "must be a string")),
            }
        };
        let request = Self {
            model: fields.take("model")?,
            prompt,
            template,
            adds_lead,
            token_texts: fields.flag("return_token_strs")?,
        };
        fields.refuse_rest()?;
        Ok(request)
    }
}

/// The body of `/detokenize`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetokenizeRequest {
    /// The model asked for, if one was named.
    pub model: Option<String>,
    /// What is to become text.
    pub tokens: Vec<u32>,
}

impl DetokenizeRequest {
    /// Reads a body of at most `most` tokens.
    ///
    /// # Errors
    /// As [`TokenizeRequest::read`].
    pub fn read(body: &[u8], most: usize) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let tokens = fields.tokens()?;
        if tokens.len() > most {
            let message = format!("at most {most} tokens, {} came", tokens.len());
            return Err(ApiError::invalid_field("tokens", &message));
        }
        let request = Self {
            model: fields.take("model")?,
            tokens,
        };
        fields.refuse_rest()?;
        Ok(request)
    }
}
