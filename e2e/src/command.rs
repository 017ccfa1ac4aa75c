//! Runs other programs with a deadline.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// Another program did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("`{line}` could not be started")]
    Start {
        /// The command line.
        line: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was still running at its deadline and was killed.
    #[error("`{line}` was still running after {} s", deadline.as_secs())]
    Deadline {
        /// The command line.
        line: String,
        /// How long it had.
        deadline: Duration,
    },
    /// It ended with an error.
    #[error("`{line}` failed ({status}): {}", output.trim())]
    Failed {
        /// The command line.
        line: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote to standard error, or else to standard output.
        output: String,
    },
}

/// Runs `command` to its end and returns its standard output.
pub async fn run(command: &mut Command, deadline: Duration) -> Result<String, CommandError> {
    run_with_input(command, "", deadline).await
}

/// Like [`run`], with `input` as standard input.
pub async fn run_with_input(
    command: &mut Command,
    input: &str,
    deadline: Duration,
) -> Result<String, CommandError> {
    let line = describe(command);
    let failed_start = |source| CommandError::Start {
        line: line.clone(),
        source,
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed_start)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A program may end without reading its input; its status tells.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let finish = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(deadline, finish)
        .await
        .map_err(|_| CommandError::Deadline {
            line: line.clone(),
            deadline,
        })?
        .map_err(failed_start)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let said = if output.stderr.is_empty() {
        &output.stdout
    } else {
        &output.stderr
    };
    Err(CommandError::Failed {
        line,
        status: output.status,
        output: text(said),
    })
}

/// The command line as one would type it, cut to a readable length.
fn describe(command: &Command) -> String {
    const LONGEST: usize = 160;
    let command = command.as_std();
    let program = std::path::Path::new(command.get_program());
    let mut line = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    if line.chars().count() > LONGEST {
        line = line.chars().take(LONGEST).collect();
        line.push('…');
    }
    line
}

/// The file that running `program` by its bare name would start.
pub fn find_program(program: &str) -> Option<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let executable = |file: &std::path::PathBuf| {
        file.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        // Not in every root shell's PATH, but where the system's own tools are.
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into))
        .map(|folder| folder.join(program))
        .find(executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn output_comes_back_and_input_goes_in() {
        let output = run_with_input(&mut Command::new("cat"), "text", SHORT).await;
        assert_eq!(output.unwrap(), "text");
    }

    #[tokio::test]
    async fn failure_names_the_command_and_what_it_said() {
        let mut command = Command::new("sh");
        let error = run(
            command.args(["-c", "echo no such thing >&2; exit 3"]),
            SHORT,
        )
        .await
        .unwrap_err();
        let message = error.to_string();
        assert!(message.contains("no such thing"), "{message}");
        assert!(message.contains("sh -c"), "{message}");
    }

    #[tokio::test]
    async fn slow_commands_are_ended() {
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(matches!(error, CommandError::Deadline { .. }));
    }

    #[test]
    fn programs_are_found_by_name() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-anywhere").is_none());
    }
}
