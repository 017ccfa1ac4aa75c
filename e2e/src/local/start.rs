//! Starts a local cluster and tells whether it is well.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::process::Command;

use super::certificates::{self, CertificateError};
use super::config::{self, Credentials};
use super::daemons::{self, Daemon};
use super::layout::{self, Layout};
use super::namespace::{NETWORK_RESULTS, Namespace, NamespaceError};
use super::processes::FORWARD;
use super::teardown::{self, TeardownError};
use super::{cgroups, namespace};
use crate::command::{self, CommandError};
use crate::components::Programs;
use crate::wait::{self, Look, WaitError};

const QUICK: Duration = Duration::from_secs(10);
const API_WITHIN: Duration = Duration::from_secs(90);
const CONTAINERD_WITHIN: Duration = Duration::from_secs(30);
const NODE_WITHIN: Duration = Duration::from_secs(90);
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
    /// A file could not be written.
    #[error("could not write {what}")]
    Write {
        /// The file or folder.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificates could not be made.
    #[error("could not make the cluster's certificates")]
    Certificates(#[from] CertificateError),
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

fn writing(what: impl AsRef<Path>) -> impl FnOnce(io::Error) -> StartError {
    let what = what.as_ref().display().to_string();
    move |source| StartError::Write { what, source }
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

/// Starts the cluster anew, or leaves it alone where it is well.
pub async fn up(layout: &Layout, parts: Parts<'_>) -> Result<Namespace, StartError> {
    if let Ok(namespace) = healthy(layout, parts.programs).await {
        eprintln!("  cluster {} is up", layout.name());
        return Ok(namespace);
    }
    let start = Instant::now();
    let plugins = requirements(parts.installer).await?;
    let removed = teardown::remove(layout).await?;
    if !removed.is_nothing() {
        eprintln!("  removed an unhealthy cluster: {removed}");
    }
    let containerd =
        command::find_program("containerd").unwrap_or_else(|| PathBuf::from("containerd"));
    let listener = TcpListener::bind("127.0.0.1:0").map_err(writing("127.0.0.1"))?;
    let port = listener.local_addr().map_err(writing("127.0.0.1"))?.port();
    prepare(layout, &plugins, port)?;

    let namespace = Namespace::create(parts.llama_cluster, layout).await?;
    namespace.connect().await?;
    for daemon in daemons::first(layout, parts.programs, containerd) {
        namespace.spawn(&daemon, layout)?;
    }
    let forwarder = forwarder(layout, parts.llama_cluster);
    namespace.spawn_listening(&forwarder, layout, listener)?;
    let progress = |what: &str| {
        eprintln!("  {what} ({:.1} s)", start.elapsed().as_secs_f32());
    };
    await_containerd(layout).await?;
    load_image(layout, parts.pause_archive).await?;
    await_api(layout, &namespace, parts.programs).await?;
    progress("API server answers");
    // Before CoreDNS starts, which would wait long after a first refusal.
    apply_first_objects(layout, parts.programs).await?;
    for daemon in daemons::second(layout, parts.programs) {
        namespace.spawn(&daemon, layout)?;
    }
    await_node(layout, &namespace, parts.programs).await?;
    progress("node is Ready");
    await_names(layout, &namespace, parts.llama_cluster).await?;
    await_accounts(layout, &namespace, parts.programs).await?;
    progress("names resolve, pods can be created");
    Ok(namespace)
}

/// Fails, with the reason, where the cluster is not running or not well.
pub async fn healthy(layout: &Layout, programs: &Programs) -> Result<Namespace, String> {
    let namespace = Namespace::find(layout)
        .map_err(|error| error.to_string())?
        .ok_or("it is not running")?;
    all_running(&namespace, &daemons::NAMES)?;
    node_ready(layout, programs)
        .await
        .map_err(|error| error.to_string())?;
    Ok(namespace)
}

fn all_running(namespace: &Namespace, names: &[&str]) -> Result<(), String> {
    let running = namespace
        .running(names)
        .map_err(|error| error.to_string())?;
    let mut ended = names
        .iter()
        .filter(|name| !running.iter().any(|program| program == *name));
    ended
        .next()
        .map_or(Ok(()), |name| Err(format!("{name} is not running")))
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

/// Writes everything that the daemons read.
fn prepare(layout: &Layout, plugins: &Path, port: u16) -> Result<(), StartError> {
    let root = layout.root();
    let folders = [
        "certificates",
        "config/cni",
        "containerd",
        "etcd",
        "hold",
        "kubelet",
        "logs",
        "network-results",
        "node-logs",
        "opt",
        "run",
        "volumes",
    ];
    for folder in folders {
        let folder = layout.path(folder);
        fs::create_dir_all(&folder).map_err(writing(&folder))?;
    }
    // Keys and Secrets lie below; etcd besides asks for a folder of its own.
    for folder in [root, &layout.path("etcd")] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(writing(folder))?;
    }
    if !Path::new(NETWORK_RESULTS).exists() {
        fs::create_dir_all(NETWORK_RESULTS).map_err(writing(NETWORK_RESULTS))?;
        let mark = Layout::made_network_results();
        fs::write(&mark, "").map_err(writing(&mark))?;
    }
    cgroups::create(layout).map_err(writing("the cluster's cgroups"))?;
    certificates::write_all(layout)?;
    let files = [
        (
            "config/containerd.toml",
            config::containerd(layout, plugins, snapshotter(root)),
        ),
        (
            "config/cni/llama.conflist",
            config::network(layout).to_string(),
        ),
        ("config/kubelet.json", config::kubelet(layout).to_string()),
        (
            "config/kube-proxy.json",
            config::kube_proxy(layout).to_string(),
        ),
        ("config/Corefile", config::coredns(layout)),
        ("config/resolv.conf", config::resolver()),
    ];
    for (name, text) in files {
        let path = layout.path(name);
        fs::write(&path, text).map_err(writing(&path))?;
    }
    write_kubeconfigs(layout, port)
}

fn write_kubeconfigs(layout: &Layout, port: u16) -> Result<(), StartError> {
    let inside = format!("https://{}:{}", layout::NODE_ADDRESS, layout::API_PORT);
    let outside = format!("https://127.0.0.1:{port}");
    let clients = [
        "kube-controller-manager",
        "kube-scheduler",
        "kubelet",
        "kube-proxy",
        "coredns",
    ];
    let mut wanted: Vec<(&str, &str, PathBuf)> = clients
        .iter()
        .map(|name| (*name, inside.as_str(), layout.daemon_kubeconfig(name)))
        .collect();
    wanted.push((certificates::ADMIN, &outside, layout.kubeconfig()));
    let read = |path: PathBuf| fs::read_to_string(&path).map_err(writing(&path));
    let authority = read(layout.certificate(certificates::AUTHORITY))?;
    for (name, server, path) in wanted {
        let (certificate, key) = (read(layout.certificate(name))?, read(layout.key(name))?);
        let credentials = Credentials {
            authority: &authority,
            certificate: &certificate,
            key: &key,
        };
        let text = config::kubeconfig(layout, server, credentials).to_string();
        certificates::write_private(&path, &text).map_err(writing(&path))?;
    }
    Ok(())
}

/// Overlays cannot be stacked on the overlay that a container's own root is.
fn snapshotter(root: &Path) -> &'static str {
    const OVERLAYFS_MAGIC: i64 = 0x794c_7630;
    match rustix::fs::statfs(root) {
        Ok(stat) if stat.f_type == OVERLAYFS_MAGIC => "native",
        _ => "overlayfs",
    }
}

fn forwarder(layout: &Layout, llama_cluster: &Path) -> Daemon {
    Daemon {
        name: FORWARD,
        program: llama_cluster.to_owned(),
        arguments: vec![
            FORWARD.to_owned(),
            layout.name().to_owned(),
            format!("{}:{}", layout::NODE_ADDRESS, layout::API_PORT),
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

/// `Never` where one of the daemons `names` has ended, else `look`.
async fn while_running<T>(
    namespace: &Namespace,
    names: &[&str],
    look: impl Future<Output = Result<T, CommandError>>,
) -> Look<T> {
    // A program appears in the namespace a moment after it was started.
    const APPEARS_WITHIN: Duration = Duration::from_secs(2);
    let error = match look.await {
        Ok(value) => return Look::Done(value),
        Err(error) => error,
    };
    if all_running(namespace, names).is_err() {
        tokio::time::sleep(APPEARS_WITHIN).await;
        if let Err(ended) = all_running(namespace, names) {
            return Look::Never(ended);
        }
    }
    Look::NotYet(error.to_string())
}

async fn await_containerd(layout: &Layout) -> Result<(), StartError> {
    let part_name = ("containerd", "containerd");
    part(layout, part_name, CONTAINERD_WITHIN, async || {
        Look::retrying(command::run(ctr(layout).arg("version"), QUICK).await)
    })
    .await
    .map(|_| ())
}

async fn await_api(
    layout: &Layout,
    namespace: &Namespace,
    programs: &Programs,
) -> Result<(), StartError> {
    let part_name = ("the API server", "kube-apiserver");
    part(layout, part_name, API_WITHIN, async || {
        let mut ready = kubectl(layout, programs);
        let look = command::run(ready.args(["get", "--raw=/readyz"]), QUICK);
        while_running(namespace, &daemons::NAMES[..daemons::FIRST], look).await
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

async fn node_ready(layout: &Layout, programs: &Programs) -> Result<(), CommandError> {
    let node = format!("node/{}", layout.node());
    let mut wait = kubectl(layout, programs);
    wait.args(["wait", "--for=condition=Ready", &node, "--timeout=5s"]);
    command::run(&mut wait, QUICK).await.map(|_| ())
}

async fn await_node(
    layout: &Layout,
    namespace: &Namespace,
    programs: &Programs,
) -> Result<(), StartError> {
    let part_name = ("the node", "kubelet");
    part(layout, part_name, NODE_WITHIN, async || {
        while_running(namespace, &daemons::NAMES, node_ready(layout, programs)).await
    })
    .await
}

/// The name of the API server must resolve through the DNS Service.
async fn await_names(
    layout: &Layout,
    namespace: &Namespace,
    llama_cluster: &Path,
) -> Result<(), StartError> {
    let part_name = ("cluster DNS", "coredns");
    let name = format!("kubernetes.default.svc.{}", layout::DOMAIN);
    let server = format!("{}:53", layout::DNS_ADDRESS);
    part(layout, part_name, NODE_WITHIN, async || {
        let mut resolve = namespace.command(llama_cluster);
        let look = command::run(resolve.args(["resolve", &name, &server]), QUICK);
        while_running(namespace, &daemons::NAMES, look).await
    })
    .await
    .map(|_| ())
}

/// Pods cannot be created before their service account is.
async fn await_accounts(
    layout: &Layout,
    namespace: &Namespace,
    programs: &Programs,
) -> Result<(), StartError> {
    let part_name = ("the default service account", "kube-controller-manager");
    part(layout, part_name, NODE_WITHIN, async || {
        let mut get = kubectl(layout, programs);
        let look = command::run(get.args(["get", "serviceaccount", "default"]), QUICK);
        while_running(namespace, &daemons::NAMES, look).await
    })
    .await
    .map(|_| ())
}

fn kubectl(layout: &Layout, programs: &Programs) -> Command {
    let mut command = Command::new(programs.path("kubectl"));
    command.arg("--kubeconfig").arg(layout.kubeconfig());
    command
}

fn ctr(layout: &Layout) -> Command {
    let mut command = Command::new("ctr");
    command
        .arg("--address")
        .arg(layout.containerd_socket())
        .args(["--namespace", IMAGE_NAMESPACE]);
    command
}

/// Makes an image archive known to the node.
pub async fn load_image(layout: &Layout, archive: &Path) -> Result<(), CommandError> {
    let mut import = ctr(layout);
    import.args([
        "images",
        "import",
        "--snapshotter",
        snapshotter(layout.root()),
    ]);
    command::run(import.arg(archive), LOAD_WITHIN).await?;
    Ok(())
}

/// Which daemons run: their names and whether they do.
pub fn daemons(layout: &Layout) -> Result<Vec<(&'static str, bool)>, namespace::NamespaceError> {
    let running = Namespace::find(layout)?
        .map(|namespace| namespace.running(&daemons::NAMES))
        .transpose()?
        .unwrap_or_default();
    Ok(daemons::NAMES
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
