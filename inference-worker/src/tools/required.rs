//! Grammars that leave a model nothing to write but calls.

use serde_json::{Map, Value};

use super::{Tool, ToolFormat, ToolShape};
use crate::openai::ApiError;
use crate::structured::{Grammar, MAX_CALLS_BYTES, quoted, with_options};

mod python;
#[cfg(test)]
mod walks;

/// Most calls of an answer that must consist of them.
const MAX_REQUIRED: usize = 16;

/// Which function must be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequiredCall<'a> {
    /// Any of them.
    Any,
    /// This one, once.
    Named(&'a str),
}

/// The grammar of an answer that is a call, or several where `parallel`, with
/// arguments by the functions' schemas. It was checked. The functions were written in
/// `shape`.
///
/// # Errors
/// 400, naming the tool whose schema cannot be kept or the choice that is none.
pub fn required_calls(
    format: ToolFormat,
    (tools, shape): (&[Tool], ToolShape),
    choice: RequiredCall<'_>,
    parallel: bool,
) -> Result<Grammar, ApiError> {
    let chosen: Vec<(usize, &Tool)> = tools
        .iter()
        .enumerate()
        .filter(|(_, tool)| match choice {
            RequiredCall::Any => true,
            RequiredCall::Named(name) => tool.name == name,
        })
        .collect();
    if chosen.is_empty() {
        let message = match choice {
            RequiredCall::Any => "a call is required, but there are no tools".to_owned(),
            RequiredCall::Named(name) => format!("there is no tool \"{name}\""),
        };
        return Err(ApiError::invalid_field("tool_choice", &message));
    }
    let more = if parallel && choice == RequiredCall::Any {
        MAX_REQUIRED - 1
    } else {
        0
    };
    let mut rules = Rules::default();
    let mut names = Vec::with_capacity(chosen.len());
    for (index, tool) in chosen {
        let place = shape.place(index, "parameters");
        Grammar::JsonSchema(tool.parameters.clone()).check_field(&place)?;
        let call = match format {
            ToolFormat::Json => json_call(tool),
            ToolFormat::Pythonic => python::call(&mut rules, tool)
                .map_err(|message| ApiError::invalid_field(&place, &message))?,
        };
        names.push(rules.add(&call));
    }
    let call = rules.add(&names.join(" | "));
    let start = match format {
        ToolFormat::Json => repeated(&call, "; ", more),
        ToolFormat::Pythonic => format!("\"[\" {} \"]\"", repeated(&call, ", ", more)),
    };
    let grammar = Grammar::Calls(format!("start: {start}\n{}", rules.text));
    grammar.check_field("tools")?;
    Ok(grammar)
}

fn repeated(call: &str, separator: &str, more: usize) -> String {
    if more == 0 {
        return call.to_owned();
    }
    format!("{call} ({} {call}){{0,{more}}}", quoted(separator))
}

fn json_call(tool: &Tool) -> String {
    let name = Value::from(tool.name.as_str());
    let begin = quoted(&format!("{{\"name\": {name}, \"parameters\": "));
    format!("{begin} {} \"}}\"", json(tool.parameters.clone()))
}

/// JSON by `schema`, inside a rule.
fn json(schema: Value) -> String {
    format!("%json {}", with_options(schema))
}

/// Rules of a grammar besides the first.
#[derive(Debug, Default)]
struct Rules {
    text: String,
    count: usize,
}

impl Rules {
    /// Adds a rule and returns its name.
    fn add(&mut self, body: &str) -> String {
        let name = format!("r{}", self.count);
        self.count += 1;
        if !self.is_full() {
            self.text.extend([name.as_str(), ": ", body, "\n"]);
        }
        name
    }

    /// Whether the grammar is too long already. A check will say so.
    fn is_full(&self) -> bool {
        self.text.len() > MAX_CALLS_BYTES
    }

    /// Adds the rule of items that stand in this order between commas, of which those
    /// that are not required may lack; an empty rule where there are none.
    fn sequence(&mut self, items: &[(String, bool)]) -> String {
        if items.is_empty() {
            return "\"\"".to_owned();
        }
        let mut begins = Vec::new();
        // What may follow the item.
        let mut rest = String::new();
        for (index, (item, required)) in items.iter().enumerate().rev() {
            if *required {
                begins.clear();
            }
            begins.push(format!("{item} {rest}"));
            if index > 0 {
                let question = if *required { "" } else { "?" };
                rest = self.add(&format!("(\", \" {item}){question} {rest}"));
            }
        }
        let body = begins.join(" | ");
        if items.iter().any(|(_, required)| *required) {
            self.add(&body)
        } else {
            format!("({})?", self.add(&body))
        }
    }
}

/// Whether a schema says nothing but what is in `keys`, and what limits no value.
fn says_only(fields: &Map<String, Value>, keys: &[&str]) -> bool {
    const REMARKS: [&str; 7] = [
        "title",
        "description",
        "default",
        "examples",
        "$schema",
        "deprecated",
        "$comment",
    ];
    fields
        .keys()
        .all(|key| keys.contains(&key.as_str()) || REMARKS.contains(&key.as_str()))
}
