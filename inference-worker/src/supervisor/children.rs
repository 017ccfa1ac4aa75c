//! The processes of this pod's ranks.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use super::cause::Exit;
use crate::telemetry::{LOG_FORMAT_ENV, LogFormat};

/// One rank's process.
#[derive(Debug)]
struct RankChild {
    rank: u32,
    child: Child,
    exit: Option<Exit>,
}

/// A rank's process could not be started.
#[derive(Debug, thiserror::Error)]
#[error("start rank {rank}")]
pub(super) struct StartError {
    rank: u32,
    #[source]
    source: std::io::Error,
}

/// All ranks of this pod. Dropping it kills those that still run.
#[derive(Debug)]
pub(super) struct Children {
    ranks: Vec<RankChild>,
    log_format: LogFormat,
}

impl Children {
    /// No ranks yet; they will log in `log_format`.
    pub(super) fn new(log_format: LogFormat) -> Self {
        Self {
            ranks: Vec::new(),
            log_format,
        }
    }

    /// Starts `rank` with `args`. `front` becomes its standard input.
    ///
    /// The kernel ends the child when the calling *thread* ends, so this must be
    /// the thread that lives as long as the process.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(super) fn start(
        &mut self,
        program: &Path,
        rank: u32,
        args: Vec<String>,
        front: Option<UnixStream>,
    ) -> Result<(), StartError> {
        let stdin = front.map_or_else(Stdio::null, |stream| Stdio::from(OwnedFd::from(stream)));
        let child = Command::new(program)
            .arg("rank")
            .args(args)
            .env(LOG_FORMAT_ENV, self.log_format.as_str())
            .stdin(stdin)
            // A signal from a terminal is for the supervisor.
            .process_group(0)
            .spawn()
            .map_err(|source| StartError { rank, source })?;
        self.ranks.push(RankChild {
            rank,
            child,
            exit: None,
        });
        Ok(())
    }

    /// Process ids, by place in the pod.
    pub(super) fn pids(&self) -> Vec<u32> {
        self.ranks.iter().map(|child| child.child.id()).collect()
    }

    /// Notes which ranks have ended.
    pub(super) fn poll(&mut self) {
        for child in &mut self.ranks {
            if child.exit.is_none() {
                match child.child.try_wait() {
                    Ok(status) => child.exit = status.map(exit_of),
                    Err(error) => tracing::warn!(rank = child.rank, %error, "look at a rank"),
                }
            }
        }
    }

    /// How the ranks have ended, by place in the pod; `None` for those that run.
    pub(super) fn exits(&self) -> Vec<Option<Exit>> {
        self.ranks.iter().map(|child| child.exit).collect()
    }

    /// Kills all ranks that still run and waits for them.
    pub(super) fn kill(&mut self) {
        let running = || |child: &&mut RankChild| child.exit.is_none();
        for child in self.ranks.iter_mut().filter(running()) {
            if let Err(error) = child.child.kill() {
                tracing::warn!(rank = child.rank, %error, "kill a rank");
            }
        }
        for child in self.ranks.iter_mut().filter(running()) {
            match child.child.wait() {
                Ok(status) => child.exit = Some(exit_of(status)),
                Err(error) => tracing::warn!(rank = child.rank, %error, "wait for a rank"),
            }
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.kill();
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (_, Some(signal)) => Exit::Signal(signal),
        (code, None) => Exit::Code(code.unwrap_or(0)),
    }
}
