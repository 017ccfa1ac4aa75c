//! Step 5: what is told of a model. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use llama_crds::v1alpha1::{
    Copies, LlamaModelStatus, MAX_MODEL_NODES, MAX_MODEL_USERS, ModelNodePhase, ModelNodeStatus,
    ModelReason, Reason,
};

use super::plan::Plan;
use super::validate::ValidModel;
use crate::events::Notice;
use crate::labels;
use crate::reconcile::condition::{Verdict, condition, shortened};
use crate::reconcile::progress;

/// The one condition.
pub const READY: &str = "Ready";
/// Nodes that the condition names at most.
const NAMED: usize = 3;

/// The condition Ready of `status`.
pub fn ready(status: &LlamaModelStatus) -> Option<&Condition> {
    let mut all = status.conditions.iter();
    all.find(|condition| condition.type_ == READY)
}

/// Status of a model whose spec cannot be planned.
pub fn of_invalid(
    reason: Reason,
    message: &str,
    previous: &LlamaModelStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> LlamaModelStatus {
    let verdict = Verdict::new("False", reason, message);
    with(previous.clone(), verdict, previous, generation, now)
}

/// Status of a model that is to be left alone.
pub fn of_paused(
    previous: &LlamaModelStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> LlamaModelStatus {
    let message = format!(
        "the annotation {} is true: no pod is created or deleted",
        labels::PAUSE
    );
    let was_ready = ready(previous).is_some_and(|ready| ready.status == "True");
    let status = if was_ready { "True" } else { "False" };
    let verdict = Verdict::new(status, Reason::Paused, message);
    with(previous.clone(), verdict, previous, generation, now)
}

/// Status of a model that was planned and applied.
pub fn of_plan(
    model: &ValidModel,
    plan: &Plan,
    previous: &LlamaModelStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> LlamaModelStatus {
    let whole = plan.nodes.iter().filter(|node| is_whole(node)).count();
    let count = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    let status = LlamaModelStatus {
        identity: Some(model.cache.entry.clone()),
        claim_name: Some(model.cache.claim.clone()),
        revision: Some(model.revision.clone()),
        desired_copies: count(plan.nodes.len()),
        ready_copies: count(whole),
        nodes: plan.nodes.clone(),
        used_by: plan.users.iter().take(MAX_MODEL_USERS).cloned().collect(),
        ..LlamaModelStatus::default()
    };
    let verdict = verdict(model, plan, whole);
    with(status, verdict, previous, generation, now)
}

fn with(
    status: LlamaModelStatus,
    verdict: Verdict,
    previous: &LlamaModelStatus,
    generation: Option<i64>,
    now: Timestamp,
) -> LlamaModelStatus {
    LlamaModelStatus {
        observed_generation: generation,
        conditions: vec![condition(READY, verdict, ready(previous), generation, now)],
        ..status
    }
}

fn is_whole(node: &ModelNodeStatus) -> bool {
    node.phase == ModelNodePhase::Ready
}

fn verdict(model: &ValidModel, plan: &Plan, whole: usize) -> Verdict {
    if plan.is_blind {
        let message = "the operator watches one namespace and may not see nodes: set spec.copies \
                       to Shared, or let it watch all namespaces";
        return Verdict::new("False", ModelReason::NodesNotVisible.as_str(), message);
    }
    let all = plan.nodes.len();
    if all == 0 {
        let message = "no node that takes pods matches spec.nodes (nodeSelector and tolerations)";
        return Verdict::new("False", ModelReason::NoNodes.as_str(), message);
    }
    let mut words = vec![held(model, whole, all)];
    if whole == all {
        words.extend(beyond(plan));
        let reason = ModelReason::Fetched.as_str();
        return Verdict::new("True", reason, words.join("; "));
    }
    let obstacle = plan.claim.as_ref().map(|obstacle| &obstacle.message);
    words.extend(plan.refused.as_ref().or(obstacle).cloned());
    let mut rest: Vec<_> = plan.nodes.iter().filter(|node| !is_whole(node)).collect();
    rest.sort_by_key(|node| order(node));
    words.extend(rest.iter().take(NAMED).map(|node| told(model, node)));
    if rest.len() > NAMED {
        words.push(format!("and {} more", rest.len() - NAMED));
    }
    words.extend(beyond(plan));
    Verdict::new("False", reason(plan), shortened(&words.join("; ")))
}

/// What is told first: what failed, then what is on its way.
fn order(node: &ModelNodeStatus) -> (u8, bool) {
    let place = match node.phase {
        ModelNodePhase::Failed => 0,
        ModelNodePhase::Fetching => 1,
        ModelNodePhase::Waiting | ModelNodePhase::Ready => 2,
    };
    (place, node.reason.is_none())
}

/// "3 of 5 nodes hold it".
fn held(model: &ValidModel, whole: usize, all: usize) -> String {
    match (model.copies, whole) {
        (Copies::Shared, 0) => "the copy is not whole".to_owned(),
        (Copies::Shared, _) => "the copy is whole".to_owned(),
        (Copies::PerNode, _) if all == 1 => format!("{whole} of 1 node holds it"),
        (Copies::PerNode, _) => format!("{whole} of {all} nodes hold it"),
    }
}

fn told(model: &ValidModel, node: &ModelNodeStatus) -> String {
    let message = node
        .message
        .as_deref()
        .unwrap_or("waits")
        .trim_end_matches('.');
    let doing = match &node.progress {
        Some(progress) => format!("has fetched {}", progress::short(progress)),
        None if node.phase == ModelNodePhase::Waiting => message.to_owned(),
        None => return format!("{}: {message}", name(model, node)),
    };
    format!("{} {doing}", name(model, node))
}

fn name<'a>(model: &ValidModel, node: &'a ModelNodeStatus) -> &'a str {
    match model.copies {
        Copies::Shared => "it",
        Copies::PerNode => &node.name,
    }
}

fn beyond(plan: &Plan) -> Option<String> {
    let more = plan.left_out;
    (more > 0).then(|| {
        format!(
            "{more} more nodes match, beyond the {MAX_MODEL_NODES} that one LlamaModel serves: \
             share them out by spec.nodes"
        )
    })
}

/// The first failure, then what keeps everything waiting.
fn reason(plan: &Plan) -> String {
    let of = |phase: ModelNodePhase| {
        let mut nodes = plan.nodes.iter().filter(move |node| node.phase == phase);
        nodes.find_map(|node| node.reason.clone())
    };
    if let Some(reason) = of(ModelNodePhase::Failed) {
        return reason;
    }
    if plan.refused.is_some() {
        return Reason::CreationRefused.to_string();
    }
    if let Some(obstacle) = &plan.claim {
        return obstacle.reason.to_string();
    }
    let mut nodes = plan.nodes.iter();
    let is_fetching = nodes.any(|node| node.phase == ModelNodePhase::Fetching);
    let waits_for = of(ModelNodePhase::Waiting).filter(|_| !is_fetching);
    waits_for.unwrap_or_else(|| ModelReason::Fetching.as_str().to_owned())
}

/// Events of a round that led from `before` to `after`.
pub fn notices(
    plan: Option<&Plan>,
    before: &LlamaModelStatus,
    after: &LlamaModelStatus,
    now: Timestamp,
) -> Vec<Notice> {
    let failed = plan.into_iter().flat_map(|plan| {
        let just = |node: &&ModelNodeStatus| plan.failed.contains(&node.name);
        plan.nodes.iter().filter(just)
    });
    let mut all: Vec<_> = failed
        .map(|node| Notice {
            warning: true,
            reason: node.reason.clone().unwrap_or_default(),
            action: "Fetch",
            note: format!(
                "{}: {}",
                node.name,
                node.message.as_deref().unwrap_or_default()
            ),
            occurrence: node.pod.clone().unwrap_or_default(),
        })
        .collect();
    let (Some(new), old) = (ready(after), ready(before)) else {
        return all;
    };
    let is_warning = [
        Reason::InvalidSpec.as_str(),
        Reason::CreationRefused.as_str(),
        Reason::PersistentVolumeClaimNotFound.as_str(),
        Reason::PersistentVolumeClaimLost.as_str(),
        ModelReason::NodesNotVisible.as_str(),
    ]
    .contains(&new.reason.as_str());
    let is_news = old.is_none_or(|old| (&old.status, &old.reason) != (&new.status, &new.reason));
    if is_news && (is_warning || new.status == "True") {
        all.push(Notice {
            warning: is_warning,
            reason: new.reason.clone(),
            action: "Fetch",
            note: new.message.clone(),
            occurrence: now.as_second().to_string(),
        });
    }
    all
}
