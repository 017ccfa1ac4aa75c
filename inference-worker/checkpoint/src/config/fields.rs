//! Reading a JSON object strictly: every field is known, or an error.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::MAX_SIZE;
use crate::error::ModelError;
use crate::foreign::shown;

/// How many names a message lists.
const LISTED_FIELDS: usize = 6;

/// One object of `config.json`, and which of its fields were read.
pub(super) struct Fields<'a> {
    file: &'a str,
    /// Where the object lies, for messages: empty, or a name with a dot behind.
    prefix: String,
    object: &'a Map<String, Value>,
    used: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a str, object: &'a Map<String, Value>) -> Self {
        Self {
            file,
            prefix: String::new(),
            object,
            used: RefCell::default(),
        }
    }

    /// Likewise of an object inside, which `prefix` names.
    fn inside(&self, prefix: String, object: &'a Map<String, Value>) -> Self {
        Self {
            prefix,
            ..Self::new(self.file, object)
        }
    }

    /// The fields of the object in field `name`, `None` when it is absent or null.
    pub(super) fn object(&self, name: &'static str) -> Result<Option<Self>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(self.inside(self.named(name) + ".", object))),
            Some(other) => Err(self.mistyped(name, "an object", other)),
        }
    }

    /// The fields of each object inside; nothing else may be inside.
    pub(super) fn objects(&self) -> Result<Vec<Self>, ModelError> {
        let inside = self.object.iter().map(|(name, value)| match value {
            Value::Object(object) => {
                let prefix = self.named(&shown(name)) + ".";
                Ok(self.inside(prefix, object))
            }
            other => Err(self.mistyped(&shown(name), "an object", other)),
        });
        inside.collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.object.is_empty()
    }

    /// Whether `name` is there and null.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.object.get(name).is_some_and(Value::is_null)
    }

    /// The value of `name`; null counts as absent.
    pub(super) fn get(&self, name: &'static str) -> Option<&'a Value> {
        self.used.borrow_mut().insert(name);
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// The full name of a field, for messages.
    pub(super) fn named(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(super) fn invalid(&self, what: &str) -> ModelError {
        ModelError::Invalid(format!("{}: {what}", self.file))
    }

    pub(super) fn unsupported(&self, what: &str) -> ModelError {
        ModelError::Unsupported(format!("{}: {what}", self.file))
    }

    fn mistyped(&self, name: &str, expected: &str, found: &Value) -> ModelError {
        self.invalid(&format!(
            "{} is {}, expected {expected}",
            self.named(name),
            shown(&found.to_string())
        ))
    }

    pub(super) fn text(&self, name: &'static str) -> Result<Option<&'a str>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.mistyped(name, "a string", other)),
        }
    }

    pub(super) fn optional_size(&self, name: &'static str) -> Result<Option<usize>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_u64()
                .filter(|size| (1..=MAX_SIZE).contains(size))
                .and_then(|size| usize::try_from(size).ok())
                .map(Some)
                .ok_or_else(|| self.mistyped(name, &format!("1 to {MAX_SIZE}"), value)),
        }
    }

    pub(super) fn size(&self, name: &'static str) -> Result<usize, ModelError> {
        self.optional_size(name)?
            .ok_or_else(|| self.invalid(&format!("{} is missing", self.named(name))))
    }

    pub(super) fn optional_positive(&self, name: &'static str) -> Result<Option<f64>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_f64()
                .filter(|number| *number > 0.0 && number.is_finite())
                .map(Some)
                .ok_or_else(|| self.mistyped(name, "a positive number", value)),
        }
    }

    pub(super) fn positive(&self, name: &'static str) -> Result<f64, ModelError> {
        self.optional_positive(name)?
            .ok_or_else(|| self.invalid(&format!("{} is missing", self.named(name))))
    }

    /// A truth value; numbers count as Python counts them.
    pub(super) fn bool(&self, name: &'static str) -> Result<Option<bool>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(Value::Number(number)) => Ok(Some(number.as_f64() != Some(0.0))),
            Some(other) => Err(self.mistyped(name, "true or false", other)),
        }
    }

    /// A list of whole numbers below `limit`.
    pub(super) fn indices(
        &self,
        name: &'static str,
        limit: usize,
    ) -> Result<Option<Vec<usize>>, ModelError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let expected = || format!("a list of whole numbers below {limit}");
        let list = value
            .as_array()
            .ok_or_else(|| self.mistyped(name, &expected(), value))?;
        let list: Vec<usize> = list
            .iter()
            .map(|item| {
                item.as_u64()
                    .and_then(|item| usize::try_from(item).ok())
                    .filter(|item| *item < limit)
                    .ok_or_else(|| self.mistyped(name, &expected(), item))
            })
            .collect::<Result<_, _>>()?;
        Ok(Some(list))
    }

    /// A list of strings.
    pub(super) fn texts(&self, name: &'static str) -> Result<Option<Vec<&'a str>>, ModelError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .map(Some)
            .ok_or_else(|| self.mistyped(name, "a list of strings", value))
    }

    /// Refuses any value of `name` but those of which `allowed` holds.
    pub(super) fn expect(
        &self,
        name: &'static str,
        expected: &str,
        allowed: impl FnOnce(&Value) -> bool,
    ) -> Result<(), ModelError> {
        match self.get(name) {
            Some(value) if !allowed(value) => Err(self.unsupported(&format!(
                "{} is {}; this worker computes {expected}",
                self.named(name),
                shown(&value.to_string())
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses fields that nobody read, unless they are among the `harmless` or
    /// say nothing: a field that is not known may change the computation.
    pub(super) fn refuse_unknown(&self, harmless: &[&str]) -> Result<(), ModelError> {
        let used = self.used.borrow();
        let unknown: Vec<String> = self
            .object
            .iter()
            .filter(|(name, value)| {
                !used.contains(name.as_str())
                    && !harmless.contains(&name.as_str())
                    && !name.starts_with('_')
                    && !matches!(value, Value::Null | Value::Bool(false))
            })
            .map(|(name, _)| self.named(&shown(name)))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let mut listed = unknown[..unknown.len().min(LISTED_FIELDS)].join(", ");
        if unknown.len() > LISTED_FIELDS {
            listed.push_str(", …");
        }
        Err(self.unsupported(&format!(
            "this worker does not know {listed}, which may change what the model computes; \
             remove what does not"
        )))
    }
}
