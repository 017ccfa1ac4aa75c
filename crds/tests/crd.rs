//! The CRD builds, is small, documents every field, and is what is committed.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

use std::path::Path;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use llama_crds::v1alpha1::{
    Accelerator, ConditionType, LlamaDeployment, MAX_CONCURRENT_FETCHES, MAX_GROUP_ENTRIES,
    MAX_GROUPS, MAX_MODEL_NODES, MAX_MODEL_USERS, MAX_NAME_LENGTH, MAX_RANKS, MAX_TEXT,
    MIN_MEMORY_BYTES, Reason,
};
use serde_json::Value;

fn schema() -> Value {
    schema_of(&llama_crds::crd())
}

fn schema_of(crd: &CustomResourceDefinition) -> Value {
    let crd = serde_json::to_value(crd).expect("the CRD is JSON");
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// Calls `visit` with the path and schema of every field of every kind.
fn walk_all(mut visit: impl FnMut(&str, &Value)) {
    for crd in llama_crds::crds() {
        walk("", &schema_of(&crd), &mut visit);
    }
}

/// Calls `visit` with the path and schema of every field below `schema`.
fn walk(path: &str, schema: &Value, visit: &mut impl FnMut(&str, &Value)) {
    visit(path, schema);
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        walk(&format!("{path}.{name}"), field, visit);
    }
    if schema["items"].is_object() {
        walk(&format!("{path}[]"), &schema["items"], visit);
    }
}

#[test]
fn every_field_says_what_it_is() {
    let mut seen = 0;
    walk_all(|path, field| {
        let is_name = path.ends_with("nodes[]") || path.ends_with("usedBy[]");
        if !path.is_empty() && !is_name {
            let text = field["description"].as_str().unwrap_or_default();
            assert!(text.len() > 10, "{path} has no description");
            seen += 1;
        }
    });
    assert!(seen > 40, "only {seen} fields were seen");
}

/// kubectl and helm read YAML 1.1, in which these words without quotes are no text.
#[test]
fn no_value_is_a_boolean_to_kubectl() {
    let booleans = ["on", "off", "yes", "no", "y", "n", "true", "false", "null"];
    walk_all(|path, field| {
        for value in field["enum"].as_array().into_iter().flatten() {
            let word = value.as_str().unwrap_or_default().to_ascii_lowercase();
            assert!(!booleans.contains(&word.as_str()), "{path} may be {value}");
        }
    });
}

#[test]
fn every_list_and_text_of_spec_is_bounded() {
    let mut visit = |path: &str, field: &Value| match field["type"].as_str() {
        Some("string") if field["enum"].is_null() => {
            assert!(field["maxLength"].is_u64(), "{path} has no maxLength");
        }
        Some("array") => assert!(field["maxItems"].is_u64(), "{path} has no maxItems"),
        Some("integer") if !path.ends_with("tolerationSeconds") => {
            assert!(field["maximum"].is_number(), "{path} has no maximum");
        }
        _ => {}
    };
    for crd in llama_crds::crds() {
        walk("spec", &schema_of(&crd)["properties"]["spec"], &mut visit);
    }
}

#[test]
fn every_rank_of_the_greatest_group_can_be_named() {
    let mut seen = 0;
    walk("", &schema(), &mut |path, field| {
        if path.rsplit('.').next() == Some("rank") {
            let most = f64::from(llama_crds::v1alpha1::MAX_RANKS - 1);
            assert_eq!(field["maximum"].as_f64(), Some(most), "{path}");
            seen += 1;
        }
    });
    assert!(seen > 0, "no field names a rank");
}

#[test]
fn no_field_is_nullable_or_unsigned() {
    walk_all(|path, field| {
        assert!(field["nullable"].is_null(), "{path} is nullable");
        let format = field["format"].as_str().unwrap_or_default();
        assert!(!format.starts_with("uint"), "{path} has format {format}");
    });
}

