//! Text around the model: tokenizer, streaming detokenizer, chat template, all
//! read from the model's own files.

mod added;
mod bytes;
mod detokenizer;
mod folder;
mod from_gguf;
mod from_json;
mod origin;
mod ranks;
mod settings;
mod split;
mod template;
mod tiktoken;
mod tokenizer;
mod vocabulary;

pub(crate) use bytes::byte_characters;
pub use detokenizer::Detokenizer;
pub use folder::ModelText;
pub(crate) use folder::read;
pub(crate) use origin::excerpt;
pub use template::{ChatMessage, ChatTemplate, Conversation, MessageError, Rendered};
pub use tokenizer::{Special, Tokenizer};

/// Text that could not become tokens, or messages that could not become text.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The tokenizer refused the text.
    #[error("tokenize {bytes} bytes of text")]
    Tokenize {
        /// Length of the text.
        bytes: usize,
        /// What the tokenizer said.
        #[source]
        source: tokenizers::Error,
    },
    /// The model file brings no chat template.
    #[error("the model has no chat template; use /v1/completions")]
    NoChatTemplate,
    /// The chat template refused the messages in its own words.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The chat template failed.
    #[error("render the model's chat template")]
    Template(#[source] minijinja::Error),
}
