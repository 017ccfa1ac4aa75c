//! What is served, and where it comes from.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Least size of a cache in bytes.
pub const MIN_CACHE_BYTES: u64 = 1 << 20;

/// What to serve.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.cache) || has(self.source.http) || has(self.source.huggingFace) || has(self.source.s3) && self.source.s3.files.size() > 0").message("cache is for models that are fetched and whose bytes are known beforehand: from http, huggingFace, or s3 with files").field_path(".cache")
)]
pub struct Model {
    /// Name that clients send as `model`. The object's own name when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    )]
    pub served_name: Option<String>,

    /// Where the model comes from: exactly one of pvc, image, http, s3 and huggingFace.
    pub source: ModelSource,

    /// Where pods keep what they fetch from http, s3 or huggingFace, for the next ones.
    /// Without it each pod fetches the model for itself, onto its node's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<ModelCache>,
}

/// Where the model comes from.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("[has(self.pvc), has(self.image), has(self.http), has(self.s3), has(self.huggingFace)].filter(x, x).size() == 1").message("exactly one of pvc, image, http, s3 and huggingFace must be set")
)]
pub struct ModelSource {
    /// A file on a volume that exists already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pvc: Option<PvcSource>,

    /// A file inside a container image that holds the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSource>,

    /// Files of a web server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpSource>,

    /// Objects of an S3-compatible store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Source>,

    /// A repository of the Hugging Face Hub, or of a mirror of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugging_face: Option<HuggingFaceSource>,
}

/// A model on a PersistentVolumeClaim.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PvcSource {
    /// PersistentVolumeClaim in the same namespace. It is mounted read-only; with more
    /// than one pod its access mode must let several nodes read.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,

    /// Path of the GGUF file, or of the folder of a checkpoint, inside the volume, relative
    /// to the volume's root.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("!self.startsWith('/')").message("path is relative to the volume's root and must not start with '/'"),
        validation = Rule::new("!self.split('/').exists(part, part == '..' || part == '.' || part == '')").message("path must not have empty, '.' or '..' parts")
    )]
    pub path: String,
}

/// A model inside a container image.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageSource {
    /// The image. A digest (`name@sha256:…`) gives every pod the same bytes.
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^\S+$"))]
    pub reference: String,

    /// Absolute path of the GGUF file, or of the folder of a checkpoint, inside the image.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("self.startsWith('/')").message("path is a path inside the image and must start with '/'"),
        validation = Rule::new("!self.split('/').exists(part, part == '..' || part == '.')").message("path must not have '.' or '..' parts"),
        validation = Rule::new("!self.endsWith('/')").message("path must name a file and not end with '/'")
    )]
    pub path: String,

    /// When the node pulls the image. Kubernetes' own default when absent: Always for the
    /// tag latest, IfNotPresent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "ImagePullPolicy")]
    pub pull_policy: Option<ImagePullPolicy>,

    /// How the model comes from the image into pods.
    #[serde(default)]
    pub mount: ImageMount,
}

/// How a model comes from its image into pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImageMount {
    /// It is copied onto the node's disk for each pod. Works everywhere.
    #[default]
    Copy,
    /// The image is mounted as it is, and pods of a node share it. Needs image volumes of
    /// Kubernetes (on by default since 1.35) and a container runtime that has them
    /// (containerd 2.1, CRI-O 1.33).
    Volume,
}

/// When a node pulls an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImagePullPolicy {
    /// Each time a pod starts.
    Always,
    /// When the node does not have it.
    IfNotPresent,
    /// Never: the node must have it.
    Never,
}

impl ImagePullPolicy {
    /// The name that pods use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// Files of a web server.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpSource {
    /// Address of the folder that holds the files. The name of each is appended to it.
    #[schemars(length(min = 8, max = 1024), regex(pattern = r"^https?://[^\s?#]+$"))]
    pub url: String,

