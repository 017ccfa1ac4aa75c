//! `llama-cluster`: a Kubernetes cluster for demonstrations and tests, and images for it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use llama_e2e::cache::Cache;
use llama_e2e::cluster::{Cluster, ClusterNode, Volumes};
use llama_e2e::command;
use llama_e2e::components::{self, Programs};
use llama_e2e::image;
use llama_e2e::kind::{self, Kind};
use llama_e2e::local::layout::Layout;
use llama_e2e::local::node::{MOST_NODES, Node};
use llama_e2e::local::{forward, namespace, start, teardown};
use llama_e2e::lock::Lock;
use llama_e2e::provider::{self, Choice, KUBECONFIG_VARIABLE, Provider};
use llama_e2e::static_programs::{self, REPOSITORY};

const LOCK_WITHIN: Duration = Duration::from_mins(10);
const PAUSE: &str = "llama-pause";

#[derive(Debug, Parser)]
#[command(version, about, infer_subcommands = false)]
struct Arguments {
    /// Name of the cluster
    #[arg(long, global = true, default_value = "llama")]
    name: String,
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the cluster, or leave it alone where it is well
    Up {
        /// Where it comes from; auto takes an opted-in kubeconfig, kind, or local
        #[arg(long, value_enum, default_value_t = Choice::Auto)]
        provider: Choice,
        /// Use the cluster of this kubeconfig
        #[arg(long, env = KUBECONFIG_VARIABLE)]
        kubeconfig: Option<PathBuf>,
        /// How many nodes it has; without, as many as it has already, or one
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_NODES)))]
        nodes: Option<u8>,
    },
    /// Remove the cluster and everything it made but the build cache
    Down,
    /// Say whether the cluster is well, and where its files are
    Status {
        /// As JSON: name, provider, kubeconfig, kubectl, helm, volumes, nodes
        #[arg(long)]
        json: bool,
    },
    /// Print the path of the cluster's kubeconfig
    Kubeconfig,
    /// Make image archives known to the cluster's nodes
    LoadImage {
        /// Archives as `docker save` and `llama-cluster image` write them
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Build the programs of the local cluster and of tests into the cache; print their folder
    Build {
        /// Kueue too, which one test wants; some minutes more at first
        #[arg(long)]
        with_kueue: bool,
    },
    /// Write a container image as an archive, without Docker
    Image {
        /// The image's definition, as in deploy/images
        definition: PathBuf,
        /// A file that the definition names; once for each
        #[arg(long = "input", value_name = "NAME=PATH", value_parser = parse_input)]
        inputs: Vec<(String, PathBuf)>,
        /// The archive
        #[arg(long)]
        output: PathBuf,
    },
    /// Hold the namespaces of a local cluster (the first process in them)
    #[command(hide = true)]
    Hold { cluster: String },
    /// Hold the network and mounts of a further node of a local cluster
    #[command(hide = true)]
    HoldNode { cluster: String, number: u8 },
    /// Carry connections of the socket that is standard input to an address
    #[command(hide = true)]
    Forward { cluster: String, target: SocketAddr },
    /// Print the addresses of a name, asking a DNS server
    #[command(hide = true)]
    Resolve { host: String, server: SocketAddr },
}

