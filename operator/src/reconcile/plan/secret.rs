//! The token that ranks of different pods show each other. Pure: the token itself is
//! drawn when the Secret is created.

use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;

use crate::reconcile::validate::ValidDeployment;
use crate::{labels, names};

/// Key of the token in the Secret.
pub const TOKEN_KEY: &str = "token";

/// The Secret without its token and its owner. It belongs to the Service of the ranks, not
/// to the LlamaDeployment: the operator may not change Secrets, so it could not adopt one,
/// but it can adopt the Service, and the Secret goes with that.
pub(super) fn rendezvous(deployment: &ValidDeployment) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(names::rendezvous_secret(&deployment.name)),
            namespace: Some(deployment.namespace.clone()),
            labels: Some(labels::common(&deployment.name)),
            ..ObjectMeta::default()
        },
        immutable: Some(true),
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    }
}
