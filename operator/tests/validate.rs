//! Each way in which a spec can be refused.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use std::sync::Arc;

use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::reconcile::observe::Observed;
use llama_operator::reconcile::plan::revision;
use llama_operator::reconcile::source::Source;
use llama_operator::reconcile::validate::{ValidDeployment, ValidationError, validate};
use serde_json::{Value, json};
use support::deployment;

fn refused(object: &LlamaDeployment) -> ValidationError {
    validate(object, &Observed::default()).expect_err("must be refused")
}

fn refused_with(changes: &Value) -> ValidationError {
    refused(&deployment(changes))
}

fn valid_with(changes: &Value) -> ValidDeployment {
    validate(&deployment(changes), &Observed::default()).expect("valid")
}

#[test]
fn a_good_spec_is_read_whole() {
    let object = deployment(&json!({
        "model": {"servedName": "big"},
        "parallelism": {"tensor": 4, "nodes": 2},
        "resources": {"cpu": "5500m"},
        "context": {"maxTokens": 4096},
        "replicas": 3,
    }));
    let valid = validate(&object, &Observed::default()).expect("valid");
    assert_eq!(valid.served_name, "big");
    assert_eq!(
        (valid.tensor, valid.nodes, valid.ranks_per_pod()),
        (4, 2, 2)
    );
    assert_eq!(valid.pipeline, 1);
    assert_eq!(valid.threads_per_rank, 2, "5.5 cores for two ranks");
    assert_eq!(valid.max_tokens, Some(4096));
    assert_eq!(valid.wanted_groups(), 3);
    assert!(matches!(valid.source, Source::Claim { .. }));
    assert_eq!(valid.owner.block_owner_deletion, Some(true));
}

#[test]
fn stages_make_more_ranks() {
    let object = deployment(&json!({
        "parallelism": {"tensor": 3, "pipeline": 4, "nodes": 2},
        "resources": {"cpu": 13},
    }));
    let valid = validate(&object, &Observed::default()).expect("valid");
    assert_eq!((valid.pipeline, valid.ranks_per_pod()), (4, 6));
    assert_eq!(valid.threads_per_rank, 2, "13 cores for six ranks");
}

#[test]
fn a_rank_has_one_thread_at_least() {
    let object = deployment(&json!({"parallelism": {"tensor": 3}, "resources": {"cpu": "600m"}}));
    let valid = validate(&object, &Observed::default()).expect("valid");
    assert_eq!(valid.threads_per_rank, 1);
}

#[test]
fn metadata_must_be_complete() {
    for field in ["name", "namespace", "uid"] {
        let mut object = deployment(&json!({}));
        match field {
            "name" => object.metadata.name = None,
            "namespace" => object.metadata.namespace = None,
            _ => object.metadata.uid = None,
        }
        assert_eq!(refused(&object), ValidationError::IncompleteMetadata(field));
    }
}

#[test]
fn names_become_parts_of_other_names() {
    for name in ["a".repeat(41).as_str(), "1a", "a.b", "a-", "A", ""] {
        let mut object = deployment(&json!({}));
        object.metadata.name = Some(name.to_owned());
        let name = name.to_owned();
        assert_eq!(refused(&object), ValidationError::BadName { name });
    }
}

#[test]
fn there_is_one_source() {
    let image = json!({"reference": "i", "path": "/m.gguf"});
    let both = json!({"model": {"source": {"image": image}}});
    assert_eq!(
        refused_with(&both),
        ValidationError::NotOneSource { count: 2 }
    );
    let none = json!({"model": {"source": {"pvc": null}}});
    assert_eq!(
        refused_with(&none),
        ValidationError::NotOneSource { count: 0 }
    );
}

#[test]
fn a_kv_cache_in_8_bits_is_for_cpu_cores() {
    let context = json!({"kvCache": {"dtype": "Int8"}});
    let valid = valid_with(&json!({"context": context}));
    assert_eq!(valid.other_kv_cache(), Some("int8"));
    let on_gpus = json!({"context": context, "resources": {"accelerator": "Gpu"}});
    assert_eq!(refused_with(&on_gpus), ValidationError::Int8OnGpu);
    let usual = valid_with(&json!({"context": {"kvCache": {}}}));
    assert_eq!(usual.other_kv_cache(), None);
}

