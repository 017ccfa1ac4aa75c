//! How a model that no volume or image holds is brought into a pod.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Folder of a cache entry that holds the model's files.
pub const CACHE_MODEL_FOLDER: &str = "model";
/// File of a cache entry: whoever fills or removes it holds its lock alone, whoever reads
/// the model holds it together with others.
pub const CACHE_LOCK: &str = "lock";

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelFile {
    /// Its path below the source's address, and in the model's folder.
    pub name: String,
    /// SHA-256 of its bytes, 64 hexadecimal digits in lower case.
    pub sha256: String,
}

/// Where a model is fetched from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "camelCase",
    rename_all_fields = "camelCase",
    deny_unknown_fields
)]
pub enum FetchSource {
    /// Files of a web server.
    Http {
        /// Address that the names of files are appended to.
        url: String,
        /// The files.
        files: Vec<ModelFile>,
    },
    /// Objects of an S3-compatible store.
    S3 {
        /// `s3://bucket/prefix`, or `s3://bucket/key` of one object.
        uri: String,
        /// Address of the store; that of the region when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
        /// Region that requests are signed for.
        region: String,
        /// The files; whatever of a model the prefix holds when empty.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        files: Vec<ModelFile>,
    },
    /// A repository of a model hub.
    HuggingFace {
        /// `owner/name`.
        repo: String,
        /// Commit.
        revision: String,
        /// Address of the hub.
        endpoint: String,
        /// The one file that is wanted; whatever belongs to a checkpoint when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
    },
}

impl FetchSource {
    /// The files that are named with their digests; empty where the source lists them.
    pub fn files(&self) -> &[ModelFile] {
        match self {
            Self::Http { files, .. } | Self::S3 { files, .. } => files,
            Self::HuggingFace { .. } => &[],
        }
    }

    /// A name for the bytes of the model, 32 hexadecimal digits: the same for files of the
    /// same names and digests wherever they come from. `None` where the same source may
    /// give other bytes another time.
    pub fn identity(&self) -> Option<String> {
        let mut hash = Sha256::new();
        match self {
            Self::HuggingFace {
                repo,
                revision,
                path,
                ..
            } => {
                let path = path.as_deref().unwrap_or_default();
                hash.update(format!("hub\n{repo}\n{revision}\n{path}\n"));
            }
            _ if self.files().is_empty() => return None,
            _ => {
                let mut files: Vec<_> = self.files().iter().collect();
                files.sort();
                for file in files {
                    hash.update(format!("{}\n{}\n", file.sha256, file.name));
                }
            }
        }
        let digest = hash.finalize();
        Some(hex(&digest[..16]))
    }

    /// The path in the model's folder that a worker opens: the one GGUF file where a file
    /// is named, the folder itself (`None`) otherwise.
    pub fn entry(&self) -> Option<&str> {
        match self {
            Self::HuggingFace { path, .. } => path.as_deref(),
            Self::S3 { uri, files, .. } if files.is_empty() => {
                let name = uri.rsplit('/').next().unwrap_or(uri);
                is_gguf(name).then_some(name)
            }
            Self::Http { files, .. } | Self::S3 { files, .. } => {
                let mut named = files.iter().filter(|file| is_gguf(&file.name));
                let first = named.next()?;
                named.next().is_none().then_some(first.name.as_str())
            }
        }
    }
}

/// Two hexadecimal digits in lower case for each byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing into a text never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn is_gguf(name: &str) -> bool {
    std::path::Path::new(name)
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// `llama-model-fetch <flags>`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct FetchArgs {
    /// Where the model is, as JSON.
    #[arg(long, value_name = "JSON", value_parser = parse_source)]
    pub source: FetchSource,
    /// Folder that gets the files, or that of the cache.
    #[arg(long)]
    pub to: PathBuf,
    /// Fetch only what readers of headers look at; the rest of each file is a hole.
    #[arg(long, conflicts_with = "cache_bytes")]
    pub heads: bool,
    /// Keep the model in a folder of its own below --to, shared with others, and keep all
    /// of them together below so many bytes.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub cache_bytes: Option<u64>,
    /// Port on which the state is told while the model is fetched; none when absent.
    #[arg(long, value_name = "PORT")]
    pub state_port: Option<u16>,
}

fn parse_source(text: &str) -> Result<FetchSource, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

