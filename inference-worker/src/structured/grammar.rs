//! The forms that a request can require of its answer.

use std::fmt::Write;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::compile::check;
use super::error::GrammarError;
use crate::openai::ApiError;

/// Most bytes of a schema, a regular expression, a grammar or all choices.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;
/// Most bytes of the grammar of calls, which holds the schemas of all tools.
pub(crate) const MAX_CALLS_BYTES: usize = 1 << 20;
/// Most texts to choose from.
const MAX_CHOICES: usize = 1024;
/// White space between the words of JSON. Without a bound a model that is at a loss
/// writes nothing else.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,32}";

/// What an answer as a whole must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid by this schema.
    JsonSchema(Value),
    /// Text that this regular expression matches from end to end.
    Regex(String),
    /// Text of this context-free grammar, whose rules are written as in Lark; the
    /// first is called `start`.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Calls of tools, by a grammar that `required_calls` makes.
    Calls(String),
}

impl Grammar {
    /// Finds what is wrong with the grammar. Grammars are of text: they cannot name
    /// control tokens.
    ///
    /// # Errors
    /// A sentence that follows the name of the field.
    pub fn check(&self) -> Result<(), GrammarError> {
        check(self.source()?)
    }

    /// [`Grammar::check`] of what came in the field `param`.
    ///
    /// # Errors
    /// 400, naming the field, or 503 where the machine is at fault.
    pub fn check_field(&self, param: &str) -> Result<(), ApiError> {
        self.check().map_err(|error| {
            if error.is_clients() {
                ApiError::invalid_field(param, &error.to_string())
            } else {
                ApiError::unavailable(format!("{param}: {error}"))
            }
        })
    }

    /// The grammar as the compiler reads it.
    pub(super) fn source(&self) -> Result<TopLevelGrammar, GrammarError> {
        match self {
            Self::JsonObject => Ok(schema_source(json!({"type": "object"}))),
            Self::JsonSchema(schema) => {
                bounded(schema.to_string().len())?;
                Ok(schema_source(with_options(schema.clone())))
            }
            Self::Regex(regex) => {
                bounded(regex.len())?;
                regex_source(regex)
            }
            Self::Calls(text) => {
                at_most(text.len(), MAX_CALLS_BYTES)?;
                Ok(TopLevelGrammar::from_lark(text.clone()))
            }
            Self::Lark(text) => {
                bounded(text.len())?;
                if text.trim().is_empty() {
                    return Err(GrammarError::Empty);
                }
                Ok(TopLevelGrammar::from_lark(text.clone()))
            }
            Self::Choice(choices) => {
                bounded(choices.iter().map(String::len).sum())?;
                choice_source(choices)
            }
        }
    }
}

fn bounded(bytes: usize) -> Result<(), GrammarError> {
    at_most(bytes, MAX_GRAMMAR_BYTES)
}

fn at_most(bytes: usize, limit: usize) -> Result<(), GrammarError> {
    if bytes > limit {
        return Err(GrammarError::TooLong { bytes, limit });
    }
    Ok(())
}

fn schema_source(schema: Value) -> TopLevelGrammar {
    TopLevelGrammar::from_grammar(GrammarWithLexer::from_json_schema(schema))
}

/// `schema` with the compiler's options, which are no client's business.
pub(crate) fn with_options(schema: Value) -> Value {
    match schema {
        Value::Object(mut fields) => {
            let options = json!({"whitespace_pattern": WHITE_SPACE});
            fields.insert("x-guidance".to_owned(), options);
            Value::Object(fields)
        }
        Value::Bool(true) => with_options(json!({})),
        other => other,
    }
}

fn regex_source(regex: &str) -> Result<TopLevelGrammar, GrammarError> {
    let slashes = |text: &str| text.bytes().rev().take_while(|&byte| byte == b'\\').count();
    if slashes(regex) % 2 == 1 {
        let message = "it ends in a lone backslash".to_owned();
        return Err(GrammarError::Refused(message));
    }
    // The whole text must match anyway.
    let inner = regex.strip_prefix('^').unwrap_or(regex);
    let inner = match inner.strip_suffix('$') {
        Some(rest) if slashes(rest) % 2 == 0 => rest,
        _ => inner,
    };
    if inner.is_empty() {
        return Err(GrammarError::Empty);
    }
    Ok(TopLevelGrammar::from_regex(inner))
}

fn choice_source(choices: &[String]) -> Result<TopLevelGrammar, GrammarError> {
    if choices.is_empty() || choices.len() > MAX_CHOICES {
        return Err(GrammarError::Choices {
            count: choices.len(),
            limit: MAX_CHOICES,
        });
    }
    if choices.iter().any(String::is_empty) {
        return Err(GrammarError::Empty);
    }
    let quoted: Vec<String> = choices.iter().map(|choice| quoted(choice)).collect();
    Ok(TopLevelGrammar::from_lark(format!(
        "start: {}",
        quoted.join(" | ")
    )))
}

/// `text` as a literal of a grammar.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            '\0'..='\x1F' | '\x7F' => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}
