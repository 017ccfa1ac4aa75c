//! The functions that a request offers.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::openai::ApiError;
use crate::structured::MAX_GRAMMAR_BYTES;

/// Most functions of a request.
const MAX_TOOLS: usize = 128;
/// Longest name of a function, in bytes.
pub(super) const MAX_NAME_BYTES: usize = 64;
/// Most bytes of all schemas together.
const MAX_SCHEMA_BYTES: usize = 4 * MAX_GRAMMAR_BYTES;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits, `_` and `-`.
    pub name: String,
    /// The JSON schema of its arguments, which are an object.
    pub parameters: Value,
}

/// How an endpoint writes a function among its tools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolShape {
    /// `{"type": "function", "function": {"name": …}}`
    #[default]
    Nested,
    /// `{"type": "function", "name": …}`
    Flat,
}

impl ToolShape {
    /// What to call the `field` of a function that is the tool `index`.
    pub(super) fn place(self, index: usize, field: &str) -> String {
        match self {
            Self::Nested => format!("tools[{index}].function.{field}"),
            Self::Flat => format!("tools[{index}].{field}"),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    r#type: String,
    function: Function,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    #[serde(default)]
    parameters: Option<Map<String, Value>>,
    #[serde(default, rename = "strict")]
    _strict: Option<bool>,
}

impl Tool {
    /// Reads the field `tools` of a request, whose functions are written in `shape`.
    ///
    /// # Errors
    /// 400, naming the tool and the field that is wrong.
    pub fn list(tools: &[Value], shape: ToolShape) -> Result<Vec<Self>, ApiError> {
        if tools.len() > MAX_TOOLS {
            let message = format!("at most {MAX_TOOLS} tools, {} came", tools.len());
            return Err(ApiError::invalid_field("tools", &message));
        }
        let mut names = BTreeSet::new();
        let mut bytes = 0;
        let mut list = Vec::with_capacity(tools.len());
        for (index, tool) in tools.iter().enumerate() {
            let tool = Self::read(index, tool, shape)?;
            if !names.insert(tool.name.clone()) {
                let message = format!("\"{}\" is the name of another tool too", tool.name);
                let place = shape.place(index, "name");
                return Err(ApiError::invalid_field(&place, &message));
            }
            bytes += tool.parameters.to_string().len();
            if bytes > MAX_SCHEMA_BYTES {
                let message = format!("all parameters may have {MAX_SCHEMA_BYTES} bytes together");
                return Err(ApiError::invalid_field("tools", &message));
            }
            list.push(tool);
        }
        Ok(list)
    }

    fn read(index: usize, tool: &Value, shape: ToolShape) -> Result<Self, ApiError> {
        let Function {
            name, parameters, ..
        } = function(index, tool, shape)?;
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_name) {
            let message = format!("must be 1 to {MAX_NAME_BYTES} letters, digits, _ and -");
            let place = shape.place(index, "name");
            return Err(ApiError::invalid_field(&place, &message));
        }
        let place = shape.place(index, "parameters");
        let parameters = match parameters {
            None => json!({"type": "object", "properties": {}}),
            Some(mut fields) => {
                let kind = fields.entry("type").or_insert_with(|| json!("object"));
                if kind != "object" {
                    return Err(ApiError::invalid_field(&place, "must be of type object"));
                }
                Value::Object(fields)
            }
        };
        Ok(Self { name, parameters })
    }
}

/// The function that a tool is.
fn function(index: usize, tool: &Value, shape: ToolShape) -> Result<Function, ApiError> {
    let place = format!("tools[{index}]");
    let wrong = |error: serde_json::Error| ApiError::invalid_field(&place, &error.to_string());
    let check = |kind: Option<&str>| {
        if kind == Some("function") {
            return Ok(());
        }
        let place = format!("{place}.type");
        Err(ApiError::invalid_field(&place, "must be \"function\""))
    };
    match shape {
        ToolShape::Nested => {
            let written = Written::deserialize(tool).map_err(wrong)?;
            check(Some(&written.r#type))?;
            Ok(written.function)
        }
        ToolShape::Flat => {
            let mut fields = Map::deserialize(tool).map_err(wrong)?;
            check(fields.remove("type").as_ref().and_then(Value::as_str))?;
            Function::deserialize(Value::Object(fields)).map_err(wrong)
        }
    }
}

/// Whether `character` may stand in the name of a function.
pub(super) fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '_' | '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_is_its_name_and_the_schema_of_its_arguments() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let tools = json!([
            {"type": "function", "function": {"name": "f", "description": "x", "parameters": schema, "strict": true}},
            {"type": "function", "function": {"name": "g-2"}},
        ]);
        let tools =
            Tool::list(tools.as_array().expect("a list"), ToolShape::Nested).expect("valid");
        assert_eq!(tools[0].parameters, schema);
        assert_eq!(tools[1].parameters["type"], "object");
        assert_eq!(tools[1].name, "g-2");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let function = |function: Value| json!({"type": "function", "function": function});
        for (tool, field) in [
            (json!({"type": "function"}), "tools[1]"),
            (
                json!({"type": "retrieval", "function": {"name": "g"}}),
                "tools[1].type",
            ),
            (function(json!({"name": "g", "x": 1})), "tools[1]"),
            (function(json!({"name": "g h"})), "tools[1].function.name"),
            (function(json!({"name": ""})), "tools[1].function.name"),
            (function(json!({"name": "f"})), "tools[1].function.name"),
            (
                function(json!({"name": "a".repeat(65)})),
                "tools[1].function.name",
            ),
            (function(json!({"name": "g", "parameters": []})), "tools[1]"),
            (
                function(json!({"name": "g", "parameters": {"type": "string"}})),
                "tools[1].function.parameters",
            ),
            (
                function(json!({"name": "g", "parameters": {"x": "y".repeat(MAX_SCHEMA_BYTES)}})),
                "tools",
            ),
        ] {
            let tools = [function(json!({"name": "f"})), tool];
            let error = Tool::list(&tools, ToolShape::Nested).expect_err("is refused");
            assert_eq!(error.param.as_deref(), Some(field));
        }
        let many = vec![json!({}); MAX_TOOLS + 1];
        assert_eq!(
            Tool::list(&many, ToolShape::Nested)
                .expect_err("too many")
                .param
                .as_deref(),
            Some("tools")
        );
    }
}
