//! The hash that tells whether a pod was made from the spec as it is now. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use llama_contract::{HANG_TIMEOUT_SECONDS, SELF_TEST_INTERVAL_SECONDS};
use llama_crds::v1alpha1::{ImagePullPolicy, NodePool, Topology};
use serde::Serialize;

use crate::reconcile::source::{Fetched, Source};
use crate::reconcile::validate::ValidDeployment;

/// Everything of a spec that its pods are made from. The inputs and not the rendered
/// pod, and without the worker image, so that a new version of the operator does not
/// restart every model.
#[derive(Serialize)]
struct Inputs<'a> {
    served_name: &'a str,
    claim: Option<(&'a str, &'a str)>,
    image: Option<(&'a str, &'a str, Option<&'static str>)>,
    /// Likewise, of an image that is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    mounted: Option<(&'a str, &'a str, Option<&'static str>)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fetched: Option<&'a Fetched>,
    tensor: u32,
    /// Written only where there are several stages: groups made before there were
    /// any keep their revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline: Option<u32>,
    nodes: u32,
    gpu: Option<&'a str>,
    cpu: &'a str,
    memory: &'a str,
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache: Option<&'static str>,
    node_selector: &'a BTreeMap<String, String>,
    tolerations: &'a [Toleration],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pools: &'a [NodePool],
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<&'a str>,
    priority_class: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    topology: Option<&'a Topology>,
    /// Claim, places and highest rank; which are loaded needs no new pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapters: Option<(&'a str, u8, u16)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restart: Option<&'a str>,
    /// Written only where they are not as usual, like the flags that workers get.
    #[serde(skip_serializing_if = "Option::is_none")]
    self_test_interval: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hang_timeout: Option<u32>,
}

/// Eight hexadecimal digits.
pub fn revision(deployment: &ValidDeployment) -> String {
    let policy = |policy: &Option<ImagePullPolicy>| policy.map(ImagePullPolicy::as_str);
    let (mut claim, mut image, mut mounted, mut fetched) = (None, None, None, None);
    match &deployment.source {
        Source::Claim { claim: name, path } => claim = Some((name.as_str(), path.as_str())),
        Source::Image {
            reference,
            path,
            pull_policy,
        } => image = Some((reference.as_str(), path.as_str(), policy(pull_policy))),
        Source::ImageVolume {
            reference,
            path,
            pull_policy,
        } => mounted = Some((reference.as_str(), path.as_str(), policy(pull_policy))),
        Source::Fetched(of_server) => fetched = Some(of_server.as_ref()),
    }
    let inputs = Inputs {
        served_name: &deployment.served_name,
        claim,
        image,
        mounted,
        fetched,
        tensor: deployment.tensor,
        pipeline: (deployment.pipeline > 1).then_some(deployment.pipeline),
        nodes: deployment.nodes,
        gpu: deployment
            .gpu
            .as_ref()
            .map(|gpu| gpu.resource_name.as_str()),
        cpu: &deployment.cpu,
        memory: &deployment.memory,
        max_tokens: deployment.max_tokens,
        kv_cache: deployment.other_kv_cache(),
        node_selector: &deployment.placement.node_selector,
        tolerations: &deployment.placement.tolerations,
        pools: &deployment.placement.pools,
        queue: deployment.placement.queue_name.as_deref(),
        priority_class: deployment.placement.priority_class_name.as_deref(),
        topology: deployment.placement.topology.as_ref(),
        adapters: deployment
            .adapters
            .as_ref()
            .map(|set| (set.claim.as_str(), set.places, set.max_rank)),
        restart: deployment.restart.as_deref(),
        self_test_interval: Some(deployment.self_test_interval)
            .filter(|seconds| *seconds != SELF_TEST_INTERVAL_SECONDS),
        hang_timeout: Some(deployment.hang_timeout)
            .filter(|seconds| *seconds != HANG_TIMEOUT_SECONDS),
    };
    // Plain fields and maps with text keys always serialize.
    let text = serde_json::to_string(&inputs).unwrap_or_default();
    let hash = fnv1a(text.as_bytes());
    format!("{:08x}", (hash >> 32) ^ (hash & 0xffff_ffff))
}

/// FNV-1a with 64 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>).
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::fnv1a;

    #[test]
    fn hashes_as_published() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
