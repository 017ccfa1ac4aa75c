//! Recorded traffic as requests that a small model can answer: lengths are scaled to its
//! context, and what prompts had in common they still have.

use std::fmt::Write as _;
use std::time::Duration;

use clap::ValueEnum;
use serde::Deserialize;

/// Tokens of the blocks that a Mooncake trace hashes.
const HASHED_TOKENS: usize = 512;
/// Part of the requests that fit the context once scaled; longer ones are cut.
const FITTING: f64 = 0.95;
/// Words that prompts are made of; about a token each in most vocabularies.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
];

/// How a trace is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TraceFormat {
    /// JSON lines: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` of blocks of
    /// 512 tokens.
    Mooncake,
    /// CSV: `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`.
    Azure,
}

/// A line that is no request.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A line cannot be read.
    #[error("line {line} is no request: {reason}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// There are no requests.
    #[error("the trace holds no requests")]
    Empty,
}

/// One recorded request.
#[derive(Clone, Debug, PartialEq)]
struct Recorded {
    at: Duration,
    input: usize,
    output: usize,
    /// What each block of the prompt is, where the trace tells.
    blocks: Vec<u64>,
}

/// A request to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Replayed {
    /// When, from the first one on.
    pub at: Duration,
    /// The prompt.
    pub prompt: String,
    /// Tokens to generate.
    pub max_tokens: u32,
}

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: u64,
    input_length: usize,
    output_length: usize,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads the first `most` requests of a trace and scales them to `context` tokens.
///
/// # Errors
/// When a line cannot be read, or there is none.
pub fn read(
    text: &str,
    format: TraceFormat,
    most: usize,
    context: usize,
) -> Result<Vec<Replayed>, TraceError> {
    let recorded = match format {
        TraceFormat::Mooncake => mooncake(text, most)?,
        TraceFormat::Azure => azure(text, most)?,
    };
    let mut totals: Vec<usize> = recorded
        .iter()
        .map(|request| request.input + request.output)
        .collect();
    totals.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part of a length"
    )]
    let fitting = ((totals.len() as f64 * FITTING) as usize).min(totals.len().saturating_sub(1));
    let (Some(longest), Some(first)) = (totals.get(fitting), recorded.first()) else {
        return Err(TraceError::Empty);
    };
    let scale = (context as f64 / (*longest).max(1) as f64).min(1.0);
    let start = first.at;
    let requests = recorded.iter().zip(0_u64..);
    Ok(requests
        .map(|(request, number)| scaled(request, number, (scale, context), start))
        .collect())
}

fn mooncake(text: &str, most: usize) -> Result<Vec<Recorded>, TraceError> {
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.is_empty());
    lines
        .take(most)
        .map(|(line, number)| {
            let read: MooncakeLine =
                serde_json::from_str(line).map_err(|error| TraceError::Line {
                    line: number,
                    reason: error.to_string(),
                })?;
            Ok(Recorded {
                at: Duration::from_millis(read.timestamp),
                input: read.input_length,
                output: read.output_length,
                blocks: read.hash_ids,
            })
        })
        .collect()
}

fn azure(text: &str, most: usize) -> Result<Vec<Recorded>, TraceError> {
    let lines = text.lines().zip(1..).skip(1);
    let lines = lines.filter(|(line, _)| !line.is_empty());
    lines
        .take(most)
        .map(|(line, number)| {
            let wrong = |reason: &str| TraceError::Line {
                line: number,
                reason: reason.to_owned(),
            };
            let fields: Vec<&str> = line.split(',').collect();
            let [at, input, output, ..] = fields.as_slice() else {
                return Err(wrong("expected a time and two lengths"));
            };
            let count = |field: &str| {
                let field = field.trim();
                field
                    .parse::<usize>()
                    .map_err(|_| wrong("expected lengths in tokens"))
            };
            Ok(Recorded {
                at: time_of_day(at).ok_or_else(|| wrong("expected a date and a time"))?,
                input: count(input)?,
                output: count(output)?,
                blocks: Vec::new(),
            })
        })
        .collect()
}

