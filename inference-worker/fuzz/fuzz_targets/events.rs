//! Server-sent events, whole and cut into pieces, beside a reader of whole texts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llama_worker::replay::events::{EventReader, EventTooLong};

fuzz_target!(|data: &[u8]| {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    let whole = read([bytes]);
    assert_eq!(read(bytes.chunks(usize::from(cut % 16) + 1)), whole);
    let (head, tail) = bytes.split_at(usize::from(cut) * bytes.len() / 256);
    assert_eq!(read([head, tail]), whole);
    assert_eq!(by_lines(bytes), whole);
});

fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let mut reader = EventReader::default();
    let mut events = Vec::new();
    for piece in pieces {
        let read = reader.push(piece, |event| {
            events.push(event.to_vec());
            Ok::<_, EventTooLong>(())
        });
        read.expect("inputs are shorter than the bound");
    }
    events
}

/// The same by other means.
fn by_lines(bytes: &[u8]) -> Vec<Vec<u8>> {
    // A byte a character, so that nothing is lost.
    let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut lines: Vec<&str> = text.split('\n').collect();
    // What follows the last line feed is no line.
    lines.pop();
    let (mut events, mut data) = (Vec::new(), Vec::new());
    for line in lines {
        if line.is_empty() {
            if !data.is_empty() {
                let event = data.join("\n");
                events.push(event.chars().map(|one| one as u8).collect());
                data.clear();
            }
        } else if line == "data" {
            data.push("");
        } else if let Some(value) = line.strip_prefix("data:") {
            data.push(value.strip_prefix(' ').unwrap_or(value));
        }
    }
    events
}
