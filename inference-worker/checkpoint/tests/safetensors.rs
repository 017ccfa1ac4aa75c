//! Safetensors files that are cut short, damaged or made to do harm.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    clippy::format_push_string,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use hostile::{Folder, Invalid, SINGLE, Truncated, Unsupported};
use llama_checkpoint::ModelErrorCategory;
use serde_json::{Map, Value, json};

type Header = Map<String, Value>;
/// What is wrong, and what it is refused with.
type Case<C> = (C, ModelErrorCategory, &'static str);

fn with_length(len: u64, rest: &[u8]) -> Vec<u8> {
    [&len.to_le_bytes(), rest].concat()
}

fn with_header(header: &str) -> Vec<u8> {
    with_length(header.len() as u64, header.as_bytes())
}

#[test]
fn files_without_a_header() {
    let cases: [Case<Vec<u8>>; 15] = [
        (Vec::new(), Truncated, "is cut short: it is empty"),
        (
            b"1234567".to_vec(),
            Truncated,
            "is cut short: it has 7 bytes",
        ),
        (
            with_length(u64::MAX, b"{}"),
            Invalid,
            "is not a safetensors file: it announces a header of 18446744073709551615 bytes",
        ),
        (
            with_length(100_000_001, b"{}"),
            Invalid,
            "is not a safetensors file: it announces a header of 100000001 bytes",
        ),
        (
            with_length(100_000_000, b"{}"),
            Truncated,
            "is cut short: its header of 100000000 bytes does not end in its 10 bytes",
        ),
        (
            with_length(3, b"{}"),
            Truncated,
            "is cut short: its header of 3 bytes does not end in its 10 bytes",
        ),
        (
            with_length(0, b""),
            Invalid,
            "has a damaged header: EOF while parsing a value at line 1 column 0",
        ),
        (
            with_header("GGUF"),
            Invalid,
            "has a damaged header: expected value at line 1 column 1",
        ),
        (
            with_header("{\"a\":\u{1}"),
            Invalid,
            "has a damaged header: expected value at line 1 column 6",
        ),
        (
            with_length(8, b"{\"\xff\xfe\":0}"),
            Invalid,
            "has a damaged header: invalid unicode code point at line 1 column 3",
        ),
        (
            with_header("[1,2]"),
            Invalid,
            "has a damaged header: invalid type: sequence, expected an object with the names of tensors at line 1 column 0",
        ),
        (
            with_header(&"[".repeat(1 << 20)),
            Invalid,
            "has a damaged header: invalid type: sequence, expected an object with the names of tensors at line 1 column 0",
        ),
        (
            with_header(&format!("{{\"a\":{}", "[".repeat(1 << 20))),
            Invalid,
            // How the parser words it depends on its features.
            "has a damaged header: …",
        ),
        (
            with_header(&format!("{{\"__metadata__\":{}", "[".repeat(1 << 20))),
            Invalid,
            "has a damaged header: EOF while parsing a …",
        ),
        (
            with_header(&format!("{{\"a\":{{\"b\":{}", "{\"c\":".repeat(1 << 18))),
            Invalid,
            "has a damaged header: EOF while parsing a …",
        ),
    ];
    for (bytes, category, what) in cases {
        let folder = Folder::of("llama-plain");
        folder.put(SINGLE, bytes);
        let (found, said) = folder.refusal();
        assert_eq!(found, category, "{said}");
        let expected = format!("{SINGLE} {what}");
        match expected.strip_suffix('…') {
            Some(start) => assert!(said.starts_with(start), "{said}"),
            None => assert_eq!(said, expected),
        }
    }
}

#[test]
fn headers_that_do_not_say_where_tensors_lie() {
    let long = "n".repeat(257);
    let entry = "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}";
    let cases: Vec<(String, &'static str)> = vec![
        (
            format!("{{\"a\":{entry},\"a\":{entry}}}"),
            "tensor a occurs twice at line 1 column 57",
        ),
        (
            format!("{{\"\":{entry}}}"),
            "\"\" is no name of a tensor: such have 1 to 256 bytes at line 1 column 3",
        ),
        (
            format!("{{\"a\\nb\":{entry}}}"),
            "\"a\\nb\" is no name of a tensor: such have 1 to 256 bytes at line 1 column 7",
        ),
        (
            format!("{{\"{long}\":{entry}}}"),
            "\"nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn…\" is no name of a tensor: such have 1 to 256 bytes at line 1 column 260",
        ),
        (
            entry_with("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]"),
            "a tensor of more than 8 dimensions at line 1 column 47",
        ),
        (
            entry_with("\"F32\"", "[-1]", "[0,4]"),
            "invalid value: integer `-1`, expected usize at line 1 column 31",
        ),
        (
            entry_with("\"F32\"", "[18446744073709551616]", "[0,4]"),
            "invalid type: floating point `1.8446744073709552e+19`, expected usize at line 1 column 49",
        ),
        (
            entry_with("\"F32\"", "\"1\"", "[0,4]"),
            "invalid type: string \"1\", expected a list of sizes at line 1 column 31",
        ),
        (
            entry_with("\"F32\"", "[1]", "[0]"),
            "invalid length 1, expected a tuple of size 2 at line 1 column 50",
        ),
        (
            entry_with("\"F32\"", "[1]", "[0,4,8]"),
            "trailing characters at line 1 column 53",
        ),
        (
            entry_with("\"F32\"", "[1]", "[0,4.5]"),
            "invalid type: floating point `4.5`, expected u64 at line 1 column 53",
        ),
        (
            "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}".to_owned(),
            "missing field `data_offsets` at line 1 column 32",
        ),
    ];
    for (header, what) in cases {
        let folder = Folder::of("llama-plain");
        folder.put_tensors(SINGLE, header.as_bytes(), 4);
        let (category, sentence) = folder.refusal();
        let expected = format!("{SINGLE} has a damaged header: {what}");
        assert_eq!((category, sentence), (Invalid, expected));
    }
    let folder = Folder::of("llama-plain");
    folder.put_tensors(
        SINGLE,
        entry_with(&format!("\"{}\"", "F".repeat(1 << 20)), "[1]", "[0,4]").as_bytes(),
        4,
    );
    let (category, sentence) = folder.refusal();
    assert_eq!(category, Invalid);
    assert!(
        sentence.contains("unknown variant `FFF") && sentence.len() < 300,
        "{sentence}"
    );
}

fn entry_with(dtype: &str, shape: &str, offsets: &str) -> String {
    format!("{{\"a\":{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":{offsets}}}}}")
}

