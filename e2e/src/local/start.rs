//! Starts a local cluster and tells whether it is well.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::process::Command;
use tokio::task::JoinSet;

use super::config;
use super::daemons::{self, Daemon};
use super::layout::{self, Layout};
use super::namespace::{Namespace, NamespaceError};
use super::node::{self, Node};
use super::prepare::{self, PrepareError, prepare};
use super::processes::{FORWARD, HOLD};
use super::teardown::{self, TeardownError};
use crate::command::{self, CommandError};
use crate::components::Programs;
use crate::wait::{self, Look, WaitError};

const QUICK: Duration = Duration::from_secs(10);
const API_WITHIN: Duration = Duration::from_secs(90);
const CONTAINERD_WITHIN: Duration = Duration::from_secs(30);
const NODES_WITHIN: Duration = Duration::from_secs(90);
/// A program appears in the namespace a moment after it was started.
const APPEARS_WITHIN: Duration = Duration::from_secs(2);
const LOAD_WITHIN: Duration = Duration::from_mins(5);
const INSTALL_WITHIN: Duration = Duration::from_mins(10);
/// Programs of the system that a local cluster is made with.
const NEEDED: [&str; 12] = [
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "iptables",
    "conntrack",
    "ip",
    "nsenter",
    "unshare",
    "setsid",
    "mount",
    "sh",
];
/// Where distributions put the network plugins.
const PLUGIN_FOLDERS: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];
const PLUGINS: [&str; 4] = ["ptp", "host-local", "portmap", "loopback"];
/// containerd's namespace for the kubelet's images.
const IMAGE_NAMESPACE: &str = "k8s.io";