fn parse_input(text: &str) -> Result<(String, PathBuf), String> {
    text.split_once('=')
        .map(|(name, path)| (name.to_owned(), path.into()))
        .ok_or_else(|| format!("expected NAME=PATH, got {text:?}"))
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("llama-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let name = arguments.name;
    match arguments.command {
        // Without a runtime: it waits for any child process, and has one thread.
        Action::Hold { cluster } => namespace::hold(&Layout::new(&cluster)?)?,
        Action::HoldNode { cluster, number } => {
            let layout = Layout::new(&cluster)?;
            let node = Node::numbered(&layout, number).context("no number of a node")?;
            namespace::hold_node(node)?;
        }
        Action::Resolve { host, server } => {
            let addresses = llama_pause::dns::query(server, &host)?;
            if addresses.is_empty() {
                bail!("{server} knows no address of {host}");
            }
            for address in addresses {
                say(&address)?;
            }
        }
        Action::Image {
            definition,
            inputs,
            output,
        } => write_image(&definition, inputs, &output)?,
        action => return tokio::runtime::Runtime::new()?.block_on(run_async(&name, action)),
    }
    Ok(ExitCode::SUCCESS)
}

async fn run_async(name: &str, action: Action) -> anyhow::Result<ExitCode> {
    match action {
        Action::Up {
            provider,
            kubeconfig,
            nodes,
        } => up(name, provider, kubeconfig, nodes).await?,
        Action::Down => down(name).await?,
        Action::Status { json } => return status(name, json).await,
        Action::Kubeconfig => say(&Cluster::attach(name)?.kubeconfig.display())?,
        Action::LoadImage { archives } => {
            let cluster = Cluster::attach(name)?;
            for archive in archives {
                cluster.load_image(&archive).await?;
            }
        }
        Action::Build { with_kueue } => {
            let cache = Cache::from_environment()?;
            components::build(&cache, &components::TESTED).await?;
            if with_kueue {
                components::build_kueue(&cache).await?;
            }
            say(&cache.programs().display())?;
        }
        Action::Forward { target, .. } => forward::from_standard_input(target).await?,
        Action::Hold { .. }
        | Action::HoldNode { .. }
        | Action::Resolve { .. }
        | Action::Image { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn say(what: &dyn std::fmt::Display) -> io::Result<()> {
    writeln!(io::stdout(), "{what}")
}

fn write_image(
    definition: &Path,
    inputs: Vec<(String, PathBuf)>,
    output: &Path,
) -> anyhow::Result<()> {
    let inputs: BTreeMap<String, PathBuf> = inputs.into_iter().collect();
    let built = image::build(definition, &inputs, output)?;
    #[expect(clippy::cast_precision_loss, reason = "for people, one decimal")]
    let megabytes = built.bytes as f64 / 1e6;
    say(&format_args!(
        "{} {} {megabytes:.1} MB {}",
        built.reference,
        built.id,
        output.display()
    ))?;
    Ok(())
}

async fn up(
    name: &str,
    choice: Choice,
    kubeconfig: Option<PathBuf>,
    nodes: Option<u8>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let layout = Layout::new(name)?;
    let cache = Cache::from_environment()?;
    let surroundings = provider::survey(kubeconfig.clone()).await;
    let provider = provider::choose(choice, &surroundings)?;
    let known = Cluster::attach(name).ok();
    let take_down = format!("take it down first: llama-cluster --name {name} down");
    if let Some(other) = known.as_ref().map(|known| known.provider)
        && other != provider
    {
        bail!("the cluster {name} exists with provider {other:?}; {take_down}");
    }
    let has = known.map_or(0, |known| known.nodes.len());
    let count = nodes.map_or_else(|| has.max(1), usize::from);
    if provider != Provider::Kubeconfig && has > 0 && has != count {
        bail!("the cluster {name} exists with {has} nodes, not {count}; {take_down}");
    }
    let count = u8::try_from(count)?;
    let cluster = match provider {
        Provider::Local => up_local(&layout, count, &cache).await?,
        Provider::Kind => up_kind(name, count, &cache).await?,
        Provider::Kubeconfig => {
            if nodes.is_some() {
                bail!(
                    "--nodes is for clusters that this program makes, not for one of a kubeconfig"
                );
            }
            let path = kubeconfig.context("a kubeconfig")?;
            use_kubeconfig(name, &cache, &path).await?
        }
    };
    cluster.save()?;
    eprintln!(
        "  cluster {name} is ready ({:.1} s)",
        start.elapsed().as_secs_f32()
    );
    say(&cluster.kubeconfig.display())?;
    Ok(())
}

async fn up_local(layout: &Layout, count: u8, cache: &Cache) -> anyhow::Result<Cluster> {
    let programs = components::build(cache, &components::ALL).await?;
    let pause_archive = pause_image(cache).await?;
    let llama_cluster = std::env::current_exe().context("could not find this program's file")?;
    let installer = Path::new(REPOSITORY).join("e2e/install-packages.sh");
    let parts = start::Parts {
        programs: &programs,
        llama_cluster: &llama_cluster,
        pause_archive: &pause_archive,
        installer: &installer,
    };
    let _lock = Lock::take(&layout.lock(), LOCK_WITHIN).await?;
    start::up(layout, count, parts).await?;
    Ok(Cluster {
        name: layout.name().to_owned(),
        provider: Provider::Local,
        kubeconfig: layout.kubeconfig(),
        kubectl: programs.path("kubectl"),
        helm: programs.path("helm"),
        volumes: Some(Volumes {
            here: layout.volumes(),
            on_node: layout.volumes(),
        }),
        nodes: Node::all(layout, count)
            .into_iter()
            .map(|node| ClusterNode {
                name: node.name(),
                volumes: Volumes {
                    here: node.volumes(),
                    on_node: layout.node_volumes(),
                },
            })
            .collect(),
    })
}

/// Builds the static program for the pause image, and the image.
async fn pause_image(cache: &Cache) -> anyhow::Result<PathBuf> {
    let programs = static_programs::build(&[PAUSE])
        .await
        .context("could not build the pause program")?;
    let archive = cache.folder().join("images/pause.tar");
    let definition = Path::new(REPOSITORY).join("deploy/images/pause.yaml");
    let inputs = BTreeMap::from([(PAUSE.to_owned(), programs.join(PAUSE))]);
    image::build(&definition, &inputs, &archive)?;
    Ok(archive)
}

async fn up_kind(name: &str, count: u8, cache: &Cache) -> anyhow::Result<Cluster> {
    let clients = clients(cache).await?;
    let _lock = Lock::take(&cache.cluster(name).join("lock"), LOCK_WITHIN).await?;
    let kind = Kind::find(cache, name).await?;
    kind.up(count).await?;
    Ok(Cluster {
        name: name.to_owned(),
        provider: Provider::Kind,
        kubeconfig: kind.kubeconfig(),
        kubectl: clients.path("kubectl"),
        helm: clients.path("helm"),
        volumes: Some(Volumes {
            here: kind.volumes(),
            on_node: kind::SHARED_VOLUMES.into(),
        }),
        nodes: kind
            .nodes(count)
            .into_iter()
            .map(|(name, here)| ClusterNode {
                name,
                volumes: Volumes {
                    here,
                    on_node: kind::NODE_VOLUMES.into(),
                },
            })
            .collect(),
    })
}

async fn use_kubeconfig(name: &str, cache: &Cache, path: &Path) -> anyhow::Result<Cluster> {
    let clients = clients(cache).await?;
    let kubeconfig =
        fs::canonicalize(path).with_context(|| format!("no kubeconfig {}", path.display()))?;
    let cluster = Cluster {
        name: name.to_owned(),
        provider: Provider::Kubeconfig,
        kubeconfig,
        kubectl: clients.path("kubectl"),
        helm: clients.path("helm"),
        volumes: None,
        nodes: Vec::new(),
    };
    cluster.kubectl(["get", "--raw=/readyz"]).await?;
    Ok(cluster)
}

/// kubectl and helm: those in PATH, or built where one of them is missing.
async fn clients(cache: &Cache) -> anyhow::Result<Programs> {
    if ["kubectl", "helm"]
        .iter()
        .all(|name| command::find_program(name).is_some())
    {
        return Ok(Programs::default());
    }
    Ok(components::build(cache, &components::ALL).await?)
}

async fn down(name: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    let layout = Layout::new(name)?;
    let cache = Cache::from_environment()?;
    let known = Cluster::attach(name).ok();
    if known.is_some_and(|known| known.provider == Provider::Kind) {
        Kind::find(&cache, name).await?.down().await?;
    }
    let folder = cache.cluster(name);
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("could not remove {}", folder.display()))?;
    }
    // Also where nothing is known: a crash may have come before it was written down.
    if rustix::process::geteuid().is_root() && cfg!(target_os = "linux") {
        let lock = Lock::take(&layout.lock(), LOCK_WITHIN).await?;
        let removed = teardown::remove(&layout).await?;
        lock.remove()?;
        // Refuses while it holds another cluster's files.
        let _ = fs::remove_dir(Layout::state());
        eprintln!("  local cluster {name}: {removed}");
    }
    eprintln!(
        "  cluster {name} is gone ({:.1} s)",
        start.elapsed().as_secs_f32()
    );
    Ok(())
}

async fn status(name: &str, json: bool) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::attach(name)?;
    let nodes = cluster.kubectl(["get", "nodes"]).await;
    let mut well = nodes.is_ok();
    if json {
        say(&serde_json::to_string_pretty(&cluster)?)?;
    } else {
        say(&format_args!("cluster     {name} ({:?})", cluster.provider))?;
        say(&format_args!(
            "kubeconfig  {}",
            cluster.kubeconfig.display()
        ))?;
        say(&format_args!("kubectl     {}", cluster.kubectl.display()))?;
        say(&format_args!("helm        {}", cluster.helm.display()))?;
        if let Some(volumes) = &cluster.volumes {
            say(&format_args!("volumes     {}", volumes.here.display()))?;
        }
    }
    if cluster.provider == Provider::Local {
        well &= daemons_run(&cluster, json)?;
    }
    match nodes {
        Ok(nodes) if !json => say(&nodes.trim_end())?,
        Err(error) => eprintln!("llama-cluster: {error:#}"),
        Ok(_) => {}
    }
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Whether all daemons of all nodes run; says so of each unless `quiet`.
fn daemons_run(cluster: &Cluster, quiet: bool) -> anyhow::Result<bool> {
    let layout = Layout::new(&cluster.name)?;
    let mut well = true;
    let count = u8::try_from(cluster.nodes.len())?;
    for node in Node::all(&layout, count) {
        if !quiet && count > 1 {
            let volumes = node.volumes();
            say(&format_args!("{:<33} {}", node.name(), volumes.display()))?;
        }
        for (daemon, runs) in start::daemons(node)? {
            well &= runs;
            if !quiet {
                let log = node.log(daemon);
                let state = if runs { "running" } else { "ENDED" };
                say(&format_args!("{daemon:<24} {state:<8} {}", log.display()))?;
            }
        }
    }
    Ok(well)
}
