//! The Services of a deployment. Pure.

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::ObjectMeta;
use llama_contract::{API_PORT, API_PORT_NAME, RENDEZVOUS_PORT, RENDEZVOUS_PORT_NAME};

use crate::reconcile::validate::ValidDeployment;
use crate::{labels, names};

/// Where clients reach the API: the first pod of every group that serves and is to go on.
pub(super) fn client(deployment: &ValidDeployment) -> Service {
    let mut selector = labels::group_pods(&deployment.name);
    for label in [labels::RANK0, labels::SERVING] {
        selector.insert(label.to_owned(), labels::TRUE.to_owned());
    }
    let spec = ServiceSpec {
        type_: Some("ClusterIP".to_owned()),
        selector: Some(selector),
        ports: Some(vec![port(API_PORT_NAME, API_PORT)]),
        ..ServiceSpec::default()
    };
    service(deployment, names::client_service(&deployment.name), spec)
}

/// Gives every pod a host name, also before it serves: ranks have to meet first.
pub(super) fn ranks(deployment: &ValidDeployment) -> Service {
    let spec = ServiceSpec {
        cluster_ip: Some("None".to_owned()),
        publish_not_ready_addresses: Some(true),
        selector: Some(labels::group_pods(&deployment.name)),
        ports: Some(vec![port(RENDEZVOUS_PORT_NAME, RENDEZVOUS_PORT)]),
        ..ServiceSpec::default()
    };
    service(deployment, names::ranks_service(&deployment.name), spec)
}

fn service(deployment: &ValidDeployment, name: String, spec: ServiceSpec) -> Service {
    Service {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(deployment.namespace.clone()),
            labels: Some(labels::common(&deployment.name)),
            owner_references: Some(vec![deployment.owner.clone()]),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: None,
    }
}

fn port(name: &str, number: u16) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        port: i32::from(number),
        target_port: Some(IntOrString::String(name.to_owned())),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    }
}
