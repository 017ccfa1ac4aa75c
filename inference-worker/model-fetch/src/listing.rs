//! Which files a source has.

use std::time::Duration;

use llama_contract::{FetchSource, ModelFile, S3_KEY_ID_ENV, S3_SECRET_KEY_ENV};
use rusty_s3::actions::{ListObjectsV2, S3Action};
use rusty_s3::{Bucket, Credentials, UrlStyle};
use serde::Deserialize;
use url::Url;

use crate::client::{Web, shown};
use crate::error::FetchError;

/// How long a signed address is good for: for one request, which may take long to read.
const SIGNED_FOR: Duration = Duration::from_hours(12);
/// Most pages of a listing.
const PAGES: usize = 100;
/// Names that a message tells at most.
const TOLD: usize = 8;

/// What a file's bytes must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Digest {
    /// SHA-256 of the bytes.
    Sha256(String),
    /// Name of the Git object with these bytes.
    GitBlob(String),
    /// Not known.
    Unknown,
}

/// Where a file is.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// At an address.
    Url(Url),
    /// In a bucket; its address is signed for each request.
    Object(String),
}

/// One file to fetch.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// Its path in the model's folder.
    pub(crate) name: String,
    pub(crate) place: Place,
    /// Bytes, where the listing tells.
    pub(crate) bytes: Option<u64>,
    pub(crate) digest: Digest,
    /// The entity tag that it had in the listing.
    pub(crate) version: Option<String>,
}

/// A bucket and who asks for its objects.
#[derive(Debug)]
pub(crate) struct Store {
    bucket: Bucket,
    credentials: Option<Credentials>,
}

impl Store {
    /// The store that `source` names, if it is one.
    pub(crate) fn open(
        source: &FetchSource,
        credentials: Option<Credentials>,
    ) -> Result<Option<Self>, FetchError> {
        let FetchSource::S3 {
            uri,
            endpoint,
            region,
            ..
        } = source
        else {
            return Ok(None);
        };
        let (name, _) = bucket_and_key(uri)?;
        let (address, style) = match endpoint {
            Some(endpoint) => (endpoint.clone(), UrlStyle::Path),
            // A name with a point does not match the certificate of a host of its own.
            None if name.contains('.') => (amazon(region), UrlStyle::Path),
            None => (amazon(region), UrlStyle::VirtualHost),
        };
        let url = address_of("endpoint", &address)?;
        let bucket = Bucket::new(url, style, name.to_owned(), region.clone());
        let bucket = bucket.map_err(|error| FetchError::BadAddress {
            field: "uri",
            value: uri.clone(),
            problem: format!("names no bucket: {error}"),
        })?;
        Ok(Some(Self {
            bucket,
            credentials,
        }))
    }

    /// The address of an object, signed for the next hours.
    fn url(&self, key: &str) -> Url {
        let action = self.bucket.get_object(self.credentials.as_ref(), key);
        action.sign(SIGNED_FOR)
    }
}

/// Credentials of an S3 store from the environment: both or none.
pub(crate) fn s3_credentials(
    read: impl Fn(&str) -> Option<String>,
) -> Result<Option<Credentials>, FetchError> {
    let token = read(llama_contract::S3_SESSION_TOKEN_ENV);
    match (read(S3_KEY_ID_ENV), read(S3_SECRET_KEY_ENV), token) {
        (None, None, _) => Ok(None),
        (Some(id), Some(key), None) => Ok(Some(Credentials::new(id, key))),
        (Some(id), Some(key), Some(token)) => Ok(Some(Credentials::new_with_token(id, key, token))),
        _ => Err(FetchError::HalfCredentials),
    }
}

/// The address to ask for `item` now.
pub(crate) fn url(item: &Item, store: Option<&Store>) -> Result<Url, FetchError> {
    match (&item.place, store) {
        (Place::Url(url), _) => Ok(url.clone()),
        (Place::Object(key), Some(store)) => Ok(store.url(key)),
        (Place::Object(_), None) => Err(FetchError::Ended),
    }
}

/// The files of `source`, sorted by name.
pub(crate) async fn items(
    source: &FetchSource,
    store: Option<&Store>,
    web: &Web,
) -> Result<Vec<Item>, FetchError> {
    let mut items = match (source, store) {
        (FetchSource::Http { url, files }, _) => {
            let base = format!("{}/", url.trim_end_matches('/'));
            let base = address_of("url", &base)?;
            files
                .iter()
                .map(|file| {
                    let mut url = base.clone();
                    append(&mut url, &file.name);
                    named(file, Place::Url(url))
                })
                .collect()
        }
        (FetchSource::S3 { uri, files, .. }, Some(store)) => {
            let (_, key) = bucket_and_key(uri)?;
            if files.is_empty() {
                objects(store, key, uri, web).await?
            } else {
                let prefix = key.trim_end_matches('/');
                let key = |name: &str| match prefix {
                    "" => name.to_owned(),
                    _ => format!("{prefix}/{name}"),
                };
                files
                    .iter()
                    .map(|file| named(file, Place::Object(key(&file.name))))
                    .collect()
            }
        }
        (FetchSource::S3 { .. }, None) => return Err(FetchError::Ended),
        (
            FetchSource::HuggingFace {
                repo,
                revision,
                endpoint,
                path,
            },
            _,
        ) => hub(endpoint, repo, revision, path.as_deref(), web).await?,
    };
    items.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(items)
}

