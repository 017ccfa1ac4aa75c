//! The golden answers: what the first group of some weights, layout and build answered is
//! what every later one must answer before it serves. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use llama_crds::v1alpha1::{LlamaDeploymentStatus, MAX_SELF_TESTS, SelfTestRecord};

use super::groups::{GroupPlan, pods_of};
use super::observe::Observed;
use super::plan::{Plan, fnv1a};
use super::template::{Template, Templates};

/// Names what decides the golden answer of a group: model, layout, precision and build.
pub fn key(template: &Template) -> String {
    let deployment = &template.deployment;
    let mut inputs = format!(
        "{:?} {} {} {:?} {} {}",
        deployment.source,
        deployment.tensor,
        deployment.pipeline,
        deployment.max_tokens,
        deployment.gpu.is_some(),
        template.worker.image
    );
    inputs.extend(deployment.other_kv_cache());
    format!("{:016x}", fnv1a(inputs.as_bytes()))
}

/// The answer that a group made from `template` must give, if one is on record.
pub fn expected(status: &LlamaDeploymentStatus, template: &Template) -> Option<String> {
    if !template.deployment.checks_answers {
        return None;
    }
    let key = key(template);
    let record = status.self_tests.iter().find(|record| record.key == key)?;
    Some(record.answer.clone())
}

/// First pods of groups that serve and whose answer is not on record.
pub fn unanswered(plan: &Plan, status: &LlamaDeploymentStatus, observed: &Observed) -> Vec<String> {
    plan.groups
        .iter()
        .filter(|group| group.is_wanted() && group.is_ready())
        .filter(|group| {
            let template = plan.templates.of(&group.status.revision);
            template.is_some_and(|template| {
                template.deployment.checks_answers && expected(status, template).is_none()
            })
        })
        .filter_map(|group| leader(group, observed))
        .collect()
}

/// The records of `previous`, with what groups that serve have told since.
pub fn records(
    previous: &LlamaDeploymentStatus,
    groups: &[GroupPlan],
    templates: &Templates,
    observed: &Observed,
    now: Timestamp,
) -> Vec<SelfTestRecord> {
    let mut records = previous.self_tests.clone();
    for group in groups.iter().filter(|group| group.is_ready()) {
        let Some(template) = templates.of(&group.status.revision) else {
            continue;
        };
        let answer = leader(group, observed)
            .and_then(|uid| observed.states.get(&uid))
            .and_then(|state| state.answer.clone());
        let (Some(answer), key) = (answer, key(template)) else {
            continue;
        };
        if template.deployment.checks_answers && records.iter().all(|record| record.key != key) {
            records.push(SelfTestRecord {
                key,
                answer,
                revision: group.status.revision.clone(),
                time: Time(now),
            });
        }
    }
    let surplus = records.len().saturating_sub(MAX_SELF_TESTS);
    records.drain(..surplus);
    records
}

/// UID of the first pod of `group`.
pub(super) fn leader(group: &GroupPlan, observed: &Observed) -> Option<String> {
    let mut pods = pods_of(group, observed);
    pods.find(|pod| pod.node == 0).map(|pod| pod.uid.to_owned())
}
