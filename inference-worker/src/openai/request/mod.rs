//! What clients send, checked. Every field is honoured or refused by name.

use llama_model::sample::SamplingParams;
use llama_model::text::ChatMessage;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::ApiError;

/// Most stop strings of a request.
const MAX_STOPS: usize = 4;
/// Longest stop string, in bytes.
const MAX_STOP_BYTES: usize = 256;
/// Most messages of a conversation.
const MAX_MESSAGES: usize = 1024;
/// Tokens that `/v1/completions` generates unless told otherwise.
const COMPLETION_TOKENS: u32 = 16;

/// What is to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, to be put through the model's chat template.
    Chat(Vec<ChatMessage>),
    /// Text as it is.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// A request that was understood in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRequest {
    /// The model asked for.
    pub model: String,
    /// What is to be continued.
    pub prompt: Prompt,
    /// Temperature and nucleus; the seed is `seed` or drawn by the server.
    pub temperature: f32,
    /// See `temperature`.
    pub top_p: f32,
    /// The client's seed.
    pub seed: Option<u64>,
    /// Most tokens of the answer; up to the context's end when absent.
    pub max_tokens: Option<u32>,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whether a stream ends with the token counts.
    pub include_usage: bool,
}

impl ValidRequest {
    /// Reads the body of `/v1/chat/completions`.
    ///
    /// # Errors
    /// 400, naming the field that is wrong, unknown or not supported.
    pub fn chat(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let messages: Vec<Value> = fields.required("messages")?;
        if messages.is_empty() || messages.len() > MAX_MESSAGES {
            let message = format!(
                "1 to {MAX_MESSAGES} messages are needed, {} came",
                messages.len()
            );
            return Err(ApiError::invalid_field("messages", &message));
        }
        let messages = messages
            .into_iter()
            .enumerate()
            .map(|(index, message)| chat_message(index, message))
            .collect::<Result<_, _>>()?;
        let newer: Option<u32> = fields.take("max_completion_tokens")?;
        let older: Option<u32> = fields.take("max_tokens")?;
        if newer.is_some() && older.is_some() && newer != older {
            return Err(ApiError::invalid_field(
                "max_tokens",
                "differs from max_completion_tokens; send one of them",
            ));
        }
        Self::finish(fields, Prompt::Chat(messages), newer.or(older))
    }

    /// Reads the body of `/v1/completions`.
    ///
    /// # Errors
    /// As [`ValidRequest::chat`].
    pub fn completion(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let prompt = completion_prompt(fields.required("prompt")?)?;
        let max_tokens = fields.take("max_tokens")?.unwrap_or(COMPLETION_TOKENS);
        Self::finish(fields, prompt, Some(max_tokens))
    }

    fn finish(
        mut fields: Fields,
        prompt: Prompt,
        max_tokens: Option<u32>,
    ) -> Result<Self, ApiError> {
        if max_tokens == Some(0) {
            return Err(ApiError::invalid_field("max_tokens", "must be at least 1"));
        }
        let stream = fields.take("stream")?.unwrap_or(false);
        let request = Self {
            model: fields.required("model")?,
            prompt,
            temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
            top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0),
            seed: fields.take::<i64>("seed")?.map(i64::cast_unsigned),
            max_tokens,
            stop: stops(fields.take("stop")?)?,
            stream,
            include_usage: include_usage(fields.take("stream_options")?, stream)?,
        };
        fields.refuse_rest()?;
        Ok(request)
    }

    /// How tokens are drawn, with `fallback_seed` where the client named none.
    pub fn sampling(&self, fallback_seed: u64) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed.unwrap_or(fallback_seed),
            ..SamplingParams::GREEDY
        }
    }
}

/// The fields of a request that have not been read yet.
struct Fields(Map<String, Value>);

impl Fields {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(mut fields)) => {
                // An explicit null means the same as no field.
                fields.retain(|_, value| !value.is_null());
                Ok(Self(fields))
            }
            Ok(_) => Err(ApiError::invalid("the body must be a JSON object")),
            Err(error) => Err(ApiError::invalid(format!("the body is not JSON: {error}"))),
        }
    }

    fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        self.0
            .remove(name)
            .map(|value| {
                serde_json::from_value(value)
                    .map_err(|error| ApiError::invalid_field(name, &error.to_string()))
            })
            .transpose()
    }

    fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?
            .ok_or_else(|| ApiError::invalid_field(name, "is required"))
    }

    /// A number in `least..=most`.
    fn number(&mut self, name: &str, least: f32, most: f32) -> Result<Option<f32>, ApiError> {
        match self.take::<f32>(name)? {
            Some(value) if !(least..=most).contains(&value) => Err(ApiError::invalid_field(
                name,
                &format!("must be between {least} and {most}, is {value}"),
            )),
            other => Ok(other),
        }
    }

    /// Refuses what is left: fields of the API that change nothing at the value
    /// sent are let through, the others are named.
    fn refuse_rest(self) -> Result<(), ApiError> {
        for (name, value) in self.0 {
            let Some(neutral) = neutral_values(&name) else {
                return Err(ApiError::invalid_field(&name, "is not a field of this API"));
            };
            if !neutral.is_any() && !neutral.allows(&value) {
                return Err(ApiError::invalid_field(&name, "is not supported"));
            }
        }
        Ok(())
    }
}

