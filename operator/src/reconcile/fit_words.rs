//! A plan as status holds it, and what it means in a sentence with numbers. Pure.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use llama_contract::{FittingChange, GroupShape, InspectionReport, MemoryShare};
use llama_crds::v1alpha1::{
    AlternativeContext, AlternativeResources, AlternativeSpec, DeploymentPlan, PlanAlternative,
    PlannedLayout, PlannedModel, PlannedShare,
};

use super::validate::ValidDeployment;

const MIB: u64 = 1 << 20;

/// What `report` says of `deployment`, as status holds it.
pub fn plan(
    deployment: &ValidDeployment,
    inputs: &str,
    report: &InspectionReport,
) -> DeploymentPlan {
    let model = &report.model;
    let room = report.room.as_ref();
    DeploymentPlan {
        inputs: inputs.to_owned(),
        model: PlannedModel {
            architecture: model.architecture.clone(),
            layers: count(model.layers),
            heads: count(model.heads),
            kv_heads: count(model.kv_heads),
            weight_bytes: bytes(model.weight_bytes),
            max_tokens: model.max_tokens.into(),
        },
        layout: layout(GroupShape {
            tensor: deployment.tensor,
            pipeline: deployment.pipeline,
            nodes: deployment.nodes,
        }),
        max_tokens: report.max_tokens.into(),
        per_rank: share(&report.rank),
        per_pod: share(&report.pod),
        kv_bytes_per_token: bytes(report.kv_bytes_per_token),
        kv_head_replication: count(report.kv_head_replication),
        needed_bytes: bytes(report.needed_bytes),
        memory_bytes: room.map(|room| bytes(room.memory_bytes)),
        fits: room.map(|room| room.fits),
        max_sequences_at_max_tokens: room.map(|room| room.sequences.into()),
        total_tokens: room.map(|room| bytes(room.total_tokens)),
        alternatives: report
            .alternatives
            .iter()
            .take(3)
            .map(alternative)
            .collect(),
        measured: None,
    }
}

fn bytes(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn count(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn share(share: &MemoryShare) -> PlannedShare {
    PlannedShare {
        weight_bytes: bytes(share.weight_bytes),
        reserve_bytes: bytes(share.reserve_bytes),
        adapter_bytes: bytes(share.adapter_bytes),
        kv_cache_bytes: bytes(share.kv_cache_bytes),
    }
}

fn layout(shape: GroupShape) -> PlannedLayout {
    PlannedLayout {
        tensor: count(shape.tensor),
        pipeline: count(shape.pipeline),
        nodes: count(shape.nodes),
    }
}

fn alternative(change: &FittingChange) -> PlanAlternative {
    PlanAlternative {
        spec: AlternativeSpec {
            parallelism: change.layout.map(layout),
            context: change.max_tokens.map(|tokens| AlternativeContext {
                max_tokens: count(tokens),
            }),
            resources: change.memory_bytes.map(|bytes| AlternativeResources {
                memory: Quantity(format!("{}Mi", bytes.div_ceil(MIB))),
            }),
        },
        sequences: change.sequences.into(),
    }
}

/// Whether the model fits, with the numbers, and what would.
pub fn verdict(deployment: &ValidDeployment, plan: &DeploymentPlan) -> String {
    let on_gpus = deployment.gpu.is_some();
    let share = if on_gpus {
        &plan.per_rank
    } else {
        &plan.per_pod
    };
    let wanted = deployment.min_sequences;
    let sequences = |count: i64| match count {
        1 => format!("1 sequence of {} tokens", plan.max_tokens),
        count => format!("{count} sequences of {} tokens", plan.max_tokens),
    };
    let adapters = match share.adapter_bytes {
        0 => String::new(),
        bytes => format!(", adapters {}", size(bytes)),
    };
    let each = if wanted > 1 { " each" } else { "" };
    let who = match (on_gpus, deployment.nodes) {
        (true, _) => "each GPU ",
        (false, 1) => "",
        (false, _) => "each pod ",
    };
    let needs = format!(
        "{who}needs {} for {} (weights {}, KV cache {}{each}, reserve {}{adapters})",
        size(plan.needed_bytes),
        sequences(wanted.into()),
        size(share.weight_bytes),
        size(share.kv_cache_bytes),
        size(share.reserve_bytes),
    );
    let has = has(deployment, plan);
    match plan.fits {
        Some(true) => {
            let count = plan.max_sequences_at_max_tokens.unwrap_or_default();
            let (fitting, fit) = (sequences(count), if count == 1 { "fits" } else { "fit" });
            format!("{fitting} {fit} each group at the same time; {needs}, {has}")
        }
        Some(false) => format!("{needs}, {has}; {}", advice(plan)),
        None => format!(
            "{needs}; the memory of the GPUs is not known: set spec.resources.gpu.memory, or label \
             the nodes that placement allows with {}",
            super::fit::GPU_MEMORY_LABEL
        ),
    }
}

fn has(deployment: &ValidDeployment, plan: &DeploymentPlan) -> String {
    let memory = plan.memory_bytes.unwrap_or_default();
    match (&deployment.gpu, deployment.gpu_memory_bytes) {
        (None, _) => format!("spec.resources.memory is {}", deployment.memory),
        (Some(_), Some(_)) => format!("spec.resources.gpu.memory is {}", size(memory)),
        (Some(_), None) => format!(
            "the smallest GPU of the nodes that placement allows has {}",
            size(memory)
        ),
    }
}

fn advice(plan: &DeploymentPlan) -> String {
    let told: Vec<String> = plan.alternatives.iter().map(told).collect();
    if told.is_empty() {
        return "nothing that was tried would fit; use a smaller model or more memory".to_owned();
    }
    format!("set {}", told.join(", or "))
}

fn told(alternative: &PlanAlternative) -> String {
    let spec = &alternative.spec;
    let mut parts = Vec::new();
    if let Some(layout) = &spec.parallelism {
        parts.push(format!(
            "parallelism to tensor {}, pipeline {}, nodes {}",
            layout.tensor, layout.pipeline, layout.nodes
        ));
    }
    if let Some(context) = &spec.context {
        parts.push(format!(
            "context.maxTokens to at most {}",
            context.max_tokens
        ));
    }
    if let Some(resources) = &spec.resources {
        parts.push(format!(
            "resources.memory to at least {}",
            resources.memory.0
        ));
    }
    parts.join(" and ")
}

/// Bytes for people.
pub(super) fn size(bytes: i64) -> String {
    let bytes = u64::try_from(bytes).unwrap_or(0);
    if bytes >= 1 << 30 {
        format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
    } else {
        format!("{} MiB", bytes.div_ceil(MIB))
    }
}