impl FetchArgs {
    /// The flags that parse back to this value, in one fixed order.
    pub fn to_args(&self) -> Vec<String> {
        // Plain fields always serialize.
        let source = serde_json::to_string(&self.source).unwrap_or_default();
        let mut args = vec![
            format!("--source={source}"),
            format!("--to={}", self.to.display()),
        ];
        if self.heads {
            args.push("--heads".to_owned());
        }
        if let Some(bytes) = self.cache_bytes {
            args.push(format!("--cache-bytes={bytes}"));
        }
        if let Some(port) = self.state_port {
            args.push(format!("--state-port={port}"));
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use proptest::prelude::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        fetch: FetchArgs,
    }

    fn files() -> impl Strategy<Value = Vec<ModelFile>> {
        let file = ("[a-z0-9.-]{1,20}", "[0-9a-f]{64}");
        let file = file.prop_map(|(name, sha256)| ModelFile { name, sha256 });
        proptest::collection::vec(file, 0..4)
    }

    fn sources() -> impl Strategy<Value = FetchSource> {
        prop_oneof![
            ("https://[a-z]{1,9}/[ \"'a-z=]{0,9}", files())
                .prop_map(|(url, files)| FetchSource::Http { url, files }),
            (
                "s3://[a-z]{3,9}/[a-z/]{0,9}",
                proptest::option::of("http://[a-z]{1,9}:9000"),
                files()
            )
                .prop_map(|(uri, endpoint, files)| FetchSource::S3 {
                    uri,
                    endpoint,
                    region: "us-east-1".to_owned(),
                    files
                }),
            (
                "[a-z]{1,9}/[a-z]{1,9}",
                "[0-9a-f]{40}",
                proptest::option::of("[a-z]{1,9}\\.gguf")
            )
                .prop_map(|(repo, revision, path)| {
                    FetchSource::HuggingFace {
                        repo,
                        revision,
                        endpoint: "https://hub".to_owned(),
                        path,
                    }
                }),
        ]
    }

    proptest! {
        #[test]
        fn what_the_operator_writes_the_program_reads(
            source in sources(),
            to in "/[a-z0-9./_-]{1,40}",
            heads in any::<bool>(),
            cache_bytes in proptest::option::of(1_u64..),
            state_port in proptest::option::of(any::<u16>()),
        ) {
            let fetch = FetchArgs {
                source,
                to: to.into(),
                heads,
                cache_bytes: cache_bytes.filter(|_| !heads),
                state_port,
            };
            let argv = std::iter::once("fetch".to_owned()).chain(fetch.to_args());
            prop_assert_eq!(Cli::try_parse_from(argv).expect("parses").fetch, fetch);
        }
    }

    fn http(url: &str, files: &[(&str, &str)]) -> FetchSource {
        FetchSource::Http {
            url: url.to_owned(),
            files: files
                .iter()
                .map(|(name, digit)| ModelFile {
                    name: (*name).to_owned(),
                    sha256: digit.repeat(64),
                })
                .collect(),
        }
    }

    #[test]
    fn the_same_bytes_have_the_same_identity_wherever_they_are() {
        let one = http("https://a", &[("x.json", "0"), ("m.gguf", "1")]);
        let other = http("https://b/c", &[("m.gguf", "1"), ("x.json", "0")]);
        assert_eq!(one.identity(), other.identity());
        let FetchSource::Http { files, .. } = one.clone() else {
            unreachable!()
        };
        let store = |files| FetchSource::S3 {
            uri: "s3://b/p".to_owned(),
            endpoint: None,
            region: "r".to_owned(),
            files,
        };
        assert_eq!(store(files).identity(), one.identity());
        assert_eq!(store(Vec::new()).identity(), None, "its bytes may change");
        let third = http("https://a", &[("x.json", "0"), ("m.gguf", "2")]);
        assert_ne!(one.identity(), third.identity());
        assert_eq!(one.identity().map(|text| text.len()), Some(32));
    }

    #[test]
    fn a_worker_opens_the_one_gguf_file_or_the_folder() {
        let entry = |files: &[(&str, &str)]| http("https://a", files).entry().map(str::to_owned);
        assert_eq!(entry(&[("q/m.GGUF", "0")]).as_deref(), Some("q/m.GGUF"));
        assert_eq!(entry(&[("a.gguf", "0"), ("b.gguf", "1")]), None);
        assert_eq!(entry(&[("config.json", "0")]), None);
        let store = |uri: &str| FetchSource::S3 {
            uri: uri.to_owned(),
            endpoint: None,
            region: "r".to_owned(),
            files: Vec::new(),
        };
        assert_eq!(store("s3://b/p/m.gguf").entry(), Some("m.gguf"));
        assert_eq!(store("s3://b/p/llama").entry(), None);
    }
}
