//! What can be wrong with grammars, vocabularies and the tokens they are given.

use super::compile::TOO_HARD;

/// Longest sentence of the compiler that is passed on, in characters.
const MAX_SENTENCE: usize = 300;

/// A grammar that the client must mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It has too many bytes.
    #[error("has {bytes} bytes; at most {limit} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The most that is allowed.
        limit: usize,
    },
    /// It has too many alternatives.
    #[error("has {count} choices; 1 to {limit} are allowed")]
    Choices {
        /// Number of alternatives.
        count: usize,
        /// The most that is allowed.
        limit: usize,
    },
    /// There is nothing in it.
    #[error("must not be empty")]
    Empty,
    /// The compiler does not take it.
    #[error("is not supported: {0}")]
    Refused(String),
    /// The machine has no thread for the compiler.
    #[error("could not be compiled: there is no thread for it ({0})")]
    NoThread(String),
}

impl GrammarError {
    /// Whether another request with this grammar would fail too.
    pub fn is_clients(&self) -> bool {
        !matches!(self, Self::NoThread(_))
    }
}

/// A tokenizer that no vocabulary can be made of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// No token ends an answer.
    #[error("the model has no token that ends an answer, so no form can be required of one")]
    NoEnd,
    /// The tokens do not fit the tables of the compiler.
    #[error("the tokens have {bytes} bytes together; at most {limit} are supported")]
    TooLong {
        /// Their length.
        bytes: usize,
        /// The most that is supported.
        limit: usize,
    },
    /// The compiler's tables could not be made.
    #[error("make tables of the model's tokens: {0}")]
    Tables(String),
}

/// A constraint that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The token may not come next.
    #[error("token {0} may not come next")]
    NotAllowed(u32),
    /// More tokens are taken back than came.
    #[error("{asked} tokens are taken back, but {held} came")]
    NotHeld {
        /// How many are to be taken back.
        asked: usize,
        /// How many came.
        held: usize,
    },
    /// The grammar takes too much work or leads nowhere.
    #[error("the grammar cannot go on: {0}")]
    Failed(String),
}

/// The first sentence of what the compiler says; the rest is its own state.
pub(super) fn sentence(message: &str) -> String {
    let line = message.lines().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or("no reason is given").trim();
    // Names of control tokens follow, which are no part of the request.
    let line = line
        .split("; following special tokens")
        .next()
        .unwrap_or(line);
    if line.starts_with("panic: ") {
        return TOO_HARD.to_owned();
    }
    match line.char_indices().nth(MAX_SENTENCE) {
        None => line.to_owned(),
        Some((end, _)) => format!("{}…", &line[..end]),
    }
}
