//! Entry point.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use llama_contract::{FailureCategory, RENDEZVOUS_TOKEN_ENV};
use llama_worker::rank::{self, RankError, args::RankArgs};
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
