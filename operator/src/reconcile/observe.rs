//! Step 1: what the cluster holds for one deployment. Reads only.

use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod, Service};
use kube::api::ListParams;
use kube::{Api, Client};
use llama_crds::v1alpha1::LlamaDeployment;

use super::{Error, fit};
use crate::{labels, names};

/// The claim that holds the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Claim {
    /// The spec names none.
    #[default]
    NotNeeded,
    /// The spec names one that does not exist.
    Missing,
    /// It exists.
    Found(Box<PersistentVolumeClaim>),
}

/// What the cluster holds for one deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Pods with the deployment's label, whoever owns them.
    pub pods: Vec<Pod>,
    /// Services of the names that the deployment needs, whoever owns them.
    pub services: Vec<Service>,
    /// The claim that holds the model.
    pub claim: Claim,
    /// Bytes of the smallest GPU that pods may get, where it had to be looked for.
    pub gpu_memory: Option<u64>,
}

/// Reads everything that planning needs, straight from the API server: no cache that
/// could be behind our own writes.
pub async fn observe(
    client: &Client,
    namespace: &str,
    name: &str,
    object: &LlamaDeployment,
) -> Result<Observed, Error> {
    let failed = |what: &str| {
        let attempt = format!("read {what} of LlamaDeployment {namespace}/{name}");
        move |source| Error::api("observe", attempt, source)
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let selector = ListParams::default().labels(&labels::of_deployment(name));
    let client_service = names::client_service(name);
    let ranks_service = names::ranks_service(name);
    let claim_name = object.spec.model.source.pvc.as_ref();
    let claim = async {
        match claim_name {
            None => Ok(Claim::NotNeeded),
            Some(pvc) => Ok(claims
                .get_opt(&pvc.claim_name)
                .await?
                .map_or(Claim::Missing, |claim| Claim::Found(Box::new(claim)))),
        }
    };
    let (pods, client_service, ranks_service, claim, gpu_memory) = tokio::join!(
        pods.list(&selector),
        services.get_opt(&client_service),
        services.get_opt(&ranks_service),
        claim,
        gpu_memory(client, object)
    );
    let services = [
        client_service.map_err(failed("the client Service"))?,
        ranks_service.map_err(failed("the ranks Service"))?,
    ];
    Ok(Observed {
        pods: pods.map_err(failed("the pods"))?.items,
        services: services.into_iter().flatten().collect(),
        claim: claim.map_err(failed("the model's claim"))?,
        gpu_memory: gpu_memory.map_err(failed("the nodes with GPUs"))?,
    })
}

/// Bytes of the smallest GPU among the nodes that the placement allows, where that has to
/// be known. An operator that watches only some namespaces may not read nodes.
async fn gpu_memory(client: &Client, object: &LlamaDeployment) -> Result<Option<u64>, kube::Error> {
    let (spec, generation) = (&object.spec, object.metadata.generation);
    if !fit::needs_nodes(spec, object.status.as_ref(), generation) {
        return Ok(None);
    }
    let labelled = ListParams::default().labels(fit::GPU_MEMORY_LABEL);
    match Api::<Node>::all(client.clone()).list(&labelled).await {
        Ok(nodes) => Ok(fit::least_gpu_memory(&nodes.items, spec.placement.as_ref())),
        Err(kube::Error::Api(status)) if status.is_forbidden() => Ok(None),
        Err(error) => Err(error),
    }
}