fn named(file: &ModelFile, place: Place) -> Item {
    Item {
        name: file.name.clone(),
        place,
        bytes: None,
        digest: Digest::Sha256(file.sha256.clone()),
        version: None,
    }
}

/// Whether a file of this path belongs to a checkpoint: what readers open at its root, and
/// settings in folders of modules.
fn belongs(path: &str) -> bool {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    match extension {
        "json" => folder.is_empty() || !folder.contains('/') && name == "config.json",
        "safetensors" => folder.is_empty() && !name.starts_with("consolidated"),
        "jinja" | "txt" => folder.is_empty(),
        "model" => path == "tokenizer.model",
        _ => false,
    }
}

/// The one object that `key` names, or what of a model lies below it.
async fn objects(store: &Store, key: &str, uri: &str, web: &Web) -> Result<Vec<Item>, FetchError> {
    let mut items = Vec::new();
    let mut seen = Vec::new();
    let mut token: Option<String> = None;
    for _ in 0..PAGES {
        let mut action = ListObjectsV2::new(&store.bucket, store.credentials.as_ref());
        action.with_prefix(key.to_owned());
        if let Some(token) = token.take() {
            action.with_continuation_token(token);
        }
        let url = action.sign(SIGNED_FOR);
        let (text, _) = retried(|| web.text(&url, "bucket")).await?;
        let page = ListObjectsV2::parse_response(&text).map_err(|error| FetchError::BadAnswer {
            at: shown(&url),
            problem: format!("a listing that cannot be read: {error}"),
        })?;
        for object in page.contents {
            let name = if object.key == key {
                key.rsplit('/').next().unwrap_or(key)
            } else {
                let below = object.key.strip_prefix(key.trim_end_matches('/'));
                match below.and_then(|below| below.strip_prefix('/')) {
                    Some(name) if belongs(name) || key.is_empty() => name,
                    _ => {
                        seen.push(object.key);
                        continue;
                    }
                }
            };
            items.push(Item {
                name: name.to_owned(),
                bytes: object.size,
                digest: Digest::Unknown,
                version: object.etag,
                place: Place::Object(object.key),
            });
        }
        token = page.next_continuation_token;
        if token.is_none() {
            break;
        }
    }
    if items.is_empty() {
        return Err(FetchError::Nothing {
            at: uri.to_owned(),
            holds: told(&seen),
        });
    }
    Ok(items)
}

/// What a hub tells of a file.
#[derive(Deserialize)]
struct HubEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    size: u64,
    oid: String,
    lfs: Option<HubLarge>,
}

#[derive(Deserialize)]
struct HubLarge {
    oid: String,
    size: u64,
}

/// The files of a commit (<https://huggingface.co/docs/hub/api>, "tree").
async fn hub(
    endpoint: &str,
    repo: &str,
    revision: &str,
    path: Option<&str>,
    web: &Web,
) -> Result<Vec<Item>, FetchError> {
    let base = address_of("endpoint", endpoint)?;
    let mut first = base.clone();
    append(&mut first, &format!("api/models/{repo}/tree/{revision}"));
    first.set_query(Some("recursive=true"));
    let mut next = Some(first.clone());
    let mut entries: Vec<HubEntry> = Vec::new();
    for _ in 0..PAGES {
        let Some(url) = next.take() else { break };
        let (text, following) = retried(|| web.text(&url, "repository or commit")).await?;
        let page: Vec<HubEntry> =
            serde_json::from_str(&text).map_err(|error| FetchError::BadAnswer {
                at: shown(&url),
                problem: format!("a listing that cannot be read: {error}"),
            })?;
        entries.extend(page);
        next = following;
    }
    let wanted = |entry: &HubEntry| match path {
        Some(path) => entry.path == path,
        None => belongs(&entry.path),
    };
    let (found, others): (Vec<_>, Vec<_>) = entries
        .into_iter()
        .filter(|entry| entry.kind == "file")
        .partition(wanted);
    if found.is_empty() {
        let others: Vec<_> = others.into_iter().map(|entry| entry.path).collect();
        return Err(FetchError::Nothing {
            at: format!("{} at {revision}", shown(&first)),
            holds: told(&others),
        });
    }
    Ok(found
        .into_iter()
        .map(|entry| {
            let mut url = base.clone();
            append(
                &mut url,
                &format!("{repo}/resolve/{revision}/{}", entry.path),
            );
            let (bytes, digest) = match entry.lfs {
                Some(large) => (large.size, Digest::Sha256(large.oid)),
                None => (entry.size, Digest::GitBlob(entry.oid)),
            };
            Item {
                name: entry.path,
                place: Place::Url(url),
                bytes: Some(bytes),
                digest,
                version: None,
            }
        })
        .collect())
}

