//! Which events a round is worth. Pure.

use jiff::Timestamp;
use llama_crds::v1alpha1::{ConditionType, GroupPhase, LlamaDeploymentStatus, Reason};

use super::apply::Applied;
use super::failure::Cause;
use super::groups::NewFailure;
use super::plan::Plan;
use super::status::find;
use crate::events::Notice;
use crate::names;

/// Reasons of Ready that are worth a warning, besides failures, which have their own.
const WARNINGS: [Reason; 17] = [
    Reason::PersistentVolumeClaimNotFound,
    Reason::PersistentVolumeClaimPending,
    Reason::PersistentVolumeClaimLost,
    Reason::ModelImagePullFailed,
    Reason::WorkerImagePullFailed,
    Reason::ContainerNotStarting,
    Reason::CreationRefused,
    Reason::NameConflict,
    Reason::InvalidSpec,
    Reason::Unschedulable,
    Reason::InsufficientRoom,
    Reason::NodesNotVisible,
    Reason::KueueNotInstalled,
    Reason::RolloutHalted,
    Reason::RolledBack,
    Reason::NotFit,
    Reason::InspectionFailed,
];

/// Events of a round that led from `before` to `after`. `made` is `None` when there was
/// nothing valid to plan.
pub fn notices(
    name: &str,
    made: Option<(&Plan, &Applied)>,
    before: &LlamaDeploymentStatus,
    after: &LlamaDeploymentStatus,
    now: Timestamp,
) -> Vec<Notice> {
    let mut all = Vec::new();
    if let Some((_, applied)) = made {
        all.extend(applied.restored.iter().map(|child| of_restored(child, now)));
        all.extend(of_adopted(&applied.adopted, now));
    }
    for group in made.iter().flat_map(|(plan, _)| &plan.groups) {
        let status = &group.status;
        let group_name = format!("{name}-{}", status.index);
        let occurrence = format!("{}-{}", status.index, status.epoch);
        if let Some(failure) = &group.failure {
            all.push(of_failure(name, failure, status.phase));
        }
        if let Some(taken) = &group.taken {
            all.push(Notice {
                warning: true,
                reason: Reason::QuotaTaken.to_string(),
                action: "Queue",
                note: taken.note.clone(),
                occurrence: format!("{}-{}", status.index, taken.epoch),
            });
        }
        let old = before.groups.iter().find(|old| old.index == status.index);
        let served = old.is_some_and(|old| {
            matches!(old.phase, GroupPhase::Ready | GroupPhase::Unready)
                && old.epoch == status.epoch
        });
        if let (Some(drain), None) = (&status.drain, old.and_then(|old| old.drain.as_ref())) {
            all.push(Notice {
                warning: false,
                reason: "GroupEnding".to_owned(),
                action: "Drain",
                note: format!(
                    "group {group_name} ends ({}): it takes no new requests and finishes those \
                     under way",
                    drain.reason.as_str()
                ),
                occurrence: occurrence.clone(),
            });
        }
        if group.is_ready() && !served {
            all.push(Notice {
                warning: false,
                reason: "GroupReady".to_owned(),
                action: "Serve",
                note: format!(
                    "group {group_name} serves (incarnation {}, on {})",
                    status.epoch,
                    status.nodes.join(", ")
                ),
                occurrence,
            });
        }
    }
    all.extend(of_condition(before, after));
    all
}

/// Children that nobody owned were taken over.
fn of_adopted(children: &[String], now: Timestamp) -> Option<Notice> {
    (!children.is_empty()).then(|| Notice {
        warning: false,
        reason: Reason::Adopted.to_string(),
        action: "Adopt",
        note: format!("took over {}, which nobody owned", children.join(", ")),
        occurrence: format!("adopted-{}", now.as_second()),
    })
}

/// Somebody changed a child of ours.
fn of_restored(child: &str, now: Timestamp) -> Notice {
    Notice {
        warning: true,
        reason: Reason::Restored.to_string(),
        action: "Restore",
        note: format!(
            "{child} was changed by somebody and is as before again; change the LlamaDeployment \
             instead"
        ),
        occurrence: format!(
            "{}-{}",
            child.to_ascii_lowercase().replace(' ', "-"),
            now.as_second()
        ),
    }
}

fn of_failure(name: &str, failure: &NewFailure, phase: GroupPhase) -> Notice {
    let group = names::group(name, failure.group);
    let cause = &failure.cause;
    let outcome = if phase == GroupPhase::Failed {
        format!(
            "not trying again: correct it and change the spec, or delete pod {} to try once more",
            cause.pod
        )
    } else {
        format!("recreating the group (restart {})", failure.restarts)
    };
    Notice {
        warning: true,
        reason: cause.reason.clone(),
        action: if phase == GroupPhase::Failed {
            "Stop"
        } else {
            "Recreate"
        },
        note: format!("group {group}: {}; {outcome}", what_happened(cause)),
        occurrence: format!("{}-{}", failure.group, failure.epoch),
    }
}

/// The cause's message, with rank and node where it does not name them itself.
fn what_happened(cause: &Cause) -> String {
    let message = cause.message.trim_end_matches('.');
    let mut who = Vec::new();
    if let Some(rank) = cause.rank
        && !message.contains(&format!("rank {rank}"))
    {
        who.push(format!("rank {rank}"));
    }
    if let Some(node) = &cause.node
        && !message.contains(node.as_str())
    {
        who.push(format!("on node {node}"));
    }
    if who.is_empty() {
        message.to_owned()
    } else {
        format!("{}: {message}", who.join(" "))
    }
}

/// A warning when Ready takes a reason that somebody should look at.
fn of_condition(before: &LlamaDeploymentStatus, after: &LlamaDeploymentStatus) -> Option<Notice> {
    let now = find(after, ConditionType::Ready)?;
    let then = find(before, ConditionType::Ready);
    let same = then.is_some_and(|then| {
        then.reason == now.reason && then.observed_generation == now.observed_generation
    });
    if same || !WARNINGS.iter().any(|reason| reason.as_str() == now.reason) {
        return None;
    }
    Some(Notice {
        warning: true,
        reason: now.reason.clone(),
        action: "Wait",
        note: now.message.clone(),
        occurrence: format!("generation-{}", now.observed_generation.unwrap_or_default()),
    })
}
