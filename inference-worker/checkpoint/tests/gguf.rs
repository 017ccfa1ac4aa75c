//! GGUF headers that are cut short, damaged, made to do harm, or of models that are
//! not computed.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use hostile::gguf::{Header, text};
use hostile::{Folder, Invalid, Truncated, Unsupported, refusal_of};
use llama_checkpoint::checkpoint::LoadFormat;
use llama_checkpoint::config::{LayerKind, Temperature};
use llama_checkpoint::{Checkpoint, ModelErrorCategory};

/// What is wrong, and what it is refused with.
type Case = (fn(&mut Header), ModelErrorCategory, &'static str);

fn refusal(header: &Header) -> (ModelErrorCategory, String) {
    let folder = Folder::empty();
    let path = header.write(folder.path());
    refusal_of(folder.path(), &path, LoadFormat::Auto)
}

fn check(header: &Header, cases: &[Case]) {
    for (change, category, what) in cases {
        let mut header = header.clone();
        change(&mut header);
        let found = refusal(&header);
        if found != (*category, format!("model.gguf{what}")) {
            eprintln!("LEFT {found:?}\nRIGHT {category:?} {what:?}");
        }
    }
}

fn opens(header: &Header) -> Checkpoint {
    let folder = Folder::empty();
    let path = header.write(folder.path());
    match Checkpoint::open(&path, LoadFormat::Auto) {
        Ok(checkpoint) => checkpoint,
        Err(error) => panic!("{error}"),
    }
}

fn list(kind: u32, count: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &count.to_le_bytes()].concat()
}

#[test]
fn the_headers_that_are_broken_below_open() {
    let plain = opens(&Header::llama());
    assert_eq!(plain.config().layers, [LayerKind::PLAIN; 2]);
    let config = opens(&Header::llama4()).config().clone();
    let kind = |rope, experts| LayerKind {
        rope,
        chunked: rope,
        experts,
    };
    let layers = [
        kind(true, false),
        kind(true, true),
        kind(true, false),
        kind(false, true),
    ];
    assert_eq!(config.layers, layers);
    assert_eq!((config.chunk, config.qk_norm), (Some(8192), true));
    let temperature = Temperature {
        floor_scale: 8192.0,
        scale: 0.1,
    };
    assert_eq!(config.temperature, Some(temperature));
}

#[test]
fn counts_that_no_file_holds() {
    let sizes: [Case; 9] = [
        (
            |h| h.counts = Some((u64::MAX, 12)),
            Invalid,
            " is damaged: 18446744073709551615 tensors, expected at most 262144 (in its first line, before byte 24)",
        ),
        (
            |h| h.counts = Some((1, u64::MAX)),
            Invalid,
            " is damaged: 18446744073709551615 metadata keys, expected at most 65536 (in its first line, before byte 24)",
        ),
        (
            |h| h.set("a", 9, list(0, u64::MAX)),
            Invalid,
            " is damaged: 18446744073709551615 more entries of lists, expected at most 4194240 (in its metadata, before byte 1339)",
        ),
        (
            |h| {
                for key in ["a", "b", "c", "d", "e"] {
                    h.set(key, 9, [list(7, 1 << 20), vec![0; 1 << 20]].concat());
                }
            },
            Invalid,
            " is damaged: 1048576 more entries of lists, expected at most 1048512 (in its metadata, before byte 3147142)",
        ),
        (
            |h| h.set("a", 9, list(8, 1 << 20)),
            Truncated,
            " is cut short: its tensor list",
        ),
        (
            |h| h.set("a", 9, list(9, 1)),
            Invalid,
            " is damaged: unknown type 9 of a metadata list (in its metadata, before byte 1339)",
        ),
        (
            |h| h.set("a", 13, [0; 8]),
            Invalid,
            " is damaged: unknown metadata type 13 (in its metadata, before byte 1327)",
        ),
        (
            |h| h.set("a", 8, u64::MAX.to_le_bytes()),
            Truncated,
            " is cut short: its metadata needs 18446744073709551615 bytes at byte 1335 but the file has 233535 bytes",
        ),
        (
            |h| h.set("a", 8, (1_u64 << 20).to_le_bytes()),
            Truncated,
            " is cut short: its metadata needs 1048576 bytes at byte 1335 but the file has 233535 bytes",
        ),
    ];
    check(&Header::llama(), &sizes);
}

