//! Requests over time: what is replayed.

mod azure;
mod mooncake;
mod servegen;

use std::path::{Path, PathBuf};

use rand::Rng;

use crate::model::Mix;
use crate::random;

/// Copies of a request when a trace is scaled up arrive up to this many
/// seconds from it: bursts of ten seconds stay bursts.
const COPY_SPREAD_SECONDS: f64 = 5.0;

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// Seconds since the start of the trace.
    pub arrival_seconds: f64,
    /// Prompt tokens.
    pub input: u32,
    /// Prompt tokens that a prefix cache holds; fewer than the prompt's.
    pub cached: u32,
    /// Tokens of the answer, at least one.
    pub output: u32,
}

/// Requests in the order of their arrival.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// The requests.
    pub requests: Vec<Request>,
}

/// How a trace is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// CSV with TIMESTAMP, `ContextTokens` and `GeneratedTokens` (Azure LLM inference traces).
    Azure,
    /// JSON lines with timestamp, `input_length`, `output_length` and `hash_ids` (Mooncake).
    Mooncake,
    /// A rate file (CSV with `t_s` and `rate_rps`), or a folder of `NAME-trace.csv` by client (`ServeGen`).
    Servegen,
}

/// Which part of a trace is replayed, and how much of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Requests for each one of the trace.
    pub rate_scale: f64,
    /// Seconds of the trace that are left out at its start.
    pub start_seconds: f64,
    /// Seconds of the trace that are replayed; all when absent.
    pub duration_seconds: Option<f64>,
    /// Seed of all that is drawn.
    pub seed: u64,
    /// Count leading blocks that an earlier request had as cached (Mooncake).
    pub prefix_hits: bool,
    /// Token lengths by client (`ServeGen` folders without `NAME-dataset.json`).
    pub lengths: Option<PathBuf>,
    /// Mean prompt tokens where a trace has no lengths (`ServeGen` rate files).
    pub mean_input: f64,
    /// Mean answer tokens where a trace has no lengths.
    pub mean_output: f64,
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            rate_scale: 1.0,
            start_seconds: 0.0,
            duration_seconds: None,
            seed: 1,
            prefix_hits: false,
            lengths: None,
            mean_input: 1155.0,
            mean_output: 211.0,
        }
    }
}

impl Selection {
    fn end_seconds(&self) -> f64 {
        self.duration_seconds
            .map_or(f64::INFINITY, |duration| self.start_seconds + duration)
    }
}

/// Why a trace cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is not what its format says.
    #[error("{}:{line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What was expected and what is there.
        message: String,
    },
    /// A file as a whole is not what its format says.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected and what is there.
        message: String,
    },
    /// Nothing is left to replay.
    #[error("{}: no request is left to replay: the selection or the rate scale leaves none", path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
    },
}

impl TraceError {
    /// What went wrong, as a word that metrics may carry.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Line { .. } | Self::File { .. } => "format",
            Self::Empty { .. } => "empty",
        }
    }
}

/// Reads what is selected of a trace.
pub fn read(path: &Path, format: Format, selection: &Selection) -> Result<Trace, TraceError> {
    let mut requests = match format {
        Format::Azure => replayed(azure::parse(path, &text(path)?)?, selection),
        Format::Mooncake => {
            let requests = mooncake::parse(path, &text(path)?, selection.prefix_hits)?;
            replayed(requests, selection)
        }
        Format::Servegen => servegen::sample(path, selection)?,
    };
    if requests.is_empty() {
        return Err(TraceError::Empty {
            path: path.to_owned(),
        });
    }
    requests.sort_by(|a, b| a.arrival_seconds.total_cmp(&b.arrival_seconds));
    Ok(Trace { requests })
}

fn text(path: &Path) -> Result<String, TraceError> {
    std::fs::read_to_string(path).map_err(|source| TraceError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The selected part of recorded requests, thinned or copied to the rate.
fn replayed(recorded: Vec<Request>, selection: &Selection) -> Vec<Request> {
    let mut rng = random::generator(selection.seed, 1);
    let mut requests = Vec::new();
    for request in recorded {
        let at = request.arrival_seconds;
        if at < selection.start_seconds || at >= selection.end_seconds() {
            continue;
        }
        let copies = selection.rate_scale.trunc()
            + f64::from(u8::from(rng.random::<f64>() < selection.rate_scale.fract()));
        for copy in 0..crate::count::floor(copies) {
            let shift = if copy == 0 {
                0.0
            } else {
                COPY_SPREAD_SECONDS * (2.0 * rng.random::<f64>() - 1.0)
            };
            let arrival_seconds = (at - selection.start_seconds + shift).max(0.0);
            requests.push(Request {
                arrival_seconds,
                ..request
            });
        }
    }
    requests
}

impl Trace {
    /// The mean request; of nothing, a request of one token each.
    pub fn mix(&self) -> Mix {
        if self.requests.is_empty() {
            return Mix {
                input: 1.0,
                cached: 0.0,
                output: 1.0,
            };
        }
        let mean = |of: fn(&Request) -> u32| {
            self.requests
                .iter()
                .map(|request| f64::from(of(request)))
                .sum::<f64>()
                / self.requests.len() as f64
        };
        Mix {
            input: mean(|request| request.input),
            cached: mean(|request| request.cached),
            output: mean(|request| request.output),
        }
    }

    /// Seconds from the start to the last arrival.
    pub fn duration_seconds(&self) -> f64 {
        self.requests
            .last()
            .map_or(0.0, |request| request.arrival_seconds)
    }
}

impl Request {
    /// This request as a mix of one.
    pub fn mix(&self) -> Mix {
        Mix {
            input: f64::from(self.input),
            cached: f64::from(self.cached),
            output: f64::from(self.output),
        }
    }
}

/// Lines with their numbers, without empty ones.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty())
}

/// A number of a CSV field, or what is wrong with it.
fn number<T: std::str::FromStr>(field: Option<&str>, name: &str) -> Result<T, String> {
    let field = field.ok_or_else(|| format!("{name} is missing"))?.trim();
    field
        .parse()
        .map_err(|_| format!("{name}: expected a number, got \"{field}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_second(count: u32) -> Vec<Request> {
        (0..count)
            .map(|at| Request {
                arrival_seconds: f64::from(at),
                input: 10,
                cached: 0,
                output: 5,
            })
            .collect()
    }

    #[test]
    fn scaling_keeps_the_rate_that_was_asked_for() {
        for (rate_scale, expected) in [(0.25, 2500.0), (1.0, 10_000.0), (2.5, 25_000.0)] {
            let selection = Selection {
                rate_scale,
                ..Selection::default()
            };
            let got = replayed(every_second(10_000), &selection).len() as f64;
            assert!(
                (got - expected).abs() < 0.05 * expected,
                "{rate_scale}: {got}"
            );
        }
        assert_eq!(
            replayed(every_second(9), &Selection::default()),
            every_second(9)
        );
    }

    #[test]
    fn a_part_starts_at_zero() {
        let selection = Selection {
            start_seconds: 100.0,
            duration_seconds: Some(50.0),
            ..Selection::default()
        };
        assert_eq!(replayed(every_second(1000), &selection), every_second(50));
    }

    #[test]
    fn the_mix_is_the_mean() {
        let mut requests = every_second(2);
        requests[1] = Request {
            arrival_seconds: 1.0,
            input: 30,
            cached: 8,
            output: 7,
        };
        let mix = Trace { requests }.mix();
        assert_eq!(
            mix,
            Mix {
                input: 20.0,
                cached: 4.0,
                output: 6.0
            }
        );
    }
}
