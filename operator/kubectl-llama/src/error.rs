//! What can go wrong.

use std::time::Duration;

use kube::config::KubeconfigError;

/// What kube gives as the reason of an answer that is no `Status`.
const NO_STATUS: &str = "Failed to parse error data";

/// Why a command could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig")]
    Kubeconfig(#[source] Box<KubeconfigError>),
    /// No client can be made of it.
    #[error("cannot make a client from the kubeconfig")]
    Client(#[source] Box<kube::Error>),
    /// The API server refused.
    #[error("cannot {attempt}: {}", problem(.answer))]
    Api {
        /// What was tried.
        attempt: String,
        /// What it said. No source: the message has it whole.
        answer: Box<kube::Error>,
    },
    /// The API server did not answer.
    #[error("cannot {attempt}: no answer within {limit:?} (--request-timeout)")]
    NoAnswer {
        /// What was tried.
        attempt: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// An object is not as expected.
    #[error("{0}")]
    Unexpected(String),
    /// A file cannot be read.
    #[error("cannot read {path}")]
    File {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    Manifest {
        /// The file.
        path: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// What was asked for cannot be written as JSON or YAML.
    #[error("cannot write the answer as {form}: {problem}")]
    Form {
        /// JSON or YAML.
        form: &'static str,
        /// Why.
        problem: String,
    },
    /// Standard output cannot be written to.
    #[error("cannot write to standard output")]
    Output(#[from] std::io::Error),
}

impl Error {
    /// Whether the reader of our output went away.
    pub fn is_closed_output(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// Whether the API server said that the user may not do this.
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Api { answer, .. } if matches!(&**answer, kube::Error::Api(status) if status.is_forbidden()))
    }

    /// Whether the API server said that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { answer, .. } if matches!(&**answer, kube::Error::Api(status) if status.code == 404))
    }
}

/// What the API server said, or why it could not be asked, in one line.
pub fn problem(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.message.is_empty() => {
            format!("{} ({})", status.reason, status.code)
        }
        // A kind that the API server does not know gets plain text.
        kube::Error::Api(status) if status.reason.is_empty() || status.reason == NO_STATUS => {
            status.message.trim().to_owned()
        }
        kube::Error::Api(status) => format!("{} ({})", status.message, status.reason),
        other => llama_operator::telemetry::chain(other),
    }
}
