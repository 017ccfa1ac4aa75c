//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};

use super::prompt::{self, Encoding};
use super::{Front, writer};
use crate::openai::request::Shown;
use crate::openai::{ApiError, DetokenizeRequest, Prompt, TokenizeRequest, response};

/// What a text or a conversation is in tokens.
pub(super) async fn tokenize(front: &Arc<Front>, request: Request) -> Result<Response, ApiError> {
    let body = front.room.read(request).await?;
    let request = TokenizeRequest::read(&body.bytes)?;
    if let Some(model) = &request.model {
        front.check_model(model)?;
    }
    let field = match request.prompt {
        Prompt::Chat(_) => "messages",
        Prompt::Text(_) | Prompt::Tokens(_) => "prompt",
    };
    let encoding = Encoding {
        template: request.template,
        adds_lead: request.adds_lead,
        is_bounded: false,
        field,
    };
    let encoded = prompt::encode(front, vec![request.prompt], encoding).await?;
    let tokens = encoded.into_iter().next().unwrap_or_default();
    let texts: Option<Vec<String>> = request.token_texts.then(|| {
        let tokens = tokens.iter();
        tokens
            .map(|token| front.tokenizer.token_text(*token))
            .collect()
    });
    let body = response::tokenized(&tokens, texts.as_deref(), front.max_tokens);
    Ok(axum::Json(body).into_response())
}

/// What tokens are in text, control tokens included.
pub(super) async fn detokenize(front: &Arc<Front>, request: Request) -> Result<Response, ApiError> {
    let body = front.room.read(request).await?;
    let request = DetokenizeRequest::read(&body.bytes, front.max_tokens as usize)?;
    if let Some(model) = &request.model {
        front.check_model(model)?;
    }
    prompt::check_ids(front, "tokens", &request.tokens)?;
    let shown = Shown {
        control_tokens: true,
        ..Shown::default()
    };
    let text = writer::text_of(&front.tokenizer, &request.tokens, shown);
    Ok(axum::Json(response::detokenized(&text)).into_response())
}
