//! Lets pods go that end and that Kueue keeps.
//!
//! Kueue keeps a pod of a pod group until another takes its place or the pod group is over.
//! Ours are replaced under their own names, which are free only once they are gone, and
//! pods of a `LlamaDeployment` that was deleted are never replaced. A pod is let go once
//! status has another incarnation of its group, so that why it ended was seen. The kubelet
//! still has its time: a pod stays until its containers have ended, and its quota is taken
//! until then.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::core::{ObjectMeta, PartialObjectMeta};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use llama_crds::v1alpha1::LlamaDeployment;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::object::Guarded;
use super::watch::{all, scoped};
use crate::context::Context;
use crate::labels::{self, FIELD_MANAGER};
use crate::reconcile::kueue::MANAGED;
use crate::telemetry::chain;

/// Looks at the status of one pod's deployment; then the pod goes in any case, since an
/// operator that is paused writes none.
const LOOKS: u32 = 30;
/// Tries to let one pod go.
const TRIES: u32 = 5;
/// The pause between two looks or tries, and the longest wait for an answer.
const PAUSE: Duration = Duration::from_secs(1);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Pods that are let go at the same time.
const CONCURRENT: usize = 64;

/// Watches pods that Kueue keeps, in `namespace` or in all, for as long as it is polled.
pub async fn run(context: Arc<Context>, namespace: Option<String>) {
    let pods = scoped::<PartialObjectMeta<Pod>>(&context.client, namespace.as_deref());
    let kept = format!("{},{MANAGED}", labels::managed());
    watcher(pods, all().labels(&kept))
        .default_backoff()
        .for_each_concurrent(CONCURRENT, |event| look(&context, event))
        .await;
}

async fn look(context: &Context, event: watcher::Result<Event<PartialObjectMeta<Pod>>>) {
    match event {
        Ok(Event::Apply(pod) | Event::InitApply(pod)) => {
            if let Some(patch) = patch(&pod.metadata) {
                await_record(&context.client, &pod).await;
                release(&context.client, &pod, &patch).await;
            }
        }
        Ok(_) => {}
        Err(error) => {
            context.metrics.watch_failed();
            tracing::warn!(error = chain(&error), "watch failed, opening it again");
        }
    }
}

/// Waits until the end of `pod` is on record.
async fn await_record(client: &Client, pod: &PartialObjectMeta<Pod>) {
    let namespace = pod.namespace().unwrap_or_default();
    let objects: Api<Guarded> = Api::namespaced(client.clone(), &namespace);
    let name = pod.labels().get(labels::DEPLOYMENT);
    let name = name.cloned().unwrap_or_default();
    for _ in 0..LOOKS {
        match timeout(ANSWER_WITHIN, objects.get_opt(&name)).await {
            Ok(Ok(Some(Guarded(Ok(object))))) if !is_on_record(&object, &pod.metadata) => {}
            Ok(Ok(_)) => return,
            // The next look may have an answer.
            Ok(Err(_)) | Err(_) => {}
        }
        sleep(PAUSE).await;
    }
}

/// Whether `pod`, which ends, is of no incarnation that `object` is to have.
fn is_on_record(object: &LlamaDeployment, pod: &ObjectMeta) -> bool {
    let number = |label: &str| pod.labels.as_ref()?.get(label)?.parse::<i64>().ok();
    let owners = pod.owner_references.as_deref().unwrap_or_default();
    let is_ours = owners
        .iter()
        .any(|owner| Some(&owner.uid) == object.metadata.uid.as_ref());
    if !is_ours || object.metadata.deletion_timestamp.is_some() {
        return true;
    }
    let groups = object.status.iter().flat_map(|status| &status.groups);
    let mut groups = groups.filter(|group| Some(group.index.into()) == number(labels::GROUP));
    groups.all(|group| group.drain.is_some() || Some(group.epoch) != number(labels::EPOCH))
}

/// The patch that takes Kueue's finalizer off a pod that ends; `None` where there is none.
fn patch(pod: &ObjectMeta) -> Option<Value> {
    pod.deletion_timestamp.as_ref()?;
    let finalizers = pod.finalizers.as_deref().unwrap_or_default();
    let others: Vec<_> = finalizers.iter().filter(|name| *name != MANAGED).collect();
    (others.len() < finalizers.len()).then(|| {
        json!({"metadata": {
            "uid": pod.uid,
            // Another may have changed the list.
            "resourceVersion": pod.resource_version,
            "finalizers": others,
        }})
    })
}

async fn release(client: &Client, pod: &PartialObjectMeta<Pod>, patch: &Value) {
    let namespace = pod.namespace().unwrap_or_default();
    let pods: Api<PartialObjectMeta<Pod>> = Api::namespaced(client.clone(), &namespace);
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let (name, patch) = (pod.name_any(), Patch::Merge(patch));
    for attempt in 1..=TRIES {
        let write = pods.patch_metadata(&name, &params, &patch);
        let error = match timeout(ANSWER_WITHIN, write).await {
            Ok(Ok(_)) => return,
            // It is gone, or has changed, of which the watch tells.
            Ok(Err(kube::Error::Api(status))) if status.is_not_found() || status.is_conflict() => {
                return;
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => "no answer".to_owned(),
        };
        tracing::warn!(pod = %format!("{namespace}/{name}"), attempt, %error, "cannot let the pod go");
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(finalizers: &[&str], ends: bool) -> ObjectMeta {
        let ends = ends.then_some("2026-01-01T00:00:00Z");
        let meta = json!({
            "uid": "1", "resourceVersion": "7", "finalizers": finalizers, "deletionTimestamp": ends,
        });
        serde_json::from_value(meta).expect("metadata")
    }

    #[test]
    fn only_pods_that_end_are_let_go_and_by_kueue_only() {
        assert_eq!(patch(&meta(&[MANAGED], false)), None);
        assert_eq!(patch(&meta(&["other"], true)), None);
        let released = patch(&meta(&["other", MANAGED], true)).expect("a patch");
        assert_eq!(released["metadata"]["finalizers"], json!(["other"]));
        assert_eq!(released["metadata"]["resourceVersion"], "7");
    }

    #[test]
    fn why_a_pod_ends_is_on_record_before_it_goes() {
        let pod: ObjectMeta = serde_json::from_value(json!({
            "labels": {"llmops.dev/group": "0", "llmops.dev/epoch": "1"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "m", "uid": "u"}],
        }))
        .expect("metadata");
        let deployment = |uid: &str, group: Value| -> LlamaDeployment {
            serde_json::from_value(json!({
                "apiVersion": "llmops.dev/v1alpha1", "kind": "LlamaDeployment",
                "metadata": {"name": "m", "uid": uid},
                "spec": {
                    "model": {"source": {"pvc": {"claimName": "c", "path": "m.gguf"}}},
                    "resources": {"accelerator": "Cpu", "cpu": "1", "memory": "1Gi"},
                },
                "status": {"groups": [group]},
            }))
            .expect("a deployment")
        };
        let group =
            |epoch: i64| json!({"index": 0, "revision": "r", "epoch": epoch, "phase": "Ready"});
        assert!(!is_on_record(&deployment("u", group(1)), &pod));
        assert!(is_on_record(&deployment("u", group(2)), &pod));
        assert!(is_on_record(&deployment("other", group(1)), &pod));
        let mut ends = group(1);
        ends["drain"] = json!({"reason": "ScaleDown", "since": "2026-01-01T00:00:00Z"});
        assert!(is_on_record(&deployment("u", ends), &pod));
    }
}
