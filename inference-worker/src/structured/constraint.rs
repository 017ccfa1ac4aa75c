//! The state of a grammar in one sequence.

use std::fmt;
use std::sync::Arc;

use llguidance::{CancellationHandle, Matcher};

use super::compile::compile;
use super::error::{ConstraintError, GrammarError, sentence};
use super::{Grammar, Vocabulary};

/// Whether a mask allows `token`.
pub fn allows(mask: &[u32], token: u32) -> bool {
    mask.get(token as usize / 32)
        .is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// Stops the work of one constraint from another thread, for good: it fails then.
#[derive(Clone, Debug)]
pub struct Canceller(CancellationHandle);

impl Canceller {
    /// Stops it within milliseconds.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

/// Which tokens may come next in one sequence. An end token is allowed exactly where
/// the grammar may end.
///
/// A mask mostly takes some ten microseconds, but a grammar can be made for which it
/// takes seconds. Whoever cannot wait computes masks beside other work, and cancels.
pub struct Constraint {
    matcher: Matcher,
    vocabulary: Arc<Vocabulary>,
    mask: Vec<u32>,
    /// Whether `mask` is that of the present state.
    fresh: bool,
    /// Tokens before the end token.
    held: usize,
    ended: bool,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint")
            .field("held", &self.held)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl Constraint {
    /// The constraint of an answer that has no token yet. Takes milliseconds for
    /// large grammars.
    ///
    /// # Errors
    /// As [`Grammar::check`].
    pub fn new(vocabulary: &Arc<Vocabulary>, grammar: &Grammar) -> Result<Self, GrammarError> {
        Ok(Self {
            matcher: compile(vocabulary.factory(), grammar.source()?)?,
            vocabulary: Arc::clone(vocabulary),
            mask: Vec::new(),
            fresh: false,
            held: 0,
            ended: false,
        })
    }

    /// The tokens that may come next: bit `id % 32` of word `id / 32`. Behind an end
    /// token it is that of the end tokens.
    ///
    /// # Errors
    /// When the grammar takes too much work or leads nowhere.
    pub fn mask(&mut self) -> Result<&[u32], ConstraintError> {
        if !self.fresh {
            let mask = self
                .matcher
                .compute_mask_or_eos()
                .map_err(|error| failed(&error))?;
            self.mask.clear();
            self.mask.extend_from_slice(mask.as_slice());
            self.mask.resize(self.vocabulary.mask_words(), 0);
            self.fresh = true;
        }
        Ok(&self.mask)
    }

    /// Takes the token that came.
    ///
    /// # Errors
    /// `NotAllowed` for a token that may not come, which changes nothing; `Failed` as
    /// [`Constraint::mask`].
    pub fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        if self.vocabulary.ends().contains(&token) && self.may_end()? {
            self.ended = true;
            return Ok(());
        }
        if self.ended || self.matcher.is_stopped() || !self.vocabulary.holds(token) {
            return Err(ConstraintError::NotAllowed(token));
        }
        let count = self
            .matcher
            .try_consume_tokens(&[token])
            .map_err(|error| failed(&error))?;
        if count == 0 {
            return Err(ConstraintError::NotAllowed(token));
        }
        self.held += 1;
        self.fresh = false;
        Ok(())
    }

    /// How many of `tokens` could come next, one behind the other. Changes nothing.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    pub fn accepted(&mut self, tokens: &[u32]) -> Result<usize, ConstraintError> {
        if self.ended || self.matcher.is_stopped() {
            let end = |token: &&u32| !self.ended && self.vocabulary.ends().contains(token);
            return Ok(tokens.iter().take(1).filter(end).count());
        }
        let known = tokens.iter().take_while(|&&id| self.vocabulary.holds(id));
        let tokens = &tokens[..known.count()];
        self.matcher
            .validate_tokens(tokens)
            .map_err(|error| failed(&error))
    }

    /// Tokens that come next whatever the model says: a draft that is always right.
    pub fn forced(&mut self) -> Vec<u32> {
        if self.ended || self.matcher.is_stopped() {
            return Vec::new();
        }
        self.matcher.compute_ff_tokens()
    }

    /// Takes the last `tokens` back, the end token included.
    ///
    /// # Errors
    /// When fewer came.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), ConstraintError> {
        let end = usize::from(self.ended);
        if tokens > self.held + end {
            return Err(ConstraintError::NotHeld {
                asked: tokens,
                held: self.held + end,
            });
        }
        if tokens == 0 {
            return Ok(());
        }
        self.ended = false;
        self.fresh = false;
        self.held -= tokens - end;
        self.matcher
            .rollback(tokens - end)
            .map_err(|error| failed(&error))
    }

    /// Whether the answer may end here.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    pub fn may_end(&mut self) -> Result<bool, ConstraintError> {
        if self.matcher.is_error() {
            let error = self.matcher.get_error().unwrap_or_default();
            return Err(ConstraintError::Failed(sentence(&error)));
        }
        if self.ended || self.matcher.is_stopped() {
            return Ok(!self.ended);
        }
        self.matcher.is_accepting().map_err(|error| failed(&error))
    }

    /// Whether nothing but an end token may come, or one came.
    pub fn is_finished(&self) -> bool {
        self.ended || (self.matcher.is_stopped() && !self.matcher.is_error())
    }

    /// What stops this constraint.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.matcher.cancellation_handle().unwrap_or_default())
    }

    /// A second constraint in the same state, for a sequence that branches off.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
            vocabulary: Arc::clone(&self.vocabulary),
            mask: self.mask.clone(),
            ..*self
        }
    }
}

fn failed(error: &anyhow::Error) -> ConstraintError {
    ConstraintError::Failed(sentence(&error.to_string()))
}
