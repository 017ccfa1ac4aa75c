//! The messages of a conversation.

use llama_model::text::ChatMessage;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::openai::ApiError;

/// Most messages of a conversation.
pub(super) const MAX_MESSAGES: usize = 1024;

/// Reads `messages`, each refused by its place.
pub(super) fn read(messages: Vec<Value>) -> Result<Vec<ChatMessage>, ApiError> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let message = format!(
            "1 to {MAX_MESSAGES} messages are needed, {} came",
            messages.len()
        );
        return Err(ApiError::invalid_field("messages", &message));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| chat_message(&format!("messages[{index}]"), message))
        .collect()
}

/// One message, which came at `at`.
pub(super) fn chat_message(at: &str, message: Value) -> Result<ChatMessage, ApiError> {
    let place = |field: &str| format!("{at}.{field}");
    let refuse = |field: &str, why: &str| Err(ApiError::invalid_field(&place(field), why));
    let Value::Object(mut fields) = message else {
        return Err(ApiError::invalid_field(at, "must be an object"));
    };
    fields.retain(|_, value| !value.is_null());
    let Some(Value::String(role)) = fields.remove("role") else {
        return refuse("role", "is required, as a string");
    };
    let role = match role.as_str() {
        "system" | "user" | "assistant" | "tool" => role,
        // OpenAI's newer name for it.
        "developer" => "system".to_owned(),
        _ => {
            let why = format!("\"{role}\" is not supported; system, user, assistant and tool are");
            return refuse("role", &why);
        }
    };
    let calls = fields
        .remove("tool_calls")
        .filter(|calls| calls.as_array().is_none_or(|calls| !calls.is_empty()));
    if calls.is_some() && role != "assistant" {
        return refuse("tool_calls", "are an assistant's");
    }
    let content = match fields.remove("content") {
        Some(Value::String(content)) => content,
        // A message of calls need not say anything.
        None if calls.is_some() => String::new(),
        Some(Value::Array(parts)) => parts
            .into_iter()
            .map(|part| text_part(&place("content"), part))
            .collect::<Result<_, _>>()?,
        _ => {
            return refuse(
                "content",
                "is required, as a string or a list of text parts",
            );
        }
    };
    let mut message = Map::new();
    if role == "tool" {
        match fields.remove("tool_call_id") {
            Some(id @ Value::String(_)) => message.insert("tool_call_id".to_owned(), id),
            None => None,
            Some(_) => return refuse("tool_call_id", "must be a string"),
        };
    }
    message.insert("role".to_owned(), Value::String(role));
    message.insert("content".to_owned(), Value::String(content));
    message.extend(calls.map(|calls| ("tool_calls".to_owned(), calls)));
    match fields.keys().next() {
        None => ChatMessage::from_openai(message)
            .map_err(|error| ApiError::invalid_field(&place(&error.field), &error.message)),
        Some(other) => refuse(other, "is not supported"),
    }
}

fn text_part(place: &str, part: Value) -> Result<String, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct TextPart {
        r#type: String,
        text: String,
    }
    match serde_json::from_value::<TextPart>(part) {
        Ok(part) if part.r#type == "text" => Ok(part.text),
        _ => Err(ApiError::invalid_field(
            place,
            "only parts {\"type\": \"text\", \"text\": …} are supported",
        )),
    }
}
