//! A memory plan as a page. Pure.

use std::fmt::Write as _;

use kube::ResourceExt;
use llama_crds::v1alpha1::{
    Accelerator, AlternativeSpec, ConditionType, DeploymentPlan, LlamaDeployment, PlanAlternative,
    PlanPolicy, PlannedShare,
};
use serde::Serialize;

use crate::error::Error;
use crate::output::yaml;
use crate::status::condition;
use crate::words::{NONE, Table, bytes, count, full_name};

/// What the plan means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The model fits, or nobody asked.
    Good,
    /// It is not known whether it fits.
    Unknown,
    /// It does not fit, or cannot be read.
    Bad,
}

impl Verdict {
    /// Whether there is nothing to be done.
    pub fn is_good(self) -> bool {
        self == Self::Good
    }
}

/// What the plan of `deployment` means.
pub fn verdict(deployment: &LlamaDeployment) -> Verdict {
    let status = deployment.status.as_ref();
    let plan = status.and_then(|status| status.plan.as_ref());
    match plan.map(|plan| plan.fits) {
        Some(Some(true)) => Verdict::Good,
        Some(Some(false)) => Verdict::Bad,
        None if deployment.spec.plan_policy == PlanPolicy::Disabled => Verdict::Good,
        None if status.is_some_and(|status| status.inspection.is_some()) => Verdict::Bad,
        Some(None) | None => Verdict::Unknown,
    }
}

/// What can be patched into a LlamaDeployment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SpecPatch<'a> {
    spec: &'a AlternativeSpec,
}

/// `alternative` as a patch.
pub fn patch(alternative: &PlanAlternative) -> SpecPatch<'_> {
    SpecPatch {
        spec: &alternative.spec,
    }
}

/// The plan of `deployment` as a page.
///
/// # Errors
/// When an alternative cannot be written as YAML.
pub fn page(deployment: &LlamaDeployment) -> Result<String, Error> {
    let status = deployment.status.as_ref();
    let plan = status.and_then(|status| status.plan.as_ref());
    let word = match (verdict(deployment), plan) {
        (Verdict::Good, Some(_)) => "fits",
        (Verdict::Bad, Some(_)) => "does not fit",
        (Verdict::Unknown, Some(_)) => "cannot be told whether it fits",
        (Verdict::Good, None) => "no plan is made (spec.planPolicy is Disabled)",
        (Verdict::Bad, None) => "the model could not be inspected",
        (Verdict::Unknown, None) => "no plan is made yet",
    };
    let mut page = format!("LlamaDeployment {}: {word}\n", full_name(deployment));
    let failed = status.and_then(|status| status.inspection.as_ref());
    let planned = condition(deployment, ConditionType::Planned);
    if let Some(planned) = planned.filter(|_| failed.is_none()) {
        let _ = writeln!(page, "  {}: {}", planned.reason, planned.message);
    }
    if let Some(failed) = failed {
        let again = if failed.stopped {
            "it is not tried again by itself: delete the pod of the inspection to try again"
        } else {
            "it is tried again"
        };
        let failures = count(failed.failures, "failure");
        let _ = writeln!(page, "  {}: {}", failed.reason, failed.message);
        let _ = writeln!(page, "  {failures} in a row; {again}");
    }
    if let Some(plan) = plan {
        of_plan(&mut page, deployment, plan)?;
    }
    Ok(page)
}

