//! `config.json` of models that are not computed, or of none.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use hostile::{Folder, Invalid, NotFound, Unsupported};
use llama_checkpoint::ModelErrorCategory;
use llama_checkpoint::config::{Llama3Scaling, RopeScaling};
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
fn what_is_no_object() {
    let deep = "[".repeat(1 << 16);
    let cases: [(&[u8], &str); 8] = [
        (
            b"",
            " is not JSON: EOF while parsing a value at line 1 column 0",
        ),
        (
            b"{",
            " is not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            b"{} {}",
            " is not JSON: trailing characters at line 1 column 4",
        ),
        (
            b"{\"a\":NaN}",
            " is not JSON: expected value at line 1 column 6",
        ),
        (b"[1]", " is not a JSON object"),
        (
            b"{}",
            ": model_type is \"\"; \"llama\", \"llama4\" and \"llama4_text\" are built in",
        ),
        (
            deep.as_bytes(),
            " is not JSON: recursion limit exceeded at line 1 column 128",
        ),
        (
            b"\xff",
            " is not text: invalid utf-8 sequence of 1 bytes from index 0",
        ),
    ];
    for (bytes, what) in cases {
        let folder = Folder::of("llama-plain");
        folder.put(CONFIG, bytes);
        let category = if what.starts_with(':') {
            Unsupported
        } else {
            Invalid
        };
        assert_eq!(folder.refusal(), (category, format!("{CONFIG}{what}")));
    }
    let folder = Folder::of("llama-plain");
    folder.resize(CONFIG, 1 << 40);
    let (category, sentence) = folder.refusal();
    assert_eq!(category, Invalid);
    assert!(
        sentence.ends_with(" bytes, more than 1048576"),
        "{sentence}"
    );
    folder.remove(CONFIG);
    let (category, sentence) = folder.dummy_refusal();
    assert_eq!(
        (category, sentence.as_str()),
        (NotFound, "read config.json")
    );
}

#[test]
fn fields_that_are_not_known() {
    const WHAT: &str = "which may change what the model computes; remove what does not";
    for (change, names) in [
        (
            (|c| c["attn_logit_softcapping"] = json!(50.0)) as fn(&mut Value),
            "attn_logit_softcapping".to_owned(),
        ),
        (
            |c| c["sliding_window"] = json!(4096),
            "sliding_window".to_owned(),
        ),
        (
            |c| c["line\nbreak\u{1b}[31m"] = json!(1),
            "line\\nbreak\\u{1b}[31m".to_owned(),
        ),
        (
            |c| c["n".repeat(1 << 18)] = json!(1),
            format!("{}…", "n".repeat(60)),
        ),
        (
            |c| {
                for number in 0..9 {
                    c[format!("x{number}")] = json!(1);
                }
            },
            "x0, x1, x2, x3, x4, x5, …".to_owned(),
        ),
        (
            |c| c["rope_parameters"]["mscale"] = json!(1),
            "rope_parameters.mscale".to_owned(),
        ),
    ] {
        let folder = Folder::of("llama-plain");
        folder.change(CONFIG, change);
        let expected = format!("{CONFIG}: this worker does not know {names}, {WHAT}");
        assert_eq!(folder.refusal(), (Unsupported, expected));
    }
    let folder = Folder::of("llama-plain");
    folder.change(CONFIG, |c| {
        c["sliding_window"] = Value::Null;
        c["use_sliding_window"] = json!(false);
        c["_attn_implementation"] = json!("eager");
    });
    folder.opens();
}

