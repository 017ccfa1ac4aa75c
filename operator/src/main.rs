//! `llama-operator`: runs Llama models as groups of worker pods.

use std::process::ExitCode;

use clap::Parser;
use llama_operator::args::Args;
use llama_operator::{run, telemetry};

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = telemetry::start(&args.log) {
        eprintln!("llama-operator: --log {:?}: {error}", args.log);
        return ExitCode::FAILURE;
    }
    match run::run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "ended");
            ExitCode::FAILURE
        }
    }
}
