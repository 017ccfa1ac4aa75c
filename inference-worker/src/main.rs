//! Entry point.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use llama_contract::{FailureCategory, RENDEZVOUS_TOKEN_ENV};
use llama_worker::bench::{self, BenchArgs, BenchReport};
use llama_worker::failure::{Failure, of_model};
use llama_worker::inspect::InspectCommand;
use llama_worker::logits::{self, LogitsArgs};
use llama_worker::plan::{PlanArgs, Planned};
use llama_worker::rank::{self, RankError, args::RankArgs};
use llama_worker::replay::{self, ReplayArgs};
use llama_worker::shard::{self, ShardArgs};
use llama_worker::supervisor::{self, args::ServeArgs};
use llama_worker::telemetry::{self, LOG_FORMAT_ENV, LogFormat};

/// Serves a Llama model over the OpenAI API, computed by tensor-parallel ranks.
#[derive(Parser)]
#[command(name = "llama-worker", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Form of log lines.
    #[arg(long, global = true, value_enum, env = LOG_FORMAT_ENV, default_value_t)]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one pod of a group.
    Serve(ServeArgs),
    /// Says what memory a model takes in a layout, from its headers.
    Plan(PlanArgs),
    /// Says what a model would take in a layout, for the operator.
    #[command(hide = true)]
    Inspect(InspectCommand),
    /// Writes the logits after every token of a sequence.
    Logits(LogitsArgs),
    /// Writes a model cut for the ranks of a layout, one file a rank.
    Shard(ShardArgs),
    /// Measures how fast this machine computes a model, without a server.
    Bench(BenchArgs),
    /// Sends recorded traffic to any OpenAI endpoint and tells how it was answered.
    Replay(ReplayArgs),
    /// Runs one rank; started by `serve`.
    #[command(hide = true)]
    Rank(RankArgs),
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    telemetry::start(cli.log_format)?;
    let token = std::env::var(RENDEZVOUS_TOKEN_ENV)
        .ok()
        .filter(|token| !token.is_empty());
    let code = match cli.command {
        Command::Serve(args) => supervisor::run(&args, cli.log_format, token.as_deref()),
        Command::Plan(args) => Planned::new(&args).map_or_else(
            |error| refuse(&of_model(&error)),
            |report| show(&report, args.json),
        ),
        Command::Inspect(command) => command
            .run()
            .map_or_else(|failure| refuse(&failure), |report| print(&report)),
        Command::Logits(args) => {
            logits::run(&args, token.as_deref()).map_or_else(|failure| refuse(&failure), |()| 0)
        }
        Command::Shard(args) => {
            shard::run(&args).map_or_else(|error| refuse(&of_model(&error)), |()| 0)
        }
        Command::Bench(args) => bench::run(&args).map_or_else(
            |failure| refuse(&failure),
            |report| tell(&report, args.json),
        ),
        Command::Replay(args) => {
            replay::run(&args).map_or_else(|failure| refuse(&failure), |report| print(&report))
        }
        Command::Rank(args) => match rank::run(&args, token) {
            Ok(()) => 0,
            Err(error) => {
                tracing::error!(rank = args.rank, %error, "the rank ends");
                match error {
                    RankError::Failed(failure) => failure.category.exit_code(),
                    RankError::Aborted => FailureCategory::Internal.exit_code(),
                }
            }
        },
    };
    Ok(ExitCode::from(code))
}

/// Says on standard error why there is no result; returns the exit code.
fn refuse(failure: &Failure) -> u8 {
    eprintln!("llama-worker: {failure}");
    failure.category.exit_code()
}

/// Prints what was measured; returns the exit code.
#[expect(clippy::print_stdout, reason = "it is this command's output")]
fn tell(report: &BenchReport, as_json: bool) -> u8 {
    if as_json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.table());
    }
    0
}

/// Prints a report; returns the exit code.
#[expect(clippy::print_stdout, reason = "it is this command's output")]
fn print(report: &impl serde::Serialize) -> u8 {
    match serde_json::to_string_pretty(report) {
        Ok(text) => {
            println!("{text}");
            0
        }
        Err(error) => refuse(&Failure::from_error(FailureCategory::Internal, &error)),
    }
}

/// Prints a plan; returns the exit code, which says whether it fits.
#[expect(clippy::print_stdout, reason = "the plan is this command's output")]
fn show(report: &Planned, as_json: bool) -> u8 {
    if as_json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.table());
    }
    if report.fits() {
        0
    } else {
        FailureCategory::InsufficientMemory.exit_code()
    }
}
