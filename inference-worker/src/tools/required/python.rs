//! Arguments in Python's notation, by JSON schemas.

use serde_json::{Map, Value};

use super::super::Tool;
use super::super::pythonic::is_argument;
use super::super::tool::MAX_NAME_BYTES;
use super::{Rules, json, says_only};
use crate::structured::quoted;

/// Where references of a schema point to.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// The body of a rule for calls of `tool`.
///
/// # Errors
/// Why its arguments cannot be written in this notation.
pub(super) fn call(rules: &mut Rules, tool: &Tool) -> Result<String, String> {
    let Some(fields) = tool.parameters.as_object() else {
        return Err("must be an object".to_owned());
    };
    let known = [
        "type",
        "properties",
        "required",
        "additionalProperties",
        "$defs",
        "definitions",
    ];
    if !says_only(fields, &known) {
        return Err(format!(
            "this model's calls can be required only where the schema has no keys but {}",
            known.join(", ")
        ));
    }
    let root = Root(fields);
    let mut items = Vec::new();
    for (name, schema, required) in properties(fields) {
        let first = name.chars().next().is_some_and(|first| !first.is_numeric());
        if !first || name.len() > MAX_NAME_BYTES || !name.chars().all(is_argument) {
            return Err(format!("\"{name}\" cannot be the name of an argument"));
        }
        let value = root.value(rules, schema);
        let item = rules.add(&format!("{} {value}", quoted(&format!("{name}="))));
        items.push((item, required));
    }
    let arguments = rules.sequence(&items);
    let begin = quoted(&format!("{}(", tool.name));
    Ok(format!("{begin} {arguments} \")\""))
}

/// The properties of an object's schema and those that are only required, each with
/// whether it is.
fn properties(fields: &Map<String, Value>) -> Vec<(&str, &Value, bool)> {
    static ANY: Value = Value::Bool(true);
    let required: Vec<&str> = fields
        .get("required")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let known = fields.get("properties").and_then(Value::as_object);
    let mut all: Vec<(&str, &Value, bool)> = known
        .into_iter()
        .flatten()
        .map(|(name, schema)| (name.as_str(), schema, required.contains(&name.as_str())))
        .collect();
    for name in required {
        if !all.iter().any(|(known, ..)| *known == name) {
            all.push((name, &ANY, true));
        }
    }
    all
}

/// The schema that references of its parts point into.
struct Root<'a>(&'a Map<String, Value>);

impl Root<'_> {
    /// An expression for values by `schema`. What Python writes otherwise than JSON
    /// is written its way wherever the schema is plain; else it is JSON, which
    /// readers of calls take too.
    fn value(&self, rules: &mut Rules, schema: &Value) -> String {
        let plain = schema
            .as_object()
            .and_then(|fields| self.plain(rules, fields));
        plain.unwrap_or_else(|| {
            if rules.is_full() {
                return String::new();
            }
            let rule = json(self.with_definitions(schema));
            rules.add(&rule)
        })
    }

    fn plain(&self, rules: &mut Rules, fields: &Map<String, Value>) -> Option<String> {
        if let Some(values) = fields.get("enum").and_then(Value::as_array) {
            let scalars: Option<Vec<String>> = values.iter().map(scalar).collect();
            return says_only(fields, &["enum"])
                .then_some(scalars?)
                .filter(|scalars| !scalars.is_empty())
                .map(|scalars| format!("({})", scalars.join(" | ")));
        }
        if let Some(value) = fields.get("const") {
            return says_only(fields, &["const"])
                .then(|| scalar(value))
                .flatten();
        }
        if let Some(options) = fields.get("anyOf").and_then(Value::as_array) {
            if !says_only(fields, &["anyOf"]) || options.is_empty() {
                return None;
            }
            let options: Vec<String> = options
                .iter()
                .map(|option| self.value(rules, option))
                .collect();
            return Some(format!("({})", options.join(" | ")));
        }
        match fields.get("type")? {
            Value::Array(types) if !types.is_empty() => {
                let each = types.iter().map(|kind| {
                    let mut one = fields.clone();
                    one.insert("type".to_owned(), kind.clone());
                    self.value(rules, &Value::Object(one))
                });
                let each: Vec<String> = each.collect();
                Some(format!("({})", each.join(" | ")))
            }
            Value::String(kind) => self.of_type(rules, kind, fields),
            _ => None,
        }
    }

    fn of_type(
        &self,
        rules: &mut Rules,
        kind: &str,
        fields: &Map<String, Value>,
    ) -> Option<String> {
        match kind {
            "boolean" if says_only(fields, &["type"]) => Some("(\"True\" | \"False\")".to_owned()),
            "null" if says_only(fields, &["type"]) => Some("\"None\"".to_owned()),
            "array" if says_only(fields, &["type", "items"]) => {
                let item = self.value(rules, fields.get("items")?);
                let item = rules.add(&item);
                Some(format!("\"[\" ({item} (\", \" {item})*)? \"]\""))
            }
            "object"
                if says_only(
                    fields,
                    &["type", "properties", "required", "additionalProperties"],
                ) =>
            {
                let all = properties(fields);
                if all.is_empty() {
                    return None;
                }
                let mut items = Vec::new();
                for (name, schema, required) in all {
                    let value = self.value(rules, schema);
                    let key = quoted(&format!("{}: ", Value::from(name)));
                    items.push((rules.add(&format!("{key} {value}")), required));
                }
                let items = rules.sequence(&items);
                Some(format!("\"{{\" {items} \"}}\""))
            }
            _ => None,
        }
    }

    /// `schema` with what its references point to.
    fn with_definitions(&self, schema: &Value) -> Value {
        let mut schema = schema.clone();
        let refers = schema.to_string().contains("\"$ref\"");
        if let Some(fields) = schema.as_object_mut().filter(|_| refers) {
            for name in DEFINITIONS {
                if let Some(definitions) = self.0.get(name) {
                    fields.entry(name).or_insert_with(|| definitions.clone());
                }
            }
        }
        schema
    }
}

/// A literal of a grammar for a value without parts.
fn scalar(value: &Value) -> Option<String> {
    let python = match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(_) | Value::String(_) => value.to_string(),
        Value::Array(_) | Value::Object(_) => return None,
    };
    Some(quoted(&python))
}
