//! Where built programs and handles of clusters are kept between runs.

use std::path::{Path, PathBuf};

/// Names the folder directly.
pub const CACHE_VARIABLE: &str = "LLAMA_CACHE";
const XDG_VARIABLE: &str = "XDG_CACHE_HOME";
const FOLDER: &str = "llama-operator";

/// No variable says where the cache folder is.
#[derive(Debug, thiserror::Error)]
#[error("none of {CACHE_VARIABLE}, {XDG_VARIABLE} and HOME is set, so there is no cache folder")]
pub struct NoCache;

/// The cache folder; it need not exist yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache(PathBuf);

impl Cache {
    /// Takes the folder from the environment.
    pub fn from_environment() -> Result<Self, NoCache> {
        Self::locate(|name| std::env::var(name).ok())
    }

    /// The folder that the variables, as `variable` gives them, say.
    pub fn locate(variable: impl Fn(&str) -> Option<String>) -> Result<Self, NoCache> {
        let set = |name| {
            variable(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let folder = set(CACHE_VARIABLE)
            .or_else(|| Some(set(XDG_VARIABLE)?.join(FOLDER)))
            .or_else(|| Some(set("HOME")?.join(".cache").join(FOLDER)));
        folder.map(Self).ok_or(NoCache)
    }

    /// The cache folder itself.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Programs built from Go modules, a folder a module and key.
    pub fn components(&self) -> PathBuf {
        self.0.join("components")
    }

    /// Links to the components' programs as they were built last.
    pub fn programs(&self) -> PathBuf {
        self.components().join("bin")
    }

    /// Programs installed for development.
    pub fn tools(&self) -> PathBuf {
        self.0.join("tools/bin")
    }

    /// What is known about the cluster called `name`.
    pub fn cluster(&self, name: &str) -> PathBuf {
        self.0.join("clusters").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locate(set: &[(&str, &str)]) -> Result<Cache, NoCache> {
        Cache::locate(|name| {
            set.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn own_variable_wins_over_xdg_over_home() {
        let home = ("HOME", "/home/a");
        let xdg = (XDG_VARIABLE, "/xdg");
        let own = (CACHE_VARIABLE, "/own");
        let folder = |set: &[_]| locate(set).unwrap().folder().to_owned();
        assert_eq!(folder(&[home]), Path::new("/home/a/.cache/llama-operator"));
        assert_eq!(folder(&[home, xdg]), Path::new("/xdg/llama-operator"));
        assert_eq!(folder(&[home, xdg, own]), Path::new("/own"));
    }

    #[test]
    fn empty_variables_count_as_unset() {
        assert!(locate(&[(CACHE_VARIABLE, ""), ("HOME", "")]).is_err());
    }
}
