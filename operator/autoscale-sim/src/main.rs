//! `autoscale-sim`: replays a trace of LLM requests against an autoscaling policy.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use autoscale_sim::engine::{Config, Outage, simulate};
use autoscale_sim::model::{ServingModel, SloLevel};
use autoscale_sim::policy::PolicyName;
use autoscale_sim::report::{Report, timeline};
use autoscale_sim::trace::{self, Format, Selection, Trace};
use autoscale_sim::{chart, policy};
use clap::{Parser, ValueEnum};

/// Windows of a chart.
const CHART_WINDOWS: usize = 480;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModelName {
    /// Llama 3.1 405B, FP8, eight H100 a group.
    #[value(name = "405b-tp8")]
    Llama405bTp8,
    /// Llama 3.3 70B, FP8, two H100 a group.
    #[value(name = "70b-tp2")]
    Llama70bTp2,
}

/// Replays a trace of LLM requests against an autoscaling policy, in simulated time.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// File or folder of the trace.
    #[arg(long, value_name = "PATH")]
    trace: PathBuf,
    /// How it is written down.
    #[arg(long)]
    format: Format,
    /// What decides on the number of groups.
    #[arg(long)]
    policy: PolicyName,
    /// The policy's one knob; what its documentation starts with if absent.
    #[arg(long, value_name = "X", conflicts_with = "targets")]
    target: Option<f64>,
    /// Several targets: one JSON line each, a frontier.
    #[arg(long, value_name = "X,Y,…", value_delimiter = ',')]
    targets: Vec<f64>,
    /// Model and GPUs of a group.
    #[arg(long, default_value = "405b-tp8")]
    model: ModelName,
    /// What requests are measured by.
    #[arg(long, default_value = "standard")]
    slo: SloLevel,
    /// Median seconds until a new group is ready.
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0)]
    cold_start: f64,
    /// Requests for each one of the trace.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    rate_scale: f64,
    /// Seconds of the trace to leave out at its start.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    start: f64,
    /// Seconds of the trace to replay.
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Seed of all that is drawn.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Count leading blocks that an earlier request had as cached (mooncake).
    #[arg(long)]
    prefix_hits: bool,
    /// Quantiles of token lengths by client, JSON (servegen folders).
    #[arg(long, value_name = "FILE")]
    lengths: Option<PathBuf>,
    /// Mean prompt tokens (servegen rate files, which have no lengths).
    #[arg(long, value_name = "TOKENS", default_value_t = 1155.0)]
    mean_input: f64,
    /// Mean answer tokens (servegen rate files).
    #[arg(long, value_name = "TOKENS", default_value_t = 211.0)]
    mean_output: f64,
    /// Fewest groups.
    #[arg(long, value_name = "GROUPS", default_value_t = 1)]
    min: usize,
    /// Most groups.
    #[arg(long, value_name = "GROUPS", default_value_t = 64)]
    max: usize,
    /// Groups ready at the start; enough for the first ten minutes if absent.
    #[arg(long, value_name = "GROUPS")]
    initial: Option<usize>,
    /// A time without metrics: START:SECONDS.
    #[arg(long, value_name = "START:SECONDS", value_parser = outage)]
    outage: Option<Outage>,
    /// Print the report as one line of JSON.
    #[arg(long)]
    json: bool,
    /// Write a picture of what happened when.
    #[arg(long, value_name = "FILE", conflicts_with = "targets")]
    svg: Option<PathBuf>,
    /// Write the picture and the figures as a page.
    #[arg(long, value_name = "FILE", conflicts_with = "targets")]
    html: Option<PathBuf>,
}

fn outage(text: &str) -> Result<Outage, String> {
    let number = |text: &str| text.parse::<f64>().ok().filter(|value| *value >= 0.0);
    text.split_once(':')
        .and_then(|(start, duration)| {
            Some(Outage {
                start_seconds: number(start)?,
                duration_seconds: number(duration)?,
            })
        })
        .ok_or_else(|| "expected START:SECONDS, such as 36000:600".to_owned())
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let trace = read(&arguments)?;
    let config = config(&arguments, &trace)?;
    if arguments.targets.is_empty() {
        let target = arguments
            .target
            .unwrap_or_else(|| arguments.policy.default_target());
        return run(&arguments, &trace, &config, target);
    }
    for target in &arguments.targets {
        run(&arguments, &trace, &config, *target)?;
    }
    Ok(())
}

fn read(arguments: &Arguments) -> anyhow::Result<Trace> {
    for (name, value) in [
        ("--rate-scale", arguments.rate_scale),
        ("--mean-input", arguments.mean_input),
        ("--mean-output", arguments.mean_output),
    ] {
        ensure!(
            value.is_finite() && value > 0.0,
            "{name}: expected a number above 0, got {value}"
        );
    }
    let selection = Selection {
        rate_scale: arguments.rate_scale,
        start_seconds: arguments.start,
        duration_seconds: arguments.duration,
        seed: arguments.seed,
        prefix_hits: arguments.prefix_hits,
        lengths: arguments.lengths.clone(),
        mean_input: arguments.mean_input,
        mean_output: arguments.mean_output,
    };
    Ok(trace::read(&arguments.trace, arguments.format, &selection)?)
}

fn config(arguments: &Arguments, trace: &Trace) -> anyhow::Result<Config> {
    let Arguments {
        min,
        max,
        cold_start,
        ..
    } = *arguments;
    ensure!(
        max >= 1 && min <= max,
        "--max: expected at least 1 and --min, got {max}"
    );
    ensure!(
        cold_start.is_finite() && cold_start >= 0.0,
        "--cold-start: expected seconds from 0, got {cold_start}"
    );
    let model = match arguments.model {
        ModelName::Llama405bTp8 => ServingModel::llama_405b_tp8(),
        ModelName::Llama70bTp2 => ServingModel::llama_70b_tp2(),
    };
    let slo = model.slo(arguments.slo);
    let mut config = Config::new(model, slo);
    config.cold_start_seconds = cold_start;
    config.min_groups = min;
    config.max_groups = max;
    config.outage = arguments.outage;
    config.seed = arguments.seed;
    config.initial_groups = arguments
        .initial
        .unwrap_or_else(|| config.groups_for_start(trace))
        .clamp(min, max);
    Ok(config)
}

fn run(arguments: &Arguments, trace: &Trace, config: &Config, target: f64) -> anyhow::Result<()> {
    let mut policy: Box<dyn policy::Policy> = arguments.policy.build(target, trace, config)?;
    let mut config = config.clone();
    if let Some(groups) = arguments.policy.initial_groups(target, trace, &config) {
        config.initial_groups = groups;
    }
    let outcome = simulate(trace, &config, policy.as_mut());
    let report = Report::new(arguments.policy.as_str(), target, &config, &outcome);
    let mut out = std::io::stdout().lock();
    if arguments.json || !arguments.targets.is_empty() {
        serde_json::to_writer(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", report.to_text())?;
    }
    for (file, draw) in [
        (&arguments.svg, chart::svg as fn(&_, &_) -> String),
        (&arguments.html, chart::html),
    ] {
        if let Some(file) = file {
            let moments = timeline(trace, &config, &outcome, CHART_WINDOWS);
            std::fs::write(file, draw(&moments, &report))
                .with_context(|| file.display().to_string())?;
        }
    }
    Ok(())
}
