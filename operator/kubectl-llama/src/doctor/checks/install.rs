//! The `CustomResourceDefinition`, the operator and its lease.

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray,
};
use kube::ResourceExt;
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::labels;

use crate::doctor::facts::{Facts, Operator, Seen, flag, lease_of};
use crate::doctor::finding::Finding;
use crate::words::{age, count, full_name};

/// Fields that a finding names at most.
const NAMED: usize = 5;

/// What there is to say of them.
pub(super) fn check(facts: &Facts, now: Timestamp) -> Vec<Finding> {
    let mut findings = vec![definition(facts)];
    match &facts.operators {
        Seen::Hidden(why) => findings.push(Finding::skip("operator", why)),
        Seen::Known(operators) if operators.is_empty() => {
            let message = format!(
                "no Deployment with the labels {} exists in any namespace",
                labels::operators()
            );
            findings.push(Finding::fail("operator", message, INSTALL));
        }
        Seen::Known(operators) => {
            for operator in operators {
                findings.push(running(operator));
                findings.push(lease(operator, now));
            }
            findings.extend(rivals(operators));
        }
    }
    findings
}

const INSTALL: &str = "install the chart: helm install llama-operator charts/llama-operator";
const UPGRADE: &str = "bring the chart and this plugin to the same version (helm upgrade)";

fn definition(facts: &Facts) -> Finding {
    let about = "CustomResourceDefinition";
    let name = format!("{}.{}", llama_crds::PLURAL, llama_crds::GROUP);
    let version = <LlamaDeployment as kube::Resource>::version(&()).into_owned();
    let crd = match (&facts.crd, &facts.subjects) {
        (Seen::Known(Some(crd)), _) => crd,
        (Seen::Known(None), _) => {
            return Finding::fail(about, format!("{name} is not installed"), INSTALL);
        }
        (Seen::Hidden(_), Seen::Known(_)) => {
            return Finding::ok(about, format!("the API server serves {name} {version}"));
        }
        (Seen::Hidden(why), Seen::Hidden(_)) => return Finding::skip(about, why),
    };
    if crd.metadata.deletion_timestamp.is_some() {
        let message = format!("{name} is being deleted, and every LlamaDeployment with it");
        return Finding::fail(about, message, INSTALL);
    }
    let served = crd.spec.versions.iter().find(|one| one.name == version);
    if !served.is_some_and(|served| served.served) {
        let message = format!("{name} does not serve {version}");
        return Finding::fail(about, message, UPGRADE);
    }
    let conditions = crd
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    let established = conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Established" && condition.status == "True");
    if !established {
        let message = format!("{name} is not established");
        let next = format!("kubectl describe crd {name}");
        return Finding::fail(about, message, next);
    }
    let (here, there) = (fields(&llama_crds::crd(), &version), fields(crd, &version));
    for (missing, word) in [
        (&here - &there, "lacks fields that this plugin knows"),
        (&there - &here, "has fields that this plugin does not know"),
    ] {
        if !missing.is_empty() {
            let mut named: Vec<_> = missing.iter().take(NAMED).cloned().collect();
            if missing.len() > NAMED {
                named.push(format!("{} more", missing.len() - NAMED));
            }
            let message = format!("{name} {word}: {}", named.join(", "));
            return Finding::warn(about, message, UPGRADE);
        }
    }
    Finding::ok(about, format!("{name} {version} is served"))
}

/// Paths of all fields of `version` of `crd`.
fn fields(crd: &CustomResourceDefinition, version: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let found = crd.spec.versions.iter().find(|one| one.name == version);
    let schema = found.and_then(|version| version.schema.as_ref());
    if let Some(root) = schema.and_then(|schema| schema.open_api_v3_schema.as_ref()) {
        for part in ["spec", "status"] {
            let fields = root.properties.as_ref();
            if let Some(schema) = fields.and_then(|fields| fields.get(part)) {
                collect(&mut all, part, schema);
            }
        }
    }
    all
}

fn collect(all: &mut BTreeSet<String>, path: &str, schema: &JSONSchemaProps) {
    all.insert(path.to_owned());
    for (name, field) in schema.properties.iter().flatten() {
        collect(all, &format!("{path}.{name}"), field);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &schema.items {
        collect(all, path, item);
    }
}

fn running(operator: &Operator) -> Finding {
    let deployment = &operator.deployment;
    let name = full_name(deployment);
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas);
    let wanted = wanted.unwrap_or(1);
    let status = deployment.status.as_ref();
    let available = status.and_then(|status| status.available_replicas);
    let available = available.unwrap_or(0);
    let message = format!("Deployment {name}: {available} of {wanted} pods available");
    let space = deployment.namespace().unwrap_or_default();
    let next = format!(
        "kubectl -n {space} describe deployment {}",
        deployment.name_any()
    );
    match available {
        0 => Finding::fail("operator", message, next),
        _ if available < wanted => Finding::warn("operator", message, next),
        _ => Finding::ok("operator", message),
    }
}

fn lease(operator: &Operator, now: Timestamp) -> Finding {
    let about = "operator lease";
    let deployment = &operator.deployment;
    let space = deployment.namespace().unwrap_or_default();
    let log = format!(
        "kubectl -n {space} logs deployment/{}",
        deployment.name_any()
    );
    let Some((namespace, name)) = lease_of(deployment) else {
        let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas);
        return match replicas.unwrap_or(1) {
            ..=1 => Finding::ok(about, "one replica without leader election"),
            more => Finding::fail(
                about,
                format!("{more} replicas without leader election would work against each other"),
                "set leaderElection of the chart, or one replica",
            ),
        };
    };
    let spec = match &operator.lease {
        Some(Seen::Hidden(why)) => return Finding::skip(about, why),
        Some(Seen::Known(Some(lease))) => lease.spec.clone().unwrap_or_default(),
        Some(Seen::Known(None)) | None => {
            let message = format!("Lease {namespace}/{name} does not exist: no operator leads");
            return Finding::fail(about, message, log);
        }
    };
    let holder = spec.holder_identity.unwrap_or_default();
    if holder.is_empty() {
        let message = format!("nobody holds Lease {namespace}/{name}");
        return Finding::fail(about, message, log);
    }
    let Some(renewed) = spec.renew_time else {
        let message = format!("{holder} has never renewed Lease {namespace}/{name}");
        return Finding::fail(about, message, log);
    };
    let ago = age(renewed.0, now);
    let lasts = spec.lease_duration_seconds.unwrap_or(0);
    let is_over = now.duration_since(renewed.0).as_secs() > i64::from(lasts);
    let message =
        format!("{holder} holds Lease {namespace}/{name}, renewed {ago} ago (it lasts {lasts}s)");
    if is_over {
        Finding::fail(
            about,
            format!("{message}: it is over, or clocks differ"),
            log,
        )
    } else {
        Finding::ok(about, message)
    }
}

/// Operators that would each work on everything.
fn rivals(operators: &[Operator]) -> Option<Finding> {
    let everywhere: Vec<_> = operators
        .iter()
        .filter(|operator| flag(&operator.deployment, "--watch-namespace").is_none())
        .map(|operator| full_name(&operator.deployment))
        .collect();
    let number = i64::try_from(everywhere.len()).unwrap_or(i64::MAX);
    (number > 1).then(|| {
        let message = format!(
            "{} watch all namespaces: {}",
            count(number, "operator"),
            everywhere.join(", ")
        );
        Finding::fail("operator", message, "keep one of them (helm uninstall)")
    })
}
