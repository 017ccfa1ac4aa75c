//! The chat formats of Llama 3 and Llama 4 as Meta's reference writes them, for
//! models that come with a `tokenizer.model` and no template.

use serde_json::{Value, json};

use super::json::{Style, to_json};
use super::{ChatMessage, Conversation, Rendered};
use crate::text::{Special, TextError};

/// Tools that have a notation of their own.
const SEARCHES: [&str; 3] = ["brave_search", "wolfram_alpha", "photogen"];
const CODE: &str = "code_interpreter";

/// One of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::text) enum MetaFormat {
    /// Llama 3 to 3.3.
    Llama3,
    /// Llama 4.
    Llama4,
}

impl MetaFormat {
    /// The prompt for `conversation`. Control tokens stand around messages, never
    /// in them.
    ///
    /// # Errors
    /// When a message has a part that the format has no place for.
    pub(super) fn render(self, conversation: &Conversation) -> Result<Rendered, TextError> {
        if conversation.documents.is_some() {
            return Err(refused("documents have no place in the built-in format"));
        }
        let mut rendered = Rendered::default();
        rendered.push("<|begin_of_text|>", Special::Parse);
        let tools = conversation.tools.as_deref().unwrap_or_default();
        let mut messages = conversation.messages.iter().peekable();
        if let Some(system) = messages.next_if(|message| message.role() == "system") {
            self.message(&mut rendered, system)?;
        }
        if !tools.is_empty() {
            self.tools(&mut rendered, tools);
        }
        for message in messages {
            self.message(&mut rendered, message)?;
        }
        if conversation.add_generation_prompt {
            self.header(&mut rendered, "assistant");
        }
        Ok(rendered)
    }

    fn header(self, rendered: &mut Rendered, role: &str) {
        let (start, end) = match self {
            Self::Llama3 => ("<|start_header_id|>", "<|end_header_id|>"),
            Self::Llama4 => ("<|header_start|>", "<|header_end|>"),
        };
        rendered.push(format!("{start}{role}{end}\n\n"), Special::Parse);
    }

    fn end(self, rendered: &mut Rendered, of_message: bool) {
        let end = match (self, of_message) {
            (Self::Llama3, false) => "<|eot_id|>",
            (Self::Llama3, true) => "<|eom_id|>",
            (Self::Llama4, false) => "<|eot|>",
            (Self::Llama4, true) => "<|eom|>",
        };
        rendered.push(end, Special::Parse);
    }

    fn message(self, rendered: &mut Rendered, message: &ChatMessage) -> Result<(), TextError> {
        let role = match message.role() {
            role @ ("system" | "user" | "assistant") => role,
            "tool" | "ipython" => "ipython",
            other => {
                return Err(refused(&format!(
                    "\"{other}\" is not a role of the built-in format"
                )));
            }
        };
        let calls = match message.field("tool_calls") {
            Some(Value::Array(calls)) if role == "assistant" => calls
                .iter()
                .map(Call::read)
                .collect::<Result<Vec<_>, _>>()?,
            _ => Vec::new(),
        };
        self.header(rendered, role);
        let runs_code = calls.first().is_some_and(|call| call.name == CODE);
        if runs_code && self == Self::Llama3 {
            rendered.push("<|python_tag|>", Special::Parse);
        }
        content(rendered, message)?;
        for call in &calls {
            rendered.push(call.text()?, Special::Plain);
        }
        let goes_on = role == "assistant"
            && message.field("stop_reason").and_then(Value::as_str) == Some("end_of_message");
        let of_message = match self {
            Self::Llama3 => goes_on,
            Self::Llama4 => goes_on || !calls.is_empty() || role == "ipython",
        };
        self.end(rendered, of_message);
        Ok(())
    }

    /// A message of the user, behind the system's, that tells the model what it may
    /// call and how; answers in this notation are what [`Call::text`] writes.
    fn tools(self, rendered: &mut Rendered, tools: &[Value]) {
        let style = Style {
            indent: Some(4),
            ..Style::default()
        };
        let mut text = "These functions can be called when the answer needs them:\n\n".to_owned();
        for tool in tools {
            text.push_str(&to_json(tool, &style));
            text.push_str("\n\n");
        }
        text.push_str(
            "To call one, answer with one JSON object and nothing else: {\"type\": \"function\", \"name\": the function's name, \"parameters\": an object of its arguments}.",
        );
        self.header(rendered, "user");
        rendered.push(text, Special::Plain);
        self.end(rendered, false);
    }
}

fn refused(why: &str) -> TextError {
    TextError::Refused(why.to_owned())
}

/// The text of a message, each part by itself.
fn content(rendered: &mut Rendered, message: &ChatMessage) -> Result<(), TextError> {
    match message.field("content") {
        None => {}
        Some(Value::String(text)) => rendered.push(text.as_str(), Special::Plain),
        Some(Value::Array(parts)) => {
            for part in parts {
                let Some(text) = part["text"].as_str().or_else(|| part.as_str()) else {
                    return Err(refused(
                        "only parts with text have a place in the built-in format",
                    ));
                };
                rendered.push(text, Special::Plain);
            }
        }
        Some(_) => return Err(refused("content is neither text nor a list of parts")),
    }
    Ok(())
}

/// A call that the model made.
struct Call<'a> {
    name: &'a str,
    arguments: Value,
}

impl<'a> Call<'a> {
    fn read(call: &'a Value) -> Result<Self, TextError> {
        let function = call.get("function").unwrap_or(call);
        let Some(name) = function["name"].as_str() else {
            return Err(refused("a tool call has no function name"));
        };
        let arguments = match &function["arguments"] {
            Value::String(text) => serde_json::from_str(text).map_err(|error| {
                refused(&format!(
                    "the arguments of \"{name}\" are not JSON: {error}"
                ))
            })?,
            other => other.clone(),
        };
        Ok(Self { name, arguments })
    }

    fn text(&self) -> Result<String, TextError> {
        let argument = |name: &str| {
            self.arguments[name].as_str().ok_or_else(|| {
                refused(&format!(
                    "\"{}\" is called without the text \"{name}\"",
                    self.name
                ))
            })
        };
        if SEARCHES.contains(&self.name) {
            return Ok(format!(
                "{}.call(query=\"{}\")",
                self.name,
                argument("query")?
            ));
        }
        if self.name == CODE {
            return argument("code").map(str::to_owned);
        }
        let call = json!({
            "type": "function",
            "name": self.name,
            "parameters": self.arguments,
        });
        let style = Style {
            ensure_ascii: true,
            ..Style::default()
        };
        Ok(to_json(&call, &style))
    }
}
