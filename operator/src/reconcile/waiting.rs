//! What keeps pods from starting. Pure.

use llama_crds::v1alpha1::Reason;

use super::kueue;
use super::observe::{Claim, Observed};
use super::plan::FETCH_CONTAINER;
use super::pods::PodView;
use super::source::Source;
use super::validate::ValidDeployment;

/// Something that keeps a pod from starting.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Obstacle {
    /// The kind.
    pub reason: Reason,
    /// What to do about it, with names.
    pub message: String,
}

impl Obstacle {
    /// Whether the model cannot be had.
    pub fn concerns_model(&self) -> bool {
        matches!(
            self.reason,
            Reason::PersistentVolumeClaimNotFound
                | Reason::PersistentVolumeClaimPending
                | Reason::PersistentVolumeClaimLost
                | Reason::ModelImagePullFailed
        )
    }
}

/// What is wrong with the claim, if the deployment needs one.
pub fn of_claim(deployment: &ValidDeployment, claim: &Claim) -> Option<Obstacle> {
    let (name, field) = deployment.source.claim()?;
    of_named_claim(name, field, &deployment.namespace, claim)
}

/// What is wrong with the claim `name`, which is named in `field`.
pub fn of_named_claim(name: &str, field: &str, namespace: &str, claim: &Claim) -> Option<Obstacle> {
    let Claim::Found(found) = claim else {
        return Some(Obstacle {
            reason: Reason::PersistentVolumeClaimNotFound,
            message: format!(
                "PersistentVolumeClaim {name} of {field} does not exist in namespace \
                 {namespace}; create it or name another"
            ),
        });
    };
    if found.metadata.deletion_timestamp.is_some() {
        return Some(Obstacle {
            reason: Reason::PersistentVolumeClaimLost,
            message: format!(
                "PersistentVolumeClaim {name} is being deleted; new pods cannot use it"
            ),
        });
    }
    let phase = found
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    match phase {
        Some("Lost") => Some(Obstacle {
            reason: Reason::PersistentVolumeClaimLost,
            message: format!(
                "PersistentVolumeClaim {name} has lost its volume; restore the volume or name \
                 another claim"
            ),
        }),
        Some("Bound") => None,
        // A class that waits for the first consumer binds once a pod is scheduled.
        _ => Some(Obstacle {
            reason: Reason::PersistentVolumeClaimPending,
            message: format!(
                "PersistentVolumeClaim {name} is not bound to a volume yet; see `kubectl -n \
                 {namespace} describe pvc {name}`"
            ),
        }),
    }
}

/// What `pod` waits for until Kueue gives its group nodes.
pub fn of_kueue(pod: &PodView<'_>, observed: &Observed) -> Option<Obstacle> {
    kueue::waits(pod).then(|| Obstacle {
        reason: Reason::WaitingForQuota,
        message: kueue::waited_for(pod, observed),
    })
}

/// What keeps `pod` from getting a node.
pub fn of_scheduling(pod: &PodView<'_>) -> Option<Obstacle> {
    let scheduled = pod.condition("PodScheduled")?;
    let stuck = scheduled.status == "False" && scheduled.reason.as_deref() == Some("Unschedulable");
    stuck.then(|| Obstacle {
        reason: Reason::Unschedulable,
        message: scheduled.message.clone().unwrap_or_default(),
    })
}

/// What keeps a container of `pod`, which has the model from `source`, from starting.
pub fn of_containers(pod: &PodView<'_>, source: &Source) -> Option<Obstacle> {
    pod.containers().find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let why = waiting.reason.as_deref()?;
        let text = waiting.message.as_deref().unwrap_or("no message");
        // The kubelet alternates between trying and backing off; the cause stays the same.
        let (why, text) = match (why, text.split_once("ErrImagePull: ")) {
            ("ImagePullBackOff", Some((_, cause))) => ("ErrImagePull", cause),
            _ => (why, text),
        };
        let on = pod.node_name().unwrap_or("no node");
        let image = &container.image;
        let reason = match why {
            "ErrImagePull"
            | "ImagePullBackOff"
            | "ErrImageNeverPull"
            | "InvalidImageName"
            | "ImageInspectError"
            | "RegistryUnavailable"
            | "SignatureValidationFailed" => {
                let is_model = match source {
                    Source::Image { .. } => container.name == FETCH_CONTAINER,
                    // The container that mounts it says so.
                    Source::ImageVolume { reference, .. } => text.contains(reference.as_str()),
                    Source::Claim { .. } | Source::Fetched(_) => false,
                };
                if is_model {
                    Reason::ModelImagePullFailed
                } else {
                    Reason::WorkerImagePullFailed
                }
            }
            "CreateContainerConfigError"
            | "CreateContainerError"
            | "RunContainerError"
            | "PreStartHookError"
            | "PostStartHookError" => Reason::ContainerNotStarting,
            _ => return None,
        };
        let message = match (reason, source) {
            (
                Reason::ModelImagePullFailed,
                Source::Image { reference, .. } | Source::ImageVolume { reference, .. },
            ) => {
                format!("model image {reference} cannot be pulled on node {on} ({why}): {text}")
            }
            (Reason::ContainerNotStarting, _) => format!(
                "container {} of pod {} cannot start on node {on} ({why}): {text}",
                container.name, pod.name
            ),
            _ => format!("worker image {image} cannot be pulled on node {on} ({why}): {text}"),
        };
        Some(Obstacle { reason, message })
    })
}
