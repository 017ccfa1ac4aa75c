//! What ranks really take of memory, beside what was planned. Pure.

use llama_contract::{RankMemory, StateReport};
use llama_crds::v1alpha1::{DeploymentPlan, PlanMeasured};

/// The rank that takes most beside what the plan says of such a rank with as much in its
/// KV cache; nothing until every rank of `reports` has told. Until a long prompt was
/// computed a rank takes less: the plan's reserve counts the activations of a full step.
pub fn measured(plan: &DeploymentPlan, reports: &[StateReport]) -> Option<PlanMeasured> {
    let ranks = reports.iter().flat_map(|report| &report.ranks);
    let all: Vec<RankMemory> = ranks.map(|rank| rank.memory).collect::<Option<_>>()?;
    let most = all.iter().max_by_key(|memory| memory.used_bytes)?;
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
