//! The kubectl plugin `kubectl llama`.
//!
//! Each command is a module: what it shows is a pure function from objects to text, and
//! the module itself reads the objects.

pub mod args;
pub mod bench;
pub mod cluster;
pub mod doctor;
pub mod error;
pub mod logs;
pub mod output;
pub mod plan;
pub mod status;
pub mod words;

use std::io::Write;

use args::{Args, Command};
use cluster::Cluster;
use error::Error;

/// Whether what was looked at is as it should be: the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is.
    Good,
    /// It is not.
    Bad,
}

impl Health {
    /// [`Health::Good`] if `good`.
    pub fn of(good: bool) -> Self {
        if good { Self::Good } else { Self::Bad }
    }
}

/// Does what the command line `args` asks for and writes to `out`.
///
/// # Errors
/// What could not be done, with the names of the objects.
pub async fn run(args: Args, out: &mut (dyn Write + Send)) -> Result<Health, Error> {
    let cluster = Cluster::connect(&args.cluster).await?;
    match args.command {
        Command::Status(options) => status::run(&cluster, &options, out).await,
        Command::Plan(options) => plan::run(&cluster, &options, out).await,
        Command::Logs(options) => logs::run(&cluster, &options, out).await,
        Command::Doctor(options) => doctor::run(&cluster, &options, out).await,
        Command::Bench(options) => bench::run(&cluster, &options, out).await,
    }
}
