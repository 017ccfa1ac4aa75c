//! The body of `/v1/responses`: what it asks for is what a chat asks for, in other
//! words. Nothing is stored, so what refers to stored responses is refused.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{Prompt, TemplateOptions, ToolUse, ValidRequest, form, items, parts};
use crate::openai::ApiError;
use crate::tools::ToolShape;

/// What `include` may ask for.
const LOGPROBS: &str = "message.output_text.logprobs";
/// Most things that a request may ask to include.
const MAX_INCLUDED: usize = 16;
/// Most pairs of `metadata`, and most bytes of their two sides.
const MAX_METADATA: (usize, usize, usize) = (16, 64, 512);
/// Fields of the other endpoints that a response has no place for.
const ELSEWHERE: [&str; 5] = [
    "n",
    "best_of",
    "truncate_prompt_tokens",
    "return_token_ids",
    "return_tokens_as_token_ids",
];
/// Fields that responses repeat as they were sent.
const REPEATED: [&str; 12] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
];

/// A request that was understood in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct ResponsesRequest {
    /// What is to be computed.
    pub request: ValidRequest,
    /// What the response says of its request.
    pub repeated: Map<String, Value>,
}

impl ResponsesRequest {
    /// Reads the body of `/v1/responses`.
    ///
    /// # Errors
    /// As [`ValidRequest::chat`].
    pub fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        if let Some(name) = ELSEWHERE.into_iter().find(|name| fields.has(name)) {
            return Err(ApiError::invalid_field(name, "is not a field of this API"));
        }
        let repeated = repeated(&fields);
        check_metadata(&mut fields)?;
        check_reasoning(&mut fields)?;
        // OpenAI's default is to store, so clients may say so; the response says that
        // it was not.
        let _asked: Option<bool> = fields.take("store")?;
        let instructions = fields.take("instructions")?;
        let messages = items::read(instructions, fields.required("input")?)?;
        let (tool_use, tools) = ToolUse::read(&mut fields, ToolShape::Flat)?.unzip();
        let logprobs = logprobs(&mut fields)?;
        let max_tokens = fields.number("max_output_tokens", 1, u32::MAX)?;
        let form = form::read_of_text(&mut fields)?;
        let prompt = Prompt::Chat(messages);
        let mut request = ValidRequest::read(&mut fields, vec![prompt], max_tokens, form)?;
        if request.shown.include_usage {
            let message = "include_usage is not supported; the last event tells the usage";
            return Err(ApiError::invalid_field("stream_options", message));
        }
        request.template = TemplateOptions {
            tools,
            ..TemplateOptions::default()
        };
        request.sampling.logprobs = logprobs;
        request.offer(tool_use)?;
        fields.refuse_rest()?;
        Ok(Self { request, repeated })
    }
}

/// What the response says of its request.
fn repeated(fields: &Fields) -> Map<String, Value> {
    // What is no object is refused before it could be repeated.
    let mut text = Map::from_iter([("format".to_owned(), json!({"type": "text"}))]);
    if let Value::Object(sent) = fields.sent("text") {
        text.extend(sent.into_iter().filter(|(_, value)| !value.is_null()));
    }
    let mut repeated = json!({
        "background": false,
        "metadata": {},
        "parallel_tool_calls": true,
        "previous_response_id": null,
        "reasoning": {"effort": null, "summary": null},
        "service_tier": "default",
        "store": false,
        "temperature": 1.0,
        "text": text,
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
    });
    for name in REPEATED {
        let sent = fields.sent(name);
        if !sent.is_null() || repeated.get(name).is_none() {
            repeated[name] = sent;
        }
    }
    match repeated {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn check_metadata(fields: &mut Fields) -> Result<(), ApiError> {
    let (pairs, key, value) = MAX_METADATA;
    let metadata: Map<String, Value> = fields.take("metadata")?.unwrap_or_default();
    let fits = |(name, text): (&String, &Value)| {
        name.len() <= key && text.as_str().is_some_and(|text| text.len() <= value)
    };
    if metadata.len() <= pairs && metadata.iter().all(fits) {
        return Ok(());
    }
    let message =
        format!("must be at most {pairs} strings of at most {value} bytes, with names of {key}");
    Err(ApiError::invalid_field("metadata", &message))
}

/// A model that does not reason can be asked not to.
fn check_reasoning(fields: &mut Fields) -> Result<(), ApiError> {
    let reasoning: Map<String, Value> = fields.take("reasoning")?.unwrap_or_default();
    let asks = |(name, value): &(&String, &Value)| {
        !(value.is_null() || *name == "effort" && *value == "none")
    };
    match reasoning.iter().find(asks) {
        None => Ok(()),
        Some((name, _)) => {
            let place = format!("reasoning.{name}");
            Err(ApiError::invalid_field(&place, "is not supported"))
        }
    }
}

/// How many alternatives are told of each token; `None` where nothing is.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let included: Vec<String> = fields.list("include", MAX_INCLUDED)?;
    if let Some(other) = included.iter().find(|what| *what != LOGPROBS) {
        let message = format!("\"{other}\" is not supported; \"{LOGPROBS}\" is");
        return Err(ApiError::invalid_field("include", &message));
    }
    let top = fields.number("top_logprobs", 0, parts::MAX_TOP_LOGPROBS)?;
    match (included.is_empty(), top) {
        (true, Some(1..)) => {
            let message = format!("needs include to hold \"{LOGPROBS}\"");
            Err(ApiError::invalid_field("top_logprobs", &message))
        }
        (true, _) => Ok(None),
        (false, top) => Ok(Some(top.unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests;
