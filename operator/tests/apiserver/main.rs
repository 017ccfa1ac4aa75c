//! Against the real API server: what the schema refuses, what a round writes, and that
//! deletion leaves nothing. Pods do not run; the test is their kubelet.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod admission;
mod adoption;
#[path = "../support/control_plane.rs"]
mod control_plane;
mod model;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use control_plane::{control_plane, programs};
use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{Event, Pod, Secret, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, PropagationPolicy,
};
use kube::core::error_boundary::InvalidObject;
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, Resource, ResourceExt};
use llama_contract::{FailureCategory, FailureReport, FittingChange, InspectionReport, Room};
use llama_crds::v1alpha1::{ConditionType, DeploymentPlan, GroupPhase, LlamaDeployment};
use llama_operator::args::Args;
use llama_operator::backoff::Backoff;
use llama_operator::cluster::object::Guarded;
use llama_operator::cluster::{Cluster, watch};
use llama_operator::context::{Context, Settings};
use llama_operator::metrics::Metrics;
use llama_operator::reconcile::plan::WorkerSettings;
use llama_operator::reconcile::{reconcile, status};
use serde_json::{Value, json};

const NAMESPACE: &str = "default";
const WITHIN: Duration = Duration::from_mins(1);

/// One object under test and the operator's half of the work, done by hand.
struct Place {
    client: Client,
    context: Arc<Context>,
}

impl Place {
    fn new(client: &Client) -> Self {
        let settings = Settings {
            worker: WorkerSettings {
                image: "llama-operator/worker:test".to_owned(),
                pull_policy: None,
                drain_seconds: 120,
            },
            reconcile_timeout: Duration::from_secs(15),
            identity: "test".to_owned(),
        };
        let context = Arc::new(Context {
            client: client.clone(),
            metrics: Arc::new(Metrics::new()),
            cluster: Cluster::default(),
            backoff: Backoff::default(),
            settings,
        });
        let told = watch::children(&context, None);
        tokio::spawn(told.for_each(|_| std::future::ready(())));
        let told = watch::fetchers(&context, None);
        tokio::spawn(told.for_each(|_| std::future::ready(())));
        Self {
            client: client.clone(),
            context,
        }
    }