/// Values of an unsupported field that ask for nothing.
enum Neutral {
    Any,
    These(Vec<Value>),
}

impl Neutral {
    fn is_any(&self) -> bool {
        matches!(self, Self::Any)
    }

    fn allows(&self, value: &Value) -> bool {
        let Self::These(values) = self else {
            return true;
        };
        values
            .iter()
            .any(|neutral| match (neutral.as_f64(), value.as_f64()) {
                (Some(neutral), Some(value)) => neutral.total_cmp(&value).is_eq(),
                _ => neutral == value,
            })
    }
}

/// For fields of OpenAI's API that are not built in; `None` for other names.
fn neutral_values(name: &str) -> Option<Neutral> {
    let these = |values: Value| match values {
        Value::Array(values) => Neutral::These(values),
        other => Neutral::These(vec![other]),
    };
    Some(match name {
        // They name the caller or the bill and never change an answer.
        "user" | "safety_identifier" | "metadata" | "prompt_cache_key" => Neutral::Any,
        "parallel_tool_calls" => these(json!([true, false])),
        "n" | "best_of" => these(json!([1])),
        "presence_penalty" | "frequency_penalty" | "top_logprobs" => these(json!([0])),
        "logprobs" => these(json!([false, 0])),
        "echo" | "store" => these(json!([false])),
        "logit_bias" => these(json!([{}])),
        "tools" | "functions" => Neutral::These(vec![json!([])]),
        "tool_choice" | "function_call" => these(json!(["none", "auto"])),
        "response_format" => these(json!([{"type": "text"}])),
        "service_tier" => these(json!(["auto", "default"])),
        "modalities" => Neutral::These(vec![json!(["text"])]),
        "suffix" => these(json!([""])),
        "audio" | "prediction" | "reasoning_effort" | "verbosity" | "web_search_options" => {
            Neutral::These(Vec::new())
        }
        _ => return None,
    })
}

fn chat_message(index: usize, message: Value) -> Result<ChatMessage, ApiError> {
    let place = |field: &str| format!("messages[{index}].{field}");
    let Value::Object(mut fields) = message else {
        return Err(ApiError::invalid_field(
            &format!("messages[{index}]"),
            "must be an object",
        ));
    };
    fields.retain(|_, value| !value.is_null());
    let Some(Value::String(role)) = fields.remove("role") else {
        return Err(ApiError::invalid_field(
            &place("role"),
            "is required, as a string",
        ));
    };
    let role = match role.as_str() {
        "system" | "user" | "assistant" => role,
        // OpenAI's newer name for it.
        "developer" => "system".to_owned(),
        _ => {
            let message = format!("\"{role}\" is not supported; system, user and assistant are");
            return Err(ApiError::invalid_field(&place("role"), &message));
        }
    };
    let content = match fields.remove("content") {
        Some(Value::String(content)) => content,
        Some(Value::Array(parts)) => parts
            .into_iter()
            .map(|part| text_part(&place("content"), part))
            .collect::<Result<_, _>>()?,
        _ => {
            let message = "is required, as a string or a list of text parts";
            return Err(ApiError::invalid_field(&place("content"), message));
        }
    };
    match fields.keys().next() {
        None => Ok(ChatMessage::new(role, content)),
        Some(other) => Err(ApiError::invalid_field(&place(other), "is not supported")),
    }
}

fn text_part(place: &str, part: Value) -> Result<String, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct TextPart {
        r#type: String,
        text: String,
    }
    match serde_json::from_value::<TextPart>(part) {
        Ok(part) if part.r#type == "text" => Ok(part.text),
        _ => Err(ApiError::invalid_field(
            place,
            "only parts {\"type\": \"text\", \"text\": …} are supported",
        )),
    }
}

fn completion_prompt(prompt: Value) -> Result<Prompt, ApiError> {
    let refuse = || {
        ApiError::invalid_field(
            "prompt",
            "must be a string, a list of one string, or a list of token ids",
        )
    };
    match prompt {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(mut items) => match (items.len(), items.pop()) {
            (1, Some(Value::String(text))) => Ok(Prompt::Text(text)),
            (_, Some(last @ Value::Number(_))) => {
                items.push(last);
                let tokens = serde_json::from_value(Value::Array(items));
                tokens.map(Prompt::Tokens).map_err(|_error| refuse())
            }
            _ => Err(refuse()),
        },
        _ => Err(refuse()),
    }
}

fn stops(stop: Option<Value>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(list) => serde_json::from_value(list).map_err(|_error| {
            ApiError::invalid_field("stop", "must be a string or a list of strings")
        })?,
    };
    if stops.len() > MAX_STOPS {
        let message = format!("at most {MAX_STOPS} strings, {} came", stops.len());
        return Err(ApiError::invalid_field("stop", &message));
    }
    if stops
        .iter()
        .any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES)
    {
        let message = format!("each string must have 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::invalid_field("stop", &message));
    }
    Ok(stops)
}

