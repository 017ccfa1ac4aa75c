//! What is made from a spec, as committed YAML. `cargo insta review`, or
//! `INSTA_UPDATE=always cargo test -p llama-operator --test plan`, accepts a change.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use serde_json::{Value, json};
use support::{Cluster, deployment};

/// Services, Secret and pods of a new deployment.
fn made_from(changes: &Value) -> Value {
    let cluster = Cluster::new(deployment(changes));
    let plan = cluster.plan();
    json!({
        "services": [plan.client_service, plan.ranks_service],
        "secret": plan.secret,
        "pods": plan.create,
    })
}

#[test]
fn one_pod_on_cpu_from_a_claim() {
    let made = made_from(&json!({}));
    insta::assert_yaml_snapshot!(made);
}

/// Not "at most none is unavailable": Kubernetes compares that with the scale of the
/// deployment, which counts groups.
#[test]
fn a_budget_keeps_every_pod_of_a_group() {
    let mut cluster = Cluster::new(deployment(&json!({
        "parallelism": {"tensor": 3, "nodes": 3},
    })));
    cluster.nodes(&[]);
    let plan = cluster.plan();
    let spec = serde_json::to_value(&plan.budgets[0].spec).expect("a spec");
    assert_eq!(
        (&spec["minAvailable"], &spec["maxUnavailable"]),
        (&json!(3), &Value::Null)
    );
}

#[test]
fn three_ranks_from_an_image() {
    let image = json!({
        "reference": "registry.example/models/smollm2:q4_1",
        "path": "/models/SmolLM2.gguf",
        "pullPolicy": "IfNotPresent",
    });
    let made = made_from(&json!({
        "model": {"servedName": "smollm2", "source": {"pvc": null, "image": image}},
        "parallelism": {"tensor": 3},
        "context": {"maxTokens": 2048},
    }));
    insta::assert_yaml_snapshot!(made["pods"]);
}

#[test]
fn headers_are_read_from_a_claim() {
    let cluster = Cluster::new(deployment(&json!({
        "planPolicy": "Enforce",
        "parallelism": {"tensor": 2, "nodes": 2},
        "resources": {"accelerator": "Gpu", "gpu": {"memory": "80Gi"}},
        "context": {"maxTokens": 2048, "minConcurrentSequences": 3},
        "placement": {"nodeSelector": {"pool": "models"}},
    })));
    let plan = cluster.plan();
    assert!(plan.create.is_empty());
    insta::assert_yaml_snapshot!(plan.fit.create);
}

#[test]
fn headers_are_read_from_the_heads_of_an_image() {
    let image = json!({"reference": "registry.example/models/smollm2:q4_1", "path": "/m.gguf"});
    let cluster = Cluster::new(deployment(&json!({
        "planPolicy": "Enforce",
        "model": {"source": {"pvc": null, "image": image}},
    })));
    let plan = cluster.plan();
    assert!(plan.create.is_empty());
    insta::assert_yaml_snapshot!(plan.fit.create);
}

/// The parts of a pod that have to do with the model.
fn of_model(pod: &Value) -> Value {
    let worker = &pod["spec"]["containers"][0];
    json!({
        "fetch": pod["spec"]["initContainers"],
        "arguments": worker["args"],
        "mounts": worker["volumeMounts"],
        "volumes": pod["spec"]["volumes"],
    })
}

fn from_hub(cache: &Value) -> Value {
    let hub = json!({
        "repo": "meta-llama/Llama-3.1-8B-Instruct",
        "revision": "0e9e39f249a16976918f6564b8830bc894c89659",
        "endpoint": "https://hub.example",
        "tokenSecretRef": {"name": "hub", "key": "token"},
    });
    json!({"source": {"pvc": null, "huggingFace": hub}, "cache": cache})
}

#[test]
fn a_repository_of_a_hub_is_fetched_by_each_pod() {
    let made = made_from(&json!({"model": from_hub(&Value::Null)}));
    insta::assert_yaml_snapshot!(of_model(&made["pods"][0]));
}

#[test]
fn a_repository_of_a_hub_is_kept_in_a_cache() {
    let cache = json!({"claimName": "models", "size": "500Gi"});
    let made = made_from(&json!({"model": from_hub(&cache)}));
    insta::assert_yaml_snapshot!(of_model(&made["pods"][0]));
}

#[test]
fn objects_of_a_store_are_fetched_with_its_secret_and_certificates() {
    let store = json!({
        "uri": "s3://models/llama/m.gguf",
        "endpoint": "https://minio.storage.svc:9000",
        "region": "us-east-1",
        "secretRef": {"name": "minio"},
        "caConfigMapRef": {"name": "roots", "key": "ca.crt"},
    });
    let made = made_from(&json!({"model": {"source": {"pvc": null, "s3": store}}}));
    insta::assert_yaml_snapshot!(of_model(&made["pods"][0]));
}

#[test]
fn headers_are_fetched_past_the_cache() {
    let digest = "ab".repeat(32);
    let http = json!({
        "url": "https://models.example/llama",
        "files": [{"name": "m.gguf", "sha256": digest}],
    });
    let cluster = Cluster::new(deployment(&json!({
        "planPolicy": "Enforce",
        "model": {
            "source": {"pvc": null, "http": http},
            "cache": {"claimName": "models", "size": "500Gi"},
        },
    })));
    let plan = cluster.plan();
    let pod = serde_json::to_value(&plan.fit.create).expect("serializes");
    insta::assert_yaml_snapshot!(of_model(&pod));
}