fn of_plan(
    page: &mut String,
    deployment: &LlamaDeployment,
    plan: &DeploymentPlan,
) -> Result<(), Error> {
    let (model, layout) = (&plan.model, plan.layout);
    let ranks = layout.tensor * layout.pipeline;
    let _ = writeln!(
        page,
        "\nModel        {}: {}, {}, {}, {} of weights, made for {} tokens",
        model.architecture,
        count(model.layers, "layer"),
        count(model.heads, "head"),
        count(model.kv_heads, "key/value head"),
        bytes(model.weight_bytes),
        model.max_tokens
    );
    let _ = writeln!(
        page,
        "Layout       {} in {} a group (tensor {}, pipeline {})",
        count(ranks, "rank"),
        count(layout.nodes, "pod"),
        layout.tensor,
        layout.pipeline
    );
    let replicated = match plan.kv_head_replication {
        ..=1 => String::new(),
        times => format!(", kept {times} times: more ranks than key/value heads"),
    };
    let _ = writeln!(
        page,
        "KV cache     {} a token over all ranks{replicated}",
        bytes(plan.kv_bytes_per_token)
    );
    page.push('\n');
    page.push_str(&memory(plan, deployment.spec.resources.accelerator));
    room(page, plan);
    alternatives(page, deployment, plan)
}

/// Memory of the rank and of the pod that hold most, against what there is.
fn memory(plan: &DeploymentPlan, accelerator: Accelerator) -> String {
    let (rank, pod) = (plan.per_rank, plan.per_pod);
    let mut table = Table::new(&["MEMORY", "A RANK", "A POD"]);
    let mut line = |title: &str, of: &dyn Fn(PlannedShare) -> i64| {
        table.row([title.to_owned(), bytes(of(rank)), bytes(of(pod))]);
    };
    line("weights", &|share| share.weight_bytes);
    line("reserve", &|share| share.reserve_bytes);
    if pod.adapter_bytes > 0 {
        line("adapters", &|share| share.adapter_bytes);
    }
    let title = format!("KV cache of one sequence of {} tokens", plan.max_tokens);
    line(&title, &|share| share.kv_cache_bytes);
    // On CPU cores the ranks of a pod share its memory; each GPU is one rank's.
    let mut total = |title: &str, amount: Option<i64>| {
        let amount = amount.map_or_else(|| "not known".to_owned(), bytes);
        table.row(match accelerator {
            Accelerator::Cpu => [title.to_owned(), NONE.to_owned(), amount],
            Accelerator::Gpu => [title.to_owned(), amount, NONE.to_owned()],
        });
    };
    total("needed", Some(plan.needed_bytes));
    total("there is", plan.memory_bytes);
    table.text("")
}

fn room(page: &mut String, plan: &DeploymentPlan) {
    if let Some(sequences) = plan.max_sequences_at_max_tokens {
        let held = count(sequences, "sequence");
        let pool = plan.total_tokens.filter(|tokens| *tokens > 0);
        let pool = pool.map_or_else(String::new, |tokens| {
            let size = bytes(tokens.saturating_mul(plan.kv_bytes_per_token));
            format!("; its KV pool of {size} holds {tokens} tokens")
        });
        let _ = writeln!(
            page,
            "\nA group holds {held} of {} tokens at the same time{pool}.",
            plan.max_tokens
        );
    }
    if let Some(measured) = &plan.measured {
        let side = if measured.error_percent < 0 {
            "below"
        } else {
            "above"
        };
        let _ = writeln!(
            page,
            "Measured: the fullest rank takes {}, the plan says {} ({} % {side}).",
            bytes(measured.used_bytes),
            bytes(measured.planned_bytes),
            measured.error_percent.abs()
        );
    }
}

fn alternatives(
    page: &mut String,
    deployment: &LlamaDeployment,
    plan: &DeploymentPlan,
) -> Result<(), Error> {
    if plan.alternatives.is_empty() {
        return Ok(());
    }
    page.push_str("\nWhat would fit\n");
    for (number, alternative) in (1..).zip(&plan.alternatives) {
        let _ = writeln!(
            page,
            "\n# {number}: holds {}",
            count(alternative.sequences, "sequence")
        );
        page.push_str(yaml(&patch(alternative))?.trim_end());
        page.push('\n');
    }
    let name = deployment.name_any();
    let space = deployment.namespace().unwrap_or_default();
    let _ = writeln!(
        page,
        "\nTo take the first:\n  kubectl llama -n {space} plan {name} --alternative 1 > change.yaml\n  \
         kubectl -n {space} patch ld {name} --type merge --patch-file change.yaml"
    );
    Ok(())
}
