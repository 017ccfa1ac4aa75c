//! Claims, Secrets and `ConfigMaps` that a LlamaDeployment refers to.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::reconcile::observe::{Claim, Observed};
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
    let found = Claim::Found(Box::new(claim.clone()));
    let is_model = deployment.spec.model.source.pvc.as_ref();
    let is_model = is_model.is_some_and(|pvc| pvc.claim_name == claim.name_any());
    let space = deployment.namespace().unwrap_or_default();
    let name = claim.name_any();
    let describe = format!("kubectl -n {space} describe pvc {name}");
    if is_model
        && let Ok(valid) = validate(deployment, &Observed::default())
        && let Some(obstacle) = of_claim(&valid, &found)
    {
        findings.push(Finding::fail(about, obstacle.message, describe));
    }
    let pods = deployment
        .spec
        .parallelism
        .nodes
        .saturating_mul(deployment.spec.replicas);
    let modes = claim
        .spec
        .as_ref()
        .and_then(|spec| spec.access_modes.clone());
    let modes = modes.unwrap_or_default();
    let has = |mode: &str| modes.iter().any(|one| one == mode);
    if pods > 1 && !has("ReadOnlyMany") && !has("ReadWriteMany") {
        let message = format!(
            "PersistentVolumeClaim {name} has the access modes {}, which {pods} pods on different \
             nodes cannot share",
            modes.join(", ")
        );
        let next = "use a claim with ReadOnlyMany or ReadWriteMany";
        findings.push(if has("ReadWriteOnce") {
            // All of them on one node will do.
            Finding::warn(about, message, next)
        } else {
            Finding::fail(about, message, next)
        });
    }
    findings
}