/// The cluster could not be started or used.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The system lacks programs, and they could not be installed.
    #[error("missing programs: {}", missing.join(", "))]
    Missing {
        /// Their names.
        missing: Vec<String>,
        /// How the attempt to install them ended.
        #[source]
        source: Option<CommandError>,
    },
    /// Remains of an earlier cluster are in the way.
    #[error("could not clear what an earlier cluster left")]
    Teardown(#[from] TeardownError),
    /// No port of this machine could be had for the API server.
    #[error("could not listen on 127.0.0.1")]
    Listen(#[source] io::Error),
    /// What the cluster starts from could not be written.
    #[error("could not prepare the cluster")]
    Prepare(#[from] PrepareError),
    /// The namespaces could not be made.
    #[error("could not make the cluster's namespaces")]
    Namespace(#[from] NamespaceError),
    /// A part did not come up.
    #[error("{what} did not come up; the end of {}:\n{tail}", log.display())]
    Part {
        /// What was awaited.
        what: &'static str,
        /// Its log.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
        /// What the wait saw last.
        #[source]
        source: Box<WaitError>,
    },
    /// A command that sets the cluster up failed.
    #[error("could not set up the cluster")]
    Command(#[from] CommandError),
}

/// What starting needs besides the system's programs.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// Kubernetes' programs.
    pub programs: &'a Programs,
    /// The llama-cluster program.
    pub llama_cluster: &'a Path,
    /// Archive of the image [`layout::PAUSE_IMAGE`].
    pub pause_archive: &'a Path,
    /// Installs the system's programs where that is possible.
    pub installer: &'a Path,
}

/// A node of a running cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member<'a> {
    node: Node<'a>,
    namespace: Namespace,
}

/// Starts the cluster with `count` nodes anew, or leaves it alone where it is well.
pub async fn up(layout: &Layout, count: u8, parts: Parts<'_>) -> Result<(), StartError> {
    if healthy(layout, count, parts.programs).await.is_ok() {
        eprintln!("  cluster {} is up", layout.name());
        return Ok(());
    }
    let start = Instant::now();
    let plugins = requirements(parts.installer).await?;
    let removed = teardown::remove(layout).await?;
    if !removed.is_nothing() {
        eprintln!("  removed an unhealthy cluster: {removed}");
    }
    let containerd = containerd();
    let listener = TcpListener::bind("127.0.0.1:0").map_err(StartError::Listen)?;
    let port = listener.local_addr().map_err(StartError::Listen)?.port();
    let nodes = Node::all(layout, count);
    prepare(&nodes, &plugins, port)?;

    let members = make_nodes(layout, &nodes, parts.llama_cluster).await?;
    let first = &members[0];
    for Member { node, namespace } in &members {
        for daemon in daemons::first(*node, parts.programs, &containerd) {
            namespace.spawn(&daemon, *node)?;
        }
    }
    let forwarder = forwarder(layout, parts.llama_cluster);
    first
        .namespace
        .spawn_listening(&forwarder, first.node, listener)?;
    let progress = |what: &str| {
        eprintln!("  {what} ({:.1} s)", start.elapsed().as_secs_f32());
    };
    for node in &nodes {
        await_containerd(*node).await?;
    }
    load_image(&nodes, parts.pause_archive).await?;
    await_api(layout, &members, parts.programs).await?;
    progress("API server answers");
    // Before CoreDNS starts, which would wait long after a first refusal.
    apply_first_objects(layout, parts.programs).await?;
    for Member { node, namespace } in &members {
        for daemon in daemons::second(*node, parts.programs) {
            namespace.spawn(&daemon, *node)?;
        }
    }
    await_nodes(layout, &members, parts.programs).await?;
    progress(match count {
        1 => "node is Ready",
        _ => "nodes are Ready",
    });
    await_names(layout, &members, parts.llama_cluster).await?;
    await_accounts(layout, &members, parts.programs).await?;
    progress("names resolve, pods can be created");
    Ok(())
}

/// Makes the namespaces of all nodes and connects them. The first member is the first node.
async fn make_nodes<'a>(
    layout: &'a Layout,
    nodes: &[Node<'a>],
    llama_cluster: &Path,
) -> Result<Vec<Member<'a>>, NamespaceError> {
    let namespace = Namespace::create(llama_cluster, layout).await?;
    let node = Node::first(layout);
    namespace.connect(node, nodes).await?;
    let mut members = vec![Member {
        node,
        namespace: namespace.clone(),
    }];
    for node in nodes.iter().filter(|node| !node.is_first()) {
        let further = namespace.create_further(llama_cluster, *node).await?;
        namespace.join((*node, &further), nodes).await?;
        members.push(Member {
            node: *node,
            namespace: further,
        });
    }
    Ok(members)
}

/// Fails, with the reason, where the cluster is not running with `count` nodes or not well.
async fn healthy(layout: &Layout, count: u8, programs: &Programs) -> Result<(), String> {
    let mut members = Vec::new();
    for node in Node::all(layout, node::MOST_NODES) {
        match Namespace::find(node).map_err(|error| error.to_string())? {
            Some(namespace) => members.push(Member { node, namespace }),
            None if node.number() <= count => return Err(format!("{} is not there", node.name())),
            None => {}
        }
    }
    if members.len() != usize::from(count) {
        return Err(format!("it has {} nodes", members.len()));
    }
    all_running(&members, daemons::names)?;
    nodes_ready(layout, &members, programs)
        .await
        .map_err(|error| error.to_string())
}

/// Names of the daemons of a node that should run.
type Names = fn(Node<'_>) -> &'static [&'static str];

fn all_running(members: &[Member<'_>], names: Names) -> Result<(), String> {
    for Member { node, namespace } in members {
        let names = names(*node);
        let running = namespace
            .running(names)
            .map_err(|error| error.to_string())?;
        let mut ended = names
            .iter()
            .filter(|name| !running.iter().any(|program| program == *name));
        if let Some(name) = ended.next() {
            return Err(format!("{} is not running", node.file(name)));
        }
    }
    Ok(())
}

/// Makes sure that the system's programs are there; returns the folder of the
/// network plugins.
async fn requirements(installer: &Path) -> Result<PathBuf, StartError> {
    let mut source = None;
    if !missing().is_empty() {
        source = command::run(&mut Command::new(installer), INSTALL_WITHIN)
            .await
            .err();
    }
    let missing = missing();
    match plugin_folder() {
        Some(folder) if missing.is_empty() => Ok(folder),
        _ => Err(StartError::Missing { missing, source }),
    }
}

fn containerd() -> PathBuf {
    let name = "containerd";
    command::find_program(name).unwrap_or_else(|| PathBuf::from(name))
}

fn missing() -> Vec<String> {
    let mut missing: Vec<String> = NEEDED
        .iter()
        .filter(|name| command::find_program(name).is_none())
        .map(|name| (*name).to_owned())
        .collect();
    if plugin_folder().is_none() {
        missing.push(format!("CNI plugins ({})", PLUGINS.join(", ")));
    }
    missing
}

fn plugin_folder() -> Option<PathBuf> {
    PLUGIN_FOLDERS
        .iter()
        .map(PathBuf::from)
        .find(|folder| PLUGINS.iter().all(|plugin| folder.join(plugin).exists()))
}

fn forwarder(layout: &Layout, llama_cluster: &Path) -> Daemon {
    Daemon {
        name: FORWARD,
        program: llama_cluster.to_owned(),
        arguments: vec![
            FORWARD.to_owned(),
            layout.name().to_owned(),
            format!("{}:{}", layout::API_ADDRESS, layout::API_PORT),
        ],
    }
}

/// Waits for a part of the cluster; on failure shows the end of its log.
async fn part<T>(
    layout: &Layout,
    (what, log): (&'static str, &str),
    deadline: Duration,
    look: impl AsyncFnMut() -> Look<T>,
) -> Result<T, StartError> {
    wait::until(what, deadline, look).await.map_err(|source| {
        // Where a daemon has ended, its own log says why.
        let log = match &source {
            WaitError::Never { reason, .. } => reason.split(' ').next().unwrap_or(log),
            WaitError::Deadline { .. } => log,
        };
        let log = layout.log(log);
        let tail = tail(&log);
        StartError::Part {
            what,
            log,
            tail,
            source: Box::new(source),
        }
    })
}

fn tail(log: &Path) -> String {
    const LINES: usize = 20;
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// `Never` where one of the daemons that `names` gives for a node has ended, else `look`.
async fn while_running<T>(
    members: &[Member<'_>],
    names: Names,
    look: impl Future<Output = Result<T, CommandError>>,
) -> Look<T> {
    let error = match look.await {
        Ok(value) => return Look::Done(value),
        Err(error) => error,
    };
    if all_running(members, names).is_err() {
        tokio::time::sleep(APPEARS_WITHIN).await;
        if let Err(ended) = all_running(members, names) {
            return Look::Never(ended);
        }
    }
    Look::NotYet(error.to_string())
}

async fn await_containerd(node: Node<'_>) -> Result<(), StartError> {
    let log = node.file("containerd");
    let part_name = ("containerd", log.as_str());
    part(node.layout(), part_name, CONTAINERD_WITHIN, async || {
        Look::retrying(command::run(ctr(node).arg("version"), QUICK).await)
    })
    .await
    .map(|_| ())
}

async fn await_api(
    layout: &Layout,
    members: &[Member<'_>],
    programs: &Programs,
) -> Result<(), StartError> {
    let part_name = ("the API server", "kube-apiserver");
    part(layout, part_name, API_WITHIN, async || {
        let mut ready = kubectl(layout, programs);
        let look = command::run(ready.args(["get", "--raw=/readyz"]), QUICK);
        while_running(members, daemons::first_names, look).await
    })
    .await
    .map(|_| ())
}

async fn apply_first_objects(layout: &Layout, programs: &Programs) -> Result<(), StartError> {
    let objects = config::first_objects().to_string();
    let part_name = ("the cluster's first objects", "kube-apiserver");
    part(layout, part_name, QUICK * 3, async || {
        let mut apply = kubectl(layout, programs);
        apply.args(["apply", "--server-side", "-f", "-"]);
        Look::retrying(command::run_with_input(&mut apply, &objects, QUICK).await)
    })
    .await
    .map(|_| ())
}

async fn nodes_ready(
    layout: &Layout,
    members: &[Member<'_>],
    programs: &Programs,
) -> Result<(), CommandError> {
    let mut wait = kubectl(layout, programs);
    wait.args(["wait", "--for=condition=Ready", "--timeout=5s"]);
    wait.args(
        members
            .iter()
            .map(|member| format!("node/{}", member.node.name())),
    );
    command::run(&mut wait, QUICK).await.map(|_| ())
}

async fn await_nodes(
    layout: &Layout,
    members: &[Member<'_>],
    programs: &Programs,
) -> Result<(), StartError> {
    let part_name = ("the nodes", "kubelet");
    part(layout, part_name, NODES_WITHIN, async || {
        let look = nodes_ready(layout, members, programs);
        while_running(members, daemons::names, look).await
    })
    .await
}

/// The name of the API server must resolve through the DNS Service.
async fn await_names(
    layout: &Layout,
    members: &[Member<'_>],
    llama_cluster: &Path,
) -> Result<(), StartError> {
    let part_name = ("cluster DNS", "coredns");
    let name = format!("kubernetes.default.svc.{}", layout::DOMAIN);
    let server = format!("{}:53", layout::DNS_ADDRESS);
    part(layout, part_name, NODES_WITHIN, async || {
        let mut resolve = members[0].namespace.command(llama_cluster);
        let look = command::run(resolve.args(["resolve", &name, &server]), QUICK);
        while_running(members, daemons::names, look).await
    })
    .await
    .map(|_| ())
}

/// Pods cannot be created before their service account is.
async fn await_accounts(
    layout: &Layout,
    members: &[Member<'_>],
    programs: &Programs,
) -> Result<(), StartError> {
    let part_name = ("the default service account", "kube-controller-manager");
    part(layout, part_name, NODES_WITHIN, async || {
        let mut get = kubectl(layout, programs);
        let look = command::run(get.args(["get", "serviceaccount", "default"]), QUICK);
        while_running(members, daemons::names, look).await
    })
    .await
    .map(|_| ())
}

fn kubectl(layout: &Layout, programs: &Programs) -> Command {
    let mut command = Command::new(programs.path("kubectl"));
    command.arg("--kubeconfig").arg(layout.kubeconfig());
    command
}

fn ctr(node: Node<'_>) -> Command {
    let mut command = Command::new("ctr");
    command
        .arg("--address")
        .arg(node.containerd_socket())
        .args(["--namespace", IMAGE_NAMESPACE]);
    command
}

/// Makes an image archive known to the nodes, which take it in at the same time.
pub async fn load_image(nodes: &[Node<'_>], archive: &Path) -> Result<(), CommandError> {
    let mut imports = JoinSet::new();
    for node in nodes {
        let mut import = ctr(*node);
        import.args([
            "images",
            "import",
            "--snapshotter",
            prepare::snapshotter(node.layout().root()),
        ]);
        import.arg(archive);
        imports.spawn(async move { command::run(&mut import, LOAD_WITHIN).await });
    }
    imports
        .join_all()
        .await
        .into_iter()
        .try_for_each(|outcome| outcome.map(|_| ()))
}

/// Starts those daemons of a further node again that have ended, as the repair of a machine
/// would, and waits until the node is Ready.
pub async fn restart(node: Node<'_>, programs: &Programs) -> Result<(), StartError> {
    let log = node.log(HOLD);
    let namespace = Namespace::find(node)?.ok_or(NamespaceError::NotReady { log })?;
    let containerd = containerd();
    let mut wanted = daemons::first(node, programs, &containerd);
    wanted.extend(daemons::second(node, programs));
    let members = [Member { node, namespace }];
    let log = node.file("kubelet");
    part(
        node.layout(),
        ("the node", &log),
        NODES_WITHIN,
        async || {
            // The kubelet ends where containerd is not there yet.
            if let Err(error) = start_ended(&members[0], &wanted) {
                return Look::NotYet(error.to_string());
            }
            tokio::time::sleep(APPEARS_WITHIN).await;
            Look::retrying(nodes_ready(node.layout(), &members, programs).await)
        },
    )
    .await
}

fn start_ended(member: &Member<'_>, wanted: &[Daemon]) -> Result<(), NamespaceError> {
    let names = daemons::names(member.node);
    let running = member.namespace.running(names)?;
    wanted
        .iter()
        .filter(|daemon| !running.iter().any(|name| name == daemon.name))
        .try_for_each(|daemon| member.namespace.spawn(daemon, member.node))
}

/// Which daemons run on a node: their names and whether they do.
pub fn daemons(node: Node<'_>) -> Result<Vec<(&'static str, bool)>, NamespaceError> {
    let names = daemons::names(node);
    let running = Namespace::find(node)?
        .map(|namespace| namespace.running(names))
        .transpose()?
        .unwrap_or_default();
    Ok(names
        .iter()
        .map(|name| (*name, running.iter().any(|program| program == name)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_is_the_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let lines: Vec<String> = (0..50).map(|line| line.to_string()).collect();
        fs::write(&log, lines.join("\n")).unwrap();
        assert!(tail(&log).starts_with("30\n31"));
        assert!(tail(&log).ends_with("49"));
        assert_eq!(tail(Path::new("/no/such/log")), "");
    }
}
