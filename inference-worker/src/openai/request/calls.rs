//! The functions that a chat offers to the model, and which of them it must call.

use serde::Deserialize;
use serde_json::{Value, json};

use super::fields::Fields;
use crate::openai::ApiError;
use crate::structured::Grammar;
use crate::tools::{RequiredCall, Tool, ToolFormat, ToolShape, required_calls};

/// Functions that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolUse {
    /// The functions.
    pub tools: Vec<Tool>,
    /// Which must be called.
    pub choice: ToolChoice,
    /// Whether there may be several calls.
    pub parallel: bool,
    /// How the client wrote the functions.
    pub shape: ToolShape,
}

/// Which function must be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    Auto,
    /// Any.
    Required,
    /// The one of this name.
    Named(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedChoice {
    #[serde(rename = "type")]
    _type: String,
    function: NamedFunction,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedFunction {
    name: String,
}

impl ToolUse {
    /// The functions, and how chats write them, for the template. `None` where the
    /// model is not to call any.
    pub(super) fn read(
        fields: &mut Fields,
        shape: ToolShape,
    ) -> Result<Option<(Self, Vec<Value>)>, ApiError> {
        let sent: Vec<Value> = fields.take("tools")?.unwrap_or_default();
        let choice = choice(fields.take("tool_choice")?, shape)?;
        let parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        let tools = Tool::list(&sent, shape)?;
        match choice {
            None => Ok(None),
            Some(ToolChoice::Auto) if tools.is_empty() => Ok(None),
            Some(choice) => {
                if let ToolChoice::Named(name) = &choice
                    && !tools.iter().any(|tool| tool.name == *name)
                {
                    let message = format!("there is no tool \"{name}\"");
                    return Err(ApiError::invalid_field("tool_choice", &message));
                }
                if tools.is_empty() {
                    let message = "requires a call, but there are no tools";
                    return Err(ApiError::invalid_field("tool_choice", message));
                }
                let tool_use = Self {
                    tools,
                    choice,
                    parallel,
                    shape,
                };
                let sent = sent.into_iter().map(|tool| nested(tool, shape));
                Ok(Some((tool_use, sent.collect())))
            }
        }
    }

    /// What the answer must be where a call is required, for a model that writes calls in
    /// `format`.
    ///
    /// # Errors
    /// 400, naming the tool whose schema cannot be kept.
    pub fn form(&self, format: ToolFormat) -> Result<Option<Grammar>, ApiError> {
        let required = match &self.choice {
            ToolChoice::Auto => return Ok(None),
            ToolChoice::Required => RequiredCall::Any,
            ToolChoice::Named(name) => RequiredCall::Named(name),
        };
        required_calls(format, (&self.tools, self.shape), required, self.parallel).map(Some)
    }
}

/// A tool as chats write it.
fn nested(tool: Value, shape: ToolShape) -> Value {
    match (shape, tool) {
        (ToolShape::Flat, Value::Object(mut function)) => {
            function.remove("type");
            json!({"type": "function", "function": function})
        }
        (_, tool) => tool,
    }
}

/// `None` where no function is to be called.
fn choice(sent: Option<Value>, shape: ToolShape) -> Result<Option<ToolChoice>, ApiError> {
    let expected = "must be \"auto\", \"none\", \"required\" or a function by its name";
    let refuse = || ApiError::invalid_field("tool_choice", expected);
    match sent {
        None => Ok(Some(ToolChoice::Auto)),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Ok(Some(ToolChoice::Auto)),
            "none" => Ok(None),
            "required" => Ok(Some(ToolChoice::Required)),
            _ => Err(refuse()),
        },
        Some(other) => {
            if other.get("type").is_none_or(|kind| kind != "function") {
                return Err(refuse());
            }
            let other = nested(other, shape);
            let named: NamedChoice = serde_json::from_value(other).map_err(|_| refuse())?;
            Ok(Some(ToolChoice::Named(named.function.name)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<Option<ToolChoice>, ApiError> {
        let mut fields = Fields::parse(body.to_string().as_bytes())?;
        let read = ToolUse::read(&mut fields, ToolShape::Nested)?;
        Ok(read.map(|(tool_use, _)| tool_use.choice))
    }

    #[test]
    fn choices_are_understood_or_refused() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let named = |name: &str| json!({"type": "function", "function": {"name": name}});
        for (choice, expected) in [
            (Value::Null, Some(ToolChoice::Auto)),
            (json!("auto"), Some(ToolChoice::Auto)),
            (json!("none"), None),
            (json!("required"), Some(ToolChoice::Required)),
            (named("f"), Some(ToolChoice::Named("f".to_owned()))),
        ] {
            let body = json!({"tools": tools, "tool_choice": choice});
            assert_eq!(read(&body).expect("valid"), expected, "{body}");
        }
        assert_eq!(read(&json!({})).expect("valid"), None);
        assert_eq!(read(&json!({"tools": []})).expect("valid"), None);
        for (body, field) in [
            (json!({"tool_choice": "required"}), "tool_choice"),
            (
                json!({"tools": tools, "tool_choice": named("g")}),
                "tool_choice",
            ),
            (
                json!({"tools": tools, "tool_choice": "some"}),
                "tool_choice",
            ),
            (json!({"tools": [{}]}), "tools[0]"),
        ] {
            let error = read(&body).expect_err("is refused");
            assert_eq!(error.param.as_deref(), Some(field));
        }
    }
}
