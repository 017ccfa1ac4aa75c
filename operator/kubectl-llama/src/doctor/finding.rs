//! What the check-up found, as lines. Pure.

use std::fmt::Write as _;

use serde::Serialize;

use crate::Health;
use crate::words::count;

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Not known: the user may not see it.
    Skip,
    /// Somebody should know.
    Warn,
    /// Something does not work.
    Fail,
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Skip => "SKIP",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// How it stands with one thing, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it stands.
    pub level: Level,
    /// With what.
    pub about: String,
    /// In a sentence.
    pub message: String,
    /// What to do next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl Finding {
    /// All is well with `about`.
    pub fn ok(about: &str, message: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            about: about.to_owned(),
            message: message.into(),
            next: None,
        }
    }

    /// It is not known how it stands with `about`.
    pub fn skip(about: &str, message: impl Into<String>) -> Self {
        Self {
            level: Level::Skip,
            ..Self::ok(about, message)
        }
    }

    /// Somebody should know of `about`, and do `next`.
    pub fn warn(about: &str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            level: Level::Warn,
            next: Some(next.into()),
            ..Self::ok(about, message)
        }
    }

    /// `about` does not work; `next` may help.
    pub fn fail(about: &str, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(about, message, next)
        }
    }
}

/// Whether none of `findings` is a failure.
pub fn health(findings: &[Finding]) -> Health {
    Health::of(findings.iter().all(|one| one.level != Level::Fail))
}

/// `findings` as lines, in their order, and a sum.
pub fn page(findings: &[Finding]) -> String {
    let mut page = String::new();
    for finding in findings {
        let Finding { about, message, .. } = finding;
        let _ = writeln!(
            page,
            "{:<5} {about}: {}",
            finding.level.as_str(),
            message.replace('\n', " ")
        );
        if let Some(next) = &finding.next {
            let _ = writeln!(page, "      next: {next}");
        }
    }
    let number = |level| {
        let of_level = findings.iter().filter(|one| one.level == level);
        i64::try_from(of_level.count()).unwrap_or(i64::MAX)
    };
    let _ = writeln!(
        page,
        "\n{}, {}",
        count(number(Level::Fail), "failure"),
        count(number(Level::Warn), "warning")
    );
    page
}
