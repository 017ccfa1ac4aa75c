//! Logs: one line an event on standard error, never with text of prompts or
//! answers.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Environment variable with what to log, such as `info` or `llama_worker=debug`.
pub const LOG_ENV: &str = "LLAMA_LOG";
/// Environment variable with the form of log lines.
pub const LOG_FORMAT_ENV: &str = "LLAMA_LOG_FORMAT";
const DEFAULT_FILTER: &str = "info";

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    #[default]
    Json,
    /// For people.
    Text,
}

impl LogFormat {
    /// The flag's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Text => "text",
        }
    }
}

/// Starts logging.
///
/// # Errors
/// When logging has been started before.
pub fn start(format: LogFormat) -> Result<(), TryInitError> {
    let filter =
        EnvFilter::try_from_env(LOG_ENV).unwrap_or_else(|_unset| EnvFilter::new(DEFAULT_FILTER));
    let registry = tracing_subscriber::registry().with(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    match format {
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
        LogFormat::Text => registry.with(lines).try_init(),
    }
}
