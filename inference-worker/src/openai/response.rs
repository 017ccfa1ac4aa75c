//! What clients get.

use serde_json::{Value, json};

use crate::scheduler::Finish;

/// Token counts of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
}

impl Usage {
    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// Which of the two endpoints answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
}

impl Endpoint {
    /// What ids of this endpoint begin with.
    pub fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completion => "cmpl-",
        }
    }
}

/// What all parts of one answer share.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The answer's id.
    pub id: String,
    /// When it began, in seconds since 1970.
    pub created: u64,
    /// The served name.
    pub model: String,
}

impl Answer {
    /// The body of an answer that comes whole.
    pub fn whole(&self, text: &str, reason: Finish, usage: Usage) -> Value {
        let (object, mut choice) = match self.endpoint {
            Endpoint::Chat => (
                "chat.completion",
                json!({"index": 0, "message": {"role": "assistant", "content": text}}),
            ),
            Endpoint::Completion => ("text_completion", json!({"index": 0, "text": text})),
        };
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(reason.as_str());
        let mut body = self.envelope(object, &json!([choice]));
        body["usage"] = usage.json();
        body
    }

    /// The event that opens a stream, where the endpoint has one.
    pub fn opening(&self) -> Option<Value> {
        (self.endpoint == Endpoint::Chat)
            .then(|| self.chunk(&json!({"role": "assistant", "content": ""}), &Value::Null))
    }

    /// The event of one piece of text.
    pub fn piece(&self, text: &str) -> Value {
        match self.endpoint {
            Endpoint::Chat => self.chunk(&json!({"content": text}), &Value::Null),
            Endpoint::Completion => self.chunk(&json!(text), &Value::Null),
        }
    }

    /// The event that says why the answer ended.
    pub fn closing(&self, reason: Finish) -> Value {
        match self.endpoint {
            Endpoint::Chat => self.chunk(&json!({}), &json!(reason.as_str())),
            Endpoint::Completion => self.chunk(&json!(""), &json!(reason.as_str())),
        }
    }

    /// The event with the token counts.
    pub fn usage(&self, usage: Usage) -> Value {
        let mut event = self.envelope(self.chunk_object(), &json!([]));
        event["usage"] = usage.json();
        event
    }

    fn chunk(&self, content: &Value, reason: &Value) -> Value {
        let field = match self.endpoint {
            Endpoint::Chat => "delta",
            Endpoint::Completion => "text",
        };
        let choice = json!({"index": 0, field: content, "logprobs": null, "finish_reason": reason});
        self.envelope(self.chunk_object(), &json!([choice]))
    }

    fn chunk_object(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }

    fn envelope(&self, object: &str, choices: &Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

/// The body of `/v1/models`.
pub fn models(served_name: &str, created: u64, max_tokens: u32) -> Value {
    json!({
        "object": "list",
        "data": [{
            "id": served_name,
            "object": "model",
            "created": created,
            "owned_by": "llama-operator",
            "max_model_len": max_tokens,
        }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(endpoint: Endpoint) -> Answer {
        Answer {
            endpoint,
            id: "id".to_owned(),
            created: 1,
            model: "m".to_owned(),
        }
    }

    #[test]
    fn answers_have_the_shape_that_clients_read() {
        let usage = Usage {
            prompt_tokens: 2,
            completion_tokens: 3,
        };
        let chat = answer(Endpoint::Chat).whole("hi", Finish::Stop, usage);
        assert_eq!(
            chat["choices"][0]["message"],
            json!({"role": "assistant", "content": "hi"})
        );
        assert_eq!(chat["choices"][0]["finish_reason"], "stop");
        assert_eq!(chat["usage"]["total_tokens"], 5);
        let text = answer(Endpoint::Completion).whole("hi", Finish::Length, usage);
        assert_eq!(
            (&text["choices"][0]["text"], &text["object"]),
            (&json!("hi"), &json!("text_completion"))
        );
    }

    #[test]
    fn streams_open_with_the_role_and_close_with_the_reason() {
        let chat = answer(Endpoint::Chat);
        assert_eq!(
            chat.opening().expect("chat opens")["choices"][0]["delta"]["role"],
            "assistant"
        );
        assert_eq!(chat.piece("x")["choices"][0]["delta"]["content"], "x");
        assert_eq!(
            chat.closing(Finish::Length)["choices"][0]["finish_reason"],
            "length"
        );
        assert_eq!(chat.usage(Usage::default())["choices"], json!([]));
        assert_eq!(answer(Endpoint::Completion).opening(), None);
    }
}
