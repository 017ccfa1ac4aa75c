//! What clients get.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::scheduler::Finish;
use crate::tools::ToolDelta;

/// Token counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens of all answers.
    pub completion_tokens: usize,
    /// Tokens of the prompts that did not have to be computed.
    pub cached_tokens: usize,
}

impl Usage {
    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
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

    /// The field that brings the prompt.
    pub fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completion => "prompt",
        }
    }
}

/// A token and the logarithm of its probability.
#[derive(Clone, Debug, PartialEq)]
pub struct Likely {
    /// The token as it is shown.
    pub text: String,
    /// The bytes that it stands for.
    pub bytes: Vec<u8>,
    /// The logarithm; nothing for what a prompt begins with.
    pub logprob: Option<f32>,
}

/// A token of an answer with what the client asked to know of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// Its id.
    pub id: u32,
    /// Characters before it, of the answer and of a prompt that is shown before.
    pub offset: usize,
    /// Whether it is one of the prompt.
    pub is_prompt: bool,
    /// The token, and the likeliest at its place.
    pub likely: Option<(Likely, Vec<Likely>)>,
}

/// A part of an answer: text, and the tokens behind it where the client asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// The tokens; empty unless something of them is to be told.
    pub tokens: Vec<Told>,
    /// What becomes of calls of tools behind the text, which is without them.
    pub calls: Vec<ToolDelta>,
}

impl Piece {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty() && self.calls.is_empty()
    }

    /// Adds what comes next.
    pub fn extend(&mut self, next: Self) {
        self.text.push_str(&next.text);
        self.tokens.extend(next.tokens);
        self.calls.extend(next.calls);
    }
}

/// An answer that is complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Complete {
    /// All of it.
    pub piece: Piece,
    /// Why it ended.
    pub reason: Finish,
}

/// What all parts of one response share.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The response's id.
    pub id: String,
    /// When it began, in seconds since 1970.
    pub created: u64,
    /// The served name.
    pub model: String,
    /// Answers to each prompt.
    pub choices: usize,
    /// Whether probabilities were asked for.
    pub logprobs: bool,
    /// The tokens of each prompt, where the client asked for ids.
    pub prompt_ids: Option<Vec<Arc<[u32]>>>,
    /// Whether parts of a stream have a place for token counts.
    pub include_usage: bool,
}

