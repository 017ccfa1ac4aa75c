//! Adapters of a real model, loaded and forgotten while a pod of three ranks serves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::collections::BTreeSet;
use std::path::Path;

use harness::{MODEL, Worker, model};
use llama_contract::{AdapterList, AdapterModule, AdapterPhase, AdapterReport, FailureCategory};
use serde_json::{Value, json};

/// The shape of `SmolLM2`.
const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const KV: usize = 192;
const FFN: usize = 1536;
const RANK: usize = 4;

/// Writes an adapter of some matrices with random numbers that `seed` decides.
fn write_adapter(folder: &Path, seed: u64) {
    std::fs::create_dir(folder).unwrap();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut noise = |size: f32| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        size * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for layer in 0..LAYERS {
        for (part, rows, columns) in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.v_proj", KV, HIDDEN),
            ("mlp.down_proj", HIDDEN, FFN),
        ] {
            for (half, shape, size) in [("A", [RANK, columns], 0.1), ("B", [rows, RANK], 0.06)] {
                let start = data.len();
                for _ in 0..shape[0] * shape[1] {
                    data.extend(noise(size).to_le_bytes());
                }
                header.insert(
                    format!("base_model.model.model.layers.{layer}.{part}.lora_{half}.weight"),
                    json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
                );
            }
        }
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
    let settings = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK});
    std::fs::write(folder.join("adapter_config.json"), settings.to_string()).unwrap();
}

fn load(worker: &Worker, name: &str, path: &str) -> (u16, Value) {
    let body = json!({"lora_name": name, "lora_path": path});
    worker.post("/v1/load_lora_adapter", &body)
}

fn unload(worker: &Worker, name: &str) -> (u16, Value) {
    worker.post("/v1/unload_lora_adapter", &json!({"lora_name": name}))
}

fn request(model: &str) -> Value {
    json!({
        "model": model, "prompt": "The capital of France is a city", "max_tokens": 8,
        "temperature": 0, "logprobs": 1,
    })
}

/// Text and probabilities of a short answer.
fn answer(worker: &Worker, model: &str) -> Value {
    let (status, body) = worker.post("/v1/completions", &request(model));
    assert_eq!(status, 200, "{body}");
    json!([
        body["choices"][0]["text"],
        body["choices"][0]["logprobs"]["token_logprobs"]
    ])
}

#[test]
fn adapters_come_and_go_while_a_pod_serves() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let names: Vec<String> = (0..32).map(|number| format!("adapter-{number}")).collect();
    for (seed, name) in (0..).zip(&names) {
        write_adapter(&path(name), seed);
    }
    std::fs::create_dir(path("empty")).unwrap();
    let flags = [
        "--tensor-parallel=3",
        "--max-loras=32",
        "--max-lora-rank=4",
        &format!("--lora-folder={}", folder.path().display()),
        &format!("--lora-modules=adapter-0={}", path("adapter-0").display()),
    ];
    let worker = Worker::serving(&model, &flags);
    let plain = answer(&worker, MODEL);
    for name in &names[1..] {
        let (status, body) = load(&worker, name, name);
        assert_eq!((status, &body["id"]), (200, &json!(name)), "{body}");
    }
    let (_, models) = worker.get("/v1/models").unwrap();
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(models["data"].as_array().unwrap().len(), 33);
    assert_eq!(models["data"][1]["parent"], MODEL);

    let alone: Vec<Value> = names.iter().map(|name| answer(&worker, name)).collect();
    let texts: BTreeSet<String> = alone.iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 32, "adapters differ from each other");
    assert!(!alone.contains(&plain), "and from the model");
    std::thread::scope(|scope| {
        let together: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(|| answer(&worker, name)))
            .collect();
        let together = together.into_iter().map(|thread| thread.join().unwrap());
        assert!(together.eq(alone.iter().cloned()), "mixed as alone");
    });
    assert_eq!(answer(&worker, MODEL), plain);

    for (name, path, param) in [
        ("adapter-1", "adapter-2", json!("lora_name")),
        (MODEL, "adapter-2", json!("lora_name")),
        ("other", "../etc", json!("lora_path")),
        ("other", "/etc", json!("lora_path")),
        ("other", "adapter-2", Value::Null),
    ] {
        let (status, body) = load(&worker, name, path);
        assert_eq!((status, &body["error"]["param"]), (400, &param), "{body}");
    }
    while_a_stream_uses_it(&worker, "adapter-7");
    assert_eq!(unload(&worker, "adapter-7").0, 404);
    assert_eq!(worker.post("/v1/completions", &request("adapter-7")).0, 404);
    let (status, body) = load(&worker, "other", "empty");
    assert_eq!(status, 400, "{body}");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("adapter_config.json does not exist"),
        "{message}"
    );
    // The place of another adapter, whose cached tokens are not taken for its own.
    assert_eq!(load(&worker, "other", "adapter-8").0, 200);
    assert_eq!(answer(&worker, "other"), alone[8]);
    assert_eq!(answer(&worker, "adapter-8"), alone[8]);
}

