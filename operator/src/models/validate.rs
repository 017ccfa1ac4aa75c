//! Step 2: from what the user wrote to what can be planned. Pure.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;
use llama_crds::v1alpha1::{ANY_NODE, Copies, LlamaModel, MAX_CONCURRENT_FETCHES, ModelNodes};

use crate::reconcile::plan::fnv1a;
use crate::reconcile::source::{self, Cache, Fetched};
use crate::reconcile::validate::{ValidationError, in_range};

/// Least and greatest time between two looks at a copy.
const RECHECK: (Duration, Duration) = (Duration::from_mins(1), Duration::from_hours(720));

/// A model that can be planned.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidModel {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// UID.
    pub uid: String,
    /// Owner reference for its pods.
    pub owner: OwnerReference,
    /// Where it comes from.
    pub fetched: Fetched,
    /// Where it is kept.
    pub cache: Cache,
    /// Hash of what its pods are made from.
    pub revision: String,
    /// Who has a copy.
    pub copies: Copies,
    /// Which nodes.
    pub nodes: ModelNodes,
    /// Nodes that fetch at the same time.
    pub most: usize,
    /// Time between two looks at a copy.
    pub recheck: Duration,
}

impl ValidModel {
    /// Name of the entry of status for the copy of `node`, or for that of all nodes.
    pub fn entry_of<'a>(&self, node: Option<&'a str>) -> &'a str {
        node.unwrap_or(ANY_NODE)
    }
}

/// Checks `object` as far as its spec allows.
///
/// # Errors
/// The first thing that is wrong.
pub fn validate(object: &LlamaModel) -> Result<ValidModel, ValidationError> {
    let (meta, spec) = (&object.metadata, &object.spec);
    let required = |value: &Option<String>, field| {
        let value = value.clone();
        value.ok_or(ValidationError::IncompleteMetadata(field))
    };
    let owner = object
        .controller_owner_ref(&())
        .ok_or(ValidationError::IncompleteMetadata("uid"))?;
    let (fetched, cache) = source::cached(spec)?;
    let most = in_range(
        "spec.maxConcurrentFetches",
        spec.max_concurrent_fetches,
        1,
        MAX_CONCURRENT_FETCHES,
    )?;
    let (least, longest) = RECHECK;
    let recheck = spec.recheck_every.parse();
    let recheck = recheck
        .filter(|time| (least..=longest).contains(time))
        .ok_or_else(|| ValidationError::BadDuration {
            field: "spec.recheckEvery",
            value: spec.recheck_every.0.clone(),
            least: "1m",
            most: "720h",
        })?;
    // Plain fields always serialize.
    let text = serde_json::to_string(&fetched).unwrap_or_default();
    Ok(ValidModel {
        name: required(&meta.name, "name")?,
        namespace: required(&meta.namespace, "namespace")?,
        uid: required(&meta.uid, "uid")?,
        owner: OwnerReference {
            block_owner_deletion: Some(true),
            ..owner
        },
        fetched,
        cache,
        revision: format!("{:016x}", fnv1a(text.as_bytes())),
        copies: spec.copies,
        nodes: spec.nodes.clone().unwrap_or_default(),
        most: usize::try_from(most).unwrap_or(1),
        recheck,
    })
}