    /// The files, each with its digest. With one GGUF file among them that is the model,
    /// otherwise the folder is.
    #[schemars(length(min = 1, max = 512))]
    pub files: Vec<ModelFile>,

    /// A Secret's key with a token that is sent as `Authorization: Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<KeyReference>,

    /// A ConfigMap's key with certificates (PEM) to trust besides the public ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_config_map_ref: Option<KeyReference>,
}

/// One file of a model.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelFile {
    /// Path of the file, relative to the source's address. It keeps it in the model's
    /// folder.
    #[schemars(
        length(min = 1, max = 256),
        regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")
    )]
    pub name: String,

    /// SHA-256 of its bytes, as `sha256sum` prints it.
    #[schemars(length(min = 64, max = 64), regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: String,
}

/// Objects of an S3-compatible store.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct S3Source {
    /// `s3://bucket/prefix` of a checkpoint, or `s3://bucket/key` of one GGUF file.
    #[schemars(
        length(min = 6, max = 1024),
        regex(pattern = r"^s3://[A-Za-z0-9][A-Za-z0-9.-]+(/\S*)?$")
    )]
    pub uri: String,

    /// Address of the store, for example `https://minio.storage.svc:9000`. That of AWS in
    /// the region when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 512), regex(pattern = r"^https?://[^\s?#]+$"))]
    pub endpoint: Option<String>,

    /// Region that requests are signed for. Many other stores take any.
    #[serde(default = "us_east_1")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9-]+$"))]
    pub region: String,

    /// The files, each with its digest. When empty, whatever of a checkpoint is found below
    /// the prefix is fetched, and only its length is checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512))]
    pub files: Vec<ModelFile>,

    /// Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and
    /// AWS_SESSION_TOKEN where there is one. Without it requests are not signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<NameReference>,

    /// A ConfigMap's key with certificates (PEM) to trust besides the public ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_config_map_ref: Option<KeyReference>,
}

fn us_east_1() -> String {
    "us-east-1".to_owned()
}

/// A repository of the Hugging Face Hub, or of a mirror of it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HuggingFaceSource {
    /// Owner and name, for example meta-llama/Llama-3.1-8B-Instruct.
    #[schemars(
        length(min = 3, max = 200),
        regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
    )]
    pub repo: String,

    /// Commit. Not a branch: every pod must get the same bytes, today and after a restart.
    #[schemars(length(min = 40, max = 40), regex(pattern = r"^[0-9a-f]{40}$"))]
    pub revision: String,

    /// The one GGUF file that is wanted of a repository with several. Without it the
    /// checkpoint in safetensors is fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 6, max = 256),
        regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*\.gguf$")
    )]
    pub path: Option<String>,

    /// Address of the hub or of a mirror.
    #[serde(default = "hub")]
    #[schemars(length(min = 8, max = 512), regex(pattern = r"^https?://[^\s?#]+$"))]
    pub endpoint: String,

    /// A Secret's key with an access token, for repositories that want one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<KeyReference>,

    /// A ConfigMap's key with certificates (PEM) to trust besides the public ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_config_map_ref: Option<KeyReference>,
}

fn hub() -> String {
    "https://huggingface.co".to_owned()
}

/// An object in the same namespace, by its name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NameReference {
    /// The name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// One key of an object in the same namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyReference {
    /// The object's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// The key in it.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._A-Za-z0-9]+$"))]
    pub key: String,
}

/// Where fetched models are kept for the next pods.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelCache {
    /// PersistentVolumeClaim in the same namespace. Pods of the user 65532 must be able to
    /// write to it, from every node that they run on: with a volume that all nodes share a
    /// model is fetched once, with one that is each node's own folder once a node.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,

    /// Most that models may take on it together. The ones unused for the longest time go;
    /// one that a pod uses never does.
    #[schemars(schema_with = "crate::schema::quantity")]
    #[x_kube(
        validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('1Mi')) >= 0").message("cache.size must be at least 1Mi, for example 500Gi")
    )]
    pub size: Quantity,
}
