//! Text of a model, whatever its files are.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::origin::Origin;
use super::settings::Settings;
use super::{ChatTemplate, Tokenizer};
use crate::error::ModelError;
use crate::gguf::Gguf;

const JSON: &str = "tokenizer.json";
const TIKTOKEN: &str = "tokenizer.model";
/// Largest tokenizer file that is read, in bytes. Llama 4's has 27 MB.
const MAX_BYTES: u64 = 128 << 20;

/// The way from messages to tokens and back.
#[derive(Debug)]
pub struct ModelText {
    /// Text to tokens and tokens to bytes.
    pub tokenizer: Tokenizer,
    /// Messages to one prompt.
    pub template: ChatTemplate,
}

impl ModelText {
    /// Opens what belongs to the model at `path`: a GGUF, a folder, or any file in
    /// a folder. In a folder, `tokenizer.json` is taken before `tokenizer.model`,
    /// and that before a GGUF.
    ///
    /// # Errors
    /// `ModelNotFound` when there is no tokenizer, else as
    /// [`Tokenizer::from_gguf`].
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            return Self::from_gguf(&Gguf::open(path)?);
        }
        let folder = match path.parent() {
            Some(parent) if !path.is_dir() => parent,
            _ => path,
        };
        let named = path.file_name().filter(|_| !path.is_dir());
        let json = folder.join(JSON);
        let tiktoken = folder.join(TIKTOKEN);
        if named.is_none_or(|name| name != TIKTOKEN)
            && let Some(bytes) = read(&json, MAX_BYTES)?
        {
            return Self::from_json(folder, &Origin::new(&json), &bytes);
        }
        if let Some(bytes) = read(&tiktoken, MAX_BYTES)? {
            return Self::from_tiktoken(folder, &Origin::new(&tiktoken), &bytes);
        }
        match Gguf::open(folder) {
            Err(ModelError::NotFound(_)) => Err(ModelError::NotFound(format!(
                "{} holds neither {JSON} nor {TIKTOKEN} nor one .gguf file",
                folder.display()
            ))),
            gguf => Self::from_gguf(&gguf?),
        }
    }

    /// The text of a GGUF that is open already.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`] and [`ChatTemplate::from_gguf`].
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        Ok(Self {
            template: ChatTemplate::from_gguf(gguf, &tokenizer)?,
            tokenizer,
        })
    }

    fn from_json(folder: &Path, origin: &Origin, bytes: &[u8]) -> Result<Self, ModelError> {
        let settings = Settings::read(folder)?;
        Ok(Self {
            tokenizer: Tokenizer::from_json(origin, bytes, &settings)?,
            template: ChatTemplate::from_settings(origin, settings)?,
        })
    }

    fn from_tiktoken(folder: &Path, origin: &Origin, bytes: &[u8]) -> Result<Self, ModelError> {
        let settings = Settings::read(folder)?;
        let (tokenizer, format) = Tokenizer::from_tiktoken(origin, bytes, &settings)?;
        let template = if settings.templates.is_empty() {
            ChatTemplate::built_in(format)
        } else {
            ChatTemplate::from_settings(origin, settings)?
        };
        Ok(Self {
            tokenizer,
            template,
        })
    }
}

/// The bytes of the file at `path`, `None` when there is none.
///
/// # Errors
/// `ModelInvalid` when the file has more than `most` bytes.
pub(crate) fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, ModelError> {
    let io = |source| ModelError::Io {
        path: path.display().to_string(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let len = file.metadata().map_err(io)?.len();
    if len > most {
        return Err(
            Origin::new(path).invalid(format!("the file has {len} bytes; at most {most} are read"))
        );
    }
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).map_err(io)?;
    Ok(Some(bytes))
}