#[test]
fn more_tensors_than_any_model_has() {
    let mut header = String::from("{");
    for number in 0..=1 << 18 {
        header.push_str(&format!(
            "\"{number}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}},"
        ));
    }
    header.pop();
    header.push('}');
    let folder = Folder::of("llama-plain");
    folder.put_tensors(SINGLE, header.as_bytes(), 0);
    let (category, sentence) = folder.refusal();
    assert_eq!(category, Invalid);
    let expected = format!("{SINGLE} has a damaged header: more than 262144 tensors at line 1 ");
    assert!(sentence.starts_with(&expected), "{sentence}");
}

#[test]
fn tensors_that_overlap_leave_gaps_or_lie_elsewhere() {
    const NORM: &str = "model.layers.0.input_layernorm.weight";
    let cases: [Case<fn(&mut Header)>; 12] = [
        (
            |h| h["lm_head.weight"]["data_offsets"] = json!([4, 49156]),
            Invalid,
            "tensor lm_head.weight begins 4 bytes behind the header, but the tensors before it end at 0",
        ),
        (
            |h| h[NORM]["data_offsets"] = json!([98300, 98812]),
            Invalid,
            "tensor model.layers.0.input_layernorm.weight begins 98300 bytes behind the header, but the tensors before it end at 98304",
        ),
        (
            |h| h["lm_head.weight"]["data_offsets"] = json!([49152, 98304]),
            Invalid,
            "tensor lm_head.weight begins 49152 bytes behind the header, but the tensors before it end at 0",
        ),
        (
            |h| h["lm_head.weight"]["data_offsets"] = json!([0, u64::MAX]),
            Invalid,
            "tensor lm_head.weight lies in bytes 0 to 18446744073709551615, but F32 of the shape [96, 128] takes 49152 bytes",
        ),
        (
            |h| {
                h["lm_head.weight"]["data_offsets"] = json!([0, 1_u64 << 40]);
                h["lm_head.weight"]["shape"] = json!([1_u64 << 40]);
                h["lm_head.weight"]["dtype"] = json!("U8");
            },
            Truncated,
            "tensor lm_head.weight ends 1099511627776 bytes behind the header but 985600 are there",
        ),
        (
            |h| h["model.norm.weight"]["data_offsets"] = json!([u64::MAX - 512, u64::MAX]),
            Invalid,
            "tensor model.norm.weight begins 18446744073709551103 bytes behind the header, but the tensors before it end at 985088",
        ),
        (
            |h| h["lm_head.weight"]["data_offsets"] = json!([0, 0]),
            Invalid,
            "tensor lm_head.weight lies in bytes 0 to 0, but F32 of the shape [96, 128] takes 49152 bytes",
        ),
        (
            |h| h[NORM]["data_offsets"] = json!([98304, 98300]),
            Invalid,
            "tensor model.layers.0.input_layernorm.weight lies in bytes 98304 to 98300, but F32 of the shape [128] takes 512 bytes",
        ),
        (
            |h| h["lm_head.weight"]["shape"] = json!([1_u64 << 40, 1_u64 << 40]),
            Invalid,
            "tensor lm_head.weight has the impossible shape [1099511627776, 1099511627776] of F32",
        ),
        (
            |h| h["lm_head.weight"]["shape"] = json!([u64::MAX, u64::MAX, 0]),
            Invalid,
            "tensor lm_head.weight has the impossible shape [18446744073709551615, 18446744073709551615, 0] of F32",
        ),
        (
            |h| {
                h["lm_head.weight"]["dtype"] = json!("F4");
                h["lm_head.weight"]["shape"] = json!([98303]);
            },
            Invalid,
            "tensor lm_head.weight has the impossible shape [98303] of F4",
        ),
        (
            |h| h["lm_head.weight"]["dtype"] = json!("BF16"),
            Invalid,
            "tensor lm_head.weight lies in bytes 0 to 49152, but BF16 of the shape [96, 128] takes 24576 bytes",
        ),
    ];
    for (change, category, what) in cases {
        let folder = Folder::of("llama-plain");
        folder.change_header(SINGLE, change);
        let word = if category == Truncated {
            "cut short"
        } else {
            "damaged"
        };
        let expected = (category, format!("{SINGLE} is {word}: {what}"));
        assert_eq!(folder.refusal(), expected);
    }
}

