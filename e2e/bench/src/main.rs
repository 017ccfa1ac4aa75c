//! `llama-bench`: what the operator takes to bring many deployments up, on a real API
//! server with simulated nodes, beside a peer on the same control plane.

mod machine;
mod plane;
mod process;
mod profile;
mod prometheus;
mod report;
mod run;
mod subject;
mod watch;

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use llama_e2e::cache::Cache;
use llama_e2e::components;
use tokio::signal::unix::{SignalKind, signal};

use plane::Parts;
use report::{Figures, PUBLISHED, Report, Run, TARGETS};
use run::{Settings, measure};
use subject::{Operator, PODS_EACH, Subject};

/// Brings many LlamaDeployments up at once on a control plane of its own, on loopback, and
/// prints what that took as JSON.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The operator's program, an optimized build
    #[arg(long)]
    operator: PathBuf,
    /// One more argument of the operator, for example --concurrency=16; once for each
    #[arg(
        long = "operator-argument",
        value_name = "FLAG",
        allow_hyphen_values = true
    )]
    operator_arguments: Vec<String>,
    /// LlamaDeployments to create at once, each one group of two pods
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    deployments: u32,
    /// LlamaDeployments to create one by one after that
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    singly: u32,
    /// Namespaces that they are spread over: with one, controllers that compare every pod
    /// with every Service of its namespace have the most to do
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    namespaces: u32,
    /// Simulated nodes; each takes 250 pods
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    nodes: u32,
    /// Measurements of each subject; every second time the peer goes first
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
    repeats: u32,
    /// What else to measure in the same way
    #[arg(long, value_enum, default_value_t = Peer::StatefulSet)]
    peer: Peer,
    /// Cores that everything shares
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    cores: u16,
    /// Seconds of rest in which nothing should be written
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=600))]
    rest_seconds: u32,
    /// Seconds that all objects have to become Ready before the benchmark fails
    #[arg(long, default_value_t = 900, value_parser = clap::value_parser!(u32).range(10..=3600))]
    within_seconds: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// Kubernetes' own controller of sets of pods
    StatefulSet,
    /// Nothing
    None,
}

impl Args {
    /// What to measure, in order.
    fn order(&self) -> Vec<Subject> {
        let mut order = Vec::new();
        for repeat in 0..self.repeats {
            let mut pair = vec![Subject::LlamaOperator];
            if self.peer == Peer::StatefulSet {
                pair.push(Subject::StatefulSet);
            }
            // What comes second may find a warmer machine, so they take turns. The first
            // of all is the operator, whose pods the peer's are made like.
            if repeat % 2 == 1 {
                pair.reverse();
            }
            order.extend(pair);
        }
        order
    }
}

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("llama-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Args) -> anyhow::Result<()> {
    // Before there are threads: these, and all programs, get the same cores.
    let cores = machine::restrict(args.cores.into())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // Whatever ends first, all programs are killed with what is dropped here.
        tokio::select! {
            report = bench(args, cores) => report,
            _ = terminate.recv() => bail!("asked to stop"),
            _ = interrupt.recv() => bail!("interrupted"),
        }
    })?;
    let mut output = io::stdout().lock();
    serde_json::to_writer_pretty(&mut output, &report)?;
    writeln!(output)?;
    Ok(())
}

async fn bench(args: &Args, cores: usize) -> anyhow::Result<Report> {
    let load_average = machine::load();
    let operator = std::path::absolute(&args.operator)?;
    if !operator.is_file() {
        bail!("--operator names no file: {}", operator.display());
    }
    let deployments = usize::try_from(args.deployments)?;
    let cache = Cache::from_environment()?;
    let programs = components::build(&cache, &components::SIMULATED).await?;
    let stages = components::kwok_stages().await?;
    let settings = Settings {
        parts: Parts {
            programs: &programs,
            stages: &stages,
            nodes: usize::try_from(args.nodes)?,
        },
        operator: Operator {
            program: &operator,
            arguments: &args.operator_arguments,
        },
        deployments,
        namespaces: usize::try_from(args.namespaces)?,
        singly: usize::try_from(args.singly)?,
        rest: Duration::from_secs(args.rest_seconds.into()),
        within: Duration::from_secs(args.within_seconds.into()),
    };
    let (mut runs, mut flags, mut pod) = (Vec::new(), BTreeMap::new(), None);
    for subject in args.order() {
        let outcome = Box::pin(measure(settings, subject, pod.clone()))
            .await
            .with_context(|| format!("measure {}", subject.name()))?;
        if subject == Subject::LlamaOperator {
            pod = outcome.pod;
        }
        flags.extend(outcome.flags);
        runs.push(outcome.run);
    }
    let (medians, ratios) = compare(&runs);
    Ok(Report {
        deployments,
        pods_each: PODS_EACH,
        namespaces: settings.namespaces,
        nodes: settings.parts.nodes,
        cores,
        processor: machine::processor(),
        load_average,
        targets: TARGETS,
        published: PUBLISHED,
        runs,
        medians,
        ratios,
        flags,
    })
}

type ByName = BTreeMap<&'static str, Figures>;

/// Medians of each subject, and what each peer takes relative to the operator.
fn compare(runs: &[Run]) -> (ByName, ByName) {
    let medians: ByName = [Subject::LlamaOperator, Subject::StatefulSet]
        .into_iter()
        .filter_map(|subject| {
            let of_subject = runs.iter().filter(|run| run.subject == subject);
            let figures: Vec<Figures> = of_subject.map(Run::figures).collect();
            Some((subject.name(), report::median(&figures)?))
        })
        .collect();
    let mut ratios = ByName::new();
    if let Some(own) = medians.get(Subject::LlamaOperator.name()) {
        let peer = medians.get(Subject::StatefulSet.name());
        ratios.extend(peer.map(|peer| (Subject::StatefulSet.name(), report::ratio(peer, own))));
        ratios.insert(PUBLISHED.name, report::ratio(&PUBLISHED.figures, own));
    }
    (medians, ratios)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn args(more: &[&str]) -> Args {
        let argv = ["x", "--operator=y"]
            .into_iter()
            .chain(more.iter().copied());
        Args::try_parse_from(argv).unwrap()
    }

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn subjects_take_turns_and_the_operator_is_first() {
        use Subject::{LlamaOperator, StatefulSet};
        let order = args(&["--repeats=2"]).order();
        assert_eq!(
            order,
            [LlamaOperator, StatefulSet, StatefulSet, LlamaOperator]
        );
        let alone = args(&["--repeats=2", "--peer=none"]).order();
        assert_eq!(alone, [LlamaOperator, LlamaOperator]);
    }
}
