//! What the other JSON files of a model folder say about text.

use std::path::Path;

use serde_json::Value;

use super::folder::read;
use super::origin::{Origin, excerpt};
use crate::error::ModelError;

/// Largest of these files that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// Named tokens that templates may use.
const TOKEN_NAMES: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// Settings of a model folder. What no file names is absent.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// The token that begins a text.
    pub(super) bos: Option<String>,
    /// The token that templates know as the end.
    pub(super) eos: Option<String>,
    /// Every named token, for templates: `bos_token` and so on.
    pub(super) named: Vec<(&'static str, String)>,
    /// Whether texts begin with `bos`, where `tokenizer_config.json` decides it.
    pub(super) add_bos: Option<bool>,
    /// Tokens that end an answer.
    pub(super) ends: Vec<u32>,
    /// `model_type` of `config.json`.
    pub(super) model_type: Option<String>,
    /// Chat templates by name.
    pub(super) templates: Vec<(String, String)>,
}

impl Settings {
    /// Reads the settings of `folder`; every file may be missing.
    ///
    /// # Errors
    /// `ModelInvalid` when a file is damaged.
    pub(super) fn read(folder: &Path) -> Result<Self, ModelError> {
        let mut settings = Self::default();
        if let Some((origin, generation)) = object(folder, "generation_config.json")? {
            settings.add_ends(&origin, &generation["eos_token_id"])?;
        }
        if let Some((origin, config)) = object(folder, "config.json")? {
            settings.add_ends(&origin, &config["eos_token_id"])?;
            settings.add_ends(&origin, &config["text_config"]["eos_token_id"])?;
            settings.model_type = config["model_type"].as_str().map(str::to_owned);
        }
        if let Some((origin, config)) = object(folder, "tokenizer_config.json")? {
            settings.take_tokenizer_config(&origin, &config)?;
        }
        let path = folder.join("chat_template.jinja");
        if let Some(template) = read(&path, MAX_BYTES)? {
            let template = String::from_utf8(template)
                .map_err(|error| Origin::new(&path).invalid(format!("not UTF-8: {error}")))?;
            settings.templates.retain(|(name, _)| name != "default");
            settings.templates.push(("default".to_owned(), template));
        }
        Ok(settings)
    }

    fn take_tokenizer_config(&mut self, origin: &Origin, config: &Value) -> Result<(), ModelError> {
        for name in TOKEN_NAMES {
            let token = match &config[name] {
                Value::Null => continue,
                Value::String(text) => text,
                Value::Object(fields) => match fields.get("content") {
                    Some(Value::String(text)) => text,
                    _ => return Err(origin.invalid(format!("{name} has no content"))),
                },
                _ => return Err(origin.invalid(format!("{name} is neither text nor an object"))),
            };
            self.named.push((name, token.clone()));
        }
        let named = |wanted| self.named.iter().find(|(name, _)| *name == wanted);
        self.bos = named("bos_token").map(|(_, text)| text.clone());
        self.eos = named("eos_token").map(|(_, text)| text.clone());
        self.add_bos = match &config["add_bos_token"] {
            Value::Null => None,
            Value::Bool(add) => Some(*add),
            _ => return Err(origin.invalid("add_bos_token is not a bool")),
        };
        self.templates = templates(origin, &config["chat_template"])?;
        Ok(())
    }

    /// One id or several.
    fn add_ends(&mut self, origin: &Origin, ids: &Value) -> Result<(), ModelError> {
        let ids = match ids {
            Value::Null => return Ok(()),
            Value::Array(ids) => ids.as_slice(),
            id => std::slice::from_ref(id),
        };
        for id in ids {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            self.ends.push(id.ok_or_else(|| {
                origin.invalid("eos_token_id is neither a token id nor a list of them")
            })?);
        }
        Ok(())
    }
}

/// One template, or several with names.
fn templates(origin: &Origin, value: &Value) -> Result<Vec<(String, String)>, ModelError> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(template) => Ok(vec![("default".to_owned(), template.clone())]),
        Value::Array(named) => named
            .iter()
            .map(|entry| {
                let text = |name: &str| entry[name].as_str().map(str::to_owned);
                text("name").zip(text("template")).ok_or_else(|| {
                    origin.invalid("an entry of chat_template lacks its name or template")
                })
            })
            .collect(),
        _ => Err(origin.invalid("chat_template is neither text nor a list")),
    }
}

/// The JSON object in `folder/name`, `None` where there is no such file.
fn object(folder: &Path, name: &str) -> Result<Option<(Origin, Value)>, ModelError> {
    let path = folder.join(name);
    let Some(json) = read(&path, MAX_BYTES)? else {
        return Ok(None);
    };
    let origin = Origin::new(&path);
    match serde_json::from_slice(&json) {
        Ok(value @ Value::Object(_)) => Ok(Some((origin, value))),
        Ok(other) => {
            Err(origin.invalid(format!("{} is not an object", excerpt(&other.to_string()))))
        }
        Err(error) => Err(origin.invalid(format!("not JSON: {error}"))),
    }
}