fn include_usage(options: Option<Value>, stream: bool) -> Result<bool, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct StreamOptions {
        #[serde(default)]
        include_usage: bool,
    }
    let Some(options) = options else {
        return Ok(false);
    };
    if !stream {
        return Err(ApiError::invalid_field(
            "stream_options",
            "needs stream to be true",
        ));
    }
    serde_json::from_value::<StreamOptions>(options)
        .map(|options| options.include_usage)
        .map_err(|error| ApiError::invalid_field("stream_options", &error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(mut change: Value) -> Result<ValidRequest, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (name, value) in change.as_object_mut().expect("an object") {
            body[name.as_str()] = value.take();
        }
        ValidRequest::chat(body.to_string().as_bytes())
    }

    fn refused(change: Value) -> String {
        let error = chat(change).expect_err("refused");
        assert_eq!(error.status, 400);
        error.param.expect("names a field")
    }

    #[test]
    fn defaults_are_openais() {
        let request = chat(json!({})).expect("valid");
        assert_eq!((request.temperature, request.top_p), (1.0, 1.0));
        assert_eq!(
            (request.max_tokens, request.stream, request.seed),
            (None, false, None)
        );
        let body = br#"{"model": "m", "prompt": "x"}"#;
        assert_eq!(
            ValidRequest::completion(body).expect("valid").max_tokens,
            Some(16)
        );
    }

    #[test]
    fn every_supported_field_arrives() {
        let request = chat(json!({
            "temperature": 0.5, "top_p": 0.9, "seed": -1, "max_completion_tokens": 7,
            "stop": ["a", "b"], "stream": true, "stream_options": {"include_usage": true},
            "n": 1, "user": "u", "presence_penalty": 0.0, "tools": [], "logprobs": null,
            "response_format": {"type": "text"}, "tool_choice": "auto",
        }))
        .expect("valid");
        assert_eq!(
            (request.temperature, request.top_p, request.seed),
            (0.5, 0.9, Some(u64::MAX))
        );
        assert_eq!(request.max_tokens, Some(7));
        assert_eq!(request.stop, ["a", "b"]);
        assert!(request.stream && request.include_usage);
    }

    #[test]
    fn what_is_wrong_unknown_or_unsupported_is_named() {
        for (change, field) in [
            (json!({"temperature": 3}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_p": -0.1}), "top_p"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (
                json!({"max_tokens": 1, "max_completion_tokens": 2}),
                "max_tokens",
            ),
            (json!({"max_tokens": -1}), "max_tokens"),
            (json!({"n": 2}), "n"),
            (json!({"tools": [{}]}), "tools"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"logprobs": true}), "logprobs"),
            (json!({"frequency_penalty": 0.1}), "frequency_penalty"),
            (
                json!({"response_format": {"type": "json_object"}}),
                "response_format",
            ),
            (json!({"reasoning_effort": "low"}), "reasoning_effort"),
            (json!({"tempratur": 1}), "tempratur"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"stop": ""}), "stop"),
            (json!({"stream_options": {}}), "stream_options"),
            (
                json!({"stream": true, "stream_options": {"x": 1}}),
                "stream_options",
            ),
            (json!({"messages": []}), "messages"),
            (
                json!({"messages": [{"role": "tool", "content": "x"}]}),
                "messages[0].role",
            ),
            (
                json!({"messages": [{"role": "user"}]}),
                "messages[0].content",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
                "messages[0].content",
            ),
            (
                json!({"messages": [{"role": "user", "content": "x", "name": "n"}]}),
                "messages[0].name",
            ),
            (json!({"model": 7}), "model"),
        ] {
            assert_eq!(refused(change), field);
        }
        assert!(ValidRequest::chat(b"[]").is_err());
        assert!(ValidRequest::chat(b"{").is_err());
    }

    #[test]
    fn text_parts_are_joined_and_developers_are_the_system() {
        let request = chat(json!({"messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]}))
        .expect("valid");
        let Prompt::Chat(messages) = request.prompt else {
            panic!("a chat")
        };
        assert_eq!(messages, [ChatMessage::new("system", "ab")]);
    }

    #[test]
    fn prompts_are_text_or_tokens() {
        let prompt = |value: Value| {
            let body = json!({"model": "m", "prompt": value}).to_string();
            ValidRequest::completion(body.as_bytes()).map(|request| request.prompt)
        };
        assert_eq!(prompt(json!("x")), Ok(Prompt::Text("x".to_owned())));
        assert_eq!(prompt(json!(["x"])), Ok(Prompt::Text("x".to_owned())));
        assert_eq!(prompt(json!([1, 2])), Ok(Prompt::Tokens(vec![1, 2])));
        for bad in [
            json!(["x", "y"]),
            json!([]),
            json!([[1]]),
            json!([1, "x"]),
            json!(7),
        ] {
            assert_eq!(
                prompt(bad).expect_err("refused").param.as_deref(),
                Some("prompt")
            );
        }
    }
}
