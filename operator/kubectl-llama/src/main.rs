//! `kubectl llama`: kubectl runs any program on the `PATH` that is named `kubectl-llama`.

use std::process::ExitCode;

use clap::Parser as _;
use kubectl_llama::Health;
use kubectl_llama::args::Args;
use llama_operator::telemetry::chain;

#[tokio::main]
async fn main() -> ExitCode {
    match kubectl_llama::run(Args::parse(), &mut std::io::stdout()).await {
        Ok(Health::Good) => ExitCode::SUCCESS,
        Ok(Health::Bad) => ExitCode::FAILURE,
        // Whoever reads us, for example `head`, has seen enough.
        Err(error) if error.is_closed_output() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(&error).replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