#[test]
fn bytes_that_are_no_header() {
    let folder = Folder::empty();
    let path = folder.path().join("model.gguf");
    for (bytes, category, what) in [
        (b"".as_slice(), Truncated, " is cut short: it is empty"),
        (b"GG", Truncated, " is cut short: it has 2 bytes"),
        (
            b"GGUF\x03\0\0\0",
            Truncated,
            " is cut short: its first line needs 8 bytes at byte 8 but the file has 8 bytes",
        ),
        (
            b"\x89PNG\r\n",
            Invalid,
            " is not a GGUF file: it starts with \"\\x89PNG\"",
        ),
        (
            b"GGUF\0\0\0\x03",
            Unsupported,
            " is GGUF version 50331648; this worker reads versions 2 and 3, little-endian",
        ),
    ] {
        std::fs::write(&path, bytes).expect("writes");
        let expected = (category, format!("model.gguf{what}"));
        assert_eq!(refusal_of(folder.path(), &path, LoadFormat::Auto), expected);
    }
    // Wherever it ends, a header is cut short.
    let (header, _) = Header::llama4().to_bytes();
    for end in (4..header.len()).step_by(11) {
        std::fs::write(&path, &header[..end]).expect("writes");
        let (category, sentence) = refusal_of(folder.path(), &path, LoadFormat::Auto);
        assert_eq!(category, Truncated, "{end}: {sentence}");
        let expected = format!("but the file has {end} bytes");
        assert!(sentence.ends_with(&expected), "{end}: {sentence}");
    }
}

#[test]
fn names_that_are_none() {
    let long = " is damaged: \"nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn…\" is no name: such have 1 to 256 bytes (in its metadata, before byte 1580)";
    check(
        &Header::llama(),
        &[
            (|h| h.set(&"n".repeat(257), 7, [0]), Invalid, long),
            (
                |h| h.tensors[0].name = "a\nb".to_owned(),
                Invalid,
                " is damaged: \"a\\nb\" is no name: such have 1 to 256 bytes (in its tensor list, before byte 1325)",
            ),
            (
                |h| {
                    h.metadata
                        .push(("llama.block_count".to_owned(), 7, vec![0]));
                },
                Invalid,
                " is damaged: metadata key llama.block_count occurs twice (in its metadata, before byte 1344)",
            ),
            (
                |h| h.tensors[1].name = h.tensors[0].name.clone(),
                Invalid,
                " is damaged: tensor token_embd.weight occurs twice",
            ),
            (
                |h| h.set("a", 8, [1, 0, 0, 0, 0, 0, 0, 0, 0xFF]),
                Invalid,
                " is damaged: a string is not UTF-8 (in its metadata, before byte 1336)",
            ),
        ],
    );
}

