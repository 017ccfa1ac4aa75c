//! What is measured: the operator, and as its peer the controller of `StatefulSet`s, which
//! makes the same pods.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Service;
use kube::api::{ApiResource, DynamicObject, PostParams};
use kube::{Api, Client};
use llama_crds::v1alpha1::LlamaDeployment;
use llama_e2e::components::Programs;
use serde::Serialize;
use serde_json::{Value, json};

use crate::plane::{ControlPlane, Identity, free_port};
use crate::process::Process;
use crate::prometheus::{Metrics, count, counts, of_loopback};
use crate::watch::IsReady;

/// Pods of each object.
pub(crate) const PODS_EACH: usize = 2;
const CPU: &str = "100m";
const MEMORY: &str = "64Mi";
/// Fields of a pod's spec that its controller or the scheduler sets.
const NOT_IN_TEMPLATES: [&str; 3] = ["nodeName", "hostname", "subdomain"];

/// Whose controller is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Subject {
    /// `LlamaDeployment`s of one group of two pods, and this project's operator.
    LlamaOperator,
    /// `StatefulSet`s of two pods with the same two Services, and Kubernetes' controller.
    StatefulSet,
}

/// The operator that is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operator<'a> {
    pub(crate) program: &'a Path,
    /// Besides those that every measurement needs.
    pub(crate) arguments: &'a [String],
}

impl Subject {
    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::LlamaOperator => "llama-operator",
            Self::StatefulSet => "stateful-set",
        }
    }

    /// The kind of object.
    pub(crate) fn resource(self) -> ApiResource {
        match self {
            Self::LlamaOperator => ApiResource::erase::<LlamaDeployment>(&()),
            Self::StatefulSet => ApiResource::erase::<StatefulSet>(&()),
        }
    }

    /// Whether an object is ready.
    pub(crate) fn is_ready(self) -> IsReady {
        match self {
            Self::LlamaOperator => deployment_is_ready,
            Self::StatefulSet => set_is_ready,
        }
    }

    /// The queue of requests that the API server keeps its controller's in.
    pub(crate) fn flow_schema(self) -> &'static str {
        match self {
            Self::LlamaOperator => "service-accounts",
            Self::StatefulSet => "kube-system-service-accounts",
        }
    }

    /// Starts its controller.
    pub(crate) fn start(
        self,
        plane: &mut ControlPlane,
        programs: &Programs,
        operator: Operator<'_>,
    ) -> anyhow::Result<Controller> {
        let port = free_port()?;
        let process = match self {
            Self::LlamaOperator => {
                let kubeconfig = plane.kubeconfig(Identity::Operator);
                let mut arguments = vec![
                    "--worker-image=worker.invalid/llama-worker:bench".to_owned(),
                    format!("--listen=127.0.0.1:{port}"),
                ];
                arguments.extend_from_slice(operator.arguments);
                let environment = [("KUBECONFIG", kubeconfig.as_path())];
                plane.program("llama-operator", operator.program, arguments, &environment)?
            }
            Self::StatefulSet => {
                let flags = plane.controller_flags("--controllers=statefulset-controller", port);
                let program = programs.path("kube-controller-manager");
                plane.program("statefulset-controller", &program, flags, &[])?
            }
        };
        Ok(Controller {
            subject: self,
            process,
            port,
        })
    }

    /// Creates the object `name`. A user of `StatefulSet`s makes the Services too.
    pub(crate) async fn create(
        self,
        client: &Client,
        namespace: &str,
        name: &str,
        pod: Option<&Value>,
    ) -> anyhow::Result<()> {
        let params = PostParams::default();
        let object = match self {
            Self::LlamaOperator => deployment(name),
            Self::StatefulSet => {
                let services: Api<Service> = Api::namespaced(client.clone(), namespace);
                for service in services_of(name) {
                    let service = serde_json::from_value(service)?;
                    services.create(&params, &service).await?;
                }
                stateful_set(name, pod.context("no pod to make a template of")?)
            }
        };
        let object: DynamicObject = serde_json::from_value(object)?;
        let api: Api<DynamicObject> =
            Api::namespaced_with(client.clone(), namespace, &self.resource());
        api.create(&params, &object)
            .await
            .with_context(|| format!("create {name}"))?;
        Ok(())
    }
}

