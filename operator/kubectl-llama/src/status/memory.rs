//! The memory plan in one line. Pure.

use llama_crds::v1alpha1::{Accelerator, DeploymentPlan};

use crate::words::{bytes, count};

/// What the plan of a deployment on `accelerator` says of memory: whether it fits, and
/// what a rank holds.
pub fn memory_lines(plan: &DeploymentPlan, accelerator: Accelerator) -> [String; 2] {
    let each = match accelerator {
        Accelerator::Cpu => "each pod",
        Accelerator::Gpu => "each GPU",
    };
    let needed = bytes(plan.needed_bytes);
    let rank = &plan.per_rank;
    let held = format!(
        "a rank: {} of weights, {} besides, {} of KV cache for each sequence of {} tokens",
        bytes(rank.weight_bytes),
        bytes(rank.reserve_bytes + rank.adapter_bytes),
        bytes(rank.kv_cache_bytes),
        plan.max_tokens
    );
    let fits = match (plan.memory_bytes.map(bytes), plan.fits) {
        (None, _) => format!("{needed} needed of {each}, whose memory is not known"),
        (Some(memory), Some(false)) => {
            format!("{needed} needed of {memory} in {each}: does not fit")
        }
        (Some(memory), _) => {
            let room = plan.max_sequences_at_max_tokens.unwrap_or(1);
            let room = count(room, "sequence");
            format!("{needed} needed of {memory} in {each}: fits, with room for {room} a group")
        }
    };
    [fits, held]
}
