//! The text of an answer that may hold calls, in both notations, whole and cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llama_worker::tools::{MAX_CALLS, Tool, ToolDelta, ToolFormat, ToolStream};

fuzz_target!(|data: &[u8]| {
    let Some((&cut, text)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    for format in [ToolFormat::Json, ToolFormat::Pythonic] {
        let whole = read(format, [&*text]);
        let at = text.floor_char_boundary(usize::from(cut) * text.len() / 256);
        let (head, tail) = text.split_at(at);
        assert_eq!(read(format, [head, tail]), whole, "{head:?} | {tail:?}");
    }
});

/// Content, and the calls: name, arguments, whether they are whole.
type Answer = (String, Vec<(String, String, bool)>);

fn read<'a>(format: ToolFormat, pieces: impl IntoIterator<Item = &'a str>) -> Answer {
    let tools = ["f", "get_weather"].map(|name| Tool {
        name: name.to_owned(),
        parameters: serde_json::json!({"type": "object"}),
    });
    let mut stream = ToolStream::new(format, &tools, "x");
    let mut deltas: Vec<ToolDelta> = pieces
        .into_iter()
        .flat_map(|piece| stream.push(piece))
        .collect();
    deltas.extend(stream.finish());
    let (mut content, mut calls) = Answer::default();
    let mut open = false;
    for delta in deltas {
        match delta {
            ToolDelta::Content(text) => {
                assert!(!open, "content in a call");
                content += &text;
            }
            ToolDelta::Start { index, name, .. } => {
                assert!(!open && index == calls.len() && index < MAX_CALLS);
                calls.push((name, String::new(), false));
                open = true;
            }
            ToolDelta::Arguments { index, json } => {
                assert!(open && index + 1 == calls.len());
                calls[index].1 += &json;
            }
            ToolDelta::End { index, complete } => {
                assert!(open && index + 1 == calls.len());
                calls[index].2 = complete;
                open = false;
            }
        }
    }
    assert!(!open, "a call does not end");
    for (_, arguments, complete) in &calls {
        if *complete && let Err(error) = serde_json::from_str::<serde_json::Value>(arguments) {
            // JSON has no bound of numbers, and no rule for halves of characters.
            let error = error.to_string();
            let known = ["number out of range", "surrogate", "escape"];
            assert!(
                known.iter().any(|part| error.contains(part)),
                "{error}: {arguments}"
            );
        }
    }
    (content, calls)
}
