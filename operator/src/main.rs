//! `llama-operator`: runs Llama models as groups of worker pods.

use std::process::ExitCode;

use clap::Parser;
use llama_operator::args::Args;
use llama_operator::{run, telemetry};

// One thread: rounds wait for the API server and compute next to nothing, and memory that
// one thread frees is used again by the next round.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = telemetry::start(&args.log, args.log_format) {
        eprintln!("llama-operator: --log {:?}: {error}", args.log);
        return ExitCode::FAILURE;
    }
    match run::run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = telemetry::chain(&error), "ended");
            ExitCode::FAILURE
        }
    }
}