#[test]
fn pools_can_be_told_apart_and_reached() {
    let words = |placement: Value| refused_with(&json!({"placement": placement})).to_string();
    let pool = |name: &str| json!({"name": name, "nodeSelector": {"zone": "b"}});
    assert_eq!(
        words(json!({"pools": [pool("x"), pool("x")]})),
        "spec.placement.pools has two pools named x; names must differ"
    );
    assert!(words(json!({"nodeSelector": {"zone": "a"}, "pools": [pool("x")]})).contains("zone=b"));
    let nine: Vec<_> = (0..9).map(|index| pool(&index.to_string())).collect();
    assert!(words(json!({"pools": nine})).contains("9 pools, of at most 8"));
    let same = json!({"nodeSelector": {"zone": "b"}, "pools": [pool("x"), pool("y")]});
    assert_eq!(
        valid_with(&json!({"placement": same}))
            .placement
            .pools
            .len(),
        2
    );
}

#[test]
fn a_queue_is_for_kueue_and_kueue_wants_one() {
    let refused = |placement: Value| refused_with(&json!({"placement": placement}));
    let provider = |name: &str| json!({"provider": name});
    assert_eq!(
        refused(json!({"gang": provider("Kueue")})),
        ValidationError::KueueWithoutQueue
    );
    assert_eq!(
        refused(json!({"gang": provider("Builtin"), "queueName": "q"})),
        ValidationError::QueueWithoutKueue
    );
    assert_eq!(
        refused(json!({"pools": [{"name": "a"}], "queueName": "q"})),
        ValidationError::Exclusive {
            one: "spec.placement.pools",
            other: "spec.placement.queueName",
        }
    );
    for (gang, queue) in [
        (json!({}), None),
        (provider("Auto"), None),
        (provider("Kueue"), Some("q")),
    ] {
        let placement = json!({"gang": gang, "queueName": "q"});
        let valid = valid_with(&json!({"placement": placement}));
        assert_eq!(valid.queue.as_deref(), queue, "no Kueue was seen");
    }
}

#[test]
fn a_cache_wants_bytes_that_are_known_beforehand() {
    let cache = json!({"claimName": "models", "size": "500Gi"});
    let of = |name: &str, source: serde_json::Value| json!({"model": {"source": {"pvc": null, name: source}, "cache": cache.clone()}});
    let store = json!({"uri": "s3://models/llama", "region": "us-east-1"});
    let image = json!({"reference": "i", "path": "/m.gguf"});
    let claim = json!({"model": {"cache": cache.clone()}});
    for spec in [of("s3", store), of("image", image), claim] {
        assert_eq!(refused_with(&spec), ValidationError::CacheWithoutDigests);
    }
    let commit = "0".repeat(40);
    let hub = json!({"repo": "a/b", "revision": commit, "endpoint": "https://hub.example"});
    let mut spec = of("huggingFace", hub);
    let valid = valid_with(&spec);
    assert_eq!(valid.source.claim(), Some(("models", "spec.model.cache")));
    spec["model"]["cache"]["size"] = json!("1k");
    let error = refused_with(&spec).to_string();
    assert!(error.contains("spec.model.cache.size is \"1k\""), "{error}");
}

#[test]
fn files_are_named_once_and_stay_inside() {
    let digest = "0".repeat(64);
    let of = |names: [&str; 2]| {
        let files = names.map(|name| json!({"name": name, "sha256": digest}));
        let http = json!({"url": "https://models.example/llama", "files": files});
        json!({"model": {"source": {"pvc": null, "http": http}}})
    };
    let error = refused_with(&of(["a.json", "a.json"])).to_string();
    assert!(
        error.contains("http.files \"a.json\" must be named once"),
        "{error}"
    );
    let error = refused_with(&of(["a.json", "../m.gguf"])).to_string();
    assert!(error.contains("http.files \"../m.gguf\""), "{error}");
    valid_with(&of(["a.json", "q/m.gguf"]));
}

#[test]
fn paths_stay_inside_their_source() {
    for path in [
        "../m.gguf",
        "/m.gguf",
        "a//m.gguf",
        "a/../m.gguf",
        "./m.gguf",
        "a/",
    ] {
        let error = refused_with(&json!({"model": {"source": {"pvc": {"path": path}}}}));
        assert!(
            matches!(error, ValidationError::BadPath { .. }),
            "{path}: {error}"
        );
    }
    for path in ["m.gguf", "/../m.gguf", "/", "/a/"] {
        let image = json!({"reference": "i", "path": path});
        let error = refused_with(&json!({"model": {"source": {"pvc": null, "image": image}}}));
        assert!(
            matches!(error, ValidationError::BadPath { .. }),
            "{path}: {error}"
        );
    }
}

#[test]
fn numbers_stay_in_range() {
    for (changes, field) in [
        (json!({"replicas": 257}), "spec.replicas"),
        (json!({"replicas": -1}), "spec.replicas"),
        (
            json!({"parallelism": {"tensor": 0}}),
            "spec.parallelism.tensor",
        ),
        (
            json!({"parallelism": {"pipeline": 65}}),
            "spec.parallelism.pipeline",
        ),
        (
            json!({"parallelism": {"nodes": 65}}),
            "spec.parallelism.nodes",
        ),
        (
            json!({"context": {"maxTokens": 0}}),
            "spec.context.maxTokens",
        ),
    ] {
        let error = refused_with(&changes);
        assert!(
            matches!(error, ValidationError::OutOfRange { field: found, .. } if found == field),
            "{changes}: {error}"
        );
    }
}

