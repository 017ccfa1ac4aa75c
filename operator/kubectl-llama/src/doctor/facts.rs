//! What the check-up looks at. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Container, PersistentVolumeClaim, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::ResourceExt;
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::cluster::kinds::{ClusterNode, PlacedPod};
use llama_operator::reconcile::source::{Source, claim_of, source};

/// Something that the user may be kept from seeing.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen<T> {
    /// It was seen.
    Known(T),
    /// It was not; why, in a sentence.
    Hidden(String),
}

/// An operator and what shows that it works.
#[derive(Clone, Debug, PartialEq)]
pub struct Operator {
    /// Its Deployment.
    pub deployment: Deployment,
    /// The lease that its flags name; `None` where they name none.
    pub lease: Option<Seen<Option<Lease>>>,
}

/// Something that pods refer to by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reference {
    /// A Secret.
    Secret(String),
    /// A `ConfigMap`.
    ConfigMap(String),
    /// A `PersistentVolumeClaim`.
    Claim(String),
}

impl Reference {
    /// Its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Secret(_) => "Secret",
            Self::ConfigMap(_) => "ConfigMap",
            Self::Claim(_) => "PersistentVolumeClaim",
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Secret(name) | Self::ConfigMap(name) | Self::Claim(name) => name,
        }
    }
}

/// What became of a reference.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// It exists.
    There,
    /// It is a claim, and exists.
    Claim(Box<PersistentVolumeClaim>),
    /// It does not exist.
    Missing,
}

/// A LlamaDeployment and what belongs to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Subject {
    /// It.
    pub deployment: LlamaDeployment,
    /// Its pods.
    pub pods: Vec<Pod>,
    /// What they and it refer to.
    pub targets: BTreeMap<Reference, Seen<Target>>,
}

/// What the check-up looks at.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// The `CustomResourceDefinition`, if there is one.
    pub crd: Seen<Option<CustomResourceDefinition>>,
    /// Operators of the cluster.
    pub operators: Seen<Vec<Operator>>,
    /// Its nodes.
    pub nodes: Seen<Vec<ClusterNode>>,
    /// All pods of the cluster, with what they take of their nodes.
    pub placed: Seen<Vec<PlacedPod>>,
    /// The LlamaDeployments; not known where the API server serves none.
    pub subjects: Seen<Vec<Subject>>,
}

/// What `deployment` and its `pods` refer to and cannot do without.
pub fn references(deployment: &LlamaDeployment, pods: &[Pod]) -> BTreeSet<Reference> {
    let mut all = BTreeSet::new();
    all.extend(claim_of(&deployment.spec).map(|name| Reference::Claim(name.to_owned())));
    if let Ok(Source::Fetched(fetched)) = source(&deployment.spec) {
        let token = fetched.token.map(|token| token.name);
        let secrets = token.into_iter().chain(fetched.credentials);
        all.extend(secrets.map(Reference::Secret));
        let certificates = fetched.certificates;
        all.extend(certificates.map(|map| Reference::ConfigMap(map.name)));
    }
    for spec in pods.iter().filter_map(|pod| pod.spec.as_ref()) {
        for volume in spec.volumes.iter().flatten() {
            if let Some(claim) = &volume.persistent_volume_claim {
                all.insert(Reference::Claim(claim.claim_name.clone()));
            }
            if let Some(secret) = &volume.secret {
                let name = secret.secret_name.as_ref();
                add(&mut all, Reference::Secret, name, secret.optional);
            }
            if let Some(map) = &volume.config_map {
                add(
                    &mut all,
                    Reference::ConfigMap,
                    Some(&map.name),
                    map.optional,
                );
            }
        }
        let first = spec.init_containers.iter().flatten();
        for container in first.chain(&spec.containers) {
            of_container(&mut all, container);
        }
    }
    all
}

fn of_container(all: &mut BTreeSet<Reference>, container: &Container) {
    for variable in container.env.iter().flatten() {
        let Some(from) = &variable.value_from else {
            continue;
        };
        if let Some(key) = &from.secret_key_ref {
            add(all, Reference::Secret, Some(&key.name), key.optional);
        }
        if let Some(key) = &from.config_map_key_ref {
            add(all, Reference::ConfigMap, Some(&key.name), key.optional);
        }
    }
    for from in container.env_from.iter().flatten() {
        if let Some(secret) = &from.secret_ref {
            add(all, Reference::Secret, Some(&secret.name), secret.optional);
        }
        if let Some(map) = &from.config_map_ref {
            add(all, Reference::ConfigMap, Some(&map.name), map.optional);
        }
    }
}

fn add(
    all: &mut BTreeSet<Reference>,
    kind: fn(String) -> Reference,
    name: Option<&String>,
    optional: Option<bool>,
) {
    if let Some(name) = name.filter(|name| !name.is_empty())
        && optional != Some(true)
    {
        all.insert(kind(name.clone()));
    }
}

/// The value of the flag `--name=` of an operator.
pub fn flag(operator: &Deployment, name: &str) -> Option<String> {
    let spec = operator.spec.as_ref()?.template.spec.as_ref()?;
    let all = spec.containers.iter();
    let mut args = all.flat_map(|container| container.args.iter().flatten());
    let value = args.find_map(|arg| arg.strip_prefix(name)?.strip_prefix('='));
    value.map(str::to_owned)
}

/// Namespace and name of the lease that replicas of `operator` compete for.
pub fn lease_of(operator: &Deployment) -> Option<(String, String)> {
    let namespace = flag(operator, "--lease-namespace")?;
    let name = flag(operator, "--lease-name")
        .unwrap_or_else(|| llama_operator::labels::FIELD_MANAGER.to_owned());
    Some((namespace, name))
}

/// Pods of `namespace` among `pods` that belong to the LlamaDeployment `name`.
pub fn pods_of(pods: &[Pod], namespace: &str, name: &str) -> Vec<Pod> {
    let is_of = |pod: &&Pod| {
        pod.namespace().as_deref() == Some(namespace)
            && pod
                .labels()
                .get(llama_operator::labels::DEPLOYMENT)
                .is_some_and(|of| of == name)
    };
    pods.iter().filter(is_of).cloned().collect()
}
