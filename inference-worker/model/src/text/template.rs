//! The model's own chat template (Jinja), rendered as its authors' library does.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::Serializer;
use serde_json::ser::PrettyFormatter;

use super::{TextError, Tokenizer};
use crate::error::ModelError;
use crate::gguf::Gguf;

const TEMPLATE_KEY: &str = "tokenizer.chat_template";
const TEMPLATE_NAME: &str = "chat";
/// Work a template may do, in instructions: a guard against endless loops.
const FUEL: u64 = 10_000_000;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or what the template knows besides.
    pub role: String,
    /// The message's text.
    pub content: String,
}

impl ChatMessage {
    fn value(&self) -> Value {
        Value::from_pairs([("role", self.role.as_str()), ("content", &self.content)])
    }
}

/// A conversation's way into one prompt.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Option<Environment<'static>>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template that the GGUF brings; a model without one has no chat.
    ///
    /// # Errors
    /// `ModelInvalid` when the template does not parse.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let text_of = |id: Option<u32>| id.map(|id| tokenizer.token_text(id)).unwrap_or_default();
        let environment = match gguf.text(TEMPLATE_KEY)? {
            None => None,
            Some(source) => Some(environment(source).map_err(|error| {
                gguf.invalid(&format!("{TEMPLATE_KEY} does not parse: {error}"))
            })?),
        };
        Ok(Self {
            environment,
            bos: text_of(tokenizer.bos_id()),
            eos: text_of(tokenizer.eos_ids().first().copied()),
        })
    }

    /// The prompt for `messages`; with `add_generation_prompt` it ends where the
    /// answer begins.
    ///
    /// # Errors
    /// When the model has no template, or the template refuses the messages.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let environment = self.environment.as_ref().ok_or(TextError::NoChatTemplate)?;
        let template = environment
            .get_template(TEMPLATE_NAME)
            .map_err(TextError::Template)?;
        let messages: Vec<Value> = messages.iter().map(ChatMessage::value).collect();
        template
            .render(context! {
                messages => messages,
                add_generation_prompt => add_generation_prompt,
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
            })
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidOperation => {
                    TextError::Refused(error.detail().unwrap_or("no reason given").to_owned())
                }
                _ => TextError::Template(error),
            })
    }
}

fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment.add_template_owned(TEMPLATE_NAME, source.to_owned())?;
    Ok(environment)
}

/// The date and time in UTC, for templates that tell the model what day it is.
#[expect(
    clippy::needless_pass_by_value,
    reason = "functions take their arguments by value"
)]
fn strftime_now(format: String) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(&format, &now).map_err(|error| {
        let what = format!("write the time as \"{format}\"");
        Error::new(ErrorKind::BadSerialization, what).with_source(error)
    })
}

/// `tojson` as Python's `json.dumps` writes it; the built-in one escapes HTML.
#[expect(
    clippy::needless_pass_by_value,
    reason = "filters take their arguments by value"
)]
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, PythonJson)),
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))
        }
    };
    written.map_err(unwritten)?;
    String::from_utf8(out).map_err(unwritten)
}

fn unwritten(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::BadSerialization, "write a value as JSON").with_source(error)
}

/// Puts a space behind every comma and colon.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate {
            environment: Some(environment(source).expect("parses")),
            bos: "<s>".to_owned(),
            eos: "</s>".to_owned(),
        }
    }

    fn user(content: &str) -> ChatMessage {
        ChatMessage {
            role: "user".to_owned(),
            content: content.to_owned(),
        }
    }

    #[test]
    fn blocks_leave_no_lines_and_python_methods_work() {
        let chat = template(
            "{{ bos_token }}\n{% for message in messages %}\n  {% if message['role'] == 'user' %}\n[{{ message.content.strip() | trim }}]\n  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}>{% endif %}",
        );
        assert_eq!(
            chat.render(&[user(" hi ")], true).expect("renders"),
            "<s>\n[hi]\n>"
        );
        assert_eq!(
            chat.render(&[user("hi")], false).expect("renders"),
            "<s>\n[hi]\n"
        );
    }

    #[test]
    fn a_template_may_refuse() {
        let chat = template("{{ raise_exception('roles must alternate') }}");
        let error = chat.render(&[user("x")], true).expect_err("refuses");
        assert!(
            matches!(&error, TextError::Refused(why) if why == "roles must alternate"),
            "{error:?}"
        );
    }

    #[test]
    fn json_is_pythons_and_not_escaped_for_html() {
        let chat = template("{{ messages | tojson }}");
        assert_eq!(
            chat.render(&[user("<a> & 'b'")], true).expect("renders"),
            r#"[{"role": "user", "content": "<a> & 'b'"}]"#
        );
        let chat = template("{{ messages | tojson(indent=2) }}");
        assert_eq!(
            chat.render(&[user("<")], true).expect("renders"),
            "[\n  {\n    \"role\": \"user\",\n    \"content\": \"<\"\n  }\n]"
        );
    }

    #[test]
    fn templates_can_tell_the_day() {
        let chat =
            template("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}");
        let day = chat.render(&[], true).expect("renders");
        let parts: Vec<&str> = day.split(' ').collect();
        assert_eq!(
            parts.iter().map(|part| part.len()).collect::<Vec<_>>(),
            [2, 3, 4],
            "{day}"
        );
    }

    #[test]
    fn an_endless_template_ends() {
        let chat = template(
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        );
        assert!(chat.render(&[], true).is_err());
    }
}
