//! Where the cluster comes from.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::command;

/// Names a kubeconfig whose cluster may be used. The user's current context is
/// never taken by itself.
pub const KUBECONFIG_VARIABLE: &str = "LLAMA_CLUSTER_KUBECONFIG";

/// What makes the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// Processes of this machine, in namespaces of their own.
    Local,
    /// kind, in a Docker engine.
    Kind,
    /// A cluster that exists already.
    Kubeconfig,
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// An opted-in kubeconfig, else kind, else local.
    Auto,
    /// Only [`Provider::Local`].
    Local,
    /// Only [`Provider::Kind`].
    Kind,
    /// Only [`Provider::Kubeconfig`].
    Kubeconfig,
}

/// What this machine offers.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "five independent facts")]
pub struct Surroundings {
    /// The kubeconfig that the user opted into.
    pub kubeconfig: Option<PathBuf>,
    /// A Docker engine answers.
    pub docker: bool,
    /// There is a `kind` program.
    pub kind: bool,
    /// There is a `go` program, which can install kind.
    pub go: bool,
    /// This is Linux.
    pub linux: bool,
    /// We are root.
    pub root: bool,
}

/// No cluster can be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// None of the three is possible.
    #[error(
        "no cluster can be had here. One of these is needed:\n\
         - a cluster of yours: set {KUBECONFIG_VARIABLE} or --kubeconfig to its kubeconfig\n\
         - kind: a Docker engine that answers `docker info`, and `kind` or `go` in PATH ({})\n\
         - the local cluster: Linux, as root ({})",
        missing_for_kind(.0), missing_for_local(.0)
    )]
    None(Box<Surroundings>),
    /// `--provider kubeconfig` without a kubeconfig.
    #[error("--provider kubeconfig needs --kubeconfig or {KUBECONFIG_VARIABLE}")]
    NoKubeconfig,
    /// `--provider kind` where it cannot work.
    #[error("--provider kind cannot work here: {}", missing_for_kind(.0))]
    NoKind(Box<Surroundings>),
    /// `--provider local` where it cannot work.
    #[error("--provider local cannot work here: {}", missing_for_local(.0))]
    NoLocal(Box<Surroundings>),
}

fn missing_for_kind(surroundings: &Surroundings) -> &'static str {
    match (surroundings.docker, surroundings.kind || surroundings.go) {
        (true, true) => "all there",
        (true, false) => "neither kind nor go is in PATH",
        (false, _) => "no Docker engine answers",
    }
}

fn missing_for_local(surroundings: &Surroundings) -> &'static str {
    match (surroundings.linux, surroundings.root) {
        (true, true) => "all there",
        (true, false) => "this user is not root",
        (false, _) => "this is not Linux",
    }
}

/// Decides by what the user asked for and what the machine offers.
pub fn choose(choice: Choice, surroundings: &Surroundings) -> Result<Provider, ProviderError> {
    let facts = || Box::new(surroundings.clone());
    let kubeconfig = surroundings.kubeconfig.is_some();
    let kind = surroundings.docker && (surroundings.kind || surroundings.go);
    let local = surroundings.linux && surroundings.root;
    // In the order in which they are preferred.
    let possible = [
        (Provider::Kubeconfig, kubeconfig),
        (Provider::Kind, kind),
        (Provider::Local, local),
    ];
    let wanted = |provider| match choice {
        Choice::Auto => true,
        Choice::Kubeconfig => provider == Provider::Kubeconfig,
        Choice::Kind => provider == Provider::Kind,
        Choice::Local => provider == Provider::Local,
    };
    let found = possible
        .into_iter()
        .find(|(provider, is_possible)| *is_possible && wanted(*provider));
    found
        .map(|(provider, _)| provider)
        .ok_or_else(|| match choice {
            Choice::Auto => ProviderError::None(facts()),
            Choice::Kubeconfig => ProviderError::NoKubeconfig,
            Choice::Kind => ProviderError::NoKind(facts()),
            Choice::Local => ProviderError::NoLocal(facts()),
        })
}

/// Looks at this machine.
pub async fn survey(kubeconfig: Option<PathBuf>) -> Surroundings {
    const DOCKER_ANSWERS_WITHIN: Duration = Duration::from_secs(10);
    let docker = command::find_program("docker").is_some()
        && command::run(Command::new("docker").arg("info"), DOCKER_ANSWERS_WITHIN)
            .await
            .is_ok();
    Surroundings {
        kubeconfig,
        docker,
        kind: command::find_program("kind").is_some(),
        go: command::find_program("go").is_some(),
        linux: cfg!(target_os = "linux"),
        root: rustix::process::geteuid().is_root(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Surroundings {
        Surroundings {
            kubeconfig: None,
            docker: false,
            kind: false,
            go: false,
            linux: false,
            root: false,
        }
    }

    #[test]
    fn auto_prefers_opted_in_kubeconfig_then_kind_then_local() {
        let mut machine = Surroundings {
            kubeconfig: Some("k".into()),
            docker: true,
            kind: true,
            go: true,
            linux: true,
            root: true,
        };
        assert_eq!(choose(Choice::Auto, &machine), Ok(Provider::Kubeconfig));
        machine.kubeconfig = None;
        assert_eq!(choose(Choice::Auto, &machine), Ok(Provider::Kind));
        machine.kind = false;
        assert_eq!(
            choose(Choice::Auto, &machine),
            Ok(Provider::Kind),
            "go installs it"
        );
        machine.docker = false;
        assert_eq!(choose(Choice::Auto, &machine), Ok(Provider::Local));
    }

    #[test]
    fn error_says_what_each_way_lacks() {
        let machine = Surroundings {
            docker: true,
            linux: true,
            ..nothing()
        };
        let message = choose(Choice::Auto, &machine).unwrap_err().to_string();
        assert!(message.contains("neither kind nor go"), "{message}");
        assert!(message.contains("not root"), "{message}");
        assert!(message.contains(KUBECONFIG_VARIABLE), "{message}");
    }

    #[test]
    fn explicit_choice_is_never_replaced() {
        let root = Surroundings {
            linux: true,
            root: true,
            ..nothing()
        };
        assert!(choose(Choice::Kind, &root).is_err());
        assert!(choose(Choice::Kubeconfig, &root).is_err());
        assert_eq!(choose(Choice::Local, &root), Ok(Provider::Local));
        assert!(choose(Choice::Local, &nothing()).is_err());
    }
}