/// The controller that is measured.
pub(crate) struct Controller {
    subject: Subject,
    /// Its process.
    pub(crate) process: Process,
    port: u16,
}

/// What a controller says it has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Counters {
    /// Writes by verb, and resource where it tells.
    pub(crate) writes: BTreeMap<String, u64>,
    /// Rounds of reconciliation.
    pub(crate) rounds: u64,
    /// Objects that had a round; rounds, where it does not tell.
    pub(crate) objects: u64,
}

impl Counters {
    /// Writes of all kinds.
    pub(crate) fn all_writes(&self) -> u64 {
        self.writes.values().sum()
    }

    /// What it has done since `before`, and the objects of now.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let earlier = |kind: &String| before.writes.get(kind).copied().unwrap_or_default();
        Self {
            writes: self
                .writes
                .iter()
                .map(|(kind, writes)| (kind.clone(), writes - earlier(kind)))
                .filter(|(_, writes)| *writes > 0)
                .collect(),
            rounds: self.rounds - before.rounds,
            objects: self.objects,
        }
    }
}

impl Controller {
    /// What it has done since it started.
    pub(crate) async fn counters(&self, plane: &ControlPlane) -> anyhow::Result<Counters> {
        match self.subject {
            Subject::LlamaOperator => of_loopback(self.port).await.map(|m| of_operator(&m)),
            Subject::StatefulSet => plane.metrics_of(self.port).await.map(|m| of_sets(&m)),
        }
    }
}

fn of_operator(metrics: &Metrics) -> Counters {
    let writes = metrics.sums("llama_operator_api_writes_total", |sample| {
        let (verb, resource) = (sample.label("verb"), sample.label("resource"));
        Some(format!("{verb} {resource}"))
    });
    let objects = metrics.named("llama_operator_groups_wanted").count();
    Counters {
        writes: counts(&writes),
        rounds: count(metrics.total("llama_operator_reconcile_total")),
        objects: u64::try_from(objects).unwrap_or(u64::MAX),
    }
}

fn of_sets(metrics: &Metrics) -> Counters {
    let rounds = metrics.sums("workqueue_work_duration_seconds_count", |sample| {
        (sample.label("name") == "statefulset").then(String::new)
    });
    let rounds = count(rounds.values().sum());
    let writes = metrics.sums("rest_client_requests_total", |sample| {
        let verb = match sample.label("method") {
            "POST" => "create",
            "PUT" => "update",
            "PATCH" => "patch",
            "DELETE" => "delete",
            _ => return None,
        };
        Some(verb.to_owned())
    });
    Counters {
        writes: counts(&writes),
        rounds,
        objects: rounds,
    }
}

fn deployment(name: &str) -> Value {
    json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": {"image": {
                "reference": "models.invalid/bench:1",
                "path": "/models/bench.gguf",
            }}},
            "planPolicy": "Disabled",
            "parallelism": {"tensor": 2, "nodes": PODS_EACH},
            "resources": {"accelerator": "Cpu", "cpu": CPU, "memory": MEMORY},
        },
    })
}

fn deployment_is_ready(object: &DynamicObject) -> bool {
    let status = &object.data["status"];
    let current = status["observedGeneration"].as_i64() == object.metadata.generation;
    let conditions = status["conditions"].as_array();
    current
        && conditions
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn set_is_ready(object: &DynamicObject) -> bool {
    let status = &object.data["status"];
    status["observedGeneration"].as_i64() == object.metadata.generation
        && status["readyReplicas"] == PODS_EACH
}

/// What the operator makes for a deployment: a Service for clients, and one that gives
/// the pods host names.
fn services_of(name: &str) -> [Value; 2] {
    let service = |name: String, spec: Value| {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": spec,
        })
    };
    [
        service(
            name.to_owned(),
            json!({
                "selector": {"bench": name, "apps.kubernetes.io/pod-index": "0"},
                "ports": [{"name": "http", "port": 8000}],
            }),
        ),
        service(
            format!("{name}-ranks"),
            json!({
                "clusterIP": "None",
                "publishNotReadyAddresses": true,
                "selector": {"bench": name},
                "ports": [{"name": "rendezvous", "port": 29500}],
            }),
        ),
    ]
}

