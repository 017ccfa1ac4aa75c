//! Adapters that are served beside the model.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most adapters of one group.
pub const MAX_ADAPTERS: i32 = 64;
/// Highest rank of an adapter.
pub const MAX_ADAPTER_RANK: i32 = 512;

/// LoRA adapters that every group serves beside the model.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.loaded) || self.loaded.size() <= self.places").message("loaded has more adapters than there are places").field_path(".loaded")
)]
pub struct Adapters {
    /// PersistentVolumeClaim in the same namespace with the adapters. It is mounted
    /// read-only; with more than one pod its access mode must let several nodes read.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,

    /// Adapters that a group can have at a time. Memory is kept for as many.
    #[serde(default = "places")]
    #[schemars(range(min = 1, max = 64))]
    pub places: i32,

    /// Highest rank (r) of an adapter. Memory is kept for it.
    #[serde(default = "max_rank")]
    #[schemars(range(min = 1, max = 512))]
    pub max_rank: i32,

    /// The adapters that groups have now. They are loaded and forgotten while groups serve:
    /// a change needs no new pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub loaded: Vec<Adapter>,
}

fn places() -> i32 {
    8
}

fn max_rank() -> i32 {
    16
}

/// One LoRA adapter.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Adapter {
    /// Name that clients send as `model`.
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    )]
    pub name: String,

    /// Folder with adapter_config.json and adapter_model.safetensors, relative to the
    /// volume's root.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("!self.startsWith('/')").message("path is relative to the volume's root and must not start with '/'"),
        validation = Rule::new("!self.split('/').exists(part, part == '..' || part == '.' || part == '')").message("path must not have empty, '.' or '..' parts")
    )]
    pub path: String,
}

/// What became of an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterStatus {
    /// Name of the adapter.
    #[schemars(length(max = 128))]
    pub name: String,
    /// Folder of the adapter.
    #[schemars(length(max = 512))]
    pub path: String,
    /// Groups that serve it.
    #[schemars(range(min = 0))]
    pub groups: i32,
    /// Why others do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}
