//! Headers, texts and lists of real checkpoints with bytes changed, put in or cut
//! out: they open or are refused, soon, and by the name of a file.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod hostile;

use std::path::Path;
use std::time::{Duration, Instant};

use hostile::gguf::Header;
use hostile::{Folder, INDEX, SINGLE, header_of};
use llama_checkpoint::checkpoint::{LoadFormat, SHARDS, ShardManifest};
use llama_checkpoint::slices::ModelSlices;
use llama_checkpoint::{Checkpoint, Layout, Shard};
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Pieces that parsers may stumble over.
const PIECES: [&str; 18] = [
    "0",
    "9",
    "-",
    "1e999",
    "0.5",
    "18446744073709551615",
    "9223372036854775808",
    "null",
    "true",
    "[]",
    "{}",
    "[[[[[[[[",
    "\"",
    "\\u0000",
    "\\ud800",
    ",",
    ":",
    "\u{0}\u{7f}",
];

/// A change of some bytes.
#[derive(Clone, Debug)]
enum Change {
    Set(Index, u8),
    Flip(Index, u32),
    Insert(Index, &'static str),
    Remove(Index, usize),
    Repeat(Index, usize),
    End(Index),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    prop_oneof![
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        3 => (at(), 0..8_u32).prop_map(|(at, bit)| Change::Flip(at, bit)),
        3 => (at(), select(&PIECES[..])).prop_map(|(at, piece)| Change::Insert(at, piece)),
        2 => (at(), 1..40_usize).prop_map(|(at, len)| Change::Remove(at, len)),
        1 => (at(), 1..400_usize).prop_map(|(at, len)| Change::Repeat(at, len)),
        1 => at().prop_map(Change::End),
    ]
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    proptest::collection::vec(change(), 1..5)
}

fn apply(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        if bytes.is_empty() {
            break;
        }
        let place = |at: &Index| at.index(bytes.len());
        match change {
            Change::Set(at, byte) => {
                let at = place(at);
                bytes[at] = *byte;
            }
            Change::Flip(at, bit) => {
                let at = place(at);
                bytes[at] ^= 1 << bit;
            }
            Change::Insert(at, piece) => {
                let at = place(at);
                bytes.splice(at..at, piece.bytes());
            }
            Change::Remove(at, len) => {
                let at = place(at);
                bytes.drain(at..bytes.len().min(at + len));
            }
            Change::Repeat(at, len) => {
                let at = place(at);
                let again = bytes[at..bytes.len().min(at + len)].to_vec();
                bytes.splice(at..at, again);
            }
            Change::End(at) => bytes.truncate(place(at)),
        }
    }
    bytes
}

/// Opens what lies in `folder` and, if it opens, looks all its tensors up.
fn settle(folder: &Path, format: LoadFormat) -> Result<(), TestCaseError> {
    let start = Instant::now();
    match Checkpoint::open(folder, format) {
        Ok(checkpoint) => {
            let layout = checkpoint.cut_for().unwrap_or_else(|| Layout::tensor(1));
            let shard = Shard::new(checkpoint.config(), layout, 0).expect("was checked");
            let slices = ModelSlices::locate(&checkpoint, &shard).expect("was checked");
            for place in slices.places() {
                let len = checkpoint.files()[place.file].len;
                let end = place.region.stretches().last().map_or(0, |last| last.end);
                prop_assert!(end <= len, "{place:?} of a file of {len} bytes");
            }
        }
        Err(error) => {
            let sentence = error.to_string();
            let path = folder.display().to_string();
            prop_assert!(sentence.contains(&path), "names no file: {sentence}");
            let is_short = sentence.len() < 600 && !sentence.contains(char::is_control);
            prop_assert!(is_short, "{sentence:?}");
        }
    }
    prop_assert!(start.elapsed() < Duration::from_secs(10));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn safetensors_headers(
        name in select(&["llama-plain", "llama-fp8-channel", "llama-int4-group", "llama4-scout"][..]),
        changes in changes(),
        keeps_length in any::<bool>(),
    ) {
        let folder = Folder::of(name);
        let (header, data) = header_of(&folder.path().join(SINGLE));
        if keeps_length {
            folder.put_tensors(SINGLE, &apply(header, &changes), data);
        } else {
            let len = (header.len() as u64).to_le_bytes();
            folder.put(SINGLE, apply([&len, header.as_slice()].concat(), &changes));
        }
        settle(folder.path(), LoadFormat::Auto)?;
    }

    #[test]
    fn configurations(
        name in select(&["llama-plain", "llama-scaled", "llama-int4-group", "llama4-maverick", "llama4-multimodal"][..]),
        changes in changes(),
    ) {
        let folder = Folder::of(name);
        let text = std::fs::read(folder.path().join("config.json")).expect("is there");
        folder.put("config.json", apply(text, &changes));
        settle(folder.path(), LoadFormat::Auto)?;
        settle(folder.path(), LoadFormat::Dummy)?;
    }

    #[test]
    fn indices(changes in changes()) {
        let folder = Folder::of("llama-sharded");
        let text = std::fs::read(folder.path().join(INDEX)).expect("is there");
        folder.put(INDEX, apply(text, &changes));
        settle(folder.path(), LoadFormat::Auto)?;
    }

    #[test]
    fn lists_of_parts(changes in changes()) {
        let whole = Folder::of("llama-plain").opens();
        let layout = Layout { tensor: 2, pipeline: 2 };
        let text = serde_json::to_vec(&ShardManifest::new(&whole, layout)).expect("serialises");
        let folder = Folder::empty();
        folder.put(SHARDS, apply(text, &changes));
        settle(folder.path(), LoadFormat::Auto)?;
    }

    #[test]
    fn gguf_headers(is_llama4 in any::<bool>(), changes in changes()) {
        let header = if is_llama4 { Header::llama4() } else { Header::llama() };
        let (header, rest) = header.to_bytes();
        let folder = Folder::empty();
        folder.put("model.gguf", apply(header, &changes));
        folder.resize("model.gguf", i64::try_from(rest).expect("fits"));
        settle(folder.path(), LoadFormat::Auto)?;
    }
}
