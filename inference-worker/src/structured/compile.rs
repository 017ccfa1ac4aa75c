//! The compiler of grammars, kept within bounds.

use std::sync::{LazyLock, mpsc};
use std::thread;
use std::time::Duration;

use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, TokenParser};

use super::error::{GrammarError, VocabularyError, sentence};
use super::vocabulary::byte_tokens;

/// The compiler descends into rules that name each other; a chain of as many as a
/// request has room for needs this much. Only what is used takes memory.
const STACK_BYTES: usize = 128 << 20;

/// How long the first mask of a grammar may take where it is checked. Usual ones take
/// a thousandth of that.
const PATIENCE: Duration = Duration::from_secs(1);
/// Said of grammars that take more.
pub(super) const TOO_HARD: &str = "the grammar is too hard for the compiler";

/// A compiler for the tokens of `environment`.
pub(super) fn compiler(environment: &TokEnv) -> Result<ParserFactory, VocabularyError> {
    // Tokens that are ordinary text of JSON strings are looked at once, together.
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(environment, InferenceCapabilities::default(), &slices)
        .map_err(|error| VocabularyError::Tables(sentence(&error.to_string())))?;
    factory.quiet();
    *factory.limits_mut() = limits();
    Ok(factory)
}

/// Work and memory that one grammar may take.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        // About 20 ms.
        initial_lexer_fuel: 1_000_000,
        // About 15 ms.
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // About 100 MB.
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        // Would make what a check accepts depend on the vocabulary.
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// Compiles `grammar` for the tokens of `factory`.
///
/// # Errors
/// When it is wrong or takes too much.
pub(super) fn compile(
    factory: &ParserFactory,
    grammar: TopLevelGrammar,
) -> Result<Matcher, GrammarError> {
    let parser = on_deep_stack(|| {
        factory
            .create_parser(grammar)
            .map_err(|error| refused(&error))
    })?;
    start(parser?)
}

fn start(parser: TokenParser) -> Result<Matcher, GrammarError> {
    let matcher = Matcher::new(Ok(parser));
    match matcher.get_error() {
        None => Ok(matcher.into_cancellable()),
        Some(error) => Err(GrammarError::Refused(sentence(&error))),
    }
}

/// Compiles `grammar` for single bytes, which finds all that is wrong with it.
///
/// # Errors
/// As [`compile`].
pub(super) fn check(grammar: TopLevelGrammar) -> Result<(), GrammarError> {
    static BYTES: LazyLock<Result<ParserFactory, VocabularyError>> =
        LazyLock::new(|| compiler(&byte_tokens()));
    match &*BYTES {
        Ok(factory) => try_out(compile(factory, grammar)?),
        Err(error) => Err(GrammarError::Refused(error.to_string())),
    }
}

/// Computes the first mask, for no longer than [`PATIENCE`].
fn try_out(mut matcher: Matcher) -> Result<(), GrammarError> {
    let canceller = matcher.cancellation_handle();
    thread::scope(|scope| {
        let (done, is_done) = mpsc::channel::<()>();
        thread::Builder::new()
            .name("grammar-clock".to_owned())
            .spawn_scoped(scope, move || {
                if is_done.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout)
                    && let Some(canceller) = canceller
                {
                    canceller.cancel();
                }
            })
            .map_err(|error| GrammarError::NoThread(error.to_string()))?;
        let mask = matcher.compute_mask_or_eos();
        drop(done);
        match mask {
            Ok(_) => Ok(()),
            Err(_) if matcher.is_cancelled() => Err(GrammarError::Refused(TOO_HARD.to_owned())),
            Err(error) => Err(refused(&error)),
        }
    })
}

fn refused(error: &anyhow::Error) -> GrammarError {
    GrammarError::Refused(sentence(&error.to_string()))
}

fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, GrammarError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("grammar".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| GrammarError::NoThread(error.to_string()))?;
        let panicked = |_panic| GrammarError::Refused(TOO_HARD.to_owned());
        thread.join().map_err(panicked)
    })
}
