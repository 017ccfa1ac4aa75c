//! Step 4: makes the cluster match the plan. Writes only.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};

use super::Error;
use super::groups::Deletion;
use super::plan::{Plan, TOKEN_KEY};
use crate::labels::FIELD_MANAGER;

/// Bytes of a rendezvous token before it is written as text.
const TOKEN_BYTES: usize = 32;

/// What came of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Objects that the API server refused, with its words: quota, admission, Pod
    /// Security. Trying again helps only once somebody has acted.
    pub refused: Vec<String>,
    /// Writes made.
    pub writes: usize,
}

/// Makes the cluster match `plan`: Services first, then deletions, then the Secret and
/// the pods that need it.
pub async fn apply(
    client: &Client,
    namespace: &str,
    plan: &Plan,
    live_services: &[Service],
) -> Result<Applied, Error> {
    let mut applied = Applied::default();
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    for service in &plan.services {
        apply_service(&services, service, live_services, &mut applied).await?;
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let of_groups = plan.groups.iter().flat_map(|group| &group.delete);
    for deletion in of_groups.chain(&plan.fit.delete) {
        delete_pod(&pods, deletion, &mut applied).await?;
    }
    if let Some(secret) = &plan.secret {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        create_secret(&secrets, secret, &mut applied).await?;
    }
    for pod in plan.fit.create.iter().chain(&plan.create) {
        create(&pods, "Pod", pod, &mut applied).await?;
    }
    Ok(applied)
}

/// Server-side apply, unless the live Service already has every field as planned.
async fn apply_service(
    services: &Api<Service>,
    planned: &Service,
    live: &[Service],
    applied: &mut Applied,
) -> Result<(), Error> {
    let name = planned.name_any();
    if live
        .iter()
        .any(|live| live.name_any() == name && is_as_planned(live, planned))
    {
        return Ok(());
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let result = services.patch(&name, &params, &Patch::Apply(planned)).await;
    settle(result.map(|_| ()), "apply Service", &name, applied)
}

/// Whether every field of `planned` has its value in `live`, whatever else that has.
fn is_as_planned(live: &Service, planned: &Service) -> bool {
    let json = |service: &Service| serde_json::to_value(service);
    match (json(live), json(planned)) {
        (Ok(live), Ok(planned)) => includes(&live, &planned),
        _ => false,
    }
}

fn includes(live: &serde_json::Value, planned: &serde_json::Value) -> bool {
    use serde_json::Value::{Array, Object};
    match (live, planned) {
        (Object(live), Object(planned)) => planned
            .iter()
            .all(|(key, value)| live.get(key).is_some_and(|live| includes(live, value))),
        (Array(live), Array(planned)) => {
            live.len() == planned.len()
                && live
                    .iter()
                    .zip(planned)
                    .all(|(live, value)| includes(live, value))
        }
        (live, planned) => live == planned,
    }
}

/// Deletes the very pod that was observed, and no later one of the same name.
async fn delete_pod(
    pods: &Api<Pod>,
    deletion: &Deletion,
    applied: &mut Applied,
) -> Result<(), Error> {
    let mut params = DeleteParams::default().preconditions(Preconditions {
        uid: Some(deletion.uid.clone()),
        resource_version: None,
    });
    params.grace_period_seconds = deletion.grace;
    match pods.delete(&deletion.name, &params).await {
        Ok(_) => {
            applied.writes += 1;
            Ok(())
        }
        // Gone already, or a younger pod has the name: both are what was wanted.
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(source) => Err(Error::api(
            "apply",
            format!("delete Pod {}", deletion.name),
            source,
        )),
    }
}

/// Creates the Secret with a new token; one that exists keeps its token.
async fn create_secret(
    secrets: &Api<Secret>,
    planned: &Secret,
    applied: &mut Applied,
) -> Result<(), Error> {
    let secret = Secret {
        data: Some(BTreeMap::from([(
            TOKEN_KEY.to_owned(),
            ByteString(token()?),
        )])),
        ..planned.clone()
    };
    create(secrets, "Secret", &secret, applied).await
}

/// Sixty-four hexadecimal digits from the kernel's random numbers.
fn token() -> Result<Vec<u8>, Error> {
    let mut bytes = [0_u8; TOKEN_BYTES];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
    Ok(bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)])
        .collect())
}

/// Creates `object`; one that exists already stays as it is. Not server-side apply:
/// that would change a pod of this name that is about to end, or is somebody else's.
async fn create<K>(api: &Api<K>, kind: &str, object: &K, applied: &mut Applied) -> Result<(), Error>
where
    K: kube::Resource + serde::Serialize + serde::de::DeserializeOwned + Clone + std::fmt::Debug,
{
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    match api.create(&params, object).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        result => {
            let attempt = format!("create {kind}");
            settle(result.map(|_| ()), &attempt, &object.name_any(), applied)
        }
    }
}

/// Counts a write, keeps a refusal for status, and passes everything else on.
fn settle(
    result: Result<(), kube::Error>,
    attempt: &str,
    name: &str,
    applied: &mut Applied,
) -> Result<(), Error> {
    match result {
        Ok(()) => {
            applied.writes += 1;
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.is_forbidden() || status.is_invalid() => {
            let text = format!(
                "the API server refused to {attempt} {name}: {}",
                status.message
            );
            applied.refused.push(text);
            Ok(())
        }
        Err(source) => Err(Error::api("apply", format!("{attempt} {name}"), source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn defaults_of_the_api_server_are_no_difference() {
        let planned = json!({"a": 1, "list": [{"x": 1}]});
        assert!(includes(
            &json!({"a": 1, "b": 2, "list": [{"x": 1, "y": 2}]}),
            &planned
        ));
        assert!(!includes(&json!({"a": 2, "list": [{"x": 1}]}), &planned));
        assert!(!includes(&json!({"a": 1, "list": []}), &planned));
        assert!(!includes(&json!({"list": [{"x": 1}]}), &planned));
    }

    #[test]
    fn tokens_differ() {
        let (one, other) = (token().expect("random"), token().expect("random"));
        assert_eq!(one.len(), 2 * TOKEN_BYTES);
        assert_ne!(one, other);
    }
}
