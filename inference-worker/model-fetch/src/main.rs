//! `llama-model-fetch`: brings a model from a web server, an S3-compatible store or a model
//! hub into a pod's volume, or into a cache that pods share.

mod cache;
mod client;
mod error;
mod file;
mod listing;
mod model;
mod state;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use llama_contract::{FETCH_CA_ENV, FETCH_TOKEN_ENV, FetchArgs, TERMINATION_LOG};
use llama_model_copy::report;
use tokio::signal::unix::{SignalKind, signal};

use crate::cache::{Cache, Found};
use crate::client::Web;
use crate::error::FetchError;
use crate::listing::Store;
use crate::model::Model;
use crate::state::Progress;

const PROGRAM: &str = "llama-model-fetch";
/// Exit code of a program that SIGTERM ended, as a shell counts it.
const TERMINATED: u8 = 128 + 15;

/// Fetches a model.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// File that gets the failure report.
    #[arg(long, hide = true, default_value = TERMINATION_LOG)]
    termination_log: PathBuf,
    #[command(flatten)]
    fetch: FetchArgs,
}

fn main() -> ExitCode {
    let cli: Cli = match report::parse(PROGRAM) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(model::PARALLEL)
        .enable_all()
        .build()
        .map_err(FetchError::Start);
    match runtime.and_then(|runtime| runtime.block_on(until_terminated(&cli.fetch))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ FetchError::Stopped) => {
            eprintln!("{PROGRAM}: {error}");
            ExitCode::from(TERMINATED)
        }
        Err(error) => {
            let category = error.category();
            report::tell(PROGRAM, &cli.termination_log, category, &error);
            ExitCode::from(category.exit_code())
        }
    }
}

/// As the first process of a container the program must ask for SIGTERM to get it;
/// without that a deleted pod would wait for its whole grace period.
async fn until_terminated(args: &FetchArgs) -> Result<(), FetchError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(FetchError::Start)?;
    tokio::select! {
        result = fetch(args) => result,
        _ = terminate.recv() => Err(FetchError::Stopped),
    }
}

async fn fetch(args: &FetchArgs) -> Result<(), FetchError> {
    if !args.to.is_dir() {
        return Err(FetchError::NoFolder(args.to.clone()));
    }
    let progress = Arc::new(Progress::new());
    if let Some(port) = args.state_port {
        tokio::spawn(state::serve(port, Arc::clone(&progress)));
    }
    let Some(budget) = args.cache_bytes else {
        let model = find(args).await?;
        return model.fetch(&args.to, args.heads, &progress).await;
    };
    let cache = Cache::new(&args.to, budget);
    let identity = args.source.identity().ok_or(FetchError::NoIdentity)?;
    let Found::Mine(claimed) = cache.find(&identity, &progress).await? else {
        eprintln!("{PROGRAM}: the cache has the model");
        return Ok(());
    };
    let model = find(args).await?;
    cache.make_room(&claimed, model.bytes()).await?;
    model.fetch(&claimed.folder()?, false, &progress).await?;
    claimed.complete(model.bytes())
}

async fn find(args: &FetchArgs) -> Result<Model, FetchError> {
    let read = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let credentials = listing::s3_credentials(read)?;
    let signs = credentials.is_some();
    let store = Store::open(&args.source, credentials)?;
    let token = read(FETCH_TOKEN_ENV);
    let certificates = read(FETCH_CA_ENV);
    let web = Web::new(certificates.as_deref(), token.as_deref(), signs)?;
    Model::find(&args.source, web, store).await
}
