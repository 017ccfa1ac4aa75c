//! Looks before writes that by themselves would not do what they say.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::{Error, Observed, Work, post};
use crate::cluster::kinds::OwnBudget;
use crate::labels::FIELD_MANAGER;

impl Work<'_> {
    /// Takes maxUnavailable off a live budget on which somebody set it: with it no apply of
    /// the planned minAvailable would be valid.
    pub(super) async fn take_off_maximum(
        &mut self,
        budget: &PodDisruptionBudget,
        observed: &Observed,
    ) -> Result<(), Error> {
        let name = budget.name_any();
        let mut live = observed.budgets.iter();
        let live = live.find(|live| live.name_any() == name);
        let Some(live) = live.filter(|live| !live.spec["maxUnavailable"].is_null()) else {
            return Ok(());
        };
        let minimum = budget
            .spec
            .as_ref()
            .and_then(|spec| spec.min_available.as_ref());
        let patch = json!({
            "metadata": {"uid": live.uid()},
            "spec": {"maxUnavailable": null, "minAvailable": minimum},
        });
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let result = self
            .api::<OwnBudget>()
            .patch(&name, &params, &Patch::Merge(&patch))
            .await;
        let written = self.settle(result, "change PodDisruptionBudget", &name)?;
        if let Some(object) = written {
            self.context.cluster.budgets.wrote(&object);
        }
        Ok(())
    }

    /// Whether the API server would keep the volumes of `pod`. One without image volumes
    /// makes an empty folder of each, in which no model would be found.
    pub(super) async fn keeps_volumes(&mut self, pod: &Pod) -> Result<bool, Error> {
        let mounts_image = |pod: &Pod| {
            let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
            volumes.is_some_and(|all| all.iter().any(|volume| volume.image.is_some()))
        };
        if !mounts_image(pod) {
            return Ok(true);
        }
        let params = PostParams {
            dry_run: true,
            ..post()
        };
        let pods: Api<Pod> = Api::namespaced(self.context.client.clone(), self.namespace);
        let name = pod.name_any();
        let tried = match pods.create(&params, pod).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => return Ok(true),
            tried => self.settle(tried, "create Pod", &name)?,
        };
        if tried.as_ref().is_some_and(|pod| !mounts_image(pod)) {
            self.applied.refused.push(format!(
                "the API server refused to create Pod {name} with an image volume: it has no such \
                 volumes (feature gate ImageVolume, on by default since Kubernetes 1.35); set \
                 spec.model.source.image.mount to Copy"
            ));
            return Ok(false);
        }
        Ok(tried.is_some())
    }
}
