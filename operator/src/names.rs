//! Names of what belongs to a `LlamaDeployment`. They are deterministic, so that a
//! second attempt meets the first one's objects and never adds to them.

use llama_contract::{API_PORT, RENDEZVOUS_PORT};

use crate::reconcile::plan::fnv1a;

/// Group `group` of deployment `name`, in messages and reports.
pub fn group(name: &str, group: u32) -> String {
    format!("{name}-{group}")
}

/// Pod `node` of group `group`; also its host name.
pub fn pod(name: &str, group: u32, node: u32) -> String {
    format!("{name}-{group}-{node}")
}

/// The pod that inspects the model.
pub fn inspection(name: &str) -> String {
    format!("{name}-inspect")
}

/// The pod that fetches for the `LlamaModel` `name` on the node `node`. Not the node's name:
/// the two together may be longer than a name can be, and must not meet another pair.
pub fn fetch(name: &str, node: &str) -> String {
    format!("{name}-fetch-{:016x}", fnv1a(node.as_bytes()))
}

/// The Service that clients use.
pub fn client_service(name: &str) -> String {
    name.to_owned()
}

/// The headless Service that gives every pod a host name.
pub fn ranks_service(name: &str) -> String {
    format!("{name}-ranks")
}

/// The Secret with the token that ranks of different pods show each other.
pub fn rendezvous_secret(name: &str) -> String {
    format!("{name}-rendezvous")
}

/// The `ControllerRevision` that keeps what pods of the revision `hash` are made from.
pub fn revision(name: &str, hash: &str) -> String {
    format!("{name}-{hash}")
}

/// The `PodDisruptionBudget` of a group.
pub fn budget(name: &str, group: u32) -> String {
    self::group(name, group)
}

/// Where rank 0 of a group waits for the ranks of the other pods.
pub fn rendezvous_address(name: &str, namespace: &str, group: u32) -> String {
    let (host, service) = (pod(name, group, 0), ranks_service(name));
    format!("{host}.{service}.{namespace}.svc:{RENDEZVOUS_PORT}")
}

/// Base URL of the OpenAI API inside the cluster.
pub fn url(name: &str, namespace: &str) -> String {
    format!(
        "http://{}.{namespace}.svc:{API_PORT}/v1",
        client_service(name)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_crds::v1alpha1::{MAX_GROUPS, MAX_NAME_LENGTH};

    #[test]
    fn the_longest_names_are_host_names() {
        let name = "a".repeat(MAX_NAME_LENGTH);
        let last = 2 * u32::try_from(MAX_GROUPS).expect("positive") - 1;
        assert!(pod(&name, last, 63).len() <= 63);
        assert!(ranks_service(&name).len() <= 63);
        assert!(rendezvous_secret(&name).len() <= 63);
    }

    #[test]
    fn addresses_are_inside_the_cluster() {
        assert_eq!(
            rendezvous_address("m", "team", 2),
            "m-2-0.m-ranks.team.svc:29500"
        );
        assert_eq!(url("m", "team"), "http://m.team.svc:8000/v1");
    }
}
