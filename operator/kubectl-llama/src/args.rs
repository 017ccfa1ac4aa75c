//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as Flags, Parser, Subcommand, ValueEnum};

/// Longest time that a flag may ask for.
const LONGEST: Duration = Duration::from_hours(24);

/// What LlamaDeployments do and why, their logs, a check-up and a benchmark.
#[derive(Clone, Debug, Parser)]
#[command(name = "kubectl-llama", bin_name = "kubectl llama", version)]
pub struct Args {
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterFlags,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Which cluster, as for kubectl.
#[derive(Clone, Debug, Flags)]
pub struct ClusterFlags {
    /// Namespace; that of the context when absent.
    #[arg(short, long, global = true)]
    pub namespace: Option<String>,
    /// Context of the kubeconfig; the current one when absent.
    #[arg(long, global = true)]
    pub context: Option<String>,
    /// The kubeconfig; $KUBECONFIG or ~/.kube/config when absent.
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Longest wait for one answer, for example 30s or 5m. 30s when absent; 5m for the
    /// answers of a benchmark.
    #[arg(long, global = true, value_name = "TIME", value_parser = time)]
    pub request_timeout: Option<Duration>,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// How LlamaDeployments are: a table, or with a name a page. Exits 1 if one is not ready.
    Status(StatusFlags),
    /// What the model takes of the memory, and what would fit. Exits 1 if it does not fit.
    Plan(PlanFlags),
    /// Logs of the worker pods, the pod of a failed rank first.
    Logs(LogsFlags),
    /// Looks for what is wrong and says what to do next. Exits 1 if something fails.
    Doctor(DoctorFlags),
    /// Sends streaming chats through the API server and measures them. Exits 1 on any error.
    Bench(BenchFlags),
}

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Flags of `status`.
#[derive(Clone, Debug, Flags)]
pub struct StatusFlags {
    /// The LlamaDeployment; all of the namespace when absent.
    pub name: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, conflicts_with_all = ["name", "namespace"])]
    pub all_namespaces: bool,
    /// Write the objects as JSON or YAML.
    #[arg(short, long, value_enum, conflicts_with = "watch")]
    pub output: Option<Form>,
    /// Look again every two seconds until interrupted.
    #[arg(short, long)]
    pub watch: bool,
}

/// Flags of `plan`.
#[derive(Clone, Debug, Flags)]
pub struct PlanFlags {
    /// The LlamaDeployment.
    #[arg(required_unless_present = "file")]
    pub name: Option<String>,
    /// Check the LlamaDeployments of a file instead, here and by a dry run at the API
    /// server; - reads standard input.
    #[arg(short, long = "file", value_name = "FILE", conflicts_with_all = ["name", "output", "alternative"])]
    pub file: Option<PathBuf>,
    /// Write the plan as JSON or YAML.
    #[arg(short, long, value_enum)]
    pub output: Option<Form>,
    /// Write only this change that would fit, counted from 1, as a patch.
    #[arg(long, value_name = "N", conflicts_with = "output", value_parser = clap::value_parser!(u8).range(1..=3))]
    pub alternative: Option<u8>,
}

/// Flags of `logs`.
#[derive(Clone, Debug, Flags)]
pub struct LogsFlags {
    /// The LlamaDeployment.
    pub name: String,
    /// Only this group.
    #[arg(long)]
    pub group: Option<u32>,
    /// Only the pods that hold this rank.
    #[arg(long)]
    pub rank: Option<u32>,
    /// Only lines that are not older, for example 10m.
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub since: Option<Duration>,
    /// Last lines of each pod.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub tail: u32,
    /// Go on with new lines until the pods end.
    #[arg(short, long)]
    pub follow: bool,
}

/// Flags of `doctor`.
#[derive(Clone, Debug, Flags)]
pub struct DoctorFlags {
    /// Only this LlamaDeployment; all of the namespace when absent.
    pub name: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, conflicts_with_all = ["name", "namespace"])]
    pub all_namespaces: bool,
    /// Write the findings as JSON or YAML.
    #[arg(short, long, value_enum)]
    pub output: Option<Form>,
}

/// Flags of `bench`.
#[derive(Clone, Debug, Flags)]
pub struct BenchFlags {
    /// The LlamaDeployment.
    pub name: String,
    /// Chats to send.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub requests: u32,
    /// Chats under way at the same time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,
    /// Words of each prompt: about as many tokens, besides those of the chat template.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub prompt_tokens: u32,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub max_tokens: u32,
    /// Begin no chat after this time, for example 1m.
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub duration: Option<Duration>,
    /// Write the figures as JSON or YAML.
    #[arg(short, long, value_enum)]
    pub output: Option<Form>,
}

/// A length of time such as `90s` or `1h30m`.
fn time(text: &str) -> Result<Duration, String> {
    let parsed = llama_crds::v1alpha1::Duration(text.to_owned()).parse();
    parsed
        .filter(|time| !time.is_zero() && *time <= LONGEST)
        .ok_or_else(|| "expected a time such as 30s, 10m or 1h30m, at most 24h".to_owned())
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
    fn the_page_in_docs_names_every_command_and_flag() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/kubectl-llama.md");
        let page = std::fs::read_to_string(path).expect("the page");
        let root = Args::command();
        let commands: Vec<_> = root.get_subcommands().collect();
        for command in &commands {
            assert!(page.contains(&format!("\n## {}\n", command.get_name())));
        }
        for command in commands.into_iter().chain([&root]) {
            for flag in command.get_arguments().filter_map(clap::Arg::get_long) {
                assert!(page.contains(&format!("--{flag}")), "{flag}");
            }
        }
    }

    #[test]
    fn flags_of_the_cluster_may_stand_anywhere() {
        for line in [
            "kubectl-llama -n team status m --request-timeout=1m",
            "kubectl-llama status -n team --request-timeout 60s m",
        ] {
            let args = Args::try_parse_from(line.split(' ')).expect(line);
            assert_eq!(args.cluster.namespace.as_deref(), Some("team"));
            assert_eq!(args.cluster.request_timeout, Some(Duration::from_mins(1)));
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_flag() {
        for (line, flag) in [
            ("status -A -n team", "--namespace"),
            ("status -A m", "--all-namespaces"),
            ("status -o table", "--output"),
            ("plan", "<NAME|--file"),
            ("plan m -f x.yaml", "--file"),
            ("plan m --alternative 4", "--alternative"),
            ("logs m --since=10", "--since"),
            ("logs m --since=0s", "--since"),
            ("bench m --concurrency=0", "--concurrency"),
            ("bench m --requests=10001", "--requests"),
            ("status --request-timeout=25h", "--request-timeout"),
        ] {
            let argv = std::iter::once("kubectl-llama").chain(line.split(' '));
            let refused = Args::try_parse_from(argv).expect_err(line).to_string();
            let word = flag.split('|').next().expect("a word");
            assert!(refused.contains(word), "{line}: {refused}");
        }
    }
}
