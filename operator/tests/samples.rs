//! What is made from each sample, as committed YAML: the pod that inspects the model, and
//! the pods of the first group once it fits.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use std::path::Path;

use llama_crds::v1alpha1::{LlamaDeployment, PlanPolicy};
use serde_json::{Value, json};
use support::Cluster;

/// The sample as the API server would give it; `None` for one of another kind.
fn sample(path: &Path) -> Option<LlamaDeployment> {
    let text = std::fs::read(path).expect("a sample");
    let mut object: Value = serde_yaml::from_slice(&text).expect("YAML");
    if object["kind"] != "LlamaDeployment" {
        return None;
    }
    let meta = &mut object["metadata"];
    meta["namespace"] = json!("team");
    meta["uid"] = json!("uid-m");
    meta["generation"] = json!(1);
    Some(serde_json::from_value(object).expect("a LlamaDeployment"))
}

#[test]
fn every_sample_has_its_plan() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/samples");
    let files = std::fs::read_dir(folder).expect("samples");
    for file in files {
        let path = file.expect("a file").path();
        let Some(object) = sample(&path) else {
            continue;
        };
        let inspected = Cluster::new(object.clone()).plan();
        assert!(inspected.create.is_empty(), "{}", path.display());
        let mut fitting = object;
        fitting.spec.plan_policy = PlanPolicy::Disabled;
        let plan = Cluster::new(fitting).plan();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        insta::with_settings!({snapshot_suffix => stem.expect("a name")}, {
            insta::assert_yaml_snapshot!("plan", json!({
                "inspection": inspected.fit.create,
                "pods": plan.create,
            }));
        });
    }
}
