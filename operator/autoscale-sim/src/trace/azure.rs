//! Azure LLM inference traces: CSV with a date, prompt and answer tokens.

use std::path::Path;

use jiff::civil::DateTime;

use super::{Request, TraceError, lines, number};

const HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";

/// Requests of a file, with seconds since its first one.
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Request>, TraceError> {
    let bad = |line, message| TraceError::Line {
        path: path.to_owned(),
        line,
        message,
    };
    let mut lines = lines(text);
    match lines.next() {
        Some((_, header)) if header.trim_start_matches('\u{feff}') == HEADER => {}
        Some((line, header)) => {
            return Err(bad(
                line,
                format!("expected the header {HEADER}, got \"{header}\""),
            ));
        }
        None => {
            return Err(bad(
                1,
                format!("expected the header {HEADER}, got an empty file"),
            ));
        }
    }
    let mut first: Option<DateTime> = None;
    let mut requests = Vec::new();
    for (line, row) in lines {
        let (at, input, output) = fields(row).map_err(|message| bad(line, message))?;
        let since = at.duration_since(*first.get_or_insert(at)).as_secs_f64();
        requests.push(Request {
            // Lines a little out of order are sorted later.
            arrival_seconds: since.max(0.0),
            input,
            cached: 0,
            output: output.max(1),
        });
    }
    Ok(requests)
}

fn fields(row: &str) -> Result<(DateTime, u32, u32), String> {
    let mut fields = row.split(',');
    let date = fields.next().unwrap_or_default().trim();
    // The 2024 files say that they are in UTC, the 2023 ones do not.
    let at = date
        .trim_end_matches("+00:00")
        .parse()
        .map_err(|_| format!("TIMESTAMP: expected a date and time, got \"{date}\""))?;
    let input: u32 = number(fields.next(), "ContextTokens")?;
    let output = number(fields.next(), "GeneratedTokens")?;
    match fields.next() {
        Some(more) => Err(format!("expected three fields, got another: \"{more}\"")),
        None => Ok((at, input.max(1), output)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Request>, String> {
        parse(Path::new("made-up.csv"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn dates_become_seconds() {
        let requests = read(
            "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.5000000,374,44\r\n\
             2023-11-16 18:15:50.7500000,396,0\r\n",
        )
        .unwrap();
        assert_eq!(
            requests,
            [
                Request {
                    arrival_seconds: 0.0,
                    input: 374,
                    cached: 0,
                    output: 44
                },
                Request {
                    arrival_seconds: 4.25,
                    input: 396,
                    cached: 0,
                    output: 1
                },
            ]
        );
        let requests = read(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,1,2\n\
             2024-05-11 00:00:00.5+00:00,1,2",
        )
        .unwrap();
        assert!((requests[1].arrival_seconds - 86_400.0).abs() < 1e-9);
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, expected) in [
            (
                "",
                "made-up.csv:1: expected the header TIMESTAMP,ContextTokens,GeneratedTokens, got an empty file",
            ),
            (
                "a,b\n",
                "made-up.csv:1: expected the header TIMESTAMP,ContextTokens,GeneratedTokens, got \"a,b\"",
            ),
            (
                "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2\n\nyesterday,1,2\n",
                "made-up.csv:4: TIMESTAMP: expected a date and time, got \"yesterday\"",
            ),
            (
                "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-1,2\n",
                "made-up.csv:2: ContextTokens: expected a number, got \"-1\"",
            ),
            (
                "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n",
                "made-up.csv:2: GeneratedTokens is missing",
            ),
            (
                "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,2,3\n",
                "made-up.csv:2: expected three fields, got another: \"3\"",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), expected);
        }
    }
}