/// Repeats `request` a few times where that may help.
pub(crate) async fn retried<T, F: Future<Output = Result<T, FetchError>>>(
    request: impl Fn() -> F,
) -> Result<T, FetchError> {
    let mut attempt = 0;
    loop {
        match request().await {
            Err(error) if error.is_passing() && attempt + 1 < crate::file::ATTEMPTS => {
                tokio::time::sleep(crate::file::pause(attempt)).await;
                attempt += 1;
            }
            Err(error) => return Err(crate::file::tried(error, attempt + 1)),
            Ok(value) => return Ok(value),
        }
    }
}

fn told(names: &[String]) -> String {
    match names.len() {
        0 => "it is empty".to_owned(),
        count if count <= TOLD => format!("it has {}", names.join(", ")),
        count => format!(
            "it has {} and {} more",
            names[..TOLD].join(", "),
            count - TOLD
        ),
    }
}

/// Adds the parts of `path` to `url`, each encoded.
fn append(url: &mut Url, path: &str) {
    // Fails only for addresses without a host, which `address_of` refuses.
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path.split('/'));
    }
}

fn amazon(region: &str) -> String {
    format!("https://s3.{region}.amazonaws.com")
}

fn address_of(field: &'static str, text: &str) -> Result<Url, FetchError> {
    let bad = |problem: String| FetchError::BadAddress {
        field,
        value: text.to_owned(),
        problem,
    };
    let url = Url::parse(text).map_err(|error| bad(format!("is no address: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(bad(
            "must be an http or https address with a host".to_owned()
        ));
    }
    Ok(url)
}

fn bucket_and_key(uri: &str) -> Result<(&str, &str), FetchError> {
    let rest = uri.strip_prefix("s3://").filter(|rest| !rest.is_empty());
    let rest = rest.ok_or_else(|| FetchError::BadAddress {
        field: "uri",
        value: uri.to_owned(),
        problem: "must be s3://bucket/prefix".to_owned(),
    })?;
    Ok(rest.split_once('/').unwrap_or((rest, "")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_a_checkpoint_is_taken() {
        for name in [
            "config.json",
            "model.safetensors.index.json",
            "model-00001-of-00191.safetensors",
            "chat_template.jinja",
            "tokenizer.json",
            "1_Pooling/config.json",
            "vocab.txt",
            "tokenizer.model",
        ] {
            assert!(belongs(name), "{name}");
        }
        for name in [
            "original/consolidated.00.pth",
            "original/params.json",
            "original/tokenizer.model",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "README.md",
            "onnx/model.safetensors",
            "a/b/config.json",
            "model.gguf",
        ] {
            assert!(!belongs(name), "{name}");
        }
    }

    #[test]
    fn credentials_are_whole_or_absent() {
        let read = |given: &'static [&'static str]| {
            move |name: &str| given.contains(&name).then(|| "x".to_owned())
        };
        assert!(s3_credentials(read(&[])).unwrap().is_none());
        let both = s3_credentials(read(&[S3_KEY_ID_ENV, S3_SECRET_KEY_ENV])).unwrap();
        assert!(both.is_some());
        let error = s3_credentials(read(&[S3_KEY_ID_ENV])).unwrap_err();
        assert!(error.to_string().contains(S3_SECRET_KEY_ENV), "{error}");
    }

    #[test]
    fn addresses_that_cannot_be_asked_are_refused_by_name() {
        let source = |uri: &str, endpoint: &str| FetchSource::S3 {
            uri: uri.to_owned(),
            endpoint: Some(endpoint.to_owned()),
            region: "r".to_owned(),
            files: Vec::new(),
        };
        for (uri, endpoint, named) in [
            ("bucket/x", "http://a", "uri"),
            ("s3://", "http://a", "uri"),
            ("s3://b/x", "ftp://a", "endpoint"),
            ("s3://b/x", "minio:9000", "endpoint"),
        ] {
            let text = Store::open(&source(uri, endpoint), None).unwrap_err();
            assert!(text.to_string().starts_with(named), "{text}");
        }
    }
}
