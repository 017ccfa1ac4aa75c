//! Mooncake traces: JSON lines with milliseconds, lengths and prefix blocks.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use super::{Request, TraceError, lines};

/// Tokens of a block that `hash_ids` names.
const BLOCK_TOKENS: u32 = 512;

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Requests of a file. With `prefix_hits`, leading blocks that any earlier
/// request had count as cached: what one cache without bounds would hold.
pub(super) fn parse(
    path: &Path,
    text: &str,
    prefix_hits: bool,
) -> Result<Vec<Request>, TraceError> {
    let mut seen = HashSet::new();
    let mut requests = Vec::new();
    for (number, row) in lines(text) {
        let line: Line = serde_json::from_str(row).map_err(|error| TraceError::Line {
            path: path.to_owned(),
            line: number,
            message: format!(
                "expected an object with timestamp, input_length and output_length: {error}"
            ),
        })?;
        let mut cached = 0;
        if prefix_hits {
            let known = line
                .hash_ids
                .iter()
                .take_while(|block| seen.contains(*block))
                .count();
            cached = u32::try_from(known)
                .unwrap_or(u32::MAX)
                .saturating_mul(BLOCK_TOKENS);
            seen.extend(line.hash_ids);
        }
        let input = line.input_length.max(1);
        requests.push(Request {
            arrival_seconds: (line.timestamp / 1000.0).max(0.0),
            input,
            // The last token is always calculated: the first answer token comes from it.
            cached: cached.min(input - 1),
            output: line.output_length.max(1),
        });
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: &str = r#"{"timestamp": 0, "input_length": 1300, "output_length": 50, "hash_ids": [0, 1, 2]}
{"timestamp": 1500, "input_length": 1024, "output_length": 0, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 1400, "output_length": 7, "hash_ids": [9, 1, 2]}"#;

    #[test]
    fn lines_become_requests() {
        let requests = parse(Path::new("made-up.jsonl"), THREE, false).unwrap();
        assert_eq!(requests.len(), 3);
        assert_eq!(
            requests[1],
            Request {
                arrival_seconds: 1.5,
                input: 1024,
                cached: 0,
                output: 1
            }
        );
    }

    #[test]
    fn only_leading_blocks_are_hits() {
        let requests = parse(Path::new("made-up.jsonl"), THREE, true).unwrap();
        let cached: Vec<u32> = requests.iter().map(|request| request.cached).collect();
        assert_eq!(cached, [0, 1023, 0]);
    }

    #[test]
    fn bad_lines_are_named() {
        let text = format!("{THREE}\n{{\"timestamp\": 1}}\n");
        let error = parse(Path::new("made-up.jsonl"), &text, false)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("made-up.jsonl:4: expected an object with"),
            "{error}"
        );
        assert!(error.contains("missing field `input_length`"), "{error}");
    }
}