/// An adapter that is forgotten goes on for the answer that uses it, and for none that
/// come later.
fn while_a_stream_uses_it(worker: &Worker, name: &str) {
    let mut body = request(name);
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    body["max_tokens"] = json!(2000);
    let mut stream = worker.stream("/v1/completions", &body);
    stream.next().expect("a piece");
    let (_, metrics) = worker.internal("/metrics").unwrap();
    let told = metrics
        .lines()
        .find(|line| line.starts_with("vllm:lora_requests_info{"))
        .unwrap();
    assert!(told.contains("max_lora=\"32\""), "{told}");
    assert!(
        told.contains(&format!("running_lora_adapters=\"{name}\"")),
        "{told}"
    );
    std::thread::scope(|scope| {
        let unloaded = scope.spawn(|| unload(worker, name));
        while worker.post("/v1/completions", &request(name)).0 != 404 {}
        for _ in 0..5 {
            stream.next().expect("it goes on");
        }
        assert!(!unloaded.is_finished());
        drop(stream);
        assert_eq!(unloaded.join().unwrap().0, 200);
    });
}

#[test]
fn adapters_that_cannot_be_loaded_end_the_pod_by_name() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let mut worker = Worker::start(&model, &["--max-loras=1", "--lora-modules=legal=/nowhere"]);
    let (_, report) = worker.failure();
    assert_eq!(report.category, FailureCategory::InvalidConfiguration);
    assert!(
        report
            .message
            .starts_with("--lora-modules=legal: /nowhere/adapter_config.json does"),
        "{report:?}"
    );
}

#[test]
fn without_room_or_a_folder_nothing_is_loaded() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--max-loras=1"]);
    let (status, body) = load(&worker, "a", "a");
    assert_eq!(status, 400, "{body}");
    assert!(body.to_string().contains("--lora-folder"), "{body}");
    assert_eq!(unload(&worker, "a").0, 400);
    let folder = tempfile::tempdir().unwrap();
    write_adapter(&folder.path().join("a"), 1);
    drop(worker);
    let flag = format!("--lora-folder={}", folder.path().display());
    let worker = Worker::serving(&model, &[&flag]);
    let (status, body) = load(&worker, "a", "a");
    assert_eq!(status, 400, "{body}");
    assert!(body.to_string().contains("--max-loras"), "{body}");
}

/// The adapters that the pod tells of: name, phase and why.
fn told(worker: &Worker) -> Vec<(String, AdapterPhase, Option<String>)> {
    let reports = worker.state().adapters.into_iter();
    let told = reports.map(|report| (report.module.name, report.phase, report.message));
    told.collect()
}

#[test]
fn a_list_decides_which_adapters_a_pod_has() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for (seed, name) in (0..).zip(["first", "second", "third"]) {
        write_adapter(&folder.path().join(name), seed);
    }
    let flags = [
        "--tensor-parallel=3",
        "--max-loras=2",
        "--max-lora-rank=4",
        &format!("--managed-lora-folder={}", folder.path().display()),
        &format!("--lora-modules=one={}", path("first")),
        &format!("--lora-modules=bad={}", path("nowhere")),
    ];
    let mut worker = Worker::serving(&model, &flags);
    // One that is at fault ends nothing.
    let found = told(&worker);
    assert_eq!(found[0].1, AdapterPhase::Refused, "{found:?}");
    assert!(
        found[0].2.as_ref().unwrap().contains("nowhere"),
        "{found:?}"
    );
    assert_eq!(found[1], ("one".to_owned(), AdapterPhase::Loaded, None));
    let first = answer(&worker, "one");
    assert_ne!(first, answer(&worker, MODEL));

    // Another folder under a name is another adapter, and what is not named goes.
    let list = |named: &[(&str, &str)]| {
        let adapters = named.iter().map(|(name, folder)| AdapterModule {
            name: (*name).to_owned(),
            folder: path(folder).into(),
        });
        let adapters = adapters.collect();
        serde_json::to_value(AdapterList { adapters }).unwrap()
    };
    assert_eq!(
        worker.put_internal("/adapters", &list(&[("one", "second"), ("two", "first")])),
        202
    );
    worker.wait_for_state("both are loaded", |state| {
        let mut phases = state.adapters.iter().map(|report| report.phase);
        state.adapters.len() == 2 && phases.all(|phase| phase == AdapterPhase::Loaded)
    });
    assert_eq!(answer(&worker, "two"), first);
    assert_ne!(answer(&worker, "one"), first);

    assert_eq!(
        worker.put_internal("/adapters", &list(&[("two", "third")])),
        202
    );
    worker.wait_for_state(
        "one is loaded",
        |state| matches!(&state.adapters[..], [one] if one.phase == AdapterPhase::Loaded),
    );
    assert_eq!(worker.post("/v1/completions", &request("one")).0, 404);
    assert_ne!(answer(&worker, "two"), first);

    // More than there is room for, folders outside, and clients.
    let many = list(&[("a", "first"), ("b", "second"), ("c", "third")]);
    assert_eq!(worker.put_internal("/adapters", &many), 400);
    assert_eq!(
        worker.put_internal("/adapters", &json!({"adapters": [{"name": "x"}]})),
        400
    );
    assert_eq!(
        worker.put_internal("/adapters", &list(&[("out", "../..")])),
        202
    );
    worker.wait_for_state("it is refused", |state| {
        let refused = |report: &AdapterReport| report.phase == AdapterPhase::Refused;
        state.adapters.iter().any(refused)
    });
    let (status, body) = load(&worker, "mine", "first");
    assert_eq!(status, 400, "{body}");
    assert_eq!(unload(&worker, "two").0, 400);
}