/// `2023-11-16 18:15:46.6805900` as the time since the first of its month.
fn time_of_day(text: &str) -> Option<Duration> {
    let (date, time) = text.trim().split_once([' ', 'T'])?;
    let day: u64 = date.rsplit('-').next()?.parse().ok()?;
    let time = time.trim_end_matches('Z').split('+').next()?;
    let mut parts = time.split(':');
    let (hours, minutes): (u64, u64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let seconds: f64 = parts.next()?.parse().ok()?;
    let whole = Duration::from_secs(day * 86_400 + hours * 3600 + minutes * 60);
    Some(whole + Duration::try_from_secs_f64(seconds).ok()?)
}

fn scaled(
    request: &Recorded,
    number: u64,
    (scale, context): (f64, usize),
    start: Duration,
) -> Replayed {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a length made shorter"
    )]
    let scaled = |len: usize| ((len as f64 * scale) as usize).max(1);
    // A few tokens for what the vocabulary puts around.
    let room = context.saturating_sub(8).max(2);
    let output = scaled(request.output).min(room / 2);
    let input = scaled(request.input).min(room - output);
    let block = scaled(HASHED_TOKENS);
    let mut prompt = String::new();
    for word in 0..input {
        let block_number = word / block;
        // Where the trace does not tell, nobody else has this text.
        let id = request
            .blocks
            .get(block_number)
            .copied()
            .unwrap_or(1 << 40 | number << 20 | block_number as u64);
        let word = WORDS[word_number(id, word % block)];
        // Writing to a string cannot fail.
        let _ = write!(prompt, "{}{word}", if prompt.is_empty() { "" } else { " " });
    }
    Replayed {
        at: request.at.saturating_sub(start),
        prompt,
        max_tokens: u32::try_from(output).unwrap_or(u32::MAX),
    }
}

/// Which word stands at `place` of the block `id`.
fn word_number(id: u64, place: usize) -> usize {
    let mixed = (id + 1)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(place as u64)
        .wrapping_mul(0xBF58_476D_1CE4_E5B9);
    usize::try_from(mixed >> 58).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_what_they_shared() {
        let text = "\
{\"timestamp\": 1000, \"input_length\": 1500, \"output_length\": 100, \"hash_ids\": [0, 1, 2]}
{\"timestamp\": 1500, \"input_length\": 1400, \"output_length\": 400, \"hash_ids\": [0, 1, 3]}
";
        let requests = read(text, TraceFormat::Mooncake, 10, 180).expect("reads");
        let at: Vec<_> = requests
            .iter()
            .map(|request| request.at.as_millis())
            .collect();
        assert_eq!(at, [0, 500]);
        let lens = |request: &Replayed| (request.prompt.split(' ').count(), request.max_tokens);
        assert_eq!(lens(&requests[0]), (150, 10));
        assert_eq!(lens(&requests[1]), (132, 40));
        let [first, second] =
            [0, 1].map(|index| requests[index].prompt.split(' ').collect::<Vec<_>>());
        let common = first
            .iter()
            .zip(&second)
            .take_while(|(a, b)| a == b)
            .count();
        // Two blocks of 51 words, and by chance a word or two more.
        assert!((102..106).contains(&common), "{common}");
    }

    #[test]
    fn an_azure_trace_has_dates_and_lengths() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
            2023-11-16 18:15:46.6805900,374,44\n\
            2023-11-16 18:17:46.9,10,5\n";
        let requests = read(text, TraceFormat::Azure, 10, 4096).expect("reads");
        assert_eq!(requests[1].at.as_secs(), 120);
        assert_eq!((requests[0].max_tokens, requests[1].max_tokens), (44, 5));
        assert_ne!(requests[0].prompt[..20], requests[1].prompt[..20]);
    }

    #[test]
    fn damaged_lines_are_named() {
        for (format, text, says) in [
            (TraceFormat::Mooncake, "{}", "line 1 is no request"),
            (TraceFormat::Mooncake, "", "no requests"),
            (
                TraceFormat::Azure,
                "h\n1,2",
                "line 2 is no request: expected a time",
            ),
            (
                TraceFormat::Azure,
                "h\nx y,1,2",
                "line 2 is no request: expected a date",
            ),
            (
                TraceFormat::Azure,
                "h\n2023-11-16 18:15:46,a,2",
                "lengths in tokens",
            ),
        ] {
            let error = read(text, format, 9, 100).expect_err("refused").to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