#[test]
fn limits_of_the_schema_are_the_constants() {
    let schema = schema();
    let replicas = &schema["properties"]["spec"]["properties"]["replicas"];
    assert_eq!(replicas["maximum"].as_f64(), Some(f64::from(MAX_GROUPS)));
    let groups = &schema["properties"]["status"]["properties"]["groups"];
    assert_eq!(groups["maxItems"].as_u64(), Some(MAX_GROUP_ENTRIES as u64));
    let group = &groups["items"]["properties"];
    let failure = &group["lastFailure"]["properties"];
    assert_eq!(
        failure["rank"]["maximum"].as_f64(),
        Some(f64::from(MAX_RANKS - 1))
    );
    for text in [&group["message"], &failure["message"]] {
        assert_eq!(text["maxLength"].as_u64(), Some(MAX_TEXT as u64));
    }
    let rules = schema["x-kubernetes-validations"].to_string();
    assert!(rules.contains(&format!("size(self.metadata.name) <= {MAX_NAME_LENGTH}")));
    let model = schema_of(&llama_crds::model_crd());
    let status = &model["properties"]["status"]["properties"];
    for (field, most) in [("nodes", MAX_MODEL_NODES), ("usedBy", MAX_MODEL_USERS)] {
        assert_eq!(status[field]["maxItems"].as_u64(), Some(most as u64));
    }
    let fetches = &model["properties"]["spec"]["properties"]["maxConcurrentFetches"];
    assert_eq!(
        fetches["maximum"].as_f64(),
        Some(f64::from(MAX_CONCURRENT_FETCHES))
    );
    let parallelism = &schema["properties"]["spec"]["properties"]["parallelism"];
    let rules = parallelism["x-kubernetes-validations"].to_string();
    assert!(rules.contains(&format!("self.tensor * self.pipeline <= {MAX_RANKS}")));
    let memory = &schema["properties"]["spec"]["properties"]["resources"]["properties"]["memory"];
    let least = format!("quantity('{}Mi')", MIN_MEMORY_BYTES >> 20);
    assert!(
        memory["x-kubernetes-validations"]
            .to_string()
            .contains(&least)
    );
}

#[test]
fn committed_yaml_is_the_generated_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for crd in llama_crds::crds() {
        let names = &crd.spec.names;
        for folder in ["crds", "charts/llama-operator/crd"] {
            let path = format!("{folder}/{}.yaml", names.plural);
            let text = std::fs::read_to_string(root.join(&path)).expect("run `make generate`");
            assert!(text.len() < 100_000, "{path} has {} bytes", text.len());
            let committed: CustomResourceDefinition = serde_yaml::from_str(&text).expect("parses");
            assert_eq!(committed, crd, "{path}: run `make generate`");
        }
        let page = llama_crds::reference::page(&crd).expect("writes");
        let path = format!("docs/reference/{}.md", names.kind.to_lowercase());
        let committed = std::fs::read_to_string(root.join(path));
        assert_eq!(
            committed.expect("run `make generate`"),
            page,
            "run `make generate`"
        );
    }
}

#[test]
fn rust_defaults_are_the_schema_s() {
    let deployment: LlamaDeployment = serde_json::from_value(serde_json::json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": "m"},
        "spec": {
            "model": {"source": {"pvc": {"claimName": "c", "path": "m.gguf"}}},
            "resources": {"accelerator": "Gpu", "gpu": {}, "cpu": 1, "memory": "1Gi"},
        },
    }))
    .expect("deserializes");
    let spec = deployment.spec;
    assert_eq!(spec.resources.accelerator, Accelerator::Gpu);
    let schema = schema();
    let fields = &schema["properties"]["spec"]["properties"];
    let default = |path: &[&str]| {
        let field = path.iter().fold(fields, |field, name| match *name {
            name if field[name].is_object() => &field[name],
            name => &field["properties"][name],
        });
        field["default"].clone()
    };
    assert_eq!(default(&["replicas"]), spec.replicas);
    assert_eq!(default(&["suspend"]), spec.suspend);
    assert_eq!(default(&["parallelism", "tensor"]), spec.parallelism.tensor);
    let pipeline = default(&["parallelism", "pipeline"]);
    assert_eq!(pipeline, spec.parallelism.pipeline);
    assert_eq!(default(&["parallelism", "nodes"]), spec.parallelism.nodes);
    assert_eq!(
        default(&["resources", "gpu", "resourceName"]),
        spec.resources.gpu.expect("was given").resource_name
    );
}

#[test]
fn reasons_and_types_are_camel_case_and_unique() {
    let names: Vec<_> = Reason::ALL
        .iter()
        .map(|reason| reason.as_str())
        .chain(
            ConditionType::ALL
                .iter()
                .map(|condition| condition.as_str()),
        )
        .collect();
    for name in &names {
        assert!(
            name.starts_with(|first: char| first.is_ascii_uppercase()),
            "{name}"
        );
        assert!(name.chars().all(char::is_alphanumeric), "{name}");
        assert_eq!(
            names.iter().filter(|other| other == &name).count(),
            1,
            "{name}"
        );
    }
}
