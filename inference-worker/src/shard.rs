//! `llama-worker shard`: writes a model cut for the ranks of a layout.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use llama_model::ModelError;
use llama_model::cut::write_shards;

use crate::plan::ModelArgs;

/// How often progress is told.
const REPORT_PERIOD: Duration = Duration::from_secs(5);

/// Flags of `llama-worker shard`.
#[derive(Args, Clone, Debug)]
pub struct ShardArgs {
    /// What to cut, and for how many ranks.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The folder to write, new or empty.
    #[arg(long)]
    pub out: PathBuf,
}

/// Writes one file a rank, and what the model's text needs.
///
/// # Errors
/// When the model cannot be read or split so, or the folder cannot be written.
pub fn run(args: &ShardArgs) -> Result<(), ModelError> {
    let checkpoint = args.model.open()?;
    let started = Instant::now();
    let mut told = started;
    write_shards(
        &checkpoint,
        args.model.layout(),
        &args.out,
        &mut |done, total| {
            if told.elapsed() >= REPORT_PERIOD || done == total {
                told = Instant::now();
                tracing::info!(
                    done,
                    total,
                    seconds = started.elapsed().as_secs(),
                    "written"
                );
            }
        },
    )
}
