//! Chat templates in Jinja, rendered as the library of their authors does.

use std::fmt;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Object, Serde, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};
use serde_json::Map;

use super::json::{Style, float_text, to_json};
use super::{ChatMessage, Conversation, Rendered};
use crate::text::{Special, TextError};

/// The template that is used unless there is a better one.
pub(super) const DEFAULT: &str = "default";
/// The template that is used for conversations with tools.
pub(super) const TOOL_USE: &str = "tool_use";
/// Work a template may do, in instructions: a guard against endless loops.
const FUEL: u64 = 10_000_000;

/// The parsed templates of a model.
#[derive(Debug)]
pub(super) struct JinjaTemplates {
    environment: Environment<'static>,
    tool_source: Option<String>,
    named: Vec<(&'static str, String)>,
    led: bool,
}

impl JinjaTemplates {
    /// Parses `sources`, each with its name; `named` are the tokens that they may
    /// write, `led` says whether prompts get the begin token where it is missing.
    ///
    /// # Errors
    /// When one does not parse.
    pub(super) fn new(
        sources: Vec<(String, String)>,
        named: Vec<(&'static str, String)>,
        led: bool,
    ) -> Result<Self, Error> {
        let mut environment = environment()?;
        let source_of = |wanted| sources.iter().find(|(name, _)| name == wanted);
        let tool_source = source_of(TOOL_USE).or_else(|| source_of(DEFAULT));
        let tool_source = tool_source.map(|(_, source)| source.clone());
        for (name, source) in sources {
            environment.add_template_owned(name, source)?;
        }
        Ok(Self {
            environment,
            tool_source,
            named,
            led,
        })
    }

    /// The text of the template for conversations with tools.
    pub(super) fn tool_source(&self) -> Option<&str> {
        self.tool_source.as_deref()
    }

    /// The prompt for `conversation`.
    ///
    /// # Errors
    /// When there is no template for it, or the template fails or refuses it.
    pub(super) fn render(&self, conversation: &Conversation) -> Result<Rendered, TextError> {
        let template = conversation
            .tools
            .as_ref()
            .and_then(|_| self.environment.get_template(TOOL_USE).ok())
            .map_or_else(|| self.environment.get_template(DEFAULT), Ok)
            .map_err(|_none| TextError::NoChatTemplate)?;
        let text = template
            .render(self.variables(conversation))
            .map_err(text_error)?;
        let mut rendered = Rendered {
            led: self.led,
            ..Rendered::default()
        };
        rendered.push(text, Special::Parse);
        Ok(rendered)
    }

    fn variables(&self, conversation: &Conversation) -> Value {
        let mut variables: Vec<(&str, Value)> = self
            .named
            .iter()
            .map(|(name, text)| (*name, Value::from(text.as_str())))
            .collect();
        let Conversation {
            messages,
            tools,
            documents,
            ..
        } = conversation;
        let messages: Vec<_> = messages.iter().map(ChatMessage::for_template).collect();
        variables.extend([
            ("messages", Value::from(Serde(messages))),
            ("tools", Value::from(Serde(tools))),
            ("documents", Value::from(Serde(documents))),
            (
                "add_generation_prompt",
                Value::from(conversation.add_generation_prompt),
            ),
            ("strftime_now", strftime(conversation.now)),
        ]);
        variables.extend(further(&conversation.variables));
        Value::from_pairs(variables)
    }
}

fn further(variables: &Map<String, serde_json::Value>) -> impl Iterator<Item = (&str, Value)> {
    variables
        .iter()
        .map(|(name, value)| (name.as_str(), Value::from(Serde(value))))
}

/// A template's own words for why it refuses a conversation.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn text_error(error: Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return TextError::Refused(message.clone());
        }
        cause = inner.source();
    }
    TextError::Template(error)
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(method);
    environment.set_formatter(write);
    environment.add_function("raise_exception", raise);
    environment.add_filter("tojson", json);
    environment.add_filter("trim", trim);
    Ok(environment)
}

/// Writes `value` into the prompt; floats as Python does, which the default does not.
fn write(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if value.kind() == ValueKind::Number && !value.is_integer() {
        let float = f64::try_from(value.clone())?;
        return Ok(out.write_str(&float_text(float))?);
    }
    escape_formatter(out, state, value)
}

fn raise(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The function `strftime_now`, for templates that tell the model what day it is.
fn strftime(now: SystemTime) -> Value {
    #[derive(Debug)]
    struct Clock(SystemTime);
    impl Object for Clock {
        fn call(
            self: &std::sync::Arc<Self>,
            _state: &mut State<'_, '_>,
            args: &[Value],
        ) -> Result<Value, Error> {
            let (format,): (&str,) = from_args(args)?;
            let unwritten = |error: jiff::Error| {
                let what = format!("write the time as \"{format}\"");
                Error::new(ErrorKind::BadSerialization, what).with_source(error)
            };
            let now = jiff::Timestamp::try_from(self.0).map_err(unwritten)?;
            let now = now.to_zoned(jiff::tz::TimeZone::UTC);
            let text = jiff::fmt::strtime::format(format, &now).map_err(unwritten)?;
            Ok(Value::from(text))
        }
    }
    Value::from_object(Clock(now))
}

/// `tojson` as Python's `json.dumps` writes it; the built-in one escapes HTML.
#[expect(
    clippy::needless_pass_by_value,
    reason = "filters take their arguments by value"
)]
fn json(value: Value, options: Kwargs) -> Result<String, Error> {
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = Style {
        indent: options.get("indent")?,
        ensure_ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: match separators.as_deref() {
            None => None,
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(_) => {
                let message = "separators must be two strings";
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        },
    };
    options.assert_all_used()?;
    if value.is_undefined() {
        let message = "an undefined value cannot be written as JSON";
        return Err(Error::new(ErrorKind::UndefinedError, message));
    }
    let tree = serde_json::to_value(&value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "write a value as JSON").with_source(error)
    })?;
    Ok(to_json(&tree, &style))
}

/// White space as Python sees it.
fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// `trim` takes anything for text, as Jinja's does.
#[expect(
    clippy::needless_pass_by_value,
    reason = "filters take their arguments by value"
)]
fn trim(value: Value, characters: Option<String>) -> String {
    let text = match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => value.to_string(),
    };
    match characters {
        None => text.trim_matches(is_space).to_owned(),
        Some(characters) => text.trim_matches(|c| characters.contains(c)).to_owned(),
    }
}

/// Every word begins with a capital; whatever is no letter ends a word.
fn title(text: &str) -> String {
    let mut in_word = false;
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if in_word {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
        in_word = character.is_alphabetic();
    }
    out
}

/// Python's methods of strings, lists and dictionaries.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), name, args) {
        (Some(text), "title", []) => Ok(title(text).into()),
        (Some(text), "strip", []) => Ok(text.trim_matches(is_space).into()),
        (Some(text), "lstrip", []) => Ok(text.trim_start_matches(is_space).into()),
        (Some(text), "rstrip", []) => Ok(text.trim_end_matches(is_space).into()),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}
