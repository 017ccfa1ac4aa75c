//! The failure report in the container's termination message.

use std::error::Error;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use llama_contract::{FailureCategory, FailureReport, NODE_NAME_ENV, TERMINATION_LOG};

/// An error and its sources, joined by colons.
pub fn sentence(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string().trim_end().to_owned();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Says on stderr, as `program`, and in the termination log why the program fails.
pub fn tell(
    program: &str,
    termination_log: &Path,
    category: FailureCategory,
    error: &(dyn Error + 'static),
) {
    let message = sentence(error);
    eprintln!("{program}: {category}: {message}");
    if let Err(error) = write(termination_log, category, message) {
        eprintln!(
            "{program}: cannot write {}: {error}",
            termination_log.display()
        );
    }
}

/// The command line of `program`. Where it says what to print, or is wrong, which is told,
/// the exit code.
///
/// # Errors
/// The exit code, where nothing is left to do.
pub fn parse<C: clap::Parser>(program: &str) -> Result<C, ExitCode> {
    C::try_parse().map_err(|error| {
        if !error.use_stderr() {
            // `--help` and `--version`; nobody reads it when the pipe is closed.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        let category = FailureCategory::InvalidConfiguration;
        tell(program, Path::new(TERMINATION_LOG), category, &error);
        ExitCode::from(category.exit_code())
    })
}

/// Writes the report into the termination log, which the kubelet makes before the
/// container starts. Where there is none the program does not run in a pod, and the
/// words on stderr are all there is.
///
/// # Errors
/// What the system says of the file.
pub fn write(path: &Path, category: FailureCategory, message: String) -> io::Result<()> {
    let mut file = match OpenOptions::new().write(true).truncate(true).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let report = FailureReport {
        category,
        message,
        rank: None,
        node: std::env::var(NODE_NAME_ENV).ok(),
        step: None,
        // The copy is the same in every incarnation; which one this was, the pod tells.
        epoch: 0,
    };
    file.write_all(report.to_termination_message().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read /a")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_sentence_holds_the_cause() {
        let error = Outer(io::Error::other("disk on fire"));
        assert_eq!(sentence(&error), "cannot read /a: disk on fire");
    }

    #[test]
    fn no_termination_log_is_made_outside_a_pod() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        write(&log, FailureCategory::Internal, "x".to_owned()).unwrap();
        assert!(!log.exists());
    }

    #[test]
    fn the_report_replaces_what_the_log_held() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "x".repeat(9000)).unwrap();
        write(&log, FailureCategory::ModelNotFound, "no /a".to_owned()).unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        let report = FailureReport::from_termination_message(&text).unwrap();
        assert_eq!(report.category, FailureCategory::ModelNotFound);
        assert_eq!(report.message, "no /a");
    }
}
