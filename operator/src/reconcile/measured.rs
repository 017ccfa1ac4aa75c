//! What ranks really take of memory, beside what was planned. Pure.

use llama_contract::RankMemory;
use llama_crds::v1alpha1::{DeploymentPlan, PlanMeasured};

use super::groups::{GroupPlan, pods_of};
use super::observe::Observed;
use super::pods::PodView;

/// Percent by which a new measurement must be above the one on record to take its place:
/// a little more or less is no news.
const NEWS_PERCENT: i64 = 2;

/// `plan` with what the ranks of `group` have told, if they take more than is on record:
/// what a rank takes grows until it has computed a step of full length.
pub fn noted(plan: &DeploymentPlan, group: &GroupPlan, observed: &Observed) -> DeploymentPlan {
    let mut plan = plan.clone();
    let told = |pod: PodView<'_>| observed.states.get(pod.uid)?.memory.clone();
    let ranks: Option<Vec<_>> = pods_of(group, observed).map(told).collect();
    let Some(found) = ranks.and_then(|ranks| measured(&plan, &ranks.concat())) else {
        return plan;
    };
    let is_news = plan.measured.is_none_or(|known| {
        found.used_bytes.saturating_mul(100) > known.used_bytes.saturating_mul(100 + NEWS_PERCENT)
    });
    if is_news {
        plan.measured = Some(found);
    }
    plan
}

/// The rank of `ranks` that takes most beside what the plan says of such a rank with as
/// much in its KV cache.
pub fn measured(plan: &DeploymentPlan, ranks: &[RankMemory]) -> Option<PlanMeasured> {
    let most = ranks.iter().max_by_key(|memory| memory.used_bytes)?;
    let used = i64::try_from(most.used_bytes)
        .ok()
        .filter(|used| *used > 0)?;
    let kept = i64::try_from(most.kv_cache_bytes).ok()?;
    let share = &plan.per_rank;
    let planned = share.weight_bytes + share.reserve_bytes + share.adapter_bytes + kept;
    let error = (planned - used).checked_mul(100)? / used;
    Some(PlanMeasured {
        used_bytes: used,
        kv_cache_bytes: kept,
        planned_bytes: planned,
        error_percent: i32::try_from(error).unwrap_or(i32::MAX),
    })
}
