//! The `input` of a response: text, or items that become the messages of a chat.

use llama_model::text::ChatMessage;
use serde_json::{Map, Value, json};

use super::messages::{self, MAX_MESSAGES};
use crate::openai::ApiError;

/// Fields of items that name or describe what was answered before and ask for nothing.
const REMARKS: [&str; 4] = ["id", "status", "phase", "created_by"];
/// The same of parts of text.
const PART_REMARKS: [&str; 2] = ["annotations", "logprobs"];
/// Who may say something.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// A message as chats write it, and the item that it began with.
struct Message {
    place: String,
    fields: Value,
}

/// The conversation that `instructions` and `input` are, each item refused by its place.
pub(super) fn read(
    instructions: Option<String>,
    input: Value,
) -> Result<Vec<ChatMessage>, ApiError> {
    let mut conversation = Vec::new();
    conversation.extend(instructions.map(|text| Message {
        place: "instructions".to_owned(),
        fields: json!({"role": "system", "content": text}),
    }));
    match input {
        Value::String(text) => conversation.push(Message {
            place: "input".to_owned(),
            fields: json!({"role": "user", "content": text}),
        }),
        Value::Array(items) if (1..=MAX_MESSAGES).contains(&items.len()) => {
            for (index, item) in items.into_iter().enumerate() {
                add(&mut conversation, format!("input[{index}]"), item)?;
            }
        }
        Value::Array(items) => {
            let message = format!("1 to {MAX_MESSAGES} items are needed, {} came", items.len());
            return Err(ApiError::invalid_field("input", &message));
        }
        _ => {
            let message = "must be a string or a list of items";
            return Err(ApiError::invalid_field("input", message));
        }
    }
    conversation
        .into_iter()
        .map(|message| messages::chat_message(&message.place, message.fields))
        .collect()
}

/// Adds what the item at `place` says.
fn add(conversation: &mut Vec<Message>, place: String, item: Value) -> Result<(), ApiError> {
    let Value::Object(mut fields) = item else {
        return Err(ApiError::invalid_field(&place, "must be an object"));
    };
    fields.retain(|name, value| !value.is_null() && !REMARKS.contains(&name.as_str()));
    let mut item = Item { place, fields };
    let kind = match item.fields.remove("type") {
        None => "message".to_owned(),
        Some(Value::String(kind)) => kind,
        Some(_) => return item.refuse("type", "must be a string"),
    };
    match kind.as_str() {
        "message" => {
            let fields = item.message()?;
            let place = item.place;
            conversation.push(Message { place, fields });
            Ok(())
        }
        "function_call" => {
            let call = item.call()?;
            add_call(conversation, item.place, call);
            Ok(())
        }
        "function_call_output" => {
            let fields = item.output()?;
            let place = item.place;
            conversation.push(Message { place, fields });
            Ok(())
        }
        other => {
            let message = format!(
                "\"{other}\" is not supported; message, function_call and \
                 function_call_output are"
            );
            item.refuse("type", &message)
        }
    }
}

/// Calls belong to the answer that they stand behind, as in chats, so that the result is
/// what the model wrote.
fn add_call(conversation: &mut Vec<Message>, place: String, call: Value) {
    if let Some(Message { fields, .. }) = conversation.last_mut()
        && fields["role"] == "assistant"
    {
        match fields.get_mut("tool_calls").and_then(Value::as_array_mut) {
            Some(calls) => calls.push(call),
            None => fields["tool_calls"] = json!([call]),
        }
        return;
    }
    let fields = json!({"role": "assistant", "tool_calls": [call]});
    conversation.push(Message { place, fields });
}

/// An item that is being read.
struct Item {
    place: String,
    fields: Map<String, Value>,
}

impl Item {
    fn refuse<T>(&self, field: &str, message: &str) -> Result<T, ApiError> {
        let place = format!("{}.{field}", self.place);
        Err(ApiError::invalid_field(&place, message))
    }

    fn text(&mut self, field: &str) -> Result<String, ApiError> {
        match self.fields.remove(field) {
            Some(Value::String(text)) => Ok(text),
            _ => self.refuse(field, "is required, as a string"),
        }
    }

    fn refuse_rest(&self) -> Result<(), ApiError> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(other) => self.refuse(other, "is not supported"),
        }
    }

    /// A chat's message with text.
    fn message(&mut self) -> Result<Value, ApiError> {
        let role = self.text("role")?;
        if !ROLES.contains(&role.as_str()) {
            let message = format!("\"{role}\" is not supported; {} are", ROLES.join(", "));
            return self.refuse("role", &message);
        }
        let content = self.content("content")?;
        self.refuse_rest()?;
        Ok(json!({"role": role, "content": content}))
    }

    /// Text, or parts of it as chats write them.
    fn content(&mut self, field: &str) -> Result<Value, ApiError> {
        match self.fields.remove(field) {
            Some(text @ Value::String(_)) => Ok(text),
            Some(Value::Array(parts)) => {
                let parts = parts.into_iter().enumerate().map(|(index, part)| {
                    text_part(&format!("{}.{field}[{index}]", self.place), part)
                });
                let parts: Result<Vec<Value>, _> = parts.collect();
                parts.map(Value::from)
            }
            _ => self.refuse(field, "is required, as a string or a list of text parts"),
        }
    }

    /// A call of a chat's message.
    fn call(&mut self) -> Result<Value, ApiError> {
        let (id, name) = (self.text("call_id")?, self.text("name")?);
        let arguments = self.text("arguments")?;
        self.refuse_rest()?;
        // Templates write arguments as values.
        if let Err(error) = serde_json::from_str::<Map<String, Value>>(&arguments)
            && !arguments.trim().is_empty()
        {
            let message = format!("must be the text of a JSON object: {error}");
            return self.refuse("arguments", &message);
        }
        let function = json!({"name": name, "arguments": arguments});
        Ok(json!({"id": id, "type": "function", "function": function}))
    }

    /// A chat's message with the result of a call.
    fn output(&mut self) -> Result<Value, ApiError> {
        let id = self.text("call_id")?;
        let content = self.content("output")?;
        self.refuse_rest()?;
        Ok(json!({"role": "tool", "tool_call_id": id, "content": content}))
    }
}

/// A part of text as chats write it.
fn text_part(place: &str, part: Value) -> Result<Value, ApiError> {
    let refuse = |field: &str, message: &str| {
        Err(ApiError::invalid_field(
            &format!("{place}.{field}"),
            message,
        ))
    };
    let Value::Object(mut fields) = part else {
        return Err(ApiError::invalid_field(place, "must be an object"));
    };
    fields.retain(|name, value| !value.is_null() && !PART_REMARKS.contains(&name.as_str()));
    let kind = fields.remove("type");
    if !matches!(
        kind.as_ref().and_then(Value::as_str),
        Some("input_text" | "output_text" | "text")
    ) {
        return refuse(
            "type",
            "must be input_text or output_text; others are not supported",
        );
    }
    let Some(text @ Value::String(_)) = fields.remove("text") else {
        return refuse("text", "is required, as a string");
    };
    match fields.keys().next() {
        None => Ok(json!({"type": "text", "text": text})),
        Some(other) => refuse(other, "is not supported"),
    }
}
