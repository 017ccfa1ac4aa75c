//! Where a model comes from, checked. Pure.

use llama_contract::{FetchSource, ModelFile};
use llama_crds::v1alpha1::{
    ImageMount, ImagePullPolicy, KeyReference, LlamaDeploymentSpec, LlamaModelSpec,
    MIN_CACHE_BYTES, ModelCache, ModelSource,
};
use serde::Serialize;

use super::quantity;
use super::validate::ValidationError;

/// Where the model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// On a claim.
    Claim {
        /// Name of the claim.
        claim: String,
        /// Path inside the volume.
        path: String,
    },
    /// A file in an image.
    Image {
        /// The image.
        reference: String,
        /// Path inside the image.
        path: String,
        /// When to pull it.
        pull_policy: Option<ImagePullPolicy>,
    },
    /// A file in an image that is mounted.
    ImageVolume {
        /// The image.
        reference: String,
        /// Path inside the image.
        path: String,
        /// When to pull it.
        pull_policy: Option<ImagePullPolicy>,
    },
    /// On a server.
    Fetched(Box<Fetched>),
}

/// A model that is fetched from a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fetched {
    /// The server and the files.
    pub from: FetchSource,
    /// A Secret's key with a token.
    pub token: Option<KeyReference>,
    /// A Secret with the credentials of a store.
    pub credentials: Option<String>,
    /// A `ConfigMap`'s key with certificates.
    pub certificates: Option<KeyReference>,
    /// Where it is kept.
    pub cache: Option<Cache>,
}

/// Where a fetched model is kept for other pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cache {
    /// Name of the claim.
    pub claim: String,
    /// Most bytes of all models on it.
    pub bytes: u64,
    /// Folder of this model.
    pub entry: String,
}

/// Where the fields of a source stand in the spec of its object.
struct Fields {
    http_files: &'static str,
    s3_files: &'static str,
    hub_path: &'static str,
    cache_size: &'static str,
}

const OF_DEPLOYMENT: Fields = Fields {
    http_files: "spec.model.source.http.files",
    s3_files: "spec.model.source.s3.files",
    hub_path: "spec.model.source.huggingFace.path",
    cache_size: "spec.model.cache.size",
};

const OF_MODEL: Fields = Fields {
    http_files: "spec.source.http.files",
    s3_files: "spec.source.s3.files",
    hub_path: "spec.source.huggingFace.path",
    cache_size: "spec.cache.size",
};

impl Source {
    /// Where the model is kept for other pods.
    pub fn cache(&self) -> Option<&Cache> {
        match self {
            Self::Fetched(fetched) => fetched.cache.as_ref(),
            Self::Claim { .. } | Self::Image { .. } | Self::ImageVolume { .. } => None,
        }
    }

    /// The claim that pods mount, and the field that names it.
    pub fn claim(&self) -> Option<(&str, &'static str)> {
        match self {
            Self::Claim { claim, .. } => Some((claim, "spec.model.source.pvc")),
            Self::Image { .. } | Self::ImageVolume { .. } => None,
            Self::Fetched(_) => {
                let cache = self.cache()?;
                Some((&cache.claim, "spec.model.cache"))
            }
        }
    }
}

/// The claim that pods of this spec mount, be the spec valid or not.
pub fn claim_of(spec: &LlamaDeploymentSpec) -> Option<&str> {
    let model = &spec.model;
    let cache = model.cache.as_ref().map(|cache| cache.claim_name.as_str());
    let pvc = model.source.pvc.as_ref();
    pvc.map(|pvc| pvc.claim_name.as_str()).or(cache)
}

/// What the `LlamaModel` `spec` names, with where it is kept.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn cached(spec: &LlamaModelSpec) -> Result<(Fetched, Cache), ValidationError> {
    let mut found = fetched(&spec.source, &OF_MODEL).map_err(|error| match error {
        ValidationError::NotOneSource { .. } => ValidationError::NotFetchable,
        other => other,
    })?;
    let kept = cache(&spec.cache, &found.from, &OF_MODEL).map_err(|error| match error {
        ValidationError::CacheWithoutDigests => ValidationError::NotFetchable,
        other => other,
    })?;
    found.cache = Some(kept.clone());
    Ok((found, kept))
}