    /// Waits until the caches know what the test did as somebody else.
    async fn caught_up(&self, name: &str) -> anyhow::Result<()> {
        let selector = ListParams::default().labels(&format!("llmops.dev/deployment={name}"));
        let key = (NAMESPACE.to_owned(), name.to_owned());
        self.until("the caches catch up", async || {
            let cluster = &self.context.cluster;
            let pods = self.api::<Pod>().list(&selector).await?;
            let services = self.api::<Service>().list(&selector).await?;
            Ok(cluster.is_synced()
                && versions_of(&pods.items) == versions_of(cluster.pods.of(&key)?)
                && versions_of(&services.items) == versions_of(cluster.services.of(&key)?))
        })
        .await
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    async fn create(&self, object: Value) -> Result<LlamaDeployment, kube::Error> {
        let resource = kube::api::ApiResource::erase::<LlamaDeployment>(&());
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), NAMESPACE, &resource);
        let object: DynamicObject = serde_json::from_value(object).expect("an object");
        let created = api.create(&PostParams::default(), &object).await?;
        Ok(created.try_parse().expect("what was accepted can be read"))
    }

    async fn get(&self, name: &str) -> anyhow::Result<LlamaDeployment> {
        Ok(self.api::<LlamaDeployment>().get(name).await?)
    }

    /// One round, as the controller would call it.
    async fn round(&self, name: &str) -> anyhow::Result<LlamaDeployment> {
        self.caught_up(name).await?;
        let object = self.get(name).await?;
        let object = Arc::new(Guarded(Ok(object)));
        reconcile(object, Arc::clone(&self.context)).await?;
        self.get(name).await
    }

    /// resourceVersions of the object and of everything that belongs to it.
    async fn versions(&self, name: &str) -> anyhow::Result<BTreeMap<String, Option<String>>> {
        let selector = ListParams::default().labels(&format!("llmops.dev/deployment={name}"));
        let mut all = BTreeMap::new();
        let object = self.get(name).await?;
        all.insert("object".to_owned(), object.resource_version());
        for pod in self.api::<Pod>().list(&selector).await? {
            all.insert(format!("pod/{}", pod.name_any()), pod.resource_version());
        }
        for service in self.api::<Service>().list(&selector).await? {
            let key = format!("service/{}", service.name_any());
            all.insert(key, service.resource_version());
        }
        for revision in self.api::<ControllerRevision>().list(&selector).await? {
            all.insert("revision".to_owned(), revision.resource_version());
        }
        for secret in self.api::<Secret>().list(&selector).await? {
            let key = format!("secret/{}", secret.name_any());
            all.insert(key, secret.resource_version());
        }
        Ok(all)
    }

    async fn set_pod_status(&self, name: &str, status: Value) -> anyhow::Result<()> {
        let patch = Patch::Merge(json!({"status": status}));
        let params = PatchParams::default();
        self.api::<Pod>()
            .patch_status(name, &params, &patch)
            .await?;
        Ok(())
    }

    /// The scheduler and the kubelet: the pod gets a node, runs and is ready.
    async fn run_pod(&self, name: &str, node: &str) -> anyhow::Result<()> {
        let binding = json!({
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let url = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}/binding");
        let request = http::Request::post(url)
            .header("content-type", "application/json")
            .body(binding.to_string().into_bytes())?;
        self.client.request_text(request).await?;
        let ready = json!([{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        self.set_pod_status(name, json!({"phase": "Running", "conditions": ready}))
            .await
    }

    /// The kubelet: pods that are being deleted end at once.
    async fn end_deleted_pods(&self) -> anyhow::Result<()> {
        let pods = self.api::<Pod>();
        for pod in pods.list(&ListParams::default()).await? {
            if pod.metadata.deletion_timestamp.is_some() {
                let now = DeleteParams::default().grace_period(0);
                let _ = pods.delete(&pod.name_any(), &now).await;
            }
        }
        Ok(())
    }

    async fn until(
        &self,
        what: &str,
        mut look: impl AsyncFnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + WITHIN;
        while !look().await? {
            ensure!(Instant::now() < deadline, "{what}: not within {WITHIN:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }
}

/// Names and resourceVersions.
fn versions_of<K: Resource>(
    objects: impl IntoIterator<Item = impl std::ops::Deref<Target = K>>,
) -> BTreeMap<String, Option<String>> {
    objects
        .into_iter()
        .map(|object| (object.name_any(), object.resource_version()))
        .collect()
}

fn object(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": name},
        "spec": spec,
    })
}

fn spec() -> Value {
    json!({
        "model": {"source": {"image": {"reference": "models:1", "path": "/m.gguf"}}},
        "resources": {"accelerator": "Cpu", "cpu": "600m", "memory": "1Gi"},
        "planPolicy": "Disabled",
    })
}

#[tokio::test]
async fn the_real_api_server_agrees() -> anyhow::Result<()> {
    let Some(programs) = programs() else {
        return Ok(());
    };
    let cluster = control_plane(&programs).await?;
    let place = Place::new(&cluster.client);
    install_crd(&cluster.client).await?;
    admission::bad_specs_are_refused(&place).await?;
    admission::bad_sources_are_refused(&place).await?;
    admission::defaults_are_filled_in(&place).await?;
    admission::samples_are_accepted(&place).await?;
    model::bad_models_are_refused(&place).await?;
    model::a_model_is_fetched_ahead(&place).await?;
    an_unreadable_object_is_reported_on(&place).await?;
    an_image_volume_that_is_not_known_is_said(&place).await?;
    nothing_runs_that_does_not_fit(&place).await?;
    a_group_lives_and_dies(&place).await?;
    scaling_goes_through_the_subresource(&place).await?;
    adoption::orphans_find_their_owner_again(&place).await?;
    deletion_leaves_nothing(&place).await?;
    the_program_does_the_same(&place).await
}

async fn install_crd(client: &Client) -> anyhow::Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in llama_crds::crds() {
        let name = crd.name_any();
        let params = PatchParams::apply("test").validation_strict();
        crds.patch(&name, &params, &Patch::Apply(&crd)).await?;
        let established = await_condition(crds.clone(), &name, conditions::is_crd_established());
        tokio::time::timeout(WITHIN, established).await??;
    }
    Ok(())
}

/// As after a change of the schema: the object is there, and this version cannot read it.
async fn an_unreadable_object_is_reported_on(place: &Place) -> anyhow::Result<()> {
    let created = place.create(object("odd", &spec())).await?;
    let invalid = InvalidObject {
        error: "missing field `tensor`".to_owned(),
        metadata: created.metadata,
    };
    let object = Arc::new(Guarded(Err(invalid)));
    reconcile(object, Arc::clone(&place.context)).await?;
    let status = place.get("odd").await?.status.context("a status")?;
    let stalled = status::find(&status, ConditionType::Stalled).context("a condition")?;
    assert_eq!(
        (stalled.status.as_str(), stalled.reason.as_str()),
        ("True", "InvalidSpec")
    );
    assert!(
        stalled.message.contains("missing field `tensor`"),
        "{}",
        stalled.message
    );
    let delete = DeleteParams::default();
    place
        .api::<LlamaDeployment>()
        .delete("odd", &delete)
        .await?;
    Ok(())
}

/// An API server without image volumes drops the field, and a volume without a kind is an
/// empty folder.
async fn an_image_volume_that_is_not_known_is_said(place: &Place) -> anyhow::Result<()> {
    let mut mounted = spec();
    mounted["model"]["source"]["image"]["mount"] = json!("Volume");
    place.create(object("mounted", &mounted)).await?;
    let round = place.round("mounted").await;
    let error = round.err().context("the round was refused")?.to_string();
    ensure!(
        error.contains("create Pod mounted-0-0 with an image volume"),
        "{error}"
    );
    ensure!(pods_of(place, "mounted").await?.is_empty());
    let status = place.get("mounted").await?.status.context("a status")?;
    let ready = status::find(&status, ConditionType::Ready).context("a condition")?;
    let says = &ready.message;
    ensure!(says.contains("mount to Copy"), "{says}");
    let delete = DeleteParams::default();
    let api = place.api::<LlamaDeployment>();
    api.delete("mounted", &delete).await?;
    Ok(())
}

/// The pods of the deployment `name`.
async fn pods_of(place: &Place, name: &str) -> anyhow::Result<Vec<String>> {
    let selector = ListParams::default().labels(&format!("llmops.dev/deployment={name}"));
    let pods = place.api::<Pod>().list(&selector).await?;
    Ok(pods.iter().map(ResourceExt::name_any).collect())
}

/// What an inspection of a model that needs 1400Mi says of so much memory.
fn inspected(mebibytes: u64) -> InspectionReport {
    let (needed_bytes, fits) = (1400 << 20, mebibytes >= 1400);
    let more = FittingChange {
        memory_bytes: Some(needed_bytes),
        sequences: 1,
        ..FittingChange::default()
    };
    InspectionReport {
        max_tokens: 8192,
        needed_bytes,
        room: Some(Room {
            memory_bytes: mebibytes << 20,
            sequences: u32::from(fits),
            total_tokens: 8192 * u64::from(fits),
            fits,
        }),
        alternatives: if fits { Vec::new() } else { vec![more] },
        ..InspectionReport::default()
    }
}

/// The test is the kubelet of the inspection pod.
async fn nothing_runs_that_does_not_fit(place: &Place) -> anyhow::Result<()> {
    let mut large = spec();
    large["planPolicy"] = json!("Enforce");
    place.create(object("fit", &large)).await?;
    place.round("fit").await?;
    let pods = pods_of(place, "fit").await?;
    assert_eq!(pods, ["fit-inspect"], "and no worker");
    end_inspection(place, "fit-inspect", &inspected(1024)).await?;
    let status = place.round("fit").await?.status.context("a status")?;
    let ready = status::find(&status, ConditionType::Ready).context("a condition")?;
    let (verdict, message) = (format!("{}/{}", ready.status, ready.reason), &ready.message);
    assert_eq!(verdict, "False/NotFit");
    ensure!(
        message.contains("resources.memory to at least 1400Mi"),
        "{message}"
    );
    // Status has the result, so the pod goes; no other comes.
    place.round("fit").await?;
    place.end_deleted_pods().await?;
    place.round("fit").await?;
    assert_eq!(pods_of(place, "fit").await?, [""; 0]);
    let before = place.versions("fit").await?;
    place.round("fit").await?;
    assert_eq!(place.versions("fit").await?, before, "nothing is written");
    the_alternative_is_accepted(place, &status.plan.context("a plan")?).await
}

/// It is merged into the spec as it stands in status.
async fn the_alternative_is_accepted(place: &Place, plan: &DeploymentPlan) -> anyhow::Result<()> {
    let patch = Patch::Merge(json!({"spec": plan.alternatives[0].spec}));
    let objects = place.api::<LlamaDeployment>();
    objects
        .patch("fit", &PatchParams::default(), &patch)
        .await?;
    place.round("fit").await?;
    let pods = pods_of(place, "fit").await?;
    assert_eq!(pods, ["fit-inspect"], "another memory, another plan");
    end_inspection(place, "fit-inspect", &inspected(1400)).await?;
    let status = place.round("fit").await?.status.context("a status")?;
    let planned = status::find(&status, ConditionType::Planned).context("a condition")?;
    let verdict = format!("{}/{}", planned.status, planned.reason);
    assert_eq!(verdict, "True/Fits");
    place.round("fit").await?;
    place.end_deleted_pods().await?;
    assert_eq!(pods_of(place, "fit").await?, ["fit-0-0"]);
    objects.delete("fit", &DeleteParams::default()).await?;
    place
        .until("its pod is gone", async || {
            place.end_deleted_pods().await?;
            Ok(pods_of(place, "fit").await?.is_empty())
        })
        .await
}

async fn end_inspection(place: &Place, pod: &str, report: &InspectionReport) -> anyhow::Result<()> {
    let terminated = json!({"exitCode": 0, "message": report.to_termination_message()});
    let container = json!({
        "name": "inspect", "image": "w", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"terminated": terminated},
    });
    let status = json!({"phase": "Succeeded", "containerStatuses": [container]});
    place.set_pod_status(pod, status).await
}

async fn a_group_lives_and_dies(place: &Place) -> anyhow::Result<()> {
    let mut two_pods = spec();
    two_pods["parallelism"] = json!({"tensor": 4, "nodes": 2});
    place.create(object("m", &two_pods)).await?;
    let seen = place.round("m").await?;
    let ready = |object: &LlamaDeployment| {
        let status = object.status.clone().unwrap_or_default();
        let condition = status::find(&status, ConditionType::Ready).cloned();
        condition.map(|found| format!("{}/{}", found.status, found.reason))
    };
    assert_eq!(ready(&seen).as_deref(), Some("False/GroupsStarting"));
    let versions = place.versions("m").await?;
    let names: Vec<_> = versions.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "object",
            "pod/m-0-0",
            "pod/m-0-1",
            "revision",
            "secret/m-rendezvous",
            "service/m",
            "service/m-ranks"
        ]
    );
    for (pod, node) in [("m-0-0", "node-a"), ("m-0-1", "node-b")] {
        place.run_pod(pod, node).await?;
    }
    place.round("m").await?;
    assert_eq!(
        ready(&place.get("m").await?).as_deref(),
        Some("True/AllGroupsReady")
    );
    steady_state_writes_nothing(place).await?;

    let report = FailureReport {
        category: FailureCategory::RankDied,
        message: "rank 3 on node node-b was killed by SIGKILL at step 17".to_owned(),
        rank: Some(3),
        node: Some("node-b".to_owned()),
        step: Some(17),
        epoch: 0,
    };
    let terminated = json!({"exitCode": 70, "message": report.to_termination_message()});
    let container = json!({
        "name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"terminated": terminated},
    });
    let failed = json!({"phase": "Failed", "containerStatuses": [container]});
    place.set_pod_status("m-0-1", failed).await?;
    let group = place.round("m").await?.status.expect("a status").groups[0].clone();
    assert_eq!(
        (group.phase, group.epoch, group.restarts),
        (GroupPhase::Restarting, 1, 1)
    );
    let failure = group.last_failure.expect("a failure");
    assert_eq!(
        (failure.rank, failure.node.as_deref()),
        (Some(3), Some("node-b"))
    );
    let events = place.api::<Event>().list(&ListParams::default()).await?;
    let told = events
        .items
        .iter()
        .find(|event| event.reason.as_deref() == Some("RankDied"));
    let note = told
        .and_then(|event| event.message.clone())
        .context("an event")?;
    assert!(
        note.contains("rank 3 on node node-b") && note.contains("restart 1"),
        "{note}"
    );

    // The controller would call again by itself; the test is the kubelet as well.
    place
        .until("the group is made anew", async || {
            place.round("m").await?;
            place.end_deleted_pods().await?;
            let second = ListParams::default().labels("llmops.dev/epoch=1");
            Ok(place.api::<Pod>().list(&second).await?.items.len() == 2)
        })
        .await
}

