//! `llama-model-copy`: brings a model out of a model image into a pod's volume.
//!
//! A model image needs to hold nothing but the model, so this program is linked
//! statically. One init container, from the worker image, runs `install` and leaves
//! the program in a shared volume; the next one, from the model image, runs `copy`.

mod copy;
mod install;
mod plan;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Parser, Subcommand};
use llama_contract::{FailureCategory, TERMINATION_LOG};
use llama_model_copy::report;
use signal_hook::consts::SIGTERM;

use crate::copy::{CopyError, Extent};

/// Exit code of a program that SIGTERM ended, as a shell counts it.
const TERMINATED: u8 = 128 + 15;

/// Copies a model out of a model image.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// File that gets the failure report.
    #[arg(long, global = true, hide = true, default_value = TERMINATION_LOG)]
    termination_log: PathBuf,
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Put a copy of this program into a folder.
    Install {
        /// The folder.
        #[arg(long)]
        to: PathBuf,
    },
    /// Copy a model file, or the files of a folder, into a folder.
    Copy {
        /// The file or the folder.
        #[arg(long)]
        from: PathBuf,
        /// The folder that gets the files, under their own names.
        #[arg(long)]
        to: PathBuf,
        /// Copies only what readers of headers look at; the rest of each file is a hole.
        #[arg(long)]
        heads: bool,
    },
}

fn main() -> ExitCode {
    let cli: Cli = match report::parse("llama-model-copy") {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match cli.task {
        Task::Install { to } => match install::install(&to) {
            Ok(program) => {
                eprintln!("llama-model-copy: installed {}", program.display());
                ExitCode::SUCCESS
            }
            Err(error) => fail(&cli.termination_log, error.category(), &error),
        },
        Task::Copy { from, to, heads } => match copy_until_terminated(
            &from,
            &to,
            if heads { Extent::Heads } else { Extent::Whole },
        ) {
            Ok(()) => ExitCode::SUCCESS,
            Err(CopyError::Stopped) => {
                eprintln!("llama-model-copy: {}", CopyError::Stopped);
                ExitCode::from(TERMINATED)
            }
            Err(error) => fail(&cli.termination_log, error.category(), &error),
        },
    }
}

/// As the first process of a container the program must ask for SIGTERM to get it;
/// without that a deleted pod would wait for its whole grace period.
fn copy_until_terminated(
    from: &std::path::Path,
    to: &std::path::Path,
    extent: Extent,
) -> Result<(), CopyError> {
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGTERM, Arc::clone(&stop)).map_err(CopyError::Signal)?;
    copy::copy(from, to, extent, &stop)
}

fn fail(
    termination_log: &std::path::Path,
    category: FailureCategory,
    error: &(dyn std::error::Error + 'static),
) -> ExitCode {
    report::tell("llama-model-copy", termination_log, category, error);
    ExitCode::from(category.exit_code())
}
