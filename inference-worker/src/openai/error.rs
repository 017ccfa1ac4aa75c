//! Errors in the shape that OpenAI's clients read.

use serde_json::{Value, json};

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// One sentence for the person who sent the request.
    pub message: String,
    /// The class of error, in OpenAI's words.
    pub kind: &'static str,
    /// The field at fault, if one is.
    pub param: Option<String>,
    /// A word that programs can match.
    pub code: Option<&'static str>,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u32>,
}

/// Longest part of what a client sent that is sent back to it, in bytes.
const MAX_QUOTED_BYTES: usize = 1024;

/// `type` of errors that the client can mend.
const INVALID_REQUEST: &str = "invalid_request_error";
/// `type` of errors that time mends.
const UNAVAILABLE: &str = "service_unavailable";
/// `code` of answers that this worker does not finish because it was asked to end.
const SHUTTING_DOWN: &str = "shutting_down";
/// `code` of requests that came before the model was loaded.
const LOADING: &str = "model_loading";

impl ApiError {
    fn new(status: u16, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            message: shortened(message.into()),
            kind,
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// 400: the request as a whole is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(400, INVALID_REQUEST, message)
    }

    /// 400: the field `param` is wrong.
    pub fn invalid_field(param: &str, message: &str) -> Self {
        Self {
            param: Some(shortened(param.to_owned())),
            ..Self::invalid(format!("{}: {message}", shortened(param.to_owned())))
        }
    }

    /// 400: prompt and answer do not fit the model's context.
    pub fn context_length(param: &str, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.to_owned()),
            code: Some("context_length_exceeded"),
            ..Self::invalid(message)
        }
    }

    /// 404: the model is not served here.
    pub fn model_not_found(asked: &str, served: &str) -> Self {
        Self {
            param: Some("model".to_owned()),
            code: Some("model_not_found"),
            ..Self::new(
                404,
                INVALID_REQUEST,
                format!("model \"{asked}\" is not served here; \"{served}\" is"),
            )
        }
    }

    /// 404: there is no such thing.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(404, INVALID_REQUEST, message)
    }

    /// 404: no such path.
    pub fn unknown_path(path: &str) -> Self {
        Self::new(404, INVALID_REQUEST, format!("no such path: {path}"))
    }

    /// 405: the path exists for other methods.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        Self::new(
            405,
            INVALID_REQUEST,
            format!("{path} does not answer {method}"),
        )
    }

    /// 413: the body is too long.
    pub fn body_too_long(limit: usize) -> Self {
        Self::new(
            413,
            INVALID_REQUEST,
            format!("the body is longer than {limit} bytes"),
        )
    }

    /// 408: the body did not come in time.
    pub fn body_too_slow(seconds: u64) -> Self {
        Self::new(
            408,
            INVALID_REQUEST,
            format!("the body did not come within {seconds} seconds"),
        )
    }

    /// 429: too many requests are open.
    pub fn overloaded(message: impl Into<String>) -> Self {
        Self {
            code: Some("rate_limit_exceeded"),
            retry_after: Some(1),
            ..Self::new(429, "rate_limit_error", message)
        }
    }

    /// 503: not now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(2),
            ..Self::new(503, UNAVAILABLE, message)
        }
    }

    /// 503: this worker was asked to end; the same request can be sent again, and the
    /// Service has another worker for it or will have one.
    pub fn shutting_down(what: &str) -> Self {
        Self {
            code: Some(SHUTTING_DOWN),
            ..Self::unavailable(format!(
                "this worker is shutting down{what}; send the request again"
            ))
        }
    }

    /// 503: the model is not here yet.
    pub fn loading() -> Self {
        Self {
            code: Some(LOADING),
            ..Self::unavailable("the model is still loading")
        }
    }

    /// Whether something went wrong here, and neither at the client nor because this worker
    /// begins or ends.
    pub fn is_fault(&self) -> bool {
        self.status >= 500 && !matches!(self.code, Some(SHUTTING_DOWN | LOADING))
    }

    /// 500: a failure while the answer was computed.
    pub fn failed(message: impl Into<String>, code: &'static str) -> Self {
        Self {
            code: Some(code),
            ..Self::new(500, "server_error", message)
        }
    }

    /// The error's JSON body.
    pub fn body(&self) -> Value {
        json!({
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        })
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > MAX_QUOTED_BYTES {
        text.truncate(text.floor_char_boundary(MAX_QUOTED_BYTES));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_clients_nor_beginnings_and_ends_are_faults() {
        for (error, is_fault) in [
            (ApiError::invalid("no"), false),
            (ApiError::overloaded("later"), false),
            (ApiError::loading(), false),
            (ApiError::shutting_down(""), false),
            (ApiError::unavailable("the group failed"), true),
            (ApiError::failed("no numbers", "generation_failed"), true),
        ] {
            assert_eq!(error.is_fault(), is_fault, "{error}");
        }
    }

    #[test]
    fn what_a_client_sent_comes_back_short() {
        let error = ApiError::invalid_field(&"é".repeat(1 << 20), &"x".repeat(1 << 20));
        assert!(error.body().to_string().len() < 3 * MAX_QUOTED_BYTES);
        assert!(error.param.is_some_and(|param| param.ends_with("é…")));
    }
}