impl Answer {
    /// The body of a response that comes whole.
    pub fn whole(&self, complete: &[Complete], usage: Usage) -> Value {
        let object = match self.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completion => "text_completion",
        };
        let choices = complete.iter().enumerate();
        let choices = choices.map(|(index, complete)| {
            let text = &complete.piece.text;
            let (field, content) = match self.endpoint {
                Endpoint::Chat => ("message", message(text, &complete.piece.calls)),
                Endpoint::Completion => ("text", json!(text)),
            };
            let reason = json!(complete.reason.as_str());
            let mut choice = self.choice(index, field, &content, &complete.piece, &reason);
            if self.endpoint == Endpoint::Completion {
                self.put_prompt_ids(&mut choice, index);
            }
            choice
        });
        let mut body = self.envelope(object, &choices.collect::<Vec<_>>());
        if self.endpoint == Endpoint::Chat {
            self.put_prompt_ids(&mut body, 0);
        }
        body["usage"] = usage.json();
        body
    }

    /// The event that opens an answer in a stream, where there is something to tell.
    pub fn opening(&self, index: usize) -> Option<Value> {
        let content = match self.endpoint {
            Endpoint::Chat => json!({"role": "assistant", "content": ""}),
            Endpoint::Completion if self.prompt_ids.is_some() => json!(""),
            Endpoint::Completion => return None,
        };
        let mut event = self.chunk(index, &content, &Piece::default(), &Value::Null);
        match self.endpoint {
            Endpoint::Chat => self.put_prompt_ids(&mut event, 0),
            Endpoint::Completion => self.put_prompt_ids(&mut event["choices"][0], index),
        }
        Some(event)
    }

    /// The event of one piece.
    pub fn piece(&self, index: usize, piece: &Piece) -> Value {
        let content = match self.endpoint {
            Endpoint::Chat => delta(piece),
            Endpoint::Completion => json!(piece.text),
        };
        self.chunk(index, &content, piece, &Value::Null)
    }

    /// The event that says why an answer ended.
    pub fn closing(&self, index: usize, reason: Finish) -> Value {
        let content = match self.endpoint {
            Endpoint::Chat => json!({}),
            Endpoint::Completion => json!(""),
        };
        let reason = json!(reason.as_str());
        self.chunk(index, &content, &Piece::default(), &reason)
    }

    /// The event with the token counts.
    pub fn usage(&self, usage: Usage) -> Value {
        let mut event = self.envelope(self.chunk_object(), &[]);
        event["usage"] = usage.json();
        event
    }

    fn chunk(&self, index: usize, content: &Value, piece: &Piece, reason: &Value) -> Value {
        let field = match self.endpoint {
            Endpoint::Chat => "delta",
            Endpoint::Completion => "text",
        };
        let choice = self.choice(index, field, content, piece, reason);
        let mut event = self.envelope(self.chunk_object(), &[choice]);
        if self.include_usage {
            event["usage"] = Value::Null;
        }
        event
    }

    fn choice(
        &self,
        index: usize,
        field: &str,
        content: &Value,
        piece: &Piece,
        reason: &Value,
    ) -> Value {
        let logprobs = match self.endpoint {
            _ if !self.logprobs || piece.tokens.is_empty() => Value::Null,
            Endpoint::Chat => chat_logprobs(&piece.tokens),
            Endpoint::Completion => completion_logprobs(&piece.tokens),
        };
        let mut choice = json!({
            "index": index, field: content, "logprobs": logprobs, "finish_reason": reason,
        });
        if self.prompt_ids.is_some() {
            let answer = piece.tokens.iter().filter(|token| !token.is_prompt);
            choice["token_ids"] = answer.map(|token| token.id).collect();
        }
        choice
    }

    fn put_prompt_ids(&self, place: &mut Value, index: usize) {
        let prompt = index / self.choices.max(1);
        if let Some(ids) = self.prompt_ids.as_ref().and_then(|ids| ids.get(prompt)) {
            place["prompt_token_ids"] = json!(**ids);
        }
    }

    fn chunk_object(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }

    fn envelope(&self, object: &str, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

/// A message that is complete.
fn message(text: &str, deltas: &[ToolDelta]) -> Value {
    let mut calls: Vec<(&str, &str, String)> = Vec::new();
    for delta in deltas {
        match delta {
            ToolDelta::Start { id, name, .. } => calls.push((id, name, String::new())),
            ToolDelta::Arguments { index, json } => {
                if let Some((_, _, arguments)) = calls.get_mut(*index) {
                    arguments.push_str(json);
                }
            }
            ToolDelta::Content(_) | ToolDelta::End { .. } => {}
        }
    }
    if calls.is_empty() {
        return json!({"role": "assistant", "content": text});
    }
    let calls = calls.into_iter().map(|(id, name, arguments)| {
        json!({
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        })
    });
    let content = if text.is_empty() {
        Value::Null
    } else {
        json!(text)
    };
    json!({
        "role": "assistant",
        "content": content,
        "tool_calls": calls.collect::<Vec<_>>(),
    })
}

/// What a piece adds to a message.
fn delta(piece: &Piece) -> Value {
    let calls = piece.calls.iter().filter_map(|delta| match delta {
        ToolDelta::Start { index, id, name } => Some(json!({
            "index": index,
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        })),
        ToolDelta::Arguments { index, json } => {
            Some(json!({"index": index, "function": {"arguments": json}}))
        }
        ToolDelta::Content(_) | ToolDelta::End { .. } => None,
    });
    let calls: Vec<Value> = calls.collect();
    let mut delta = Map::new();
    if calls.is_empty() || !piece.text.is_empty() {
        delta.insert("content".to_owned(), json!(piece.text));
    }
    if !calls.is_empty() {
        delta.insert("tool_calls".to_owned(), Value::from(calls));
    }
    Value::Object(delta)
}

fn chat_logprobs(tokens: &[Told]) -> Value {
    json!({"content": logprobs(tokens)})
}

/// Tokens with their probabilities and the likeliest at their places.
pub(super) fn logprobs(tokens: &[Told]) -> Vec<Value> {
    let one = |likely: &Likely| json!({"token": likely.text, "logprob": likely.logprob, "bytes": likely.bytes});
    let likely = tokens.iter().filter_map(|token| token.likely.as_ref());
    let content = likely.map(|(own, top)| {
        let mut entry = one(own);
        entry["top_logprobs"] = top.iter().map(one).collect();
        entry
    });
    content.collect()
}

fn completion_logprobs(tokens: &[Told]) -> Value {
    let likely = || tokens.iter().filter_map(|token| token.likely.as_ref());
    let top = likely().map(|(own, top)| {
        if own.logprob.is_none() {
            return Value::Null;
        }
        let mut map = Map::new();
        for likely in top.iter().chain([own]) {
            // Of tokens that look the same, the likeliest is told.
            map.entry(likely.text.as_str())
                .or_insert_with(|| json!(likely.logprob));
        }
        Value::Object(map)
    });
    json!({
        "tokens": likely().map(|(own, _)| own.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": likely().map(|(own, _)| own.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|token| token.offset).collect::<Vec<_>>(),
    })
}

/// The body of `/v1/models`.
pub fn models(cards: &[ModelCard]) -> Value {
    let data = cards.iter().map(ModelCard::body);
    json!({"object": "list", "data": data.collect::<Vec<_>>()})
}

/// What is told of a model that is served no more.
pub fn deleted(id: &str) -> Value {
    json!({"id": id, "object": "model", "deleted": true})
}

/// A name that clients may send as `model`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelCard {
    /// The name.
    pub id: String,
    /// Since when it is served, in seconds since 1970.
    pub created: u64,
    /// Longest sequence in tokens.
    pub max_tokens: u32,
    /// Of an adapter, the model that it changes and its folder.
    pub parent: Option<(String, String)>,
}

impl ModelCard {
    /// As JSON.
    pub fn body(&self) -> Value {
        let mut body = json!({
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "llama-operator",
            "max_model_len": self.max_tokens,
        });
        if let Some((parent, root)) = &self.parent {
            body["parent"] = json!(parent);
            body["root"] = json!(root);
        }
        body
    }
}

/// The body of `/tokenize`.
pub fn tokenized(tokens: &[u32], texts: Option<&[String]>, max_tokens: u32) -> Value {
    json!({
        "count": tokens.len(),
        "max_model_len": max_tokens,
        "tokens": tokens,
        "token_strs": texts,
    })
}

/// The body of `/tokenizer_info`: the tokens that begin and end a text, and the chat
/// template where the model brings one.
pub fn tokenizer_info(
    [bos, eos]: &[Option<String>; 2],
    template: Option<&str>,
    max_tokens: u32,
) -> Value {
    json!({
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": max_tokens,
        "chat_template": template,
    })
}

/// The body of `/detokenize`.
pub fn detokenized(text: &str) -> Value {
    json!({"prompt": text})
}

/// The body of `/version`.
pub fn version() -> Value {
    json!({"version": env!("CARGO_PKG_VERSION")})
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
            choices: 2,
            logprobs: true,
            prompt_ids: Some(vec![Arc::new([1, 2]), Arc::new([3])]),
            include_usage: false,
        }
    }

    fn likely(text: &str, logprob: f32) -> Likely {
        Likely {
            text: text.to_owned(),
            bytes: text.as_bytes().to_vec(),
            logprob: Some(logprob),
        }
    }

    fn hi() -> Piece {
        let told = |id, offset, text: &str| Told {
            id,
            offset,
            is_prompt: false,
            likely: Some((
                likely(text, -1.0),
                vec![likely("a", -0.5), likely(text, -1.0)],
            )),
        };
        Piece {
            text: "hi".to_owned(),
            tokens: vec![told(7, 0, "h"), told(8, 1, "i")],
            calls: Vec::new(),
        }
    }

    fn complete(reason: Finish) -> Complete {
        Complete {
            piece: hi(),
            reason,
        }
    }

    #[test]
    fn calls_have_the_shape_that_clients_read() {
        let chat = answer(Endpoint::Chat);
        let start = ToolDelta::Start {
            index: 0,
            id: "call_1".to_owned(),
            name: "f".to_owned(),
        };
        let arguments = |json: &str| ToolDelta::Arguments {
            index: 0,
            json: json.to_owned(),
        };
        let piece = Piece {
            calls: vec![start, arguments("{\"a\"")],
            ..Piece::default()
        };
        let event = chat.piece(0, &piece);
        let first = json!({
            "index": 0, "id": "call_1", "type": "function",
            "function": {"name": "f", "arguments": ""},
        });
        let second = json!({"index": 0, "function": {"arguments": "{\"a\""}});
        let delta = json!({"tool_calls": [first, second]});
        assert_eq!(event["choices"][0]["delta"], delta);

        let mut whole = piece;
        whole.extend(Piece {
            calls: vec![arguments(":1}")],
            ..Piece::default()
        });
        let complete = Complete {
            piece: whole,
            reason: Finish::ToolCalls,
        };
        let choice = &chat.whole(&[complete], Usage::default())["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls");
        let call = json!({
            "id": "call_1", "type": "function",
            "function": {"name": "f", "arguments": "{\"a\":1}"},
        });
        let message = json!({"role": "assistant", "content": null, "tool_calls": [call]});
        assert_eq!(choice["message"], message);
    }

    #[test]
    fn answers_have_the_shape_that_clients_read() {
        let usage = Usage {
            prompt_tokens: 2,
            completion_tokens: 3,
            cached_tokens: 1,
        };
        let both = [complete(Finish::Stop), complete(Finish::Length)];
        let chat = answer(Endpoint::Chat).whole(&both, usage);
        assert_eq!(
            chat["choices"][0]["message"],
            json!({"role": "assistant", "content": "hi"})
        );
        assert_eq!(chat["choices"][0]["finish_reason"], "stop");
        assert_eq!(chat["choices"][1]["index"], 1);
        assert_eq!(chat["choices"][1]["token_ids"], json!([7, 8]));
        assert_eq!(chat["prompt_token_ids"], json!([1, 2]));
        let entry = &chat["choices"][0]["logprobs"]["content"][1];
        assert_eq!(
            *entry,
            json!({
                "token": "i", "logprob": -1.0, "bytes": [105], "top_logprobs": [
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                    {"token": "i", "logprob": -1.0, "bytes": [105]},
                ],
            })
        );
        assert_eq!(chat["usage"]["total_tokens"], 5);
        assert_eq!(chat["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
        let three = [(); 3].map(|()| complete(Finish::Length));
        let text = answer(Endpoint::Completion).whole(&three, usage);
        assert_eq!(
            (&text["choices"][0]["text"], &text["object"]),
            (&json!("hi"), &json!("text_completion"))
        );
        assert_eq!(text["choices"][2]["prompt_token_ids"], json!([3]));
        assert_eq!(
            text["choices"][0]["logprobs"],
            json!({
                "tokens": ["h", "i"], "token_logprobs": [-1.0, -1.0], "text_offset": [0, 1],
                "top_logprobs": [{"a": -0.5, "h": -1.0}, {"a": -0.5, "i": -1.0}],
            })
        );
    }

    #[test]
    fn streams_open_with_the_role_and_close_with_the_reason() {
        let chat = Answer {
            prompt_ids: None,
            logprobs: false,
            include_usage: true,
            ..answer(Endpoint::Chat)
        };
        let opening = chat.opening(1).expect("chat opens");
        assert_eq!(opening["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(opening["choices"][0]["index"], 1);
        assert_eq!(opening["usage"], Value::Null);
        let piece = chat.piece(0, &hi());
        assert_eq!(
            piece["choices"][0],
            json!({
                "index": 0, "delta": {"content": "hi"}, "logprobs": null, "finish_reason": null,
            })
        );
        assert_eq!(
            chat.closing(0, Finish::Length)["choices"][0]["finish_reason"],
            "length"
        );
        assert_eq!(chat.usage(Usage::default())["choices"], json!([]));
        let completion = answer(Endpoint::Completion);
        let opening = completion.opening(2).expect("tells the prompt");
        assert_eq!(opening["choices"][0]["prompt_token_ids"], json!([3]));
        let completion = Answer {
            prompt_ids: None,
            ..completion
        };
        assert_eq!(completion.opening(0), None);
    }
}
