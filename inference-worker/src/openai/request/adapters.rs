//! What clients send to load and to forget adapters, checked.

use super::fields::Fields;
use crate::openai::ApiError;

/// Longest name of an adapter, in bytes.
const MAX_NAME: usize = 256;

/// The body of `/v1/load_lora_adapter`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadAdapterRequest {
    /// What clients will send as `model`.
    pub name: String,
    /// Its folder.
    pub path: String,
}

impl LoadAdapterRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// 400, naming the field that is wrong or unknown.
    pub fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let request = Self {
            name: name(&mut fields)?,
            path: fields.required("lora_path")?,
        };
        fields.refuse_rest()?;
        Ok(request)
    }
}

/// The body of `/v1/unload_lora_adapter`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnloadAdapterRequest {
    /// The adapter.
    pub name: String,
}

impl UnloadAdapterRequest {
    /// Reads a body.
    ///
    /// # Errors
    /// As [`LoadAdapterRequest::read`].
    pub fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let request = Self {
            name: name(&mut fields)?,
        };
        fields.refuse_rest()?;
        Ok(request)
    }
}

fn name(fields: &mut Fields) -> Result<String, ApiError> {
    let name: String = fields.required("lora_name")?;
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let message = format!("must be 1 to {MAX_NAME} bytes without control characters");
        return Err(ApiError::invalid_field("lora_name", &message));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_bodies_are_named() {
        let read = |body: &str| LoadAdapterRequest::read(body.as_bytes());
        let request = LoadAdapterRequest {
            name: "a".to_owned(),
            path: "b".to_owned(),
        };
        assert_eq!(read(r#"{"lora_name":"a","lora_path":"b"}"#), Ok(request));
        for (body, param) in [
            (r#"{"lora_path":"b"}"#, "lora_name"),
            (r#"{"lora_name":"","lora_path":"b"}"#, "lora_name"),
            (r#"{"lora_name":"a\n","lora_path":"b"}"#, "lora_name"),
            (r#"{"lora_name":"a"}"#, "lora_path"),
            (
                r#"{"lora_name":"a","lora_path":"b","load_inplace":true}"#,
                "load_inplace",
            ),
        ] {
            let error = read(body).expect_err(body);
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
        let unload = UnloadAdapterRequest::read(br#"{"lora_name":"a"}"#);
        assert_eq!(unload.map(|request| request.name), Ok("a".to_owned()));
    }
}
