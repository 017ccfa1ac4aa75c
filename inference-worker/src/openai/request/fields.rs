//! The fields of a body, taken one by one.

use serde::de::{DeserializeOwned, DeserializeSeed};
use serde_json::{Value, json};

use super::Prompt;
use super::json::{InputLists, Read};
use crate::openai::ApiError;

/// The fields of a request that have not been read yet.
pub(super) struct Fields(Read);

impl Fields {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        Self::parse_with(body, InputLists::default())
    }

    /// Likewise, where other fields than a completion's hold long lists.
    pub(super) fn parse_with(body: &[u8], lists: InputLists) -> Result<Self, ApiError> {
        let mut read = Read::new(lists);
        let mut json = serde_json::Deserializer::from_slice(body);
        let parsed = read.deserialize(&mut json).and_then(|()| json.end());
        match (parsed, read.current.take()) {
            (Ok(()), _) => Ok(Self(read)),
            (Err(error), Some(field)) if error.is_data() => {
                Err(ApiError::invalid_field(&field, &error.to_string()))
            }
            (Err(error), None) if error.is_data() => {
                Err(ApiError::invalid(format!("the body is wrong: {error}")))
            }
            (Err(error), _) => Err(ApiError::invalid(format!("the body is not JSON: {error}"))),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.fields.contains_key(name)
    }

    /// The field of prompts, which is `prompt` unless the endpoint calls it otherwise.
    pub(super) fn prompts(&mut self) -> Result<Vec<Prompt>, ApiError> {
        let prompts = self.0.prompts.take();
        prompts.ok_or_else(|| ApiError::invalid_field(self.0.lists.prompts, "is required"))
    }

    /// The field `tokens`.
    pub(super) fn tokens(&mut self) -> Result<Vec<u32>, ApiError> {
        let tokens = self.0.tokens.take();
        tokens.ok_or_else(|| ApiError::invalid_field("tokens", "is required"))
    }

    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        self.0
            .fields
            .remove(name)
            .map(|value| {
                serde_json::from_value(value)
                    .map_err(|error| ApiError::invalid_field(name, &error.to_string()))
            })
            .transpose()
    }

    /// What was sent as `name`, which stays to be read.
    pub(super) fn sent(&self, name: &str) -> Value {
        self.0.fields.get(name).cloned().unwrap_or_default()
    }

    pub(super) fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?
            .ok_or_else(|| ApiError::invalid_field(name, "is required"))
    }

    /// A switch that is off unless sent.
    pub(super) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        Ok(self.take(name)?.unwrap_or(false))
    }

    /// A number in `least..=most`.
    pub(super) fn number<T>(&mut self, name: &str, least: T, most: T) -> Result<Option<T>, ApiError>
    where
        T: DeserializeOwned + PartialOrd + Copy + std::fmt::Display,
    {
        match self.take::<T>(name)? {
            Some(value) if !(least..=most).contains(&value) => Err(ApiError::invalid_field(
                name,
                &format!("must be between {least} and {most}, is {value}"),
            )),
            other => Ok(other),
        }
    }

    /// A list of at most `most` items.
    pub(super) fn list<T: DeserializeOwned>(
        &mut self,
        name: &str,
        most: usize,
    ) -> Result<Vec<T>, ApiError> {
        if let Some(Value::Array(items)) = self.0.fields.get(name)
            && items.len() > most
        {
            let message = format!("at most {most} items, {} came", items.len());
            return Err(ApiError::invalid_field(name, &message));
        }
        Ok(self.take(name)?.unwrap_or_default())
    }

    /// Refuses what is left: fields of the API that change nothing at the value
    /// sent are let through, the others are named.
    pub(super) fn refuse_rest(self) -> Result<(), ApiError> {
        for (name, left) in [
            (self.0.lists.prompts, self.0.prompts.is_some()),
            ("tokens", self.0.tokens.is_some()),
        ] {
            if left {
                return Err(ApiError::invalid_field(name, "is not a field of this API"));
            }
        }
        for (name, value) in self.0.fields {
            let Some(neutral) = neutral_values(&name) else {
                return Err(ApiError::invalid_field(&name, "is not a field of this API"));
            };
            if !neutral.allows(&value) {
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

/// For fields of OpenAI's and vLLM's APIs that are not built in; `None` for other
/// names.
fn neutral_values(name: &str) -> Option<Neutral> {
    let these = |values: Value| match values {
        Value::Array(values) => Neutral::These(values),
        other => Neutral::These(vec![other]),
    };
    Some(match name {
        // They name the caller or the bill and never change an answer.
        "user" | "safety_identifier" | "metadata" | "prompt_cache_key" => Neutral::Any,
        // Without tools there are no calls, and byte-level vocabularies have no spaces to
        // add or leave out.
        "parallel_tool_calls" | "spaces_between_special_tokens" => these(json!([true, false])),
        "echo" | "store" | "background" | "use_beam_search" | "early_stopping" => {
            these(json!([false]))
        }
        "tools" | "functions" | "bad_words" | "logits_processors" => {
            Neutral::These(vec![json!([])])
        }
        "tool_choice" | "function_call" => these(json!(["none", "auto"])),
        "service_tier" => these(json!(["auto", "default"])),
        "modalities" => Neutral::These(vec![json!(["text"])]),
        "suffix" => these(json!([""])),
        "truncation" => these(json!(["disabled"])),
        "length_penalty" => these(json!([1])),
        "include_reasoning" => these(json!([true])),
        "audio"
        | "prediction"
        | "reasoning_effort"
        | "reasoning"
        | "previous_response_id"
        | "conversation"
        | "max_tool_calls"
        | "verbosity"
        | "web_search_options"
        | "guided_decoding_backend"
        | "guided_whitespace_pattern"
        | "allowed_token_ids"
        | "prompt_logprobs"
        | "prompt_embeds"
        | "chat_template"
        | "mm_processor_kwargs"
        | "kv_transfer_params"
        | "request_id"
        | "vllm_xargs" => Neutral::These(Vec::new()),
        _ => return None,
    })
}
