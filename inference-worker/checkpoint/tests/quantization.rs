//! `quantization_config` of models that are quantised in other ways.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use hostile::{Folder, Invalid, Unsupported};
use llama_checkpoint::ModelErrorCategory;
use serde_json::{Value, json};

/// What is wrong with the only group, and what it is refused with.
type Case = (fn(&mut Value), ModelErrorCategory, &'static str);
const GROUP: &str = "quantization_config.config_groups.group_0.";
const UNKNOWN: &str = "which may change what the model computes; remove what does not";

fn refusal(name: &str, change: impl FnOnce(&mut Value)) -> (ModelErrorCategory, String) {
    let folder = Folder::of(name);
    folder.change("config.json", |config| {
        change(&mut config["quantization_config"]);
    });
    let (category, sentence) = folder.refusal();
    let what = sentence
        .strip_prefix("config.json: ")
        .expect("names the file");
    (category, what.replace(GROUP, ""))
}

fn check(name: &str, cases: &[Case]) {
    for (change, category, what) in cases {
        let found = refusal(name, |all| change(&mut all["config_groups"]["group_0"]));
        assert_eq!(found, (*category, (*what).to_owned()), "{name}");
    }
}

#[test]
fn methods_that_are_not_built_in() {
    let cases: [Case; 13] = [
        (
            |q| q["quant_method"] = json!("gptq"),
            Unsupported,
            "quantization_config.quant_method is \"gptq\"; \"fbgemm_fp8\" and \"compressed-tensors\" are built in",
        ),
        (
            |q| q["quant_method"] = Value::Null,
            Unsupported,
            "quantization_config.quant_method is \"\"; \"fbgemm_fp8\" and \"compressed-tensors\" are built in",
        ),
        (
            |q| q["format"] = json!("mixed-precision"),
            Unsupported,
            "quantization_config.format is \"mixed-precision\"; this worker computes dense, float-quantized, int-quantized, naive-quantized, pack-quantized",
        ),
        (
            |q| q["config_groups"]["group_0"]["format"] = json!("marlin-24"),
            Unsupported,
            "format is \"marlin-24\"; this worker computes dense, float-quantized, int-quantized, naive-quantized, pack-quantized",
        ),
        (
            |q| q["kv_cache_scheme"] = json!({"num_bits": 8}),
            Unsupported,
            "quantization_config.kv_cache_scheme is {\"num_bits\":8}; this worker computes no quantised KV cache",
        ),
        (
            |q| q["sparsity_config"] = json!({"format": "sparse-24-bitmask"}),
            Unsupported,
            "quantization_config.sparsity_config is {\"format\":\"sparse-24-bitmask\"}; this worker computes dense weights",
        ),
        (
            |q| q["transform_config"] = json!({"config_groups": {"u": 1}}),
            Unsupported,
            "quantization_config.transform_config is {\"config_groups\":{\"u\":1}}; this worker computes no transformed weights",
        ),
        (
            |q| q["desc_act"] = json!(true),
            Unsupported,
            "this worker does not know quantization_config.desc_act, which may change what the model computes; remove what does not",
        ),
        (
            |q| q["config_groups"] = Value::Null,
            Invalid,
            "quantization_config.config_groups is missing",
        ),
        (
            |q| q["config_groups"] = json!([1]),
            Invalid,
            "quantization_config.config_groups is [1], expected an object",
        ),
        (
            |q| q["config_groups"] = json!({"group_0": 7}),
            Invalid,
            "quantization_config.config_groups.group_0 is 7, expected an object",
        ),
        (
            |q| q["config_groups"]["group_0"]["weights"] = Value::Null,
            Invalid,
            "weights is missing",
        ),
        (
            |q| {
                let mut other = q["config_groups"]["group_0"].clone();
                other["weights"]["group_size"] = json!(64);
                q["config_groups"]["group_1"] = other;
            },
            Unsupported,
            "quantization_config.config_groups differ in how they pack 4-bit weights",
        ),
    ];
    for (change, category, what) in cases {
        let found = refusal("llama-int4-group", change);
        assert_eq!(found, (category, what.to_owned()));
    }
    let (category, what) = refusal("llama-fp8-fbgemm", |q| q["block_size"] = json!([128, 128]));
    let expected = format!("this worker does not know quantization_config.block_size, {UNKNOWN}");
    assert_eq!((category, what), (Unsupported, expected));
}

#[test]
fn groups_that_are_not_built_in() {
    const BUILT_IN: &str =
        "8-bit float or int by channel or tensor, and 4-bit int by group, are built in";
    check(
        "llama-int4-group",
        &[
            (
                |g| g["weights"]["symmetric"] = json!(false),
                Unsupported,
                "weights.symmetric is false; this worker computes weights around zero",
            ),
            (
                |g| g["weights"]["actorder"] = json!("group"),
                Unsupported,
                "weights.actorder is \"group\"; this worker computes columns in their own order",
            ),
            (
                |g| g["weights"]["actorder"] = json!("dynamic"),
                Unsupported,
                "weights.actorder is \"dynamic\"; this worker computes columns in their own order",
            ),
            (
                |g| g["weights"]["actorder"] = json!(true),
                Unsupported,
                "weights.actorder is true; this worker computes columns in their own order",
            ),
            (
                |g| g["weights"]["group_size"] = json!(0),
                Invalid,
                "weights.group_size is 0, expected 1 to 16777216",
            ),
            (
                |g| g["weights"]["group_size"] = json!(-1),
                Invalid,
                "weights.group_size is -1, expected 1 to 16777216",
            ),
            (
                |g| g["weights"]["group_size"] = Value::Null,
                Invalid,
                "weights.group_size is missing",
            ),
            (
                |g| g["weights"]["group_size"] = json!(48),
                Unsupported,
                "weights.group_size is 48; this worker computes groups of multiples of 32",
            ),
            (
                |g| g["output_activations"] = json!({"num_bits": 8}),
                Unsupported,
                "output_activations is {\"num_bits\":8}; this worker computes exact outputs",
            ),
            (
                |g| g["weights"] = json!("int4"),
                Invalid,
                "weights is \"int4\", expected an object",
            ),
        ],
    );
    check(
        "llama-int8-channel",
        &[
            (
                |g| g["input_activations"]["dynamic"] = json!(false),
                Unsupported,
                "input_activations.dynamic is not true; inputs of a fixed scale are not built in",
            ),
            (
                |g| g["input_activations"] = json!({}),
                Unsupported,
                "input_activations.dynamic is not true; inputs of a fixed scale are not built in",
            ),
            (
                |g| g["input_activations"] = json!(8),
                Invalid,
                "input_activations is 8, expected an object",
            ),
        ],
    );
    for (bits, kind, strategy) in [
        (8, "float", "tensor_group"),
        (8, "float", "block"),
        (8, "int", "group"),
        (4, "int", "channel"),
        (4, "float", "tensor_group"),
        (2, "int", "group"),
        (8, "", ""),
    ] {
        let found = refusal("llama-int4-group", |q| {
            let weights = &mut q["config_groups"]["group_0"]["weights"];
            weights["num_bits"] = json!(bits);
            weights["type"] = json!(kind);
            weights["strategy"] = json!(strategy);
        });
        let expected = format!("weights are {bits}-bit \"{kind}\" by \"{strategy}\"; {BUILT_IN}");
        assert_eq!(found, (Unsupported, expected));
    }
}

#[test]
fn what_changes_nothing_is_let_through() {
    let folder = Folder::of("llama-int4-group");
    folder.change("config.json", |config| {
        let all = &mut config["quantization_config"];
        all["ignore"] = json!(["re:.*"]);
        all["version"] = json!("0.12.2");
        all["quantization_status"] = json!("frozen");
        all["sparsity_config"] = json!({"format": "dense"});
        all["transform_config"] = json!({});
        all["config_groups"]["group_0"]["weights"]["actorder"] = json!("static");
        all["config_groups"]["group_0"]["format"] = json!("pack-quantized");
    });
    folder.opens();
}