#[test]
fn tensors_that_overlap_leave_gaps_or_lie_elsewhere() {
    check(
        &Header::llama(),
        &[
            (
                |h| h.tensors[0].start = Some(32),
                Invalid,
                " is damaged: tensor token_embd.weight begins 32 bytes behind the header, but the tensors before it end at 0",
            ),
            (
                |h| h.tensors[1].start = Some(0),
                Invalid,
                " is damaged: tensor output.weight begins 0 bytes behind the header, but the tensors before it end at 16384",
            ),
            (
                |h| h.tensors[1].start = Some(u64::MAX),
                Invalid,
                " is damaged: tensor output.weight begins 18446744073709551615 bytes behind the header, but the tensors before it end at 16384",
            ),
            (
                |h| h.tensors[1].dims = vec![1 << 40, 1 << 40],
                Invalid,
                " is damaged: tensor output.weight has impossible sizes [1099511627776, 1099511627776] (in its tensor list, before byte 1430)",
            ),
            (
                |h| {
                    h.tensors[1].dims = vec![u64::MAX];
                    h.tensors[1].kind = 24;
                },
                Invalid,
                " is damaged: tensor output.weight has impossible sizes [18446744073709551615]",
            ),
            (
                |h| h.tensors[1].dims = vec![1; 5],
                Invalid,
                " is damaged: tensor output.weight has 5 dimensions (in its tensor list, before byte 1398)",
            ),
            (
                |h| h.tensors[1].dims = vec![1 << 50],
                Truncated,
                " is cut short: tensor output.weight ends at byte 4503599627389440 but the file has 1051136 bytes",
            ),
            (
                |h| h.tensors[1].kind = 99,
                Unsupported,
                ": tensor output.weight is stored as ggml type 99, which this worker does not know",
            ),
            (
                |h| {
                    h.tensors[1].kind = 12;
                    h.tensors[1].dims = vec![64, 64];
                },
                Invalid,
                " is damaged: tensor output.weight has 64 columns, which Q4_K cannot hold in blocks of 256 (in its tensor list, before byte 1430)",
            ),
            (
                |h| h.set("general.alignment", 4, 3_u32.to_le_bytes()),
                Invalid,
                ": general.alignment is 3, expected a power of two up to 1048576",
            ),
            (
                |h| h.set("general.alignment", 10, (1_u64 << 63).to_le_bytes()),
                Invalid,
                ": general.alignment is 9223372036854775808, expected a power of two up to 1048576",
            ),
            (
                |h| h.set("general.alignment", 8, text("\n")),
                Invalid,
                ": general.alignment is a string, expected a power of two up to 1048576",
            ),
        ],
    );
    // What lies behind the last tensor is nobody's.
    let folder = Folder::empty();
    let path = Header::llama().write(folder.path());
    folder.resize("model.gguf", 1 << 40);
    Checkpoint::open(&path, LoadFormat::Auto).expect("opens");
    folder.resize("model.gguf", -(1 << 40) - 1);
    let (category, sentence) = refusal_of(folder.path(), &path, LoadFormat::Auto);
    assert_eq!(category, Truncated);
    assert!(
        sentence.starts_with("model.gguf is cut short: tensor blk.1.ffn_down.weight ends at byte"),
        "{sentence}"
    );
}

#[test]
fn models_that_are_not_computed() {
    check(
        &Header::llama(),
        &[
            (
                |h| h.set("general.architecture", 8, text(&"q\n".repeat(1 << 16))),
                Unsupported,
                ": general.architecture is \"q\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\nq\\n…\"; this worker runs \"llama\" and \"llama4\"",
            ),
            (
                |h| h.remove("general.architecture"),
                Invalid,
                ": metadata general.architecture is missing",
            ),
            (
                |h| h.set_size("split.count", 3),
                Unsupported,
                ": the model is split into 3 files; merge them into one (llama-gguf-split --merge)",
            ),
            (
                |h| h.set_size("llama.block_count", 0),
                Invalid,
                ": llama.block_count is 0, expected 1 to 16777216",
            ),
            (
                |h| h.set_size("llama.block_count", u32::MAX),
                Invalid,
                ": llama.block_count is 4294967295, expected 1 to 16777216",
            ),
            (
                |h| h.set_size("llama.block_count", 1025),
                Invalid,
                ": llama.block_count is 1025, expected 1 to 1024",
            ),
            (
                |h| h.set("llama.block_count", 8, text("2")),
                Invalid,
                ": metadata llama.block_count is a string, expected an unsigned integer",
            ),
            (
                |h| h.set("llama.block_count", 5, (-2_i32).to_le_bytes()),
                Invalid,
                ": metadata llama.block_count is a signed integer, expected an unsigned integer",
            ),
            (
                |h| h.set_size("llama.attention.head_count", 0),
                Invalid,
                ": llama.attention.head_count is 0, expected 1 to 16777216",
            ),
            (
                |h| h.set_size("llama.attention.head_count_kv", 3),
                Invalid,
                ": 2 attention heads do not share 3 KV heads evenly",
            ),
            (
                |h| h.set_size("llama.attention.key_length", 40),
                Unsupported,
                ": attention heads are 40 wide; this worker takes multiples of 32",
            ),
            (
                |h| h.set_size("llama.attention.value_length", 64),
                Unsupported,
                ": llama.attention.value_length is 64, expected 32: this worker computes keys as wide as values",
            ),
            (
                |h| h.set_size("llama.expert_count", 8),
                Unsupported,
                ": llama.expert_count is 8, which this worker does not compute",
            ),
            (
                |h| h.set("llama.rope.scaling.type", 8, text("yarn")),
                Unsupported,
                ": llama.rope.scaling.type is \"yarn\"; \"none\", \"linear\" and Llama 3's rope_freqs.weight are built in",
            ),
            (
                |h| h.set("llama.rope.freq_base", 6, f32::NAN.to_le_bytes()),
                Invalid,
                ": llama.rope.freq_base is NaN, expected a positive number",
            ),
            (
                |h| {
                    h.set(
                        "llama.attention.layer_norm_rms_epsilon",
                        6,
                        (-1.0_f32).to_le_bytes(),
                    );
                },
                Invalid,
                ": llama.attention.layer_norm_rms_epsilon is -1, expected a positive number",
            ),
            (
                |h| {
                    h.set(
                        "llama.attention.layer_norm_rms_epsilon",
                        12,
                        1e-60_f64.to_le_bytes(),
                    );
                },
                Invalid,
                ": the epsilon of norms is 0, expected a positive number",
            ),
            (
                |h| h.set("tokenizer.ggml.tokens", 9, list(8, 0)),
                Invalid,
                ": llama.vocab_size is 0 but tokenizer.ggml.tokens has 0 entries",
            ),
            (
                |h| h.remove("tokenizer.ggml.tokens"),
                Invalid,
                ": metadata tokenizer.ggml.tokens is missing",
            ),
            (
                |h| h.set_size("llama.vocab_size", 65),
                Invalid,
                ": llama.vocab_size is 65 but tokenizer.ggml.tokens has 64 entries",
            ),
        ],
    );
}

