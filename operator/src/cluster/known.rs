//! Nodes as those see them who do not ask what is free.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Taint;

/// A node, whether it takes pods or not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KnownNode {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Arc<BTreeMap<String, String>>,
    /// Its taints.
    pub taints: Arc<Vec<Taint>>,
    /// Whether it is ready and not cordoned.
    pub open: bool,
    /// When it was made: another machine of the same name is younger.
    pub created: Option<Timestamp>,
}
