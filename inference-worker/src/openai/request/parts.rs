//! Groups of fields that both endpoints share.

use std::collections::BTreeMap;

use llama_model::sample::SamplingParams;
use serde::Deserialize;
use serde_json::Value;

use super::fields::Fields;
use super::{Ending, Shown};
use crate::openai::ApiError;

/// Most stop strings of a request.
const MAX_STOPS: usize = 64;
/// Longest stop string, in bytes.
const MAX_STOP_BYTES: usize = 1024;
/// Most tokens that end an answer by the client's wish.
const MAX_STOP_IDS: usize = 128;
/// Most tokens with a bias.
const MAX_BIASED: usize = 1024;
/// Most alternatives that are told of one token.
pub(super) const MAX_TOP_LOGPROBS: u32 = 20;

/// How tokens are drawn; seed and logarithms of probabilities are not among it.
pub(super) fn sampling(fields: &mut Fields) -> Result<SamplingParams, ApiError> {
    let top_k = match fields.take::<i64>("top_k")? {
        None | Some(-1) => 0,
        Some(top_k) => u32::try_from(top_k).map_err(|_error| {
            let message = format!("must be -1 (all tokens) or at least 0, is {top_k}");
            ApiError::invalid_field("top_k", &message)
        })?,
    };
    let penalty = |fields: &mut Fields, name| fields.number(name, -2.0, 2.0);
    Ok(SamplingParams {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0),
        top_k,
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0),
        presence_penalty: penalty(fields, "presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: penalty(fields, "frequency_penalty")?.unwrap_or(0.0),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01, 100.0)?
            .unwrap_or(1.0),
        logit_bias: logit_bias(fields)?,
        min_tokens: fields.take("min_tokens")?.unwrap_or(0),
        ..SamplingParams::GREEDY
    })
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let refuse = |message: String| Err(ApiError::invalid_field("logit_bias", &message));
    let biases: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    if biases.len() > MAX_BIASED {
        return refuse(format!(
            "at most {MAX_BIASED} tokens, {} came",
            biases.len()
        ));
    }
    let mut read = Vec::with_capacity(biases.len());
    for (token, bias) in biases {
        let Ok(token) = token.parse() else {
            return refuse(format!("\"{token}\" is not a token id"));
        };
        if !(-100.0..=100.0).contains(&bias) {
            return refuse(format!("must be between -100 and 100, is {bias}"));
        }
        read.push((token, bias));
    }
    Ok(read)
}

/// What ends an answer besides its length.
pub(super) fn ending(fields: &mut Fields) -> Result<Ending, ApiError> {
    Ok(Ending {
        strings: stops(fields.take("stop")?)?,
        includes_string: fields.flag("include_stop_str_in_output")?,
        ids: fields.list("stop_token_ids", MAX_STOP_IDS)?,
        ignores_end: fields.flag("ignore_eos")?,
    })
}

fn stops(stop: Option<Value>) -> Result<Vec<String>, ApiError> {
    let refuse = |message: &str| Err(ApiError::invalid_field("stop", message));
    let stops = match stop {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(list)) if list.len() > MAX_STOPS => {
            return refuse(&format!("at most {MAX_STOPS} strings, {} came", list.len()));
        }
        Some(list) => match serde_json::from_value::<Vec<String>>(list) {
            Ok(stops) => stops,
            Err(_other) => return refuse("must be a string or a list of strings"),
        },
    };
    if stops
        .iter()
        .any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES)
    {
        return refuse(&format!(
            "each string must have 1 to {MAX_STOP_BYTES} bytes"
        ));
    }
    Ok(stops)
}

/// How the answer is shown.
pub(super) fn shown(fields: &mut Fields) -> Result<Shown, ApiError> {
    let stream = fields.flag("stream")?;
    let options = stream_options(fields, stream)?;
    Ok(Shown {
        stream,
        include_usage: options.include_usage,
        echo: false,
        control_tokens: !fields.take("skip_special_tokens")?.unwrap_or(true),
        token_ids: fields.flag("return_token_ids")?,
        ids_for_text: fields.flag("return_tokens_as_token_ids")?,
    })
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StreamOptions {
    include_usage: bool,
    continuous_usage_stats: bool,
    include_obfuscation: bool,
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<StreamOptions, ApiError> {
    let Some(options) = fields.take::<StreamOptions>("stream_options")? else {
        return Ok(StreamOptions::default());
    };
    if !stream {
        return Err(ApiError::invalid_field(
            "stream_options",
            "needs stream to be true",
        ));
    }
    for (name, asked) in [
        ("continuous_usage_stats", options.continuous_usage_stats),
        ("include_obfuscation", options.include_obfuscation),
    ] {
        if asked {
            let message = format!("{name} is not supported");
            return Err(ApiError::invalid_field("stream_options", &message));
        }
    }
    Ok(options)
}
