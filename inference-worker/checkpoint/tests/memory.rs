//! What the worst files make of memory: no more than they hold themselves.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use std::alloc::System;

use cap::Cap;
use hostile::gguf::Header;
use hostile::{Folder, INDEX, SINGLE};
use llama_checkpoint::Checkpoint;
use llama_checkpoint::checkpoint::LoadFormat;
use serde_json::json;

const MIB: usize = 1 << 20;

/// Whoever asks for more than it leaves ends the process.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Opens `folder` with at most `mib` MiB and says why it is refused.
fn refusal(what: &str, folder: &Folder, format: LoadFormat, mib: usize) -> String {
    eprintln!("{what} in {mib} MiB");
    let limit = ALLOCATOR.allocated() + mib * MIB;
    ALLOCATOR.set_limit(limit).expect("is more than there is");
    let found = Checkpoint::open(folder.path(), format);
    ALLOCATOR.set_limit(usize::MAX).expect("is more");
    match found {
        Ok(_) => panic!("{what} opens"),
        Err(error) => error.to_string(),
    }
}

/// The files have holes and take no disk. All in one test: the limit is one for
/// the process.
#[test]
fn headers_do_not_decide_how_much_is_allocated() {
    headers_of_safetensors();
    lists_and_configurations();
    headers_of_gguf();
}

fn headers_of_safetensors() {
    let folder = Folder::of("llama-plain");
    let length = 100_000_000_u64;
    folder.put(SINGLE, length.to_le_bytes());
    folder.resize(SINGLE, 1 << 42);
    let sentence = refusal("a header of zeros", &folder, LoadFormat::Auto, 1);
    assert!(
        sentence.contains("has a damaged header: expected value"),
        "{sentence}"
    );

    let repeated = |what: &str, start: &str, item: &str, mib| {
        let count = 10 * MIB / item.len();
        let header = [start, &item.repeat(count)].concat();
        folder.put_tensors(SINGLE, header.as_bytes(), 0);
        refusal(what, &folder, LoadFormat::Auto, mib)
    };
    let sentence = repeated("brackets", "{\"a\":{\"b\":", "[", 32);
    assert!(sentence.contains("EOF while parsing"), "{sentence}");
    let sentence = repeated("metadata", "{\"__metadata__\":{", "\"a\":\"\",", 32);
    assert!(sentence.contains("EOF while parsing"), "{sentence}");
    let sentence = repeated("sizes", "{\"a\":{\"dtype\":\"U8\",\"shape\":[", "0,", 1);
    assert!(sentence.contains("more than 8 dimensions"), "{sentence}");
    let sentence = repeated("a name", "{\"", "n", 32);
    assert!(sentence.contains("EOF while parsing"), "{sentence}");
}

fn lists_and_configurations() {
    let folder = Folder::of("llama-sharded");
    folder.resize(INDEX, 1 << 42);
    let sentence = refusal("an index", &folder, LoadFormat::Auto, 1);
    assert!(sentence.contains("more than 67108864"), "{sentence}");

    let folder = Folder::of("llama-plain");
    folder.put("config.json", format!("[{}", "0,".repeat(MIB / 2 - 8)));
    let sentence = refusal("a configuration", &folder, LoadFormat::Dummy, 64);
    assert!(sentence.contains("is not JSON"), "{sentence}");

    for (what, name, fields) in [
        (
            "layers",
            "llama-plain",
            json!({"num_hidden_layers": 1 << 24}),
        ),
        (
            "heads",
            "llama-plain",
            json!({"num_attention_heads": 1 << 24}),
        ),
        (
            "experts",
            "llama4-scout",
            json!({"num_local_experts": 1 << 24}),
        ),
        (
            "layers of experts",
            "llama4-scout",
            json!({"num_local_experts": 1 << 15, "num_hidden_layers": 1024, "no_rope_layers": [], "layer_types": null, "moe_layers": null}),
        ),
    ] {
        let folder = Folder::of(name);
        folder.change("config.json", |config| {
            for (field, value) in fields.as_object().expect("an object") {
                config[field] = value.clone();
            }
        });
        let sentence = refusal(what, &folder, LoadFormat::Dummy, 4);
        assert!(sentence.contains(" expected "), "{sentence}");
    }
}

fn headers_of_gguf() {
    let list =
        |kind: u32, count: u64| [kind.to_le_bytes().as_slice(), &count.to_le_bytes()].concat();
    let refused = |what: &str, change: &dyn Fn(&mut Header), mib| {
        let mut header = Header::llama();
        change(&mut header);
        let folder = Folder::empty();
        header.write(folder.path());
        folder.resize("model.gguf", 1 << 42);
        refusal(what, &folder, LoadFormat::Auto, mib)
    };
    // Each of these goes on into the hole, where all is zero.
    for kind in [0, 7, 8, 10] {
        let sentence = refused(
            "a list of 2^40",
            &|h| h.set("zeros", 9, list(kind, 1 << 40)),
            1,
        );
        assert!(sentence.contains("more entries of lists"), "{sentence}");
        let sentence = refused(
            "a list of 2^21",
            &|h| h.set("zeros", 9, list(kind, 1 << 21)),
            160,
        );
        assert!(sentence.contains("is damaged"), "{sentence}");
    }
    let sentence = refused("keys", &|h| h.counts = Some((1, 1 << 40)), 1);
    assert!(sentence.contains("metadata keys"), "{sentence}");
    let sentence = refused("tensors", &|h| h.counts = Some((1 << 40, 11)), 1);
    assert!(sentence.contains("tensors, expected"), "{sentence}");
    let sentence = refused(
        "a string",
        &|h| h.set("long", 8, (1_u64 << 40).to_le_bytes()),
        1,
    );
    assert!(sentence.contains("of a header of at most"), "{sentence}");
}
