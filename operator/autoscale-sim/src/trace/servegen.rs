//! `ServeGen` data: rates in windows, replayed, with arrivals drawn inside them.

use std::collections::BTreeMap;
use std::path::Path;

use rand::Rng;
use rand::rngs::SmallRng;
use serde::Deserialize;

use super::{Request, Selection, TraceError, lines, number, text};
use crate::{count, random};

const RATE_HEADER: &str = "t_s,rate_rps,";
const TRACE_SUFFIX: &str = "-trace.csv";
const DATASET_SUFFIX: &str = "-dataset.json";
/// Spread of lengths where only their mean is known.
const INPUT_SIGMA: f64 = 1.0;
const OUTPUT_SIGMA: f64 = 0.8;

/// How the gaps between arrivals of a window spread.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pattern {
    Poisson,
    Gamma { shape: f64 },
    Weibull { shape: f64 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Window {
    start_seconds: f64,
    rate: f64,
    pattern: Pattern,
}

/// Token lengths of one client in windows, each as quantiles from 0 to 1.
#[derive(Clone, Debug, Default, PartialEq)]
struct Lengths {
    window_seconds: f64,
    windows: BTreeMap<u64, (Distribution, Distribution)>,
}

/// Values with the share of requests that have at most that many tokens.
#[derive(Clone, Debug, PartialEq)]
struct Distribution(Vec<(f64, f64)>);

impl Distribution {
    /// A value between its neighbours' for `interpolate`, else one that is there.
    fn draw(&self, rng: &mut SmallRng, interpolate: bool) -> u32 {
        let share = rng.random::<f64>();
        let at = self
            .0
            .partition_point(|(_, upto)| *upto < share)
            .min(self.0.len() - 1);
        let (value, upto) = self.0[at];
        if !interpolate || at == 0 {
            return count::tokens(value);
        }
        let (lower, from) = self.0[at - 1];
        let part = if upto > from {
            (share - from) / (upto - from)
        } else {
            1.0
        };
        count::tokens(lower + part * (value - lower))
    }
}

impl Lengths {
    fn draw(&self, rng: &mut SmallRng, at: f64, interpolate: bool) -> Option<(u32, u32)> {
        let window = count::floor(at / self.window_seconds) * count::floor(self.window_seconds);
        // A client may lack a window in which it had little traffic.
        let (_, (input, output)) = self
            .windows
            .range(..=window)
            .next_back()
            .or_else(|| self.windows.iter().next())?;
        Some((input.draw(rng, interpolate), output.draw(rng, interpolate)))
    }
}

/// Requests of a rate file or of a folder of clients.
pub(super) fn sample(path: &Path, selection: &Selection) -> Result<Vec<Request>, TraceError> {
    if path.is_dir() {
        clients(path, selection)
    } else {
        fleet(path, selection)
    }
}

fn fleet(path: &Path, selection: &Selection) -> Result<Vec<Request>, TraceError> {
    let windows = parse_rates(path, &text(path)?)?;
    let mut rng = random::generator(selection.seed, 2);
    let arrivals = arrivals(&windows, selection, &mut rng);
    let median = |mean: f64, sigma: f64| mean * (-sigma * sigma / 2.0).exp();
    Ok(arrivals
        .into_iter()
        .map(|at| Request {
            arrival_seconds: at - selection.start_seconds,
            input: count::tokens(random::lognormal(
                &mut rng,
                median(selection.mean_input, INPUT_SIGMA),
                INPUT_SIGMA,
            )),
            cached: 0,
            output: count::tokens(random::lognormal(
                &mut rng,
                median(selection.mean_output, OUTPUT_SIGMA),
                OUTPUT_SIGMA,
            )),
        })
        .collect())
}

fn clients(folder: &Path, selection: &Selection) -> Result<Vec<Request>, TraceError> {
    let condensed = match &selection.lengths {
        Some(path) => parse_condensed(path, &text(path)?)?,
        None => BTreeMap::new(),
    };
    let mut known: Vec<(f64, Lengths, bool)> = Vec::new();
    let mut drawn: Vec<(Vec<f64>, Option<usize>, SmallRng)> = Vec::new();
    for (index, name) in client_names(folder)?.iter().enumerate() {
        let file = folder.join(format!("{name}{TRACE_SUFFIX}"));
        let windows = parse_client(&file, &text(&file)?)?;
        let mut rng = random::generator(selection.seed, 1000 + index as u64);
        let arrivals = arrivals(&windows, selection, &mut rng);
        let dataset = folder.join(format!("{name}{DATASET_SUFFIX}"));
        let lengths = if let Some(lengths) = condensed.get(name) {
            Some((lengths.clone(), true))
        } else if dataset.exists() {
            Some((parse_dataset(&dataset, &text(&dataset)?)?, false))
        } else {
            None
        };
        let at = lengths.map(|(lengths, interpolate)| {
            known.push((arrivals.len() as f64, lengths, interpolate));
            known.len() - 1
        });
        drawn.push((arrivals, at, rng));
    }
    let total: f64 = known.iter().map(|(weight, ..)| weight).sum();
    if known.is_empty() || total <= 0.0 {
        return Err(TraceError::File {
            path: folder.to_owned(),
            message: format!(
                "no client with traffic has token lengths: expected NAME{DATASET_SUFFIX} beside NAME{TRACE_SUFFIX}, or a file of lengths"
            ),
        });
    }
    let mut requests = Vec::new();
    for (arrivals, own, mut rng) in drawn {
        for at in arrivals {
            // Clients without lengths get those of the others, by their traffic.
            let from = own.unwrap_or_else(|| pick(&known, rng.random::<f64>() * total));
            let (_, lengths, interpolate) = &known[from];
            if let Some((input, output)) = lengths.draw(&mut rng, at, *interpolate) {
                let arrival_seconds = at - selection.start_seconds;
                requests.push(Request {
                    arrival_seconds,
                    input,
                    cached: 0,
                    output,
                });
            }
        }
    }
    Ok(requests)
}

fn pick(known: &[(f64, Lengths, bool)], mut share: f64) -> usize {
    for (index, (weight, ..)) in known.iter().enumerate() {
        share -= weight;
        if share < 0.0 {
            return index;
        }
    }
    known.len() - 1
}

fn client_names(folder: &Path) -> Result<Vec<String>, TraceError> {
    let read = |source| TraceError::Read {
        path: folder.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let name = entry
            .map_err(read)?
            .file_name()
            .to_string_lossy()
            .into_owned();
        if let Some(client) = name.strip_suffix(TRACE_SUFFIX) {
            names.push(client.to_owned());
        }
    }
    // Folders have no order; the same seed must give the same requests.
    names.sort();
    if names.is_empty() {
        return Err(TraceError::File {
            path: folder.to_owned(),
            message: format!("expected files NAME{TRACE_SUFFIX}, found none"),
        });
    }
    Ok(names)
}

/// Arrivals whose rate is the windows'. Gaps are drawn with mean 1 and
/// stretched by the rate of the time that they pass over, so that no window
/// starts anew and slow bursty clients keep their rate.
fn arrivals(windows: &[Window], selection: &Selection, rng: &mut SmallRng) -> Vec<f64> {
    let mut arrivals = Vec::new();
    // Starts in the middle of a gap.
    let mut left = random::exponential(rng) * rng.random::<f64>();
    for (index, window) in windows.iter().enumerate() {
        let length = window_length(windows, index);
        let from = window.start_seconds.max(selection.start_seconds);
        let end = (window.start_seconds + length).min(selection.end_seconds());
        let rate = window.rate * selection.rate_scale;
        if from >= end || rate <= 0.0 {
            continue;
        }
        let mut at = from;
        loop {
            let next = at + left / rate;
            if next >= end {
                left -= (end - at) * rate;
                break;
            }
            at = next;
            arrivals.push(at);
            left = match window.pattern {
                Pattern::Poisson => random::exponential(rng),
                Pattern::Gamma { shape } => random::gamma(rng, shape, 1.0 / shape),
                Pattern::Weibull { shape } => {
                    random::weibull(rng, shape, 1.0 / random::gamma_function(1.0 + 1.0 / shape))
                }
            };
        }
    }
    arrivals
}

/// Seconds of a window: to the next one; the last is as long as that before it.
fn window_length(windows: &[Window], index: usize) -> f64 {
    let start = |at: usize| windows.get(at).map(|window| window.start_seconds);
    match (start(index), start(index + 1)) {
        (Some(this), Some(next)) => next - this,
        (Some(this), None) => index
            .checked_sub(1)
            .and_then(start)
            .map_or(600.0, |before| this - before),
        (None, _) => 0.0,
    }
}

fn ascending(windows: &[Window], window: &Window) -> Result<(), String> {
    if !(window.rate.is_finite() && window.rate >= 0.0) {
        return Err(format!(
            "rate: expected a number from 0, got {}",
            window.rate
        ));
    }
    match windows.last() {
        Some(last) if last.start_seconds >= window.start_seconds => Err(format!(
            "expected a time after {}, got {}",
            last.start_seconds, window.start_seconds
        )),
        _ => Ok(()),
    }
}

fn parse_rates(path: &Path, text: &str) -> Result<Vec<Window>, TraceError> {
    let bad = |line, message| TraceError::Line {
        path: path.to_owned(),
        line,
        message,
    };
    let mut lines = lines(text);
    let header = lines.next();
    if !header.is_some_and(|(_, header)| format!("{header},").starts_with(RATE_HEADER)) {
        let got = header.map_or("", |(_, header)| header);
        return Err(bad(
            1,
            format!("expected a header t_s,rate_rps, got \"{got}\""),
        ));
    }
    let mut windows = Vec::new();
    for (line, row) in lines {
        let mut fields = row.split(',');
        let window = number(fields.next(), "t_s")
            .and_then(|start_seconds| {
                let rate = number(fields.next(), "rate_rps")?;
                let window = Window {
                    start_seconds,
                    rate,
                    pattern: Pattern::Poisson,
                };
                ascending(&windows, &window).map(|()| window)
            })
            .map_err(|message| bad(line, message))?;
        windows.push(window);
    }
    Ok(windows)
}

/// `t_s,rate,cv,pattern,arg1,arg2` without a header.
fn parse_client(path: &Path, text: &str) -> Result<Vec<Window>, TraceError> {
    let mut windows = Vec::new();
    for (line, row) in lines(text) {
        let window = client_window(row)
            .and_then(|window| ascending(&windows, &window).map(|()| window))
            .map_err(|message| TraceError::Line {
                path: path.to_owned(),
                line,
                message,
            })?;
        windows.push(window);
    }
    Ok(windows)
}

fn client_window(row: &str) -> Result<Window, String> {
    let fields: Vec<&str> = row.split(',').collect();
    let field = |at: usize| fields.get(at).copied();
    let start_seconds = number(field(0), "time")?;
    let pattern = match field(3).map(str::trim) {
        None | Some("") => {
            return Ok(Window {
                start_seconds,
                rate: 0.0,
                pattern: Pattern::Poisson,
            });
        }
        Some(name) => {
            let shape: f64 = number(field(4), "arg1")?;
            if !(shape.is_finite() && shape > 0.0) {
                return Err(format!("arg1: expected a shape above 0, got {shape}"));
            }
            // arg2, the scale, is a fit whose mean is not always the rate's.
            match name {
                "Gamma" => Pattern::Gamma { shape },
                "Weibull" => Pattern::Weibull { shape },
                _ => {
                    return Err(format!(
                        "pattern: expected Gamma or Weibull, got \"{name}\""
                    ));
                }
            }
        }
    };
    Ok(Window {
        start_seconds,
        rate: number(field(1), "rate")?,
        pattern,
    })
}

#[derive(Deserialize)]
struct DatasetWindow {
    input_tokens: String,
    output_tokens: String,
}

/// Windows with `"{tokens: share, …}"` of inputs and outputs.
fn parse_dataset(path: &Path, text: &str) -> Result<Lengths, TraceError> {
    let bad = |message: String| TraceError::File {
        path: path.to_owned(),
        message,
    };
    let windows: BTreeMap<String, DatasetWindow> = serde_json::from_str(text).map_err(|error| {
        bad(format!(
            "expected windows with input_tokens and output_tokens: {error}"
        ))
    })?;
    let mut lengths = Lengths::default();
    for (start, window) in windows {
        let start: u64 = number(Some(&start), "window").map_err(bad)?;
        let input = shares(&window.input_tokens).map_err(bad)?;
        let output = shares(&window.output_tokens).map_err(bad)?;
        if let (Some(input), Some(output)) = (input, output) {
            lengths.windows.insert(start, (input, output));
        }
    }
    lengths.window_seconds = window_seconds(&lengths.windows);
    Ok(lengths)
}

fn window_seconds<T>(windows: &BTreeMap<u64, T>) -> f64 {
    let starts: Vec<u64> = windows.keys().copied().collect();
    starts
        .windows(2)
        .map(|pair| pair[1] - pair[0])
        .min()
        .unwrap_or(1)
        .max(1) as f64
}

/// `{50: 0.04, 51: 0.96}` as shares that add up to 1; none when it is empty.
fn shares(text: &str) -> Result<Option<Distribution>, String> {
    let mut values: Vec<(f64, f64)> = Vec::new();
    let inner = text.trim().trim_start_matches('{').trim_end_matches('}');
    for pair in inner.split(',').filter(|pair| !pair.trim().is_empty()) {
        let (value, share) = pair
            .split_once(':')
            .ok_or_else(|| format!("expected \"tokens: share\", got \"{}\"", pair.trim()))?;
        values.push((
            number(Some(value), "tokens")?,
            number(Some(share), "share")?,
        ));
    }
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = values.iter().map(|(_, share)| share).sum();
    if total <= 0.0 {
        return Ok(None);
    }
    let mut sum = 0.0;
    for (_, share) in &mut values {
        sum += *share / total;
        *share = sum;
    }
    Ok(Some(Distribution(values)))
}

#[derive(Deserialize)]
struct Condensed {
    quantiles: Vec<f64>,
    window_seconds: f64,
    clients: BTreeMap<String, BTreeMap<String, Quantiles>>,
}

#[derive(Deserialize)]
struct Quantiles {
    input: Vec<f64>,
    output: Vec<f64>,
}

/// Quantiles of inputs and outputs by client and window.
fn parse_condensed(path: &Path, text: &str) -> Result<BTreeMap<String, Lengths>, TraceError> {
    let bad = |message: String| TraceError::File {
        path: path.to_owned(),
        message,
    };
    let file: Condensed = serde_json::from_str(text).map_err(|error| {
        bad(format!(
            "expected quantiles, window_seconds and clients: {error}"
        ))
    })?;
    if file.quantiles.is_empty() || file.window_seconds < 1.0 {
        return Err(bad(
            "expected quantiles, and window_seconds of at least 1".to_owned()
        ));
    }
    let mut clients = BTreeMap::new();
    for (name, windows) in file.clients {
        let mut lengths = Lengths {
            window_seconds: file.window_seconds,
            ..Lengths::default()
        };
        for (start, window) in windows {
            let start: u64 = number(Some(&start), "window").map_err(bad)?;
            let values = |values: Vec<f64>| {
                if values.len() == file.quantiles.len() {
                    Ok(Distribution(
                        values
                            .into_iter()
                            .zip(file.quantiles.iter().copied())
                            .collect(),
                    ))
                } else {
                    Err(bad(format!(
                        "{name}, window {start}: expected {} quantiles, got {}",
                        file.quantiles.len(),
                        values.len()
                    )))
                }
            };
            lengths
                .windows
                .insert(start, (values(window.input)?, values(window.output)?));
        }
        clients.insert(name, lengths);
    }
    Ok(clients)
}

#[cfg(test)]
mod tests;
