//! The command line.

use std::net::SocketAddr;

use clap::Parser;
use clap::builder::NonEmptyStringValueParser;

use crate::telemetry::LogFormat;

/// Runs Llama models as groups of worker pods.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Image of the worker pods.
    #[arg(long, env = "LLAMA_WORKER_IMAGE", value_parser = NonEmptyStringValueParser::new())]
    pub worker_image: String,
    /// When nodes pull the worker image; Kubernetes' own default when absent.
    #[arg(long, env = "LLAMA_WORKER_IMAGE_PULL_POLICY", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub worker_image_pull_policy: Option<String>,
    /// Seconds that running answers get to finish when a worker pod is asked to end.
    #[arg(long, env = "LLAMA_DRAIN_SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub drain_seconds: u32,
    /// Namespace to watch; repeat or separate by commas. All when absent.
    #[arg(long, env = "LLAMA_WATCH_NAMESPACE", value_delimiter = ',', value_parser = name)]
    pub watch_namespace: Vec<String>,
    /// Rounds that run at the same time.
    #[arg(long, env = "LLAMA_CONCURRENCY", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,
    /// Seconds after which a round is given up and tried again later.
    #[arg(long, env = "LLAMA_RECONCILE_TIMEOUT", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=60))]
    pub reconcile_timeout: u32,
    /// Address of /metrics, /livez and /readyz.
    #[arg(long, env = "LLAMA_LISTEN", default_value = "0.0.0.0:8080")]
    pub listen: SocketAddr,
    /// Namespace of the lease that replicas of the operator compete for. Without it there
    /// is no election, and only one process may run.
    #[arg(long, env = "LLAMA_LEASE_NAMESPACE", value_parser = name)]
    pub lease_namespace: Option<String>,
    /// Name of the lease.
    #[arg(long, env = "LLAMA_LEASE_NAME", default_value = "llama-operator", value_parser = name)]
    pub lease_name: String,
    /// Name of this process in events and in the lease, for example the pod's name.
    #[arg(long, env = "LLAMA_IDENTITY", default_value = "llama-operator", value_parser = name)]
    pub identity: String,
    /// What to log, for example `info` or `info,llama_operator=debug`.
    #[arg(long, env = "LLAMA_LOG", default_value = "info")]
    pub log: String,
    /// How a line of the log is written.
    #[arg(long, env = "LLAMA_LOG_FORMAT", value_enum, default_value_t = LogFormat::Json)]
    pub log_format: LogFormat,
}

/// A name of an object: an empty one would make another request of the URL it is put in.
fn name(text: &str) -> Result<String, String> {
    let known =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    let inside = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    let ends = inside(bytes.first()) && inside(bytes.last());
    if ends && bytes.len() <= 63 && bytes.iter().copied().all(known) {
        Ok(text.to_owned())
    } else {
        Err("expected 1 to 63 lower case letters, digits, '-' and '.', beginning and ending with a letter or digit".to_owned())
    }
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

    #[test]
    fn names_that_cannot_be_are_refused_with_their_flag() {
        for flag in [
            "--watch-namespace=",
            "--watch-namespace=a,,b",
            "--watch-namespace=Team",
            "--lease-namespace=a/b",
            "--lease-name=-a",
            "--identity=",
        ] {
            let refused = Args::try_parse_from(["x", "--worker-image=w", flag]);
            let message = refused.expect_err(flag).to_string();
            let name = flag.split('=').next().expect("a flag");
            assert!(message.contains(name), "{flag}: {message}");
        }
        let refused = Args::try_parse_from(["x", "--worker-image="]);
        assert!(refused.is_err_and(|error| error.to_string().contains("--worker-image")));
    }
}
