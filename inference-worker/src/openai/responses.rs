//! What clients of `/v1/responses` get: one response, or the events by which it grows.

use serde_json::{Map, Value, json};

use super::ApiError;
use super::response::{Piece, Told, Usage, logprobs};
use crate::scheduler::Finish;
use crate::tools::ToolDelta;

#[cfg(test)]
mod tests;

/// A response on its way. What it says of itself is JSON; every event is an object whose
/// `type` is the event's name.
#[derive(Debug)]
pub struct GrowingResponse {
    /// A part of all ids in it.
    name: String,
    created: u64,
    model: String,
    /// What it says of its request.
    repeated: Map<String, Value>,
    /// Whether probabilities were asked for.
    logprobs: bool,
    /// Items that are complete.
    output: Vec<Value>,
    open: Option<Open>,
    /// Id of the item that grows.
    open_id: String,
    /// Tokens that came before it was known to which item they belong.
    early: Vec<Told>,
    events: Vec<Value>,
    /// How many events there were.
    told: u64,
}

/// The item that grows.
#[derive(Debug)]
enum Open {
    Message {
        text: String,
        logprobs: Vec<Value>,
    },
    Call {
        id: String,
        function: String,
        arguments: String,
    },
}

/// How far an item or a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
        }
    }
}

/// What a response is made of besides its text.
#[derive(Clone, Debug)]
pub struct ResponseParts {
    /// A name that no other response has.
    pub name: String,
    /// When it began, in seconds since 1970.
    pub created: u64,
    /// The served name.
    pub model: String,
    /// What it says of its request.
    pub repeated: Map<String, Value>,
    /// Whether probabilities were asked for.
    pub logprobs: bool,
}

impl GrowingResponse {
    /// A response that has begun. Its first events are ready.
    pub fn new(parts: ResponseParts) -> Self {
        let mut response = Self {
            name: parts.name,
            created: parts.created,
            model: parts.model,
            repeated: parts.repeated,
            logprobs: parts.logprobs,
            output: Vec::new(),
            open: None,
            open_id: String::new(),
            early: Vec::new(),
            events: Vec::new(),
            told: 0,
        };
        let body = response.body(Status::InProgress, None);
        response.tell("response.created", json!({"response": body}));
        response.tell("response.in_progress", json!({"response": body}));
        response
    }

    /// The events that came since this was asked last.
    pub fn events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// It grows by `piece`.
    pub fn grow(&mut self, piece: Piece) {
        self.early.extend(piece.tokens);
        let calls = !piece.calls.is_empty() || matches!(self.open, Some(Open::Call { .. }));
        if !piece.text.is_empty() {
            self.write(&piece.text);
        } else if !calls && self.open.is_some() {
            self.write("");
        }
        for delta in piece.calls {
            match delta {
                ToolDelta::Content(text) => self.write(&text),
                ToolDelta::Start { id, name, .. } => self.open_call(id, name),
                ToolDelta::Arguments { json, .. } => self.argue(&json),
                ToolDelta::End { complete: true, .. } => self.close(Status::Completed),
                ToolDelta::End { .. } => self.close(Status::Incomplete),
            }
        }
        // Tokens of calls have no place in a response.
        if calls {
            self.early.clear();
        }
    }

    /// It has ended; the response as a whole.
    pub fn finish(&mut self, reason: Finish, usage: Usage) -> Value {
        let (status, event) = match reason {
            Finish::Length => (Status::Incomplete, "response.incomplete"),
            Finish::Stop | Finish::ToolCalls => (Status::Completed, "response.completed"),
        };
        if self.open.is_none() && self.output.is_empty() {
            self.write("");
        }
        self.close(status);
        let body = self.body(status, Some(usage));
        self.tell(event, json!({"response": body}));
        body
    }

    /// It cannot be completed.
    pub fn fail(&mut self, error: &ApiError) {
        self.close(Status::Incomplete);
        let mut body = self.body(Status::Failed, None);
        body["error"] = json!({
            "code": error.code.unwrap_or(error.kind),
            "message": error.message,
        });
        self.tell("response.failed", json!({"response": body}));
    }

