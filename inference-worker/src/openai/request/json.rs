//! Bodies as JSON without more memory than they are worth: a tree of values takes
//! many times the bytes of its text. So trees are small, and the two fields that may
//! be long lists of numbers are read as what they are.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::Prompt;

/// Most values in all fields together, those of the two lists not counted.
const MAX_VALUES: usize = 1 << 16;
/// Most prompts of a request.
const MAX_PROMPTS: usize = 1024;

/// The field that holds texts or their tokens, and how many it may hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct InputLists {
    pub(super) prompts: &'static str,
    pub(super) most: usize,
}

impl Default for InputLists {
    fn default() -> Self {
        Self {
            prompts: "prompt",
            most: MAX_PROMPTS,
        }
    }
}

/// A body, field by field. What is null counts as absent.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) lists: InputLists,
    pub(super) fields: Map<String, Value>,
    /// The field of prompts.
    pub(super) prompts: Option<Vec<Prompt>>,
    /// The field `tokens`.
    pub(super) tokens: Option<Vec<u32>>,
    /// The field that is being read, for who wants to know where an error is.
    pub(super) current: Option<String>,
}

impl Read {
    pub(super) fn new(lists: InputLists) -> Self {
        Self {
            lists,
            ..Self::default()
        }
    }
}

impl<'de> DeserializeSeed<'de> for &mut Read {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Read {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut left = MAX_VALUES;
        while let Some(name) = map.next_key::<String>()? {
            match self.current.insert(name).as_str() {
                name if name == self.lists.prompts => {
                    self.prompts = map.next_value_seed(Prompts(self.lists.most))?;
                }
                "tokens" => self.tokens = map.next_value()?,
                name => {
                    let value = map.next_value_seed(Tree(&mut left))?;
                    if !value.is_null() {
                        self.fields.insert(name.to_owned(), value);
                    }
                }
            }
        }
        self.current = None;
        Ok(())
    }
}

/// A value of any kind, as long as values are left.
struct Tree<'a>(&'a mut usize);

impl Tree<'_> {
    fn count<E: Error>(&mut self) -> Result<(), E> {
        *self.0 = self.0.checked_sub(1).ok_or_else(|| {
            E::custom(format_args!("more than {MAX_VALUES} values in the request"))
        })?;
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(mut self, deserializer: D) -> Result<Value, D::Error> {
        self.count()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element_seed(Tree(self.0))? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let value = map.next_value_seed(Tree(self.0))?;
            fields.insert(name, value);
        }
        Ok(Value::Object(fields))
    }
}

/// The prompts of a completion, so many at most: a text, token ids, or a list of either.
struct Prompts(usize);

impl<'de> DeserializeSeed<'de> for Prompts {
    type Value = Option<Vec<Prompt>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Prompts {
    type Value = Option<Vec<Prompt>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of token ids, or a list of these")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Self::Value, E> {
        Ok(Some(vec![Prompt::Text(text)]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut prompts = Vec::new();
        let mut ids = Vec::new();
        while let Some(item) = list.next_element_seed(OnePrompt)? {
            match item {
                Item::Id(id) => ids.push(id),
                Item::Prompt(prompt) => prompts.push(prompt),
            }
            if !ids.is_empty() && !prompts.is_empty() {
                return Err(A::Error::custom("token ids stand among prompts"));
            }
            if prompts.len() > self.0 {
                let message = format_args!("at most {} are taken", self.0);
                return Err(A::Error::custom(message));
            }
        }
        if !ids.is_empty() {
            prompts.push(Prompt::Tokens(ids));
        }
        if prompts.is_empty() {
            return Err(A::Error::custom("the list is empty"));
        }
        Ok(Some(prompts))
    }
}

/// What a list of prompts, or of ids, may hold.
enum Item {
    Id(u32),
    Prompt(Prompt),
}

struct OnePrompt;

impl<'de> DeserializeSeed<'de> for OnePrompt {
    type Value = Item;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Item, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for OnePrompt {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id or a list of token ids")
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Item, E> {
        let id = u32::try_from(id);
        id.map(Item::Id)
            .map_err(|_large| E::custom("a token id is too large"))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Item, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Item, E> {
        Ok(Item::Prompt(Prompt::Text(text)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Item, A::Error> {
        let mut ids = Vec::new();
        while let Some(id) = list.next_element()? {
            ids.push(id);
        }
        Ok(Item::Prompt(Prompt::Tokens(ids)))
    }
}