#[test]
fn files_shorter_and_longer_than_their_headers_say() {
    let last = "tensor model.norm.weight ends 985600 bytes behind the header but";
    for (change, category, what) in [
        (-1, Truncated, format!("cut short: {last} 985599 are there")),
        (
            -500,
            Truncated,
            format!("cut short: {last} 985100 are there"),
        ),
        (
            1,
            Invalid,
            "damaged: its tensors end 985600 bytes behind the header but 985601 are there"
                .to_owned(),
        ),
        (
            1 << 40,
            Invalid,
            "damaged: its tensors end 985600 bytes behind the header but 1099512613376 are there"
                .to_owned(),
        ),
    ] {
        let folder = Folder::of("llama-plain");
        folder.resize(SINGLE, change);
        assert_eq!(folder.refusal(), (category, format!("{SINGLE} is {what}")));
    }
}

const KNOWN: &str = "this worker computes with F32, F16, BF16, F8_E4M3, Q4_0, Q4_1, Q8_0, I8 with scales, packed 4-bit integers, and ggml's K-quants";

#[test]
fn tensors_that_are_missing_or_of_another_kind() {
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    let cases: [Case<fn(&mut Header)>; 11] = [
        (
            |h| drop(h.remove(Q)),
            Invalid,
            "tensor model.layers.1.self_attn.q_proj.weight is missing",
        ),
        (
            |h| drop(h.remove("model.norm.weight")),
            Invalid,
            "tensor model.norm.weight is missing",
        ),
        (
            |h| h[Q]["shape"] = json!([128, 64]),
            Invalid,
            "tensor model.layers.1.self_attn.q_proj.weight has the shape [128, 64], expected [128, 128]",
        ),
        (
            |h| h[Q]["shape"] = json!([16384]),
            Invalid,
            "tensor model.layers.1.self_attn.q_proj.weight has the shape [16384], expected [128, 128]",
        ),
        (
            |h| h["model.norm.weight"]["shape"] = json!([128, 1]),
            Invalid,
            "tensor model.norm.weight has the shape [128, 1], expected [128]",
        ),
        (
            |h| h[Q]["dtype"] = json!("F64"),
            Unsupported,
            "tensor model.layers.1.self_attn.q_proj.weight is stored as F64",
        ),
        (
            |h| h[Q]["dtype"] = json!("I32"),
            Unsupported,
            "tensor model.layers.1.self_attn.q_proj.weight is stored as I32",
        ),
        (
            |h| h["model.norm.weight"]["dtype"] = json!("F8_E4M3"),
            Unsupported,
            "tensor model.norm.weight is stored as F8_E4M3",
        ),
        (
            |h| h[Q]["dtype"] = json!("F8_E4M3"),
            Invalid,
            "tensor model.layers.1.self_attn.q_proj.weight_scale is missing",
        ),
        (
            |h| {
                let bias = json!({"dtype": "F32", "shape": [128], "data_offsets": [0, 0]});
                h.insert("model.layers.1.self_attn.q_proj.bias".to_owned(), bias);
            },
            Unsupported,
            "1 tensor is not part of a Llama model that this worker computes: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            |h| {
                let adapter = json!({"dtype": "F32", "shape": [4], "data_offsets": [0, 0]});
                for number in 0..6 {
                    h.insert(format!("lora_{number}"), adapter.clone());
                }
            },
            Unsupported,
            "6 tensors are not part of a Llama model that this worker computes: lora_0, lora_1, lora_2, lora_3, …",
        ),
    ];
    for (change, category, what) in cases {
        let folder = Folder::of("llama-plain");
        folder.change_tensors(SINGLE, change);
        let (found, sentence) = folder.refusal();
        // The folder is named, not a file.
        let expected = format!("{}: {what}", folder.path().display());
        let expected = if what.contains("stored as") {
            format!("{expected}; {KNOWN}")
        } else {
            expected
        };
        assert_eq!((found, sentence), (category, expected));
    }
}

