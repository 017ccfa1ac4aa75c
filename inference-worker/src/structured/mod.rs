//! Answers of a required form: grammars of requests, and which tokens may come next.
//!
//! A [`Grammar`] is what a request asks for. [`Grammar::check`] finds what is wrong
//! with it where the request is read, without a vocabulary. Where tokens are drawn,
//! a [`Vocabulary`] of the model's tokens makes a [`Constraint`] of it for each
//! sequence. Nothing here does I/O.

mod compile;
mod constraint;
mod error;
mod grammar;
#[cfg(test)]
mod hostile;
mod vocabulary;
#[cfg(test)]
mod walks;

pub(crate) use grammar::{MAX_CALLS_BYTES, quoted, with_options};
#[cfg(test)]
pub(crate) use walks::{Walk, tokenizers};

pub use constraint::{Canceller, Constraint, allows};
pub use error::{ConstraintError, GrammarError, VocabularyError};
pub use grammar::{Grammar, MAX_GRAMMAR_BYTES};
pub use vocabulary::Vocabulary;