    /// The message grows, and begins where there is none.
    fn write(&mut self, text: &str) {
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.close(Status::Completed);
            self.open(Open::Message {
                text: String::new(),
                logprobs: Vec::new(),
            });
            let part = part("", &[]);
            self.tell_of_text("response.content_part.added", json!({"part": part}));
        }
        let told = self.likely();
        let Some(Open::Message {
            text: all,
            logprobs,
        }) = &mut self.open
        else {
            return;
        };
        all.push_str(text);
        logprobs.extend(told.iter().cloned());
        if !text.is_empty() || !told.is_empty() {
            let fields = json!({"delta": text, "logprobs": told});
            self.tell_of_text("response.output_text.delta", fields);
        }
    }

    /// Probabilities of the tokens so far, where they were asked for.
    fn likely(&mut self) -> Vec<Value> {
        let tokens = std::mem::take(&mut self.early);
        if self.logprobs {
            logprobs(&tokens)
        } else {
            Vec::new()
        }
    }

    fn open_call(&mut self, id: String, function: String) {
        self.close(Status::Completed);
        self.open(Open::Call {
            id,
            function,
            arguments: String::new(),
        });
    }

    fn argue(&mut self, json: &str) {
        if let Some(Open::Call { arguments, .. }) = &mut self.open {
            arguments.push_str(json);
            let fields = json!({"delta": json});
            self.tell_of_item("response.function_call_arguments.delta", fields);
        }
    }

    fn open(&mut self, item: Open) {
        let kind = match &item {
            Open::Message { .. } => "msg",
            Open::Call { .. } => "fc",
        };
        self.open_id = format!("{kind}_{}_{}", self.name, self.output.len());
        let mut shown = self.item(&item, Status::InProgress);
        if kind == "msg" {
            shown["content"] = json!([]);
        }
        self.open = Some(item);
        let index = self.output.len();
        let fields = json!({"output_index": index, "item": shown});
        self.tell("response.output_item.added", fields);
    }

    /// Ends the item that grows, if one does.
    fn close(&mut self, status: Status) {
        let Some(item) = self.open.take() else {
            return;
        };
        match &item {
            Open::Message { text, logprobs } => {
                let part = part(text, logprobs);
                let fields = json!({"text": text, "logprobs": logprobs});
                self.tell_of_text("response.output_text.done", fields);
                self.tell_of_text("response.content_part.done", json!({"part": part}));
            }
            Open::Call {
                function,
                arguments,
                ..
            } => {
                let fields = json!({"name": function, "arguments": arguments});
                self.tell_of_item("response.function_call_arguments.done", fields);
            }
        }
        let shown = self.item(&item, status);
        let fields = json!({"output_index": self.output.len(), "item": shown});
        self.tell("response.output_item.done", fields);
        self.output.push(shown);
    }

    fn item(&self, item: &Open, status: Status) -> Value {
        let id = &self.open_id;
        match item {
            Open::Message { text, logprobs } => json!({
                "id": id,
                "type": "message",
                "role": "assistant",
                "status": status.as_str(),
                "content": [part(text, logprobs)],
            }),
            Open::Call {
                id: call,
                function,
                arguments,
            } => json!({
                "id": id,
                "type": "function_call",
                "call_id": call,
                "name": function,
                "arguments": arguments,
                "status": status.as_str(),
            }),
        }
    }

    fn body(&self, status: Status, usage: Option<Usage>) -> Value {
        let incomplete =
            (status == Status::Incomplete).then(|| json!({"reason": "max_output_tokens"}));
        let mut body = json!({
            "id": format!("resp_{}", self.name),
            "object": "response",
            "created_at": self.created,
            "status": status.as_str(),
            "error": null,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": self.output,
            "usage": usage.map(usage_json),
        });
        if let Some(fields) = body.as_object_mut() {
            fields.extend(self.repeated.clone());
        }
        body
    }

    /// An event of the text of the item that grows.
    fn tell_of_text(&mut self, name: &str, mut fields: Value) {
        fields["content_index"] = json!(0);
        self.tell_of_item(name, fields);
    }

    /// An event of the item that grows.
    fn tell_of_item(&mut self, name: &str, mut fields: Value) {
        fields["item_id"] = json!(self.open_id);
        fields["output_index"] = json!(self.output.len());
        self.tell(name, fields);
    }

    fn tell(&mut self, name: &str, mut fields: Value) {
        fields["type"] = json!(name);
        fields["sequence_number"] = json!(self.told);
        self.told += 1;
        self.events.push(fields);
    }
}

fn part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        // Nothing is written to a cache that a client would have to know of.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}
