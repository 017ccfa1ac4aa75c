//! Programs that run as long as the measurement does.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use llama_e2e::command;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::machine::{self, Usage};

/// Longest wait for a program that was asked to end.
const ENDS_WITHIN: Duration = Duration::from_secs(40);
/// Lines of a log that tell why its program ended.
const LAST_LINES: usize = 15;

/// A running program; it is killed when this value goes away.
pub(crate) struct Process {
    pub(crate) name: &'static str,
    child: Child,
    pid: u32,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with its log in `folder` and nothing of this program's environment
    /// but `environment`.
    pub(crate) fn start(
        name: &'static str,
        program: &Path,
        arguments: &[String],
        environment: &[(&str, &Path)],
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log)?;
        let child = bound(program)
            .args(arguments)
            .env_clear()
            .env("HOME", folder)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let pid = child.id().with_context(|| format!("{name} has ended"))?;
        Ok(Self {
            name,
            child,
            pid,
            log,
        })
    }

    /// Fails if the program has ended, with the end of its log.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        bail!("{} ended early ({status}):\n{end}", self.name);
    }

    /// What it has taken.
    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        machine::usage(self.pid).with_context(|| format!("measure {}", self.name))
    }

    /// Asks it to end and waits until it has.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid)?).context("a process number")?;
        kill_process(pid, Signal::TERM).with_context(|| format!("stop {}", self.name))?;
        timeout(ENDS_WITHIN, self.child.wait())
            .await
            .with_context(|| format!("{} still runs {ENDS_WITHIN:?} after SIGTERM", self.name))??;
        Ok(())
    }
}

/// A command that runs `program` and dies with this process even if that is killed.
/// `setpriv` becomes the program, so its process number is the program's.
fn bound(program: &Path) -> Command {
    let Some(setpriv) = command::find_program("setpriv") else {
        return Command::new(program);
    };
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, folder: &Path) -> Process {
        let arguments = ["-c".to_owned(), script.to_owned()];
        Process::start("shell", Path::new("/bin/sh"), &arguments, &[], folder).unwrap()
    }

    #[tokio::test]
    async fn an_early_end_is_told_with_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut process = shell("echo no such flag >&2; exit 3", folder.path());
        process.child.wait().await.unwrap();
        let message = process.check().unwrap_err().to_string();
        assert!(message.contains("shell ended early"), "{message}");
        assert!(message.contains("no such flag"), "{message}");
    }

    #[tokio::test]
    async fn a_program_is_asked_to_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut process = shell("sleep 60 & wait", folder.path());
        process.check().unwrap();
        assert!(process.usage().unwrap().rss_bytes > 0);
        process.stop().await.unwrap();
    }
}