#[test]
fn ranks_are_shared_out_evenly() {
    let error = refused_with(&json!({"parallelism": {"tensor": 3, "nodes": 2}}));
    assert_eq!(
        error,
        ValidationError::UnevenRanks {
            tensor: 3,
            pipeline: 1,
            nodes: 2
        }
    );
    let error = refused_with(&json!({"parallelism": {"tensor": 3, "pipeline": 3, "nodes": 2}}));
    assert!(error.to_string().contains("pipeline 3"), "{error}");
    let error = refused_with(&json!({"parallelism": {"tensor": 64, "pipeline": 5}}));
    assert_eq!(
        error,
        ValidationError::TooManyRanks {
            tensor: 64,
            pipeline: 5
        }
    );
}

#[test]
fn gpu_settings_need_gpus() {
    let error = refused_with(&json!({"resources": {"gpu": {}}}));
    assert_eq!(error, ValidationError::GpuWithoutAccelerator);
}

#[test]
fn quantities_are_large_enough() {
    for (field, value) in [
        ("cpu", "0"),
        ("cpu", "x"),
        ("memory", "512m"),
        ("memory", "1Q"),
    ] {
        let error = refused_with(&json!({"resources": {field: value}}));
        assert!(
            matches!(&error, ValidationError::BadQuantity { value: found, .. } if found == value),
            "{field} {value}: {error}"
        );
    }
}

#[test]
fn a_service_of_somebody_else_is_left_alone() {
    let service = |owner: Value| {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": "m-ranks", "namespace": "team", "ownerReferences": owner},
            }))
            .expect("a Service"),
        )
    };
    let reference = |uid: &str| json!([{"apiVersion": "v1", "kind": "K", "name": "n", "uid": uid}]);
    let object = deployment(&json!({}));
    for (owner, good) in [
        (json!([]), false),
        (reference("other"), false),
        (reference("uid-m"), true),
    ] {
        let observed = Observed {
            services: vec![service(owner)],
            ..Observed::default()
        };
        let result = validate(&object, &observed);
        assert_eq!(result.is_ok(), good, "{result:?}");
    }
}

#[test]
fn how_answers_are_compared_is_read() {
    let with = |limits: Value| json!({"rollout": {"rollbackOn": limits}});
    let valid = valid_with(&with(json!({"errorRatePercent": 0})));
    let limits = valid.change.rollout.answers.expect("set");
    assert_eq!(
        (limits.failed_percent, limits.slower_percent),
        (Some(0), None)
    );
    assert_eq!(
        valid.answers_within(),
        Some(std::time::Duration::from_mins(10))
    );
    assert_eq!(valid_with(&json!({})).answers_within(), None);
    for (limits, words) in [
        (
            json!({"errorRatePercent": 101}),
            "errorRatePercent is 101 and must be 0 to 100",
        ),
        (json!({"latencyRegressionPercent": 0}), "must be 1 to 1000"),
        (json!({"errorRatePercent": 1, "window": "59s"}), "1m to 1h"),
        (json!({"errorRatePercent": 1, "window": "61m"}), "1m to 1h"),
        (
            json!({"errorRatePercent": 1, "window": "soon"}),
            "spec.rollout.rollbackOn.window",
        ),
    ] {
        let error = refused_with(&with(limits)).to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn what_workers_are_told_of_tests_and_hangs_is_read_and_makes_a_revision() {
    let with = |interval: &str, hang: &str| {
        json!({
            "preflight": {"selfTestInterval": interval}, "failure": {"hangTimeout": hang},
        })
    };
    let usual = valid_with(&json!({}));
    assert_eq!((usual.self_test_interval, usual.hang_timeout), (600, 60));
    let same = valid_with(&with("10m", "60s"));
    assert_eq!(revision(&same), revision(&usual), "nothing is new");
    let never = valid_with(&with("0s", "60s"));
    assert_eq!(never.self_test_interval, 0);
    assert_ne!(revision(&never), revision(&usual));
    let error = refused_with(&with("10m", "4500ms")).to_string();
    assert!(error.contains("spec.failure.hangTimeout"), "{error}");
    assert_ne!(revision(&valid_with(&with("10m", "2m"))), revision(&usual));
    let error = refused_with(&with("9s", "60s")).to_string();
    assert!(error.contains("spec.preflight.selfTestInterval"), "{error}");
}
