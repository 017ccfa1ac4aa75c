//! `adapter_config.json`, as PEFT writes it.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::foreign::{parser_said, read_text, shown};

/// The file's name.
pub(super) const SETTINGS: &str = "adapter_config.json";
/// More than any such file needs.
const SETTINGS_LIMIT: u64 = 1 << 20;
/// Settings that change what an adapter computes, in ways that are not computed here.
/// They may be there as long as they ask for nothing.
const NOT_COMPUTED: [&str; 13] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
];

/// What the settings say of the arithmetic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Settings {
    /// Rows of every A.
    pub(super) rank: usize,
    /// What the product of B and A is multiplied by.
    pub(super) scale: f32,
}

impl Settings {
    /// Reads the settings of the adapter in `folder`.
    pub(super) fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join(SETTINGS);
        let text = read_text(&path, SETTINGS_LIMIT)?;
        Self::parse(&path.display().to_string(), &text)
    }

    fn parse(path: &str, text: &str) -> Result<Self, ModelError> {
        let invalid = |what: String| ModelError::Invalid(format!("{path}: {what}"));
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| invalid(parser_said(&error)))?;
        let expected = |name: &str, expected: &str| {
            let found = fields.get(name).unwrap_or(&Value::Null).to_string();
            invalid(format!("{name} is {}, expected {expected}", shown(&found)))
        };
        let unsupported = |name: &str, what: &str| {
            let found = fields.get(name).unwrap_or(&Value::Null).to_string();
            ModelError::Unsupported(format!("{path}: {name} is {}, {what}", shown(&found)))
        };
        if fields.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(unsupported("peft_type", "only \"LORA\" is computed"));
        }
        let asks = |name: &str| fields.get(name).is_some_and(asks_for_something);
        if let Some(name) = NOT_COMPUTED.into_iter().find(|name| asks(name)) {
            return Err(unsupported(name, "which is not computed"));
        }
        match fields.get("bias") {
            None | Some(Value::Null) => {}
            Some(bias) if bias == "none" => {}
            Some(_) => return Err(unsupported("bias", "only \"none\" is computed")),
        }
        let rank = fields.get("r").and_then(Value::as_u64);
        let rank = rank.filter(|rank| (1..=1 << 16).contains(rank));
        let rank = rank
            .and_then(|rank| usize::try_from(rank).ok())
            .ok_or_else(|| expected("r", "1 to 65536"))?;
        let alpha = fields.get("lora_alpha").and_then(Value::as_f64);
        let alpha = alpha.ok_or_else(|| expected("lora_alpha", "a number"))?;
        let divisor = match fields.get("use_rslora") {
            None | Some(Value::Null | Value::Bool(false)) => rank as f64,
            Some(Value::Bool(true)) => (rank as f64).sqrt(),
            Some(_) => return Err(expected("use_rslora", "true or false")),
        };
        #[expect(clippy::cast_possible_truncation, reason = "the nearest f32")]
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            return Err(expected("lora_alpha", "a number that a float holds"));
        }
        Ok(Self { rank, scale })
    }
}

fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        Settings::parse("a.json", text).map_err(|error| error.to_string())
    }

    #[test]
    fn scales_follow_alpha_and_rank() {
        let plain = r#"{"peft_type":"LORA","r":16,"lora_alpha":32,"bias":"none","use_dora":false,
            "rank_pattern":{},"modules_to_save":null,"target_modules":["q_proj"],"lora_dropout":0.1}"#;
        let expected = Settings {
            rank: 16,
            scale: 2.0,
        };
        assert_eq!(parse(plain), Ok(expected));
        let stable = r#"{"peft_type":"LORA","r":16,"lora_alpha":8,"use_rslora":true}"#;
        assert_eq!(parse(stable).map(|settings| settings.scale), Ok(2.0));
    }

    #[test]
    fn what_is_not_computed_is_named() {
        for (text, message) in [
            (
                r#"{"peft_type":"IA3"}"#,
                "a.json: peft_type is \"IA3\", only \"LORA\" is computed",
            ),
            (
                r#"{"peft_type":"LORA","r":8,"lora_alpha":8,"use_dora":true}"#,
                "a.json: use_dora is true, which is not computed",
            ),
            (
                r#"{"peft_type":"LORA","r":8,"lora_alpha":8,"bias":"all"}"#,
                "a.json: bias is \"all\", only \"none\" is computed",
            ),
            (
                r#"{"peft_type":"LORA","r":0,"lora_alpha":8}"#,
                "a.json: r is 0, expected 1 to 65536",
            ),
            (
                r#"{"peft_type":"LORA","r":8}"#,
                "a.json: lora_alpha is null, expected a number",
            ),
        ] {
            assert_eq!(parse(text), Err(message.to_owned()), "{text}");
        }
        assert!(parse("{").is_err());
    }
}
