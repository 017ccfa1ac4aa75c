//! Messages to one prompt: by the model's own chat template (Jinja), or by the
//! format that Meta's own reference writes, where a model brings no template.

mod conversation;
mod jinja;
mod json;
mod meta;

use super::origin::Origin;
use super::settings::Settings;
use super::{Special, TextError, Tokenizer};
use crate::error::ModelError;
use crate::gguf::Gguf;

pub use conversation::{ChatMessage, Conversation, MessageError};
use jinja::JinjaTemplates;
pub(super) use meta::MetaFormat;

const TEMPLATE_KEY: &str = "tokenizer.chat_template";

/// A conversation's way into one prompt.
///
/// A Jinja template writes text in which control tokens are recognised wherever
/// they stand, as in the library of its authors: a message with `<|eot_id|>` in it
/// ends there. The built-in formats never read control tokens out of a message.
#[derive(Debug)]
pub struct ChatTemplate {
    format: Format,
}

#[derive(Debug)]
enum Format {
    None,
    Jinja(Box<JinjaTemplates>),
    BuiltIn(MetaFormat),
}

impl ChatTemplate {
    /// The template that the GGUF brings; a model without one has no chat.
    ///
    /// # Errors
    /// `ModelInvalid` when the template does not parse.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let origin = Origin::new(gguf.path());
        let mut sources = Vec::new();
        for (name, key) in [
            (jinja::DEFAULT, TEMPLATE_KEY.to_owned()),
            (
                jinja::TOOL_USE,
                format!("{TEMPLATE_KEY}.{}", jinja::TOOL_USE),
            ),
        ] {
            if let Some(source) = gguf.text(&key)? {
                sources.push((name.to_owned(), source.to_owned()));
            }
        }
        let text_of = |id: Option<u32>| id.map(|id| tokenizer.token_text(id));
        let named = [
            ("bos_token", text_of(tokenizer.bos_id())),
            ("eos_token", text_of(tokenizer.eos_id())),
        ];
        let named = named
            .into_iter()
            .filter_map(|(name, text)| Some((name, text?)))
            .collect();
        Self::jinja(&origin, sources, named, true)
    }

    /// The templates of a model folder.
    ///
    /// # Errors
    /// `ModelInvalid` when a template does not parse.
    pub(super) fn from_settings(origin: &Origin, settings: Settings) -> Result<Self, ModelError> {
        Self::jinja(origin, settings.templates, settings.named, false)
    }

    /// The format of Meta's reference.
    pub(super) fn built_in(format: MetaFormat) -> Self {
        Self {
            format: Format::BuiltIn(format),
        }
    }

    fn jinja(
        origin: &Origin,
        sources: Vec<(String, String)>,
        named: Vec<(&'static str, String)>,
        led: bool,
    ) -> Result<Self, ModelError> {
        let format = if sources.is_empty() {
            Format::None
        } else {
            let templates = JinjaTemplates::new(sources, named, led).map_err(|error| {
                origin.invalid(format!("the chat template does not parse: {error}"))
            })?;
            Format::Jinja(Box::new(templates))
        };
        Ok(Self { format })
    }

    /// The Jinja text of the template for conversations with tools. Formats that are
    /// built in have none.
    pub fn tool_source(&self) -> Option<&str> {
        match &self.format {
            Format::None | Format::BuiltIn(_) => None,
            Format::Jinja(templates) => templates.tool_source(),
        }
    }

    /// The prompt for `conversation`.
    ///
    /// # Errors
    /// When the model has no template, or the template refuses the messages.
    pub fn render(&self, conversation: &Conversation) -> Result<Rendered, TextError> {
        match &self.format {
            Format::None => Err(TextError::NoChatTemplate),
            Format::Jinja(templates) => templates.render(conversation),
            Format::BuiltIn(format) => format.render(conversation),
        }
    }
}

/// A prompt that is not tokens yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    pieces: Vec<(String, Special)>,
    /// Whether the begin token is added where the text lacks it.
    led: bool,
}

impl Rendered {
    /// The text of the prompt.
    pub fn text(&self) -> String {
        self.pieces.iter().map(|(text, _)| text.as_str()).collect()
    }

    /// The tokens of the prompt. Each piece is encoded alone, and only the
    /// template's own pieces may hold control tokens where the format is built in.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
        if let ([(text, special)], true) = (self.pieces.as_slice(), self.led) {
            return tokenizer.encode_prompt(text, *special);
        }
        let mut ids = Vec::new();
        for (text, special) in &self.pieces {
            ids.extend(tokenizer.encode(text, *special)?);
        }
        Ok(ids)
    }

    /// The prompt up to the last place where `mark` stands; `None` where it does not
    /// stand in one piece.
    pub fn before(mut self, mark: &str) -> Option<Self> {
        let found = |(text, _): &(String, Special)| text.rfind(mark);
        let piece = self
            .pieces
            .iter()
            .rposition(|piece| found(piece).is_some())?;
        let at = found(&self.pieces[piece])?;
        self.pieces[piece].0.truncate(at);
        self.pieces.truncate(piece + 1);
        Some(self)
    }

    fn push(&mut self, text: impl Into<String>, special: Special) {
        self.pieces.push((text.into(), special));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_cut_at_the_last_mark() {
        let mut rendered = Rendered::default();
        for text in ["a#b", "c#d#e", "f"] {
            rendered.push(text, Special::Plain);
        }
        assert_eq!(
            rendered.clone().before("#").expect("stands").text(),
            "a#bc#d"
        );
        assert_eq!(rendered.clone().before("a").expect("stands").text(), "");
        assert_eq!(rendered.before("ef"), None);
    }
}
