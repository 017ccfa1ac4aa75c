//! Claims, Secrets and `ConfigMaps` that a LlamaDeployment refers to.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::reconcile::observe::{Claim, Observed};
use llama_operator::reconcile::source::claim_of;
use llama_operator::reconcile::validate::validate;
use llama_operator::reconcile::waiting::of_claim;

use crate::doctor::facts::{Reference, Seen, Subject, Target};
use crate::doctor::finding::Finding;
use crate::words::full_name;

/// What there is to say of what `subject` refers to.
pub(super) fn check(subject: &Subject) -> Vec<Finding> {
    let deployment = &subject.deployment;
    let about = full_name(deployment);
    let space = deployment.namespace().unwrap_or_default();
    let mut findings = Vec::new();
    for (reference, target) in &subject.targets {
        let (kind, name) = (reference.kind(), reference.name());
        match target {
            Seen::Hidden(why) => findings.push(Finding::skip(&about, why)),
            Seen::Known(Target::There) => {}
            Seen::Known(Target::Claim(claim)) => {
                findings.extend(claim_state(deployment, &about, claim));
            }
            Seen::Known(Target::Missing) => {
                let what = match reference {
                    Reference::Claim(_) => "the claim",
                    Reference::Secret(_) | Reference::ConfigMap(_) => {
                        "it with the keys that pods ask for"
                    }
                };
                findings.push(Finding::fail(
                    &about,
                    format!("{kind} {name} does not exist in namespace {space}"),
                    format!("create {what}, or change the spec"),
                ));
            }
        }
    }
    findings
}

fn claim_state(
    deployment: &LlamaDeployment,
    about: &str,
    claim: &PersistentVolumeClaim,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let name = claim.name_any();
    if claim_of(&deployment.spec) == Some(&name)
        && let Ok(valid) = validate(deployment, &Observed::default())
        && let Some(obstacle) = of_claim(&valid, &Claim::Found(Box::new(claim.clone())))
    {
        let space = deployment.namespace().unwrap_or_default();
        let next = format!("kubectl -n {space} describe pvc {name}");
        findings.push(Finding::fail(about, obstacle.message, next));
    }
    findings.extend(access(deployment, about, claim));
    findings
}

/// Whether all pods of `deployment` can use `claim` together.
fn access(
    deployment: &LlamaDeployment,
    about: &str,
    claim: &PersistentVolumeClaim,
) -> Option<Finding> {
    let (name, spec) = (claim.name_any(), &deployment.spec);
    let modes = claim.spec.as_ref()?.access_modes.clone()?;
    let cache = spec.model.cache.as_ref();
    let is_cache = cache.is_some_and(|cache| cache.claim_name == name);
    let shared: &[&str] = if is_cache {
        &["ReadWriteMany"]
    } else {
        &["ReadOnlyMany", "ReadWriteMany"]
    };
    let has = |mode: &str| modes.iter().any(|one| one == mode);
    let pods = spec.parallelism.nodes.saturating_mul(spec.replicas);
    let is_writable = modes.iter().any(|mode| mode.starts_with("ReadWrite"));
    if shared.iter().any(|mode| has(mode)) || (pods <= 1 && (is_writable || !is_cache)) {
        return None;
    }
    let listed = modes.join(", ");
    let message = format!("PersistentVolumeClaim {name} has the access modes {listed}");
    let next = format!("use a claim with {}", shared.join(" or "));
    Some(if is_cache && !is_writable {
        let message = format!("{message}: a cache must be written to");
        Finding::fail(about, message, next)
    } else {
        let message = format!("{message}, which {pods} pods on different nodes cannot share");
        if has("ReadWriteOnce") {
            // All of them on one node will do.
            Finding::warn(about, message, next)
        } else {
            Finding::fail(about, message, next)
        }
    })
}
