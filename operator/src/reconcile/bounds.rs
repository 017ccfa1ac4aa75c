//! Texts of status, as long as its schema takes: the API server would refuse all of it for
//! one that is longer. Pure.

use llama_crds::v1alpha1::{LlamaDeploymentStatus, MAX_TEXT};

/// `status` with no text longer than [`MAX_TEXT`], where the schema says so.
pub fn bounded(mut status: LlamaDeploymentStatus) -> LlamaDeploymentStatus {
    for group in &mut status.groups {
        group.message = group.message.as_deref().map(shortened);
        if let Some(failure) = &mut group.last_failure {
            failure.message = shortened(&failure.message);
        }
    }
    if let Some(rollout) = &mut status.rollout {
        rollout.message = shortened(&rollout.message);
        if let Some(failure) = &mut rollout.failure {
            failure.message = shortened(&failure.message);
        }
    }
    for adapter in &mut status.adapters {
        adapter.message = adapter.message.as_deref().map(shortened);
    }
    if let Some(inspection) = &mut status.inspection {
        inspection.message = shortened(&inspection.message);
    }
    status
}

/// `text` with at most [`MAX_TEXT`] characters, of which the last says that there were more.
fn shortened(text: &str) -> String {
    if text.chars().count() <= MAX_TEXT {
        return text.to_owned();
    }
    text.chars().take(MAX_TEXT - 1).chain(['…']).collect()
}
