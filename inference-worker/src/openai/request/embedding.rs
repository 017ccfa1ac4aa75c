//! What clients send to `/v1/embeddings`, checked.

use serde::Deserialize;

use super::Prompt;
use super::fields::Fields;
use super::json::InputLists;
use crate::openai::ApiError;

/// Most texts of a request, as in OpenAI's API.
const MAX_INPUTS: usize = 2048;

/// How vectors are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VectorEncoding {
    /// As lists of numbers.
    #[default]
    Float,
    /// The bytes of 32-bit floats, the lowest first, in base64.
    Base64,
}

/// The body of `/v1/embeddings`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddingInput {
    /// The model asked for.
    pub model: String,
    /// Texts, or their tokens.
    pub inputs: Vec<Prompt>,
    /// How vectors are written.
    pub encoding: VectorEncoding,
    /// Whether texts get the tokens that the model wants around them.
    pub adds_special: bool,
    /// Of a longer input, only this many first tokens count.
    pub first_tokens: Option<usize>,
}

impl EmbeddingInput {
    /// Reads a body, for a model that makes vectors of `dimensions` of texts of at most
    /// `max_tokens`.
    ///
    /// # Errors
    /// 400, naming the field that is wrong, unknown or not supported.
    pub fn read(body: &[u8], dimensions: usize, max_tokens: usize) -> Result<Self, ApiError> {
        let lists = InputLists {
            prompts: "input",
            most: MAX_INPUTS,
        };
        let mut fields = Fields::parse_with(body, lists)?;
        let inputs = fields.prompts()?;
        if inputs
            .iter()
            .any(|input| *input == Prompt::Tokens(Vec::new()))
        {
            return Err(ApiError::invalid_field(
                "input",
                "a list of tokens is empty",
            ));
        }
        if let Some(asked) = fields.take::<usize>("dimensions")?
            && asked != dimensions
        {
            let message = format!(
                "is {asked}; this model's vectors have {dimensions} and cannot be shortened"
            );
            return Err(ApiError::invalid_field("dimensions", &message));
        }
        let read = Self {
            model: fields.required("model")?,
            inputs,
            encoding: fields.take("encoding_format")?.unwrap_or_default(),
            adds_special: fields.take("add_special_tokens")?.unwrap_or(true),
            first_tokens: first_tokens(&mut fields, max_tokens)?,
        };
        fields.refuse_rest()?;
        Ok(read)
    }
}

/// What `truncate_prompt_tokens` keeps; -1 stands for what the model takes.
fn first_tokens(fields: &mut Fields, most: usize) -> Result<Option<usize>, ApiError> {
    let name = "truncate_prompt_tokens";
    let Some(asked) = fields.take::<i64>(name)? else {
        return Ok(None);
    };
    // The control tokens around a text, and one of it.
    match usize::try_from(asked) {
        Ok(kept) if (3..=most).contains(&kept) => Ok(Some(kept)),
        Err(_) if asked == -1 => Ok(Some(most)),
        _ => {
            let message = format!("must be -1 or between 3 and {most}, is {asked}");
            Err(ApiError::invalid_field(name, &message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(body: &Value) -> Result<EmbeddingInput, ApiError> {
        EmbeddingInput::read(body.to_string().as_bytes(), 384, 256)
    }

    #[test]
    fn every_form_of_input_is_read() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        for (input, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", ""]), vec![text("a"), text("")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (
                json!([[1], [2, 3]]),
                vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])],
            ),
        ] {
            let body = json!({"model": "m", "input": input, "user": "u", "dimensions": 384});
            let read = read(&body).expect("valid");
            assert_eq!(read.inputs, expected);
            assert_eq!(
                (read.encoding, read.adds_special),
                (VectorEncoding::Float, true)
            );
        }
        let body = json!({
            "model": "m", "input": "a", "encoding_format": "base64",
            "truncate_prompt_tokens": -1, "add_special_tokens": false,
        });
        let read = read(&body).expect("valid");
        assert_eq!(read.encoding, VectorEncoding::Base64);
        assert_eq!((read.first_tokens, read.adds_special), (Some(256), false));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (field, value) in [
            ("input", json!([])),
            ("input", json!([[]])),
            ("input", json!(["a", 1])),
            ("input", json!({"text": "a"})),
            ("input", json!(null)),
            ("input", json!(vec!["a"; 2049])),
            ("model", json!(null)),
            ("encoding_format", json!("int8")),
            ("dimensions", json!(128)),
            ("truncate_prompt_tokens", json!(2)),
            ("truncate_prompt_tokens", json!(257)),
            ("truncate_prompt_tokens", json!(-2)),
            ("prompt", json!("a")),
            ("messages", json!([])),
            ("normalize", json!(false)),
        ] {
            let mut body = json!({"model": "m", "input": "a"});
            body[field] = value;
            let error = read(&body).expect_err("is refused");
            assert_eq!(
                (error.status, error.param.as_deref()),
                (400, Some(field)),
                "{body}"
            );
        }
    }
}