/// A set of pods like `pod`, one that the operator has made.
fn stateful_set(name: &str, pod: &Value) -> Value {
    let mut spec = pod["spec"].clone();
    if let Some(fields) = spec.as_object_mut() {
        fields.retain(|field, _| !NOT_IN_TEMPLATES.contains(&field.as_str()));
        // A set takes no pods that are not to be started again.
        fields.insert("restartPolicy".to_owned(), json!("Always"));
    }
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "replicas": PODS_EACH,
            "podManagementPolicy": "Parallel",
            "serviceName": format!("{name}-ranks"),
            "selector": {"matchLabels": {"bench": name}},
            "template": {"metadata": {"labels": {"bench": name}}, "spec": spec},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_deployment_is_valid_and_has_two_pods() {
        let value = deployment("bench-1");
        let typed: LlamaDeployment = serde_json::from_value(value).unwrap();
        assert_eq!(typed.spec.parallelism.nodes, 2);
        assert_eq!(typed.spec.replicas, 1);
    }

    #[test]
    fn ready_is_of_the_present_generation() {
        let of = |generation: i64, status: &str| {
            object(json!({
                "metadata": {"name": "a", "generation": 2},
                "status": {
                    "observedGeneration": generation,
                    "conditions": [{"type": "Ready", "status": status}],
                },
            }))
        };
        assert!(deployment_is_ready(&of(2, "True")));
        assert!(!deployment_is_ready(&of(1, "True")));
        assert!(!deployment_is_ready(&of(2, "False")));
        assert!(!deployment_is_ready(&object(json!({"metadata": {}}))));
        let set = |ready: i64| {
            object(json!({
                "metadata": {"name": "a", "generation": 1},
                "status": {"observedGeneration": 1, "readyReplicas": ready},
            }))
        };
        assert!(set_is_ready(&set(2)));
        assert!(!set_is_ready(&set(1)));
    }

    #[test]
    fn a_set_has_pods_like_the_operators() {
        let pod = json!({"spec": {
            "nodeName": "n", "hostname": "h", "subdomain": "s",
            "restartPolicy": "Never", "containers": [{"name": "worker"}],
        }});
        let spec = &stateful_set("a", &pod)["spec"]["template"]["spec"];
        assert_eq!(
            *spec,
            json!({"restartPolicy": "Always", "containers": [{"name": "worker"}]})
        );
    }

    #[test]
    fn counters_are_read_from_either_controllers_metrics() {
        let text = "llama_operator_reconcile_total{outcome=\"success\"} 7\n\
            llama_operator_api_writes_total{verb=\"create\",resource=\"pods\"} 2\n\
            llama_operator_groups_wanted{namespace=\"a\",name=\"b\"} 1\n";
        let counters = of_operator(&Metrics::parse(text));
        assert_eq!(counters.writes["create pods"], 2);
        assert_eq!((counters.rounds, counters.objects), (7, 1));
        let text = "workqueue_work_duration_seconds_count{name=\"statefulset\"} 9\n\
            workqueue_work_duration_seconds_count{name=\"other\"} 1\n\
            rest_client_requests_total{code=\"201\",method=\"POST\"} 4\n\
            rest_client_requests_total{code=\"200\",method=\"GET\"} 5\n";
        let counters = of_sets(&Metrics::parse(text));
        assert_eq!(counters.writes["create"], 4);
        assert_eq!((counters.writes.len(), counters.rounds), (1, 9));
    }

    #[test]
    fn counters_are_compared_with_earlier_ones() {
        let of = |pods, rounds| Counters {
            writes: BTreeMap::from([("create pods".to_owned(), pods), ("b".to_owned(), 1)]),
            rounds,
            objects: 4,
        };
        let since = of(9, 12).since(&of(5, 10));
        assert_eq!((since.all_writes(), since.rounds, since.objects), (4, 2, 4));
        assert_eq!(since.writes.len(), 1);
    }
}