/// The source that `spec` names.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn source(spec: &LlamaDeploymentSpec) -> Result<Source, ValidationError> {
    let source = &spec.model.source;
    let count = [
        source.pvc.is_some(),
        source.image.is_some(),
        source.http.is_some(),
        source.s3.is_some(),
        source.hugging_face.is_some(),
    ];
    let count = count.into_iter().filter(|given| *given).count();
    if count != 1 {
        return Err(ValidationError::NotOneSource { count });
    }
    let found = if let Some(pvc) = &source.pvc {
        let field = "spec.model.source.pvc.path";
        Source::Claim {
            claim: pvc.claim_name.clone(),
            path: good_path(field, &pvc.path, &pvc.path)?,
        }
    } else if let Some(image) = &source.image {
        let field = "spec.model.source.image.path";
        let Some(inside) = image.path.strip_prefix('/') else {
            return Err(ValidationError::BadPath {
                field,
                path: image.path.clone(),
                problem: "must start with '/': it is a path inside the image",
            });
        };
        let (reference, pull_policy) = (image.reference.clone(), image.pull_policy);
        let path = good_path(field, &image.path, inside)?;
        match image.mount {
            ImageMount::Copy => Source::Image {
                reference,
                path,
                pull_policy,
            },
            ImageMount::Volume => Source::ImageVolume {
                reference,
                path,
                pull_policy,
            },
        }
    } else {
        let mut found = fetched(source, &OF_DEPLOYMENT)?;
        if let Some(wanted) = &spec.model.cache {
            found.cache = Some(cache(wanted, &found.from, &OF_DEPLOYMENT)?);
        }
        return Ok(Source::Fetched(Box::new(found)));
    };
    match &spec.model.cache {
        Some(_) => Err(ValidationError::CacheWithoutDigests),
        None => Ok(found),
    }
}

fn fetched(source: &ModelSource, fields: &Fields) -> Result<Fetched, ValidationError> {
    let fetched = if let Some(http) = &source.http {
        Fetched {
            from: FetchSource::Http {
                url: http.url.clone(),
                files: files(fields.http_files, &http.files)?,
            },
            token: http.token_secret_ref.clone(),
            credentials: None,
            certificates: http.ca_config_map_ref.clone(),
            cache: None,
        }
    } else if let Some(s3) = &source.s3 {
        Fetched {
            from: FetchSource::S3 {
                uri: s3.uri.clone(),
                endpoint: s3.endpoint.clone(),
                region: s3.region.clone(),
                files: files(fields.s3_files, &s3.files)?,
            },
            token: None,
            credentials: s3.secret_ref.as_ref().map(|secret| secret.name.clone()),
            certificates: s3.ca_config_map_ref.clone(),
            cache: None,
        }
    } else if let Some(hub) = &source.hugging_face {
        let field = fields.hub_path;
        let path = hub.path.as_ref();
        Fetched {
            from: FetchSource::HuggingFace {
                repo: hub.repo.clone(),
                revision: hub.revision.clone(),
                endpoint: hub.endpoint.clone(),
                path: path.map(|path| good_path(field, path, path)).transpose()?,
            },
            token: hub.token_secret_ref.clone(),
            credentials: None,
            certificates: hub.ca_config_map_ref.clone(),
            cache: None,
        }
    } else {
        return Err(ValidationError::NotOneSource { count: 0 });
    };
    Ok(fetched)
}

fn cache(
    cache: &ModelCache,
    from: &FetchSource,
    fields: &Fields,
) -> Result<Cache, ValidationError> {
    let bytes = quantity::thousandths(&cache.size.0).map(|thousandths| thousandths / 1000);
    let bytes = bytes
        .filter(|bytes| *bytes >= MIN_CACHE_BYTES)
        .ok_or_else(|| ValidationError::BadQuantity {
            field: fields.cache_size,
            value: cache.size.0.clone(),
            least: "1Mi",
        })?;
    Ok(Cache {
        claim: cache.claim_name.clone(),
        bytes,
        entry: from
            .identity()
            .ok_or(ValidationError::CacheWithoutDigests)?,
    })
}

fn files(
    field: &'static str,
    files: &[llama_crds::v1alpha1::ModelFile],
) -> Result<Vec<ModelFile>, ValidationError> {
    let mut names = std::collections::BTreeSet::new();
    files
        .iter()
        .map(|file| {
            if !names.insert(&file.name) {
                return Err(ValidationError::BadPath {
                    field,
                    path: file.name.clone(),
                    problem: "must be named once only",
                });
            }
            Ok(ModelFile {
                name: good_path(field, &file.name, &file.name)?,
                sha256: file.sha256.clone(),
            })
        })
        .collect()
}

/// `path`, if `inside` (the same without the leading slash that it may have) is made of
/// plain names only.
pub(super) fn good_path(
    field: &'static str,
    path: &str,
    inside: &str,
) -> Result<String, ValidationError> {
    if inside
        .split('/')
        .any(|part| matches!(part, "" | "." | ".."))
    {
        return Err(ValidationError::BadPath {
            field,
            path: path.to_owned(),
            problem: "must name a file, without empty, '.' or '..' parts",
        });
    }
    Ok(path.to_owned())
}
