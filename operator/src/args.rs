//! The command line.

use std::net::SocketAddr;

use clap::Parser;

/// Runs Llama models as groups of worker pods.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Image of the worker pods.
    #[arg(long, env = "LLAMA_WORKER_IMAGE")]
    pub worker_image: String,
    /// When nodes pull the worker image; Kubernetes' own default when absent.
    #[arg(long, env = "LLAMA_WORKER_IMAGE_PULL_POLICY", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub worker_image_pull_policy: Option<String>,
    /// Seconds that running answers get to finish when a worker pod is asked to end.
    #[arg(long, env = "LLAMA_DRAIN_SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub drain_seconds: u32,
    /// Namespace to watch; repeat or separate by commas. All when absent.
    #[arg(long, env = "LLAMA_WATCH_NAMESPACE", value_delimiter = ',')]
    pub watch_namespace: Vec<String>,
    /// Rounds that run at the same time.
    #[arg(long, env = "LLAMA_CONCURRENCY", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,
    /// Address of /metrics, /livez and /readyz.
    #[arg(long, env = "LLAMA_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Namespace of the lease that replicas of the operator compete for. Without it there
    /// is no election, and only one process may run.
    #[arg(long, env = "LLAMA_LEASE_NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// Name of the lease.
    #[arg(long, env = "LLAMA_LEASE_NAME", default_value = "llama-operator")]
    pub lease_name: String,
    /// Name of this process in events and in the lease, for example the pod's name.
    #[arg(long, env = "LLAMA_IDENTITY", default_value = "llama-operator")]
    pub identity: String,
    /// What to log, for example `info` or `info,llama_operator=debug`.
    #[arg(long, env = "LLAMA_LOG", default_value = "info")]
    pub log: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn namespaces_may_be_repeated_or_separated() {
        let argv = [
            "x",
            "--worker-image=w",
            "--watch-namespace=a,b",
            "--watch-namespace=c",
        ];
        let parsed = Args::try_parse_from(argv).expect("parses");
        assert_eq!(parsed.watch_namespace, ["a", "b", "c"]);
    }
}
