//! The files under `deploy/images`: what an image holds and how it starts.

use std::collections::BTreeMap;

use serde::Deserialize;

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    /// Its name, with tag.
    pub reference: String,
    /// `USER:GROUP` as numbers; empty means root.
    #[serde(default)]
    pub user: String,
    /// What a container runs unless it says otherwise.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Environment variables.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Whether it gets users, certificates of public authorities and a /tmp.
    #[serde(default)]
    pub system: bool,
    /// The files it carries. Executable ones bring their shared libraries along.
    pub files: Vec<FileDefinition>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDefinition {
    /// The name by which the builder is given the file.
    pub input: String,
    /// Absolute path in the image.
    pub to: String,
    /// Permissions, octal.
    #[serde(deserialize_with = "octal")]
    pub mode: u32,
}

/// A definition is wrong.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// It is not YAML of this shape.
    #[error("expected reference, user, entrypoint, env, system and files")]
    Shape(#[source] serde_yaml::Error),
    /// The name has no tag.
    #[error("reference {0:?}: expected NAME:TAG")]
    Reference(String),
    /// A path is not absolute.
    #[error("files[{index}].to {to:?}: expected an absolute path without `..`")]
    Path {
        /// Which file.
        index: usize,
        /// The path.
        to: String,
    },
}

impl Definition {
    /// Reads and checks a definition.
    pub fn parse(text: &str) -> Result<Self, DefinitionError> {
        let definition: Self = serde_yaml::from_str(text).map_err(DefinitionError::Shape)?;
        let tag = definition.reference.rsplit_once(':');
        if tag.is_none_or(|(name, tag)| name.is_empty() || tag.is_empty() || tag.contains('/')) {
            return Err(DefinitionError::Reference(definition.reference));
        }
        for (index, file) in definition.files.iter().enumerate() {
            if !file.to.starts_with('/') || file.to.split('/').any(|part| part == "..") {
                let to = file.to.clone();
                return Err(DefinitionError::Path { index, to });
            }
        }
        Ok(definition)
    }
}

fn octal<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let text = String::deserialize(deserializer)?;
    u32::from_str_radix(&text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| {
            serde::de::Error::custom(format!("mode {text:?}: expected octal, as '0755'"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_definitions_are_named() {
        let cases = [
            ("reference: a\nfiles: []\n", "NAME:TAG"),
            ("reference: host:5000/a\nfiles: []\n", "NAME:TAG"),
            (
                "reference: a:b\nfiles: [{input: x, to: ../x, mode: '0644'}]\n",
                "files[0].to",
            ),
        ];
        for (text, expected) in cases {
            let message = Definition::parse(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        for text in [
            "reference: a:b\nfiles: [{input: x, to: /x, mode: '9'}]\n",
            "reference: a:b\nfiles: []\ncommand: [x]\n",
        ] {
            assert!(matches!(
                Definition::parse(text),
                Err(DefinitionError::Shape(_))
            ));
        }
    }

    #[test]
    fn our_definitions_are_right() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/images");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_some_and(|extension| extension == "yaml")
            {
                let text = std::fs::read_to_string(&path).unwrap();
                Definition::parse(&text).unwrap();
                seen += 1;
            }
        }
        assert!(seen >= 5, "{seen} definitions");
    }
}
