//! Reads what the check-up looks at, as far as the user may see it.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams};
use kube::{Resource, ResourceExt};
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::cluster::kinds::{ClusterNode, PlacedPod};
use llama_operator::labels;
use serde::de::DeserializeOwned;

use super::facts::{
    Facts, Operator, Reference, Seen, Subject, Target, lease_of, pods_of, references,
};
use crate::args::DoctorFlags;
use crate::cluster::Cluster;
use crate::error::Error;

/// Most Secrets, `ConfigMaps` and claims that are looked for.
const MOST_REFERENCES: usize = 256;

/// What the check-up for `flags` looks at.
pub(super) async fn facts(cluster: &Cluster, flags: &DoctorFlags) -> Result<Facts, Error> {
    // First, so that a name that is not there is said at once.
    let subjects = subjects(cluster, flags).await?;
    let client = &cluster.client;
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let name = format!("{}.{}", llama_crds::PLURAL, llama_crds::GROUP);
    let attempt = format!("read CustomResourceDefinition {name}");
    let crd = seen(cluster.ask(&attempt, crds.get_opt(&name)).await)?;
    let all = ListParams::default();
    let nodes: Api<ClusterNode> = Api::all(client.clone());
    let placed: Api<PlacedPod> = Api::all(client.clone());
    Ok(Facts {
        crd,
        operators: operators(cluster).await?,
        nodes: seen(cluster.list("list nodes", &nodes, &all).await)?,
        placed: seen(
            cluster
                .list("list the pods of all namespaces", &placed, &all)
                .await,
        )?,
        subjects,
    })
}

/// `result`, where "forbidden" is an answer.
fn seen<T>(result: Result<T, Error>) -> Result<Seen<T>, Error> {
    match result {
        Ok(value) => Ok(Seen::Known(value)),
        Err(error) if error.is_forbidden() => Ok(Seen::Hidden(error.to_string())),
        Err(error) => Err(error),
    }
}

async fn operators(cluster: &Cluster) -> Result<Seen<Vec<Operator>>, Error> {
    let api: Api<Deployment> = Api::all(cluster.client.clone());
    let ours = ListParams::default().labels(&labels::operators());
    let found = cluster
        .list("list the operator's Deployments", &api, &ours)
        .await;
    let found = match seen(found)? {
        Seen::Known(found) => found,
        Seen::Hidden(why) => return Ok(Seen::Hidden(why)),
    };
    let mut operators = Vec::new();
    for deployment in found {
        let lease = match lease_of(&deployment) {
            None => None,
            Some((namespace, name)) => {
                let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), &namespace);
                let attempt = format!("read Lease {namespace}/{name}");
                Some(seen(cluster.ask(&attempt, leases.get_opt(&name)).await)?)
            }
        };
        operators.push(Operator { deployment, lease });
    }
    Ok(Seen::Known(operators))
}

async fn subjects(cluster: &Cluster, flags: &DoctorFlags) -> Result<Seen<Vec<Subject>>, Error> {
    let deployments = match &flags.name {
        Some(name) => cluster.deployment(name).await.map(|one| vec![one]),
        None => cluster.deployments(flags.all_namespaces).await,
    };
    let deployments = match deployments {
        // Without its definition the kind itself is not there.
        Err(error) if flags.name.is_none() && error.is_not_found() => {
            return Ok(Seen::Hidden(error.to_string()));
        }
        other => match seen(other)? {
            Seen::Known(deployments) => deployments,
            Seen::Hidden(why) => return Ok(Seen::Hidden(why)),
        },
    };
    let pods: Api<Pod> = cluster.api(flags.all_namespaces);
    let ours = ListParams::default().labels(&labels::managed());
    let pods = match seen(cluster.list("list the operator's pods", &pods, &ours).await)? {
        Seen::Known(pods) => pods,
        Seen::Hidden(why) => return Ok(Seen::Hidden(why)),
    };
    let mut subjects = Vec::new();
    let mut room = MOST_REFERENCES;
    for deployment in deployments {
        let space = deployment.namespace().unwrap_or_default();
        let pods = pods_of(&pods, &space, &deployment.name_any());
        let targets = targets(cluster, &space, &deployment, &pods, &mut room).await?;
        subjects.push(Subject {
            deployment,
            pods,
            targets,
        });
    }
    Ok(Seen::Known(subjects))
}

/// What `deployment` and its `pods` refer to, as long as there is `room`.
async fn targets(
    cluster: &Cluster,
    space: &str,
    deployment: &LlamaDeployment,
    pods: &[Pod],
    room: &mut usize,
) -> Result<BTreeMap<Reference, Seen<Target>>, Error> {
    let mut all = BTreeMap::new();
    for reference in references(deployment, pods) {
        let target = if *room == 0 {
            Seen::Hidden(format!(
                "{} {} was not looked for: more than {MOST_REFERENCES} references",
                reference.kind(),
                reference.name()
            ))
        } else {
            *room -= 1;
            target(cluster, space, &reference).await?
        };
        all.insert(reference, target);
    }
    Ok(all)
}

async fn target(
    cluster: &Cluster,
    space: &str,
    reference: &Reference,
) -> Result<Seen<Target>, Error> {
    let exists = |there: bool| {
        if there {
            Target::There
        } else {
            Target::Missing
        }
    };
    match reference {
        Reference::Claim(name) => {
            let claims: Api<PersistentVolumeClaim> = Api::namespaced(cluster.client.clone(), space);
            let attempt = format!("read PersistentVolumeClaim {space}/{name}");
            let found = cluster.ask(&attempt, claims.get_opt(name)).await;
            seen(
                found.map(|claim| {
                    claim.map_or(Target::Missing, |claim| Target::Claim(Box::new(claim)))
                }),
            )
        }
        Reference::Secret(_) => seen(
            is_there::<Secret>(cluster, space, reference)
                .await
                .map(exists),
        ),
        Reference::ConfigMap(_) => seen(
            is_there::<ConfigMap>(cluster, space, reference)
                .await
                .map(exists),
        ),
    }
}

/// Whether an object exists; only its metadata is read.
async fn is_there<K>(cluster: &Cluster, space: &str, reference: &Reference) -> Result<bool, Error>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + DeserializeOwned
        + Clone
        + std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(cluster.client.clone(), space);
    let attempt = format!("read {} {space}/{}", reference.kind(), reference.name());
    let found = cluster
        .ask(&attempt, api.get_metadata_opt(reference.name()))
        .await?;
    Ok(found.is_some())
}