#[test]
fn scales_that_do_not_fit_their_weights() {
    const Q: &str = "model.layers.0.self_attn.q_proj";
    let cases: [(&str, Case<fn(&mut Header)>); 11] = [
        (
            "llama-fp8-channel",
            (
                |h| drop(h.remove(&format!("{Q}.weight_scale"))),
                Invalid,
                "weight_scale is missing",
            ),
        ),
        (
            "llama-fp8-channel",
            (
                |h| h[&format!("{Q}.weight_scale")]["shape"] = json!([127, 1]),
                Invalid,
                "weight_scale has the shape [127, 1], expected [128, 1]",
            ),
        ),
        (
            "llama-fp8-channel",
            (
                |h| h[&format!("{Q}.weight_scale")]["shape"] = json!([1, 128]),
                Invalid,
                "weight_scale has the shape [1, 128], expected [128, 1]",
            ),
        ),
        (
            "llama-fp8-channel",
            (
                |h| h[&format!("{Q}.weight_scale")]["shape"] = json!([128, 2]),
                Invalid,
                "weight_scale has the shape [128, 2], expected [128, 1]",
            ),
        ),
        (
            "llama-fp8-channel",
            (
                |h| h[&format!("{Q}.weight_scale")]["dtype"] = json!("I32"),
                Unsupported,
                "weight_scale is stored as I32",
            ),
        ),
        (
            "llama-int8-channel",
            (
                |h| drop(h.remove(&format!("{Q}.weight_scale"))),
                Invalid,
                "weight_scale is missing",
            ),
        ),
        (
            "llama-int4-group",
            (
                |h| drop(h.remove(&format!("{Q}.weight_scale"))),
                Invalid,
                "weight_scale is missing",
            ),
        ),
        (
            "llama-int4-group",
            (
                |h| h[&format!("{Q}.weight_scale")]["shape"] = json!([128, 3]),
                Invalid,
                "weight_scale has the shape [128, 3], expected [128, 1]",
            ),
        ),
        (
            "llama-int4-group",
            (
                |h| h[&format!("{Q}.weight_packed")]["dtype"] = json!("F32"),
                Unsupported,
                "weight_packed is stored as F32",
            ),
        ),
        (
            "llama-int4-group",
            (
                |h| h[&format!("{Q}.weight_packed")]["shape"] = json!([128, 15]),
                Invalid,
                "weight_packed has the shape [128, 15], expected [128, 16]",
            ),
        ),
        (
            "llama-int4-group",
            (
                |h| {
                    let zeros = json!({"dtype": "I32", "shape": [16, 1], "data_offsets": [0, 0]});
                    h.insert(format!("{Q}.weight_zero_point"), zeros);
                },
                Unsupported,
                "1 tensor is not part of a Llama model that this worker computes: ",
            ),
        ),
    ];
    for (name, (change, category, what)) in cases {
        let folder = Folder::of(name);
        folder.change_tensors(SINGLE, change);
        let (found, sentence) = folder.refusal();
        let path = folder.path().display();
        let expected = match what.split_once(": ") {
            Some(_) => format!("{path}: {what}{Q}.weight_zero_point"),
            None if category == Unsupported => format!("{path}: tensor {Q}.{what}; {KNOWN}"),
            None => format!("{path}: tensor {Q}.{what}"),
        };
        assert_eq!((found, sentence), (category, expected), "{name}");
    }
    let folder = Folder::of("llama-int4-group");
    folder.change("config.json", |config| {
        config["quantization_config"] = Value::Null;
    });
    let (category, sentence) = folder.refusal();
    let what = "is packed, but quantization_config names no 4-bit weights";
    assert_eq!(category, Invalid);
    assert!(sentence.ends_with(what), "{sentence}");
}
