//! What a template is given.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Names under which clients send the reasoning of an earlier answer.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One message of a conversation: a JSON object with `role`, mostly `content` (text
/// or a list of parts), and what the template knows besides: `tool_calls`,
/// `tool_call_id`, `name` and so on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChatMessage {
    fields: Map<String, Value>,
}

impl ChatMessage {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let text = |text: String| Value::String(text);
        let fields = [
            ("role".to_owned(), text(role.into())),
            ("content".to_owned(), text(content.into())),
        ];
        Self {
            fields: fields.into_iter().collect(),
        }
    }

    /// A message of any fields.
    pub fn from_fields(fields: Map<String, Value>) -> Self {
        Self { fields }
    }

    /// The message with other text.
    #[must_use]
    pub fn with_content(mut self, content: impl Into<String>) -> Self {
        self.fields
            .insert("content".to_owned(), Value::String(content.into()));
        self
    }

    /// A message as OpenAI's clients send it. Templates want the arguments of its tool
    /// calls as objects, and a message without calls to have no `tool_calls`.
    ///
    /// # Errors
    /// When a call has no name or its arguments are no JSON object.
    pub fn from_openai(mut fields: Map<String, Value>) -> Result<Self, MessageError> {
        const FIELD: &str = "tool_calls";
        let calls = match fields.get_mut(FIELD) {
            None | Some(Value::Null) => return Ok(Self { fields }),
            Some(Value::Array(calls)) => calls,
            Some(_) => return Err(MessageError::new(FIELD, "must be a list")),
        };
        if calls.is_empty() {
            fields.remove(FIELD);
            return Ok(Self { fields });
        }
        for (index, call) in calls.iter_mut().enumerate() {
            let place = format!("{FIELD}[{index}].function");
            let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
                return Err(MessageError::new(&place, "must be an object"));
            };
            if !function.get("name").is_some_and(Value::is_string) {
                let place = format!("{place}.name");
                return Err(MessageError::new(&place, "must be a string"));
            }
            let arguments = function.get("arguments").unwrap_or(&Value::Null);
            let arguments = arguments_of(arguments)
                .map_err(|message| MessageError::new(&format!("{place}.arguments"), &message))?;
            function.insert("arguments".to_owned(), Value::Object(arguments));
        }
        Ok(Self { fields })
    }

    /// The message as templates see it: without nulls, and with the reasoning of an
    /// answer under the names that templates know.
    pub(super) fn for_template(&self) -> Map<String, Value> {
        let mut fields = self.fields.clone();
        fields.retain(|_, value| !value.is_null());
        let reasoning = REASONING.iter().find_map(|name| self.field(name)).cloned();
        if let Some(reasoning) = reasoning {
            fields
                .entry("thinking")
                .or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".to_owned(), reasoning);
        }
        fields
    }

    /// The field called `name`; null counts as absent.
    pub fn field(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// `system`, `user`, `assistant`, `tool`, or what the template knows besides;
    /// empty when the message has no role.
    pub fn role(&self) -> &str {
        self.field("role").and_then(Value::as_str).unwrap_or("")
    }
}

/// The arguments of a call, which clients send as text.
fn arguments_of(sent: &Value) -> Result<Map<String, Value>, String> {
    match sent {
        Value::Null => Ok(Map::new()),
        Value::Object(arguments) => Ok(arguments.clone()),
        Value::String(text) if text.trim().is_empty() => Ok(Map::new()),
        Value::String(text) => {
            serde_json::from_str(text).map_err(|error| format!("must be a JSON object: {error}"))
        }
        _ => Err("must be the text of a JSON object".to_owned()),
    }
}

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct MessageError {
    /// The field of the message that is at fault.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl MessageError {
    fn new(field: &str, message: &str) -> Self {
        Self {
            field: field.to_owned(),
            message: message.to_owned(),
        }
    }
}

/// All that a template may write of.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The messages, oldest first.
    pub messages: Vec<ChatMessage>,
    /// Functions that the model may call, as JSON schemas.
    pub tools: Option<Vec<Value>>,
    /// Texts that the answer may rest on.
    pub documents: Option<Vec<Value>>,
    /// Further variables of the template, such as `date_string`.
    pub variables: Map<String, Value>,
    /// Whether the prompt ends where the answer begins.
    pub add_generation_prompt: bool,
    /// What the template takes for the present, in UTC.
    pub now: SystemTime,
}

impl Conversation {
    /// `messages` that wait for an answer at the time `now`.
    pub fn new(messages: Vec<ChatMessage>, now: SystemTime) -> Self {
        Self {
            messages,
            tools: None,
            documents: None,
            variables: Map::new(),
            add_generation_prompt: true,
            now,
        }
    }
}
