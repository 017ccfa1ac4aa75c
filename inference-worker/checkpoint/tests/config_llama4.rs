//! `config.json` of Llama 4, and what follows from what it leaves out.

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
use llama_checkpoint::checkpoint::LoadFormat;
use llama_checkpoint::config::LayerKind;
use llama_checkpoint::{Checkpoint, ModelErrorCategory};
use serde_json::{Value, json};

const CONFIG: &str = "config.json";
/// What is wrong, and what it is refused with.
type Case = (fn(&mut Value), ModelErrorCategory, &'static str);

/// Every case is refused, with weights and without.
fn check(name: &str, cases: &[Case]) {
    for (change, category, what) in cases {
        let folder = Folder::of(name);
        folder.change(CONFIG, change);
        let expected = (*category, format!("{CONFIG}: {what}"));
        assert_eq!(folder.refusal(), expected);
        assert_eq!(folder.dummy_refusal(), expected);
    }
}

fn remove(config: &mut Value, field: &str) {
    config.as_object_mut().expect("an object").remove(field);
}

#[test]
fn llama4_that_is_not_computed() {
    check(
        "llama4-maverick",
        &[
            (
                |c| c["num_experts_per_tok"] = json!(2),
                Unsupported,
                "num_experts_per_tok is 2; this worker computes one expert a token",
            ),
            (
                |c| c["num_local_experts"] = json!(0),
                Invalid,
                "num_local_experts is 0, expected 1 to 16777216",
            ),
            (
                |c| c["num_local_experts"] = json!(1 << 24),
                Invalid,
                "16777216 experts, expected 1 to 32768",
            ),
            (
                |c| c["num_local_experts"] = json!(16384),
                Invalid,
                "3 layers of 16384 experts, expected at most 32768 experts",
            ),
            (
                |c| c["interleave_moe_layer_step"] = json!(0),
                Invalid,
                "interleave_moe_layer_step is 0, expected 1 to 16777216",
            ),
            (
                |c| c["no_rope_layer_interval"] = json!(0),
                Invalid,
                "no_rope_layer_interval is 0, expected 1 to 16777216",
            ),
            (
                |c| c["moe_layers"] = json!([6]),
                Invalid,
                "moe_layers is 6, expected a list of whole numbers below 6",
            ),
            (
                |c| c["moe_layers"] = json!([-1]),
                Invalid,
                "moe_layers is -1, expected a list of whole numbers below 6",
            ),
            (
                |c| c["moe_layers"] = json!(3),
                Invalid,
                "moe_layers is 3, expected a list of whole numbers below 6",
            ),
            (
                |c| c["no_rope_layers"] = json!([1, 1, 1, 0, 1]),
                Invalid,
                "no_rope_layers has 5 entries, but num_hidden_layers is 6",
            ),
            (
                |c| c["no_rope_layers"] = json!([1, 1, 1, 2, 1, 1]),
                Invalid,
                "no_rope_layers is 2, expected a list of whole numbers below 2",
            ),
            (
                |c| c["layer_types"] = json!(["full_attention"]),
                Invalid,
                "layer_types has 1 entries, but num_hidden_layers is 6",
            ),
            (
                |c| c["layer_types"] = json!([]),
                Invalid,
                "layer_types has 0 entries, but num_hidden_layers is 6",
            ),
            (
                |c| c["layer_types"] = json!([1]),
                Invalid,
                "layer_types is [1], expected a list of strings",
            ),
            (
                |c| c["layer_types"][0] = json!("sliding_attention"),
                Unsupported,
                "layer_types holds \"sliding_attention\"; \"chunked_attention\" and \"full_attention\" are built in",
            ),
            (
                |c| c["attention_chunk_size"] = json!(0),
                Invalid,
                "attention_chunk_size is 0, expected 1 to 16777216",
            ),
            (
                |c| c["attention_chunk_size"] = Value::Null,
                Invalid,
                "attention_chunk_size is null, but layers attend in chunks",
            ),
            (
                |c| c["attn_temperature_tuning"] = json!("yes"),
                Invalid,
                "attn_temperature_tuning is \"yes\", expected true or false",
            ),
            (
                |c| c["floor_scale"] = json!(0),
                Invalid,
                "floor_scale is 0, expected a positive number",
            ),
            (
                |c| c["mlp_bias"] = json!(true),
                Unsupported,
                "this worker does not know mlp_bias, which may change what the model computes; remove what does not",
            ),
            (
                |c| c["intermediate_size"] = json!(48),
                Unsupported,
                "expert feed-forward networks are 48 wide; this worker takes multiples of 32",
            ),
        ],
    );
    check(
        "llama4-multimodal",
        &[
            (
                |c| remove(c, "text_config"),
                Invalid,
                "text_config is missing",
            ),
            (
                |c| c["text_config"] = json!([]),
                Invalid,
                "text_config is [], expected an object",
            ),
            (
                |c| c["tie_word_embeddings"] = json!(true),
                Unsupported,
                "tie_word_embeddings is true; this worker computes an output head of its own",
            ),
            (
                |c| c["text_config"]["hidden_size"] = json!(0),
                Invalid,
                "text_config.hidden_size is 0, expected 1 to 16777216",
            ),
            (
                |c| c["text_config"]["x"] = json!(1),
                Unsupported,
                "this worker does not know text_config.x, which may change what the model computes; remove what does not",
            ),
        ],
    );
}

/// The layers of Maverick's little sister after a change.
fn layers(change: fn(&mut Value)) -> Vec<LayerKind> {
    let folder = Folder::of("llama4-maverick");
    folder.change(CONFIG, change);
    let checkpoint = Checkpoint::open(folder.path(), LoadFormat::Dummy);
    checkpoint.expect("opens").config().layers.clone()
}

#[test]
fn kinds_of_layers_follow_the_reference() {
    let experts = |change| -> Vec<bool> { layers(change).iter().map(|l| l.experts).collect() };
    let every_second = [false, true, false, true, false, true];
    assert_eq!(experts(|_| {}), every_second);
    assert_eq!(experts(|c| c["moe_layers"] = Value::Null), every_second);
    assert_eq!(experts(|c| remove(c, "moe_layers")), every_second);
    assert_eq!(experts(|c| c["moe_layers"] = json!([])), [false; 6]);
    assert_eq!(
        experts(|c| c["moe_layers"] = json!([4])),
        [false, false, false, false, true, false]
    );
    let third = |c: &mut Value| {
        remove(c, "moe_layers");
        c["interleave_moe_layer_step"] = json!(3);
    };
    assert_eq!(experts(third), [false, false, true, false, false, true]);

    let ropes = |change| -> Vec<bool> { layers(change).iter().map(|l| l.rope).collect() };
    let every_fourth = [true, true, true, false, true, true];
    assert_eq!(ropes(|c| c["no_rope_layers"] = json!([])), every_fourth);
    assert_eq!(ropes(|c| c["no_rope_layers"] = Value::Null), every_fourth);
    let second = |c: &mut Value| {
        remove(c, "no_rope_layers");
        c["no_rope_layer_interval"] = json!(2);
    };
    assert_eq!(ropes(second), [true, false, true, false, true, false]);

    let chunked = |change| -> Vec<bool> { layers(change).iter().map(|l| l.chunked).collect() };
    let as_ropes = |c: &mut Value| {
        remove(c, "layer_types");
        c["no_rope_layers"] = json!([0, 1, 0, 1, 0, 1]);
    };
    assert_eq!(chunked(as_ropes), [false, true, false, true, false, true]);
    assert_eq!(
        chunked(|c| c["layer_types"] = json!(vec!["full_attention"; 6])),
        [false; 6]
    );
}

#[test]
fn constants_of_llama4_have_the_defaults_of_the_reference() {
    let folder = Folder::of("llama4-maverick");
    folder.change(CONFIG, |c| {
        for field in [
            "attention_chunk_size",
            "attn_temperature_tuning",
            "floor_scale",
            "attn_scale",
        ] {
            remove(c, field);
        }
    });
    let config = folder.opens().config().clone();
    assert_eq!(config.chunk, Some(8192));
    let temperature = config.temperature.expect("is tuned");
    assert_eq!((temperature.floor_scale, temperature.scale), (8192.0, 0.1));
    for (tuning, is_tuned) in [(json!(4), true), (json!(0), false), (json!(false), false)] {
        let folder = Folder::of("llama4-maverick");
        folder.change(CONFIG, |c| c["attn_temperature_tuning"] = tuning.clone());
        assert_eq!(
            folder.opens().config().temperature.is_some(),
            is_tuned,
            "{tuning}"
        );
    }
}
