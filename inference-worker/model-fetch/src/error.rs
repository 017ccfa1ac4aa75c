//! Why a model could not be fetched.

use std::io;
use std::path::PathBuf;

use llama_contract::{FETCH_CA_ENV, FailureCategory, S3_KEY_ID_ENV, S3_SECRET_KEY_ENV};
use llama_model_copy::{progress, space};

/// Why a model could not be fetched. Addresses are shown without their query, which may
/// hold a signature.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// An address cannot be used.
    #[error("{field} {value:?} {problem}")]
    BadAddress {
        /// Where it stands.
        field: &'static str,
        /// What it is.
        value: String,
        /// What is wrong, and what was expected.
        problem: String,
    },
    /// Half of a pair of credentials.
    #[error("one of {S3_KEY_ID_ENV} and {S3_SECRET_KEY_ENV} is set and the other is not")]
    HalfCredentials,
    /// The certificates to trust cannot be used.
    #[error("the certificates in {FETCH_CA_ENV} cannot be used: {0}")]
    Certificates(String),
    /// No version of TLS can be spoken.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
    /// The client could not be made.
    #[error("cannot make an HTTP client")]
    Client(#[source] reqwest::Error),
    /// The server's certificate is not trusted, or TLS fails otherwise.
    #[error(
        "{at} cannot be trusted: {problem}; give the certificates of its authority as \
         caConfigMapRef of the source"
    )]
    Untrusted {
        /// The address.
        at: String,
        /// What is wrong.
        problem: rustls::Error,
    },
    /// 401 or 403.
    #[error(
        "{at} answers {status}: {with}; check the Secret that the source names, and what its \
         owner may read"
    )]
    Unauthorized {
        /// The address.
        at: String,
        /// The status.
        status: u16,
        /// Whether credentials were sent.
        with: &'static str,
    },
    /// 404 or 410.
    #[error("{at} answers {status}: there is no such {what}")]
    NotFound {
        /// The address.
        at: String,
        /// The status.
        status: u16,
        /// File, object or revision.
        what: &'static str,
    },
    /// Another status than a file comes with.
    #[error("{at} answers {status}{}", detail(.text))]
    Refused {
        /// The address.
        at: String,
        /// The status.
        status: u16,
        /// The start of what came with it.
        text: String,
    },
    /// No answer, or one that breaks off.
    #[error("{at} {problem} ({attempts} attempts)")]
    Unreachable {
        /// The address.
        at: String,
        /// What happened last.
        problem: String,
        /// How often it was tried without a byte more.
        attempts: u32,
    },
    /// An answer that makes no sense.
    #[error("{at} gives {problem}")]
    BadAnswer {
        /// The address.
        at: String,
        /// What is wrong.
        problem: String,
    },
    /// Nothing of a model.
    #[error("{at} holds no file of a model: {holds}")]
    Nothing {
        /// The address.
        at: String,
        /// What it holds.
        holds: String,
    },
    /// A file is not as long as was said.
    #[error("{name} from {at} has {found} bytes, {expected} were expected")]
    Length {
        /// The file.
        name: String,
        /// The address.
        at: String,
        /// Bytes expected.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },
    /// A file is not the one that the digest is of.
    #[error(
        "{name} from {at} has the {kind} {found}, expected is {expected}: the file there is \
         another one, or was damaged"
    )]
    Digest {
        /// The file.
        name: String,
        /// The address.
        at: String,
        /// SHA-256 or Git object name.
        kind: &'static str,
        /// What was expected.
        expected: String,
        /// What came.
        found: String,
    },
    /// The folder does not exist.
    #[error("cannot fetch into {0}: it is not a folder; mount a volume there")]
    NoFolder(PathBuf),
    /// Too little room on the volume.
    #[error(
        "the model has {needed} bytes ({}), the volume at {folder} has {free} bytes ({}) free",
        progress::size(*.needed), progress::size(*.free)
    )]
    NoSpace {
        /// Bytes still to be written.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The folder.
        folder: PathBuf,
    },
    /// Too little room in the cache.
    #[error(
        "the model has {} and the cache may hold {}, of which {} are models in use or used a \
         short time ago; raise spec.model.cache.size or free the claim",
        progress::size(*.needed), progress::size(*.budget), progress::size(*.held)
    )]
    OverBudget {
        /// Bytes of the model.
        needed: u64,
        /// Bytes that the cache may have.
        budget: u64,
        /// Bytes of what cannot be removed.
        held: u64,
    },
    /// Somebody else fetches the model and does not come to an end.
    #[error(
        "another pod holds {lock} and brought nothing new for {seconds} s; see the logs of pods \
         that use the same cache"
    )]
    Stuck {
        /// The lock.
        lock: PathBuf,
        /// How long.
        seconds: u64,
    },
    /// A source without digests in a cache.
    #[error("a cache needs the digests of files: name them in files")]
    NoIdentity,
    /// A file or folder cannot be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A task of the program ended without a result.
    #[error("a part of the program ended early")]
    Ended,
    /// The program cannot start.
    #[error("cannot start")]
    Start(#[source] io::Error),
    /// SIGTERM came.
    #[error("stopped by SIGTERM before the model was fetched")]
    Stopped,
}

fn detail(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

impl FetchError {
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    pub(crate) fn category(&self) -> FailureCategory {
        match self {
            Self::BadAddress { .. }
            | Self::HalfCredentials
            | Self::Certificates(_)
            | Self::Untrusted { .. }
            | Self::NoIdentity
            | Self::NoFolder(_) => FailureCategory::InvalidConfiguration,
            Self::Unauthorized { .. } => FailureCategory::SourceUnauthorized,
            Self::NotFound { .. } | Self::Nothing { .. } => FailureCategory::ModelNotFound,
            Self::Digest { .. } | Self::Length { .. } => FailureCategory::DigestMismatch,
            Self::NoSpace { .. } | Self::OverBudget { .. } => FailureCategory::InsufficientStorage,
            Self::File { source, .. } if space::is_full(source) => {
                FailureCategory::InsufficientStorage
            }
            Self::Refused { .. } | Self::Unreachable { .. } | Self::BadAnswer { .. } => {
                FailureCategory::SourceUnreachable
            }
            Self::Tls(_)
            | Self::Client(_)
            | Self::Stuck { .. }
            | Self::File { .. }
            | Self::Ended
            | Self::Start(_)
            | Self::Stopped => FailureCategory::Internal,
        }
    }

    /// Whether the same request may succeed a little later.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { status, .. } => matches!(status, 408 | 425 | 429 | 500..),
            _ => false,
        }
    }
}