async fn steady_state_writes_nothing(place: &Place) -> anyhow::Result<()> {
    let before = place.versions("m").await?;
    for _ in 0..3 {
        place.round("m").await?;
    }
    assert_eq!(place.versions("m").await?, before);
    Ok(())
}

async fn scaling_goes_through_the_subresource(place: &Place) -> anyhow::Result<()> {
    let api = place.api::<LlamaDeployment>();
    let patch = Patch::Merge(json!({"spec": {"replicas": 2}}));
    let scale = api
        .patch_scale("m", &PatchParams::default(), &patch)
        .await?;
    let status = scale.status.context("a scale has a status")?;
    assert_eq!(
        status.selector.as_deref(),
        Some("llmops.dev/deployment=m,llmops.dev/rank0=true")
    );
    let scaled = place.round("m").await?.status.context("a status")?;
    assert_eq!(scaled.replicas, 2);
    let selector = ListParams::default().labels(&status.selector.unwrap_or_default());
    let leaders = place.api::<Pod>().list(&selector).await?;
    assert_eq!(leaders.items.len(), 2, "one pod a group");
    Ok(())
}

async fn deletion_leaves_nothing(place: &Place) -> anyhow::Result<()> {
    let foreground = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Foreground),
        ..DeleteParams::default()
    };
    place
        .api::<LlamaDeployment>()
        .delete("m", &foreground)
        .await?;
    if let Ok(object) = place.get("m").await {
        // On its way out it is never given new children.
        let object = Arc::new(Guarded(Ok(object)));
        reconcile(object, Arc::clone(&place.context)).await?;
    }
    let selector = ListParams::default().labels("llmops.dev/deployment=m");
    place
        .until("everything is gone", async || {
            place.end_deleted_pods().await?;
            let left = place.api::<Pod>().list(&selector).await?.items.len()
                + place.api::<Service>().list(&selector).await?.items.len()
                + place.api::<Secret>().list(&selector).await?.items.len();
            let object = place.api::<LlamaDeployment>().get_opt("m").await?;
            Ok(left == 0 && object.is_none())
        })
        .await
}

/// The whole program: lease, watches, rounds.
async fn the_program_does_the_same(place: &Place) -> anyhow::Result<()> {
    let args = Args::try_parse_from([
        "llama-operator",
        "--worker-image=llama-operator/worker:test",
        "--listen=127.0.0.1:0",
        "--lease-namespace=default",
    ])?;
    let program = llama_operator::run::run_with(place.client.clone(), args);
    let story = async {
        place.create(object("p", &spec())).await?;
        let pod = place.api::<Pod>();
        place
            .until("a pod", async || Ok(pod.get_opt("p-0-0").await?.is_some()))
            .await?;
        place.run_pod("p-0-0", "node-a").await?;
        place
            .until("Ready", async || {
                let status = place.get("p").await?.status.unwrap_or_default();
                let ready = status::find(&status, ConditionType::Ready);
                Ok(ready.is_some_and(|ready| ready.status == "True"))
            })
            .await?;
        model::the_program_fetches_to_a_new_node(place).await
    };
    tokio::select! {
        ended = program => anyhow::bail!("the operator ended: {ended:?}"),
        result = story => result,
    }
}