#[test]
fn sizes_that_no_model_has() {
    check(
        "llama-plain",
        &[
            (
                |c| c["num_hidden_layers"] = json!(0),
                Invalid,
                "num_hidden_layers is 0, expected 1 to 16777216",
            ),
            (
                |c| c["num_hidden_layers"] = json!(1025),
                Invalid,
                "num_hidden_layers is 1025, expected 1 to 1024",
            ),
            (
                |c| c["num_hidden_layers"] = json!(1 << 24),
                Invalid,
                "num_hidden_layers is 16777216, expected 1 to 1024",
            ),
            (
                |c| c["num_hidden_layers"] = json!(u64::MAX),
                Invalid,
                "num_hidden_layers is 18446744073709551615, expected 1 to 16777216",
            ),
            (
                |c| c["num_hidden_layers"] = json!(-2),
                Invalid,
                "num_hidden_layers is -2, expected 1 to 16777216",
            ),
            (
                |c| c["num_hidden_layers"] = json!(2.0),
                Invalid,
                "num_hidden_layers is 2.0, expected 1 to 16777216",
            ),
            (
                |c| c["num_hidden_layers"] = json!("2"),
                Invalid,
                "num_hidden_layers is \"2\", expected 1 to 16777216",
            ),
            (
                |c| c["num_hidden_layers"] = json!([2]),
                Invalid,
                "num_hidden_layers is [2], expected 1 to 16777216",
            ),
            (
                |c| remove(c, "num_hidden_layers"),
                Invalid,
                "num_hidden_layers is missing",
            ),
            (
                |c| c["num_hidden_layers"] = Value::Null,
                Invalid,
                "num_hidden_layers is missing",
            ),
            (
                |c| c["num_attention_heads"] = json!(0),
                Invalid,
                "num_attention_heads is 0, expected 1 to 16777216",
            ),
            (
                |c| c["num_attention_heads"] = json!(1026),
                Invalid,
                "1026 attention heads, expected 1 to 1024",
            ),
            (
                |c| c["num_key_value_heads"] = json!(0),
                Invalid,
                "num_key_value_heads is 0, expected 1 to 16777216",
            ),
            (
                |c| c["num_key_value_heads"] = json!(3),
                Invalid,
                "4 attention heads do not share 3 KV heads evenly",
            ),
            (
                |c| c["num_key_value_heads"] = json!(8),
                Invalid,
                "4 attention heads do not share 8 KV heads evenly",
            ),
            (
                |c| c["head_dim"] = json!(0),
                Invalid,
                "head_dim is 0, expected 1 to 16777216",
            ),
            (
                |c| c["head_dim"] = json!(40),
                Unsupported,
                "attention heads are 40 wide; this worker takes multiples of 32",
            ),
            (
                |c| c["head_dim"] = json!(33),
                Invalid,
                "rotary embedding of 33 dimensions in heads of 33",
            ),
            (
                |c| c["head_dim"] = json!(8192),
                Invalid,
                "8192 dimensions of a head, expected 1 to 4096",
            ),
            (
                |c| c["hidden_size"] = json!(100),
                Unsupported,
                "hidden states are 100 wide; this worker takes multiples of 32",
            ),
            (
                |c| c["hidden_size"] = json!((1 << 24) + 32),
                Invalid,
                "hidden_size is 16777248, expected 1 to 16777216",
            ),
            (
                |c| c["intermediate_size"] = json!(100),
                Unsupported,
                "feed-forward networks are 100 wide; this worker takes multiples of 32",
            ),
            (
                |c| c["vocab_size"] = json!(0),
                Invalid,
                "vocab_size is 0, expected 1 to 16777216",
            ),
            (
                |c| c["max_position_embeddings"] = json!(0),
                Invalid,
                "max_position_embeddings is 0, expected 1 to 16777216",
            ),
            (
                |c| c["max_position_embeddings"] = json!(1e300),
                Invalid,
                "max_position_embeddings is 1e+300, expected 1 to 16777216",
            ),
            (
                |c| {
                    remove(c, "head_dim");
                    c["num_attention_heads"] = json!(3);
                },
                Invalid,
                "hidden_size 128 is not a multiple of num_attention_heads 3, and head_dim is missing",
            ),
            (
                |c| {
                    c["hidden_size"] = json!(1 << 24);
                    c["intermediate_size"] = json!(1 << 24);
                    c["num_hidden_layers"] = json!(1024);
                },
                Invalid,
                "sizes of a model of 864697728746127360 weights, expected at most 1125899906842624",
            ),
        ],
    );
}

#[test]
fn constants_that_are_no_numbers() {
    check(
        "llama-plain",
        &[
            (
                |c| remove(c, "rms_norm_eps"),
                Invalid,
                "rms_norm_eps is missing",
            ),
            (
                |c| c["rms_norm_eps"] = json!(0),
                Invalid,
                "rms_norm_eps is 0, expected a positive number",
            ),
            (
                |c| c["rms_norm_eps"] = json!(-1e-5),
                Invalid,
                "rms_norm_eps is -0.00001, expected a positive number",
            ),
            (
                |c| c["rms_norm_eps"] = json!("1e-5"),
                Invalid,
                "rms_norm_eps is \"1e-5\", expected a positive number",
            ),
            (
                |c| c["rms_norm_eps"] = json!(1e-60),
                Invalid,
                "the epsilon of norms is 0, expected a positive number",
            ),
            (
                |c| c["rms_norm_eps"] = json!(1e60),
                Invalid,
                "the epsilon of norms is inf, expected a positive number",
            ),
            (
                |c| c["rope_theta"] = json!(0),
                Invalid,
                "rope_theta is 0, expected a positive number",
            ),
            (
                |c| c["rope_parameters"]["rope_theta"] = json!(-1),
                Invalid,
                "rope_parameters.rope_theta is -1, expected a positive number",
            ),
            (
                |c| c["rope_parameters"] = json!("default"),
                Invalid,
                "rope_parameters is \"default\", expected an object",
            ),
            (
                |c| c["rope_parameters"]["rope_type"] = json!(3),
                Invalid,
                "rope_parameters.rope_type is 3, expected a string",
            ),
            (
                |c| c["tie_word_embeddings"] = json!("no"),
                Invalid,
                "tie_word_embeddings is \"no\", expected true or false",
            ),
            (
                |c| c["model_type"] = json!(1),
                Invalid,
                "model_type is 1, expected a string",
            ),
            (
                |c| c["quantization_config"] = json!([]),
                Invalid,
                "quantization_config is [], expected an object",
            ),
        ],
    );
}

