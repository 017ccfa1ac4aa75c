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

/// `type` of errors that the client can mend.
const INVALID_REQUEST: &str = "invalid_request_error";
/// `type` of errors that time mends.
const UNAVAILABLE: &str = "service_unavailable";

impl ApiError {
    fn new(status: u16, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
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
            param: Some(param.to_owned()),
            ..Self::invalid(format!("{param}: {message}"))
        }
    }

    /// 400: prompt and answer do not fit the model's context.
    pub fn context_length(tokens: usize, limit: u32) -> Self {
        Self {
            param: Some("messages".to_owned()),
            code: Some("context_length_exceeded"),
            ..Self::invalid(format!(
                "the prompt has {tokens} tokens; with the answer a sequence may have {limit}"
            ))
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