#[test]
fn three_pods_meet_at_the_first() {
    let made = made_from(&json!({"parallelism": {"tensor": 6, "nodes": 3}}));
    assert_eq!(made["pods"].as_array().map(Vec::len), Some(3));
    insta::assert_yaml_snapshot!(json!({
        "secret": made["secret"],
        "first": made["pods"][0]["spec"]["containers"][0],
        "last": made["pods"][2]["spec"]["containers"][0],
    }));
}

#[test]
fn each_rank_has_a_gpu() {
    let made = made_from(&json!({
        "parallelism": {"tensor": 8, "nodes": 2},
        "resources": {"accelerator": "Gpu", "gpu": {"resourceName": "amd.com/gpu"}},
    }));
    let spec = &made["pods"][0]["spec"];
    insta::assert_yaml_snapshot!(json!({
        "resources": spec["containers"][0]["resources"],
        "volumeMounts": spec["containers"][0]["volumeMounts"],
        "volumes": spec["volumes"],
    }));
    let args = spec["containers"][0]["args"].to_string();
    assert!(args.contains("--device=cuda"), "{args}");
}

#[test]
fn stages_reach_the_ranks_and_their_gpus() {
    let made = made_from(&json!({
        "parallelism": {"tensor": 4, "pipeline": 2, "nodes": 2},
        "resources": {"accelerator": "Gpu"},
    }));
    for (index, pod) in made["pods"].as_array().into_iter().flatten().enumerate() {
        let container = &pod["spec"]["containers"][0];
        let args = container["args"].to_string();
        for flag in [
            "--tensor-parallel=4",
            "--pipeline-parallel=2",
            "--nodes=2",
            &format!("--node-index={index}"),
        ] {
            assert!(args.contains(flag), "{flag} in {args}");
        }
        assert_eq!(container["resources"]["limits"]["nvidia.com/gpu"], "4");
    }
}

#[test]
fn placement_reaches_the_pods() {
    let made = made_from(&json!({"placement": {
        "nodeSelector": {"pool": "models"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "priorityClassName": "serving",
    }}));
    let spec = &made["pods"][0]["spec"];
    insta::assert_yaml_snapshot!(json!({
        "nodeSelector": spec["nodeSelector"],
        "tolerations": spec["tolerations"],
        "priorityClassName": spec["priorityClassName"],
    }));
}

#[test]
fn the_revision_follows_what_pods_are_made_from() {
    let revision = |changes: &Value| Cluster::new(deployment(changes)).plan().course.wanted;
    let base = revision(&json!({}));
    assert_eq!(base.len(), 8);
    for same in [
        json!({"replicas": 5}),
        json!({"suspend": true}),
        json!({"parallelism": {"pipeline": 1}}),
        json!({"planPolicy": "Warn"}),
        json!({"context": {"minConcurrentSequences": 5}}),
    ] {
        assert_eq!(revision(&same), base, "{same}");
    }
    for other in [
        json!({"model": {"servedName": "x"}}),
        json!({"model": {"source": {"pvc": {"path": "other.gguf"}}}}),
        json!({"parallelism": {"tensor": 2}}),
        json!({"parallelism": {"pipeline": 2}}),
        json!({"resources": {"cpu": "3"}}),
        json!({"resources": {"memory": "2Gi"}}),
        json!({"context": {"maxTokens": 5}}),
        json!({"placement": {"nodeSelector": {"a": "b"}}}),
        json!({"placement": {"priorityClassName": "p"}}),
        json!({"placement": {"pools": [{"name": "a"}]}}),
        json!({"placement": {"queueName": "a"}}),
    ] {
        assert_ne!(revision(&other), base, "{other}");
    }
}

#[test]
fn what_fetches_asks_for_no_more_than_what_serves() {
    for (cpu, asked) in [("5m", "5m"), ("2", "50m")] {
        let made = made_from(&json!({
            "model": {"source": {"pvc": null, "image": {"reference": "m:1", "path": "/m.gguf"}}},
            "resources": {"cpu": cpu},
        }));
        let steps = made["pods"][0]["spec"]["initContainers"].as_array();
        let steps = steps.expect("steps");
        assert_eq!(steps.len(), 2);
        for step in steps {
            assert_eq!(step["resources"]["requests"]["cpu"], asked, "{step}");
        }
    }
}

#[test]
fn a_model_image_that_is_mounted_needs_no_copy() {
    let from = |mount: &str| {
        json!({"model": {"source": {"pvc": null, "image": {
            "reference": "models/llama@sha256:00", "path": "/models/m.gguf",
            "pullPolicy": "IfNotPresent", "mount": mount,
        }}}})
    };
    let made = made_from(&from("Volume"));
    let spec = &made["pods"][0]["spec"];
    assert!(spec["initContainers"].is_null(), "{spec}");
    let image = json!({"reference": "models/llama@sha256:00", "pullPolicy": "IfNotPresent"});
    assert_eq!(spec["volumes"], json!([{"name": "model", "image": image}]));
    let worker = &spec["containers"][0];
    let mounts = json!([{"name": "model", "mountPath": "/model", "readOnly": true}]);
    assert_eq!(worker["volumeMounts"], mounts);
    let args = worker["args"].as_array().expect("arguments");
    assert!(
        args.contains(&json!("--model=/model/models/m.gguf")),
        "{args:?}"
    );

    let copied = made_from(&from("Copy"));
    let revision =
        |made: &Value| made["pods"][0]["metadata"]["labels"]["llmops.dev/revision"].clone();
    assert_ne!(revision(&made), revision(&copied));
    let usual = made_from(&json!({"model": {"source": {"pvc": null, "image": {
        "reference": "models/llama@sha256:00", "path": "/models/m.gguf",
        "pullPolicy": "IfNotPresent",
    }}}}));
    assert_eq!(revision(&usual), revision(&copied));
}
