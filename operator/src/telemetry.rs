//! Logs, on standard error.

use std::error::Error;

use tracing_subscriber::EnvFilter;

/// How a line of the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line, for log collectors.
    Json,
    /// Plain text, for people.
    Text,
}

/// Starts logging at `filter`, for example `info` or `info,llama_operator=debug`.
///
/// # Errors
/// When `filter` does not parse or logging was started before.
pub fn start(filter: &str, format: LogFormat) -> Result<(), Box<dyn Error + Send + Sync>> {
    let lines = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(EnvFilter::try_new(filter)?);
    match format {
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .try_init(),
        LogFormat::Text => lines.with_ansi(false).try_init(),
    }
}

/// `error` and its causes in one line. The JSON lines would leave the causes out, and
/// some errors repeat their cause in their own message.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Caused(&'static str, #[source] Option<Box<Self>>);

    #[test]
    fn causes_are_told_once() {
        let root = Caused("refused", None);
        let middle = Caused("connect: refused", Some(Box::new(root)));
        let top = Caused("write pod m-0-0", Some(Box::new(middle)));
        assert_eq!(chain(&top), "write pod m-0-0: connect: refused");
    }
}