#[test]
fn llama4_that_is_not_computed() {
    check(
        &Header::llama4(),
        &[
            (
                |h| h.set_size("llama4.attention.sliding_window", 0),
                Unsupported,
                ": llama4.attention.sliding_window is 0, so all layers attend to all tokens, which this worker does not compute",
            ),
            (
                |h| h.set_size("llama4.attention.sliding_window", 4096),
                Unsupported,
                ": llama4.attention.sliding_window is 4096, which this worker does not compute",
            ),
            (
                |h| h.set_size("llama4.expert_used_count", 2),
                Unsupported,
                ": llama4.expert_used_count is 2, expected 1: this worker computes one expert a token",
            ),
            (
                |h| h.set_size("llama4.expert_count", 0),
                Invalid,
                ": llama4.expert_count is 0, expected 1 to 16777216",
            ),
            (
                |h| h.set_size("llama4.expert_count", 1 << 15),
                Invalid,
                ": 2 layers of 32768 experts, expected at most 32768 experts",
            ),
            (
                |h| h.remove("llama4.expert_count"),
                Invalid,
                ": metadata llama4.expert_count is missing",
            ),
            (
                |h| h.remove("llama4.expert_feed_forward_length"),
                Invalid,
                ": metadata llama4.expert_feed_forward_length is missing",
            ),
            (
                |h| h.set_size("llama4.interleave_moe_layer_step", 0),
                Invalid,
                ": llama4.interleave_moe_layer_step is 0, expected 1 to 16777216",
            ),
            (
                |h| h.set_size("llama4.interleave_moe_layer_step", 1),
                Invalid,
                ": tensor blk.0.ffn_gate_inp.weight is missing",
            ),
            (
                |h| h.set_size("llama4.expert_count", 2),
                Invalid,
                ": tensor blk.1.ffn_gate_inp.weight has the shape [4, 64], expected [2, 64]",
            ),
            (
                |h| {
                    h.tensors
                        .retain(|tensor| tensor.name != "blk.3.ffn_up_exps.weight");
                },
                Invalid,
                ": tensor blk.3.ffn_up_exps.weight is missing",
            ),
        ],
    );
}

/// Maverick does not normalise queries and keys, which its GGUF does not say.
#[test]
fn a_model_of_128_experts_is_maverick() {
    let mut header = Header::llama4();
    header.set_size("llama4.expert_count", 128);
    for tensor in &mut header.tensors {
        let is_gate = tensor.name.contains("ffn_gate_inp");
        if is_gate || tensor.name.contains("_exps") {
            *tensor.dims.last_mut().expect("has sizes") = 128;
        }
    }
    let folder = Folder::empty();
    let path = header.write(folder.path());
    folder.resize("model.gguf", 1 << 24);
    let checkpoint = Checkpoint::open(&path, LoadFormat::Auto).expect("opens");
    assert!(!checkpoint.config().qk_norm);
}