#[test]
fn computations_that_are_not_built_in() {
    check(
        "llama-plain",
        &[
            (
                |c| c["model_type"] = json!("mistral"),
                Unsupported,
                "model_type is \"mistral\"; \"llama\", \"llama4\" and \"llama4_text\" are built in",
            ),
            (
                |c| c["attention_bias"] = json!(true),
                Unsupported,
                "attention_bias is true; this worker computes attention without bias",
            ),
            (
                |c| c["mlp_bias"] = json!(true),
                Unsupported,
                "mlp_bias is true; this worker computes feed-forward networks without bias",
            ),
            (
                |c| c["hidden_act"] = json!("gelu"),
                Unsupported,
                "hidden_act is \"gelu\"; this worker computes SwiGLU with \"silu\"",
            ),
            (
                |c| c["partial_rotary_factor"] = json!(0.5),
                Unsupported,
                "partial_rotary_factor is 0.5; this worker computes heads that turn whole",
            ),
            (
                |c| c["rope_parameters"]["partial_rotary_factor"] = json!(0.5),
                Unsupported,
                "rope_parameters.partial_rotary_factor is 0.5; this worker computes heads that turn whole",
            ),
            (
                |c| c["rope_parameters"] = json!({"rope_type": "yarn", "factor": 4.0}),
                Unsupported,
                "the rope_type \"yarn\" is not built in; \"default\", \"linear\" and \"llama3\" are",
            ),
            (
                |c| c["rope_parameters"] = json!({"rope_type": "llama3", "factor": 4.0}),
                Invalid,
                "rope_parameters.low_freq_factor is missing",
            ),
            (
                |c| c["rope_parameters"] = json!({"rope_type": "linear"}),
                Invalid,
                "rope_parameters.factor is missing",
            ),
            (
                |c| c["hidden_act"] = json!("g".repeat(1 << 18)),
                Unsupported,
                "hidden_act is \"ggggggggggggggggggggggggggggggggggggggggggggggggggggggggggg…; this worker computes SwiGLU with \"silu\"",
            ),
        ],
    );
}

#[test]
fn both_spellings_of_rope_must_agree() {
    let scaling = json!({"rope_type": "linear", "factor": 2.0});
    let refused = format!(
        "{CONFIG}: rope_parameters and rope_scaling say different things; remove one of them"
    );
    // The base in rope_parameters is 10000, which is also the one that files without
    // a base mean.
    let cases: [(Value, Value, bool); 7] = [
        (Value::Null, scaling.clone(), false),
        (Value::Null, json!({}), true),
        (Value::Null, json!({"rope_type": "default"}), true),
        (json!(500_000.0), json!({"rope_type": "default"}), false),
        (json!(500_000.0), json!({}), true),
        (json!(500_000.0), Value::Null, true),
        (
            json!(500_000.0),
            json!({"rope_type": "default", "rope_theta": 10_000}),
            true,
        ),
    ];
    for (base, old, agrees) in cases {
        let folder = Folder::of("llama-plain");
        folder.change(CONFIG, |c| {
            c["rope_theta"] = base.clone();
            c["rope_scaling"] = old.clone();
        });
        if agrees {
            let rope = folder.opens().config().rope.clone();
            assert_eq!(
                (rope.base, rope.scaling),
                (1e4, RopeScaling::None),
                "{base} {old}"
            );
        } else {
            assert_eq!(
                folder.refusal(),
                (Unsupported, refused.clone()),
                "{base} {old}"
            );
        }
    }
}

#[test]
fn rope_of_either_spelling() {
    let rope = |change: fn(&mut Value)| {
        let folder = Folder::of("llama-plain");
        folder.change(CONFIG, change);
        let rope = folder.opens().config().rope.clone();
        (rope.base, rope.scaling)
    };
    let linear = |c: &mut Value| {
        remove(c, "rope_parameters");
        c["rope_scaling"] = json!({"type": "linear", "factor": 2});
    };
    assert_eq!(rope(linear), (1e4, RopeScaling::Linear(2.0)));
    let llama3 = |c: &mut Value| {
        c["rope_theta"] = json!(500_000);
        c["rope_parameters"] = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
    };
    let scaling = Llama3Scaling {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original: 1024.0,
    };
    assert_eq!(rope(llama3), (5e5, RopeScaling::Llama3(scaling)));
    let inside = |c: &mut Value| {
        c["rope_theta"] = json!(500_000);
        c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 7});
    };
    assert_eq!(rope(inside), (7.0, RopeScaling::None));
}
