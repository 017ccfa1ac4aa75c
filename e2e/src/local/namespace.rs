//! The namespaces that a local cluster lives in, held by one process.
//!
//! Network, mounts and processes are the cluster's own. When the holder, the first
//! process of the process namespace, ends, the kernel ends all others with it, and
//! with them go mounts, links, addresses and packet filter rules. So nothing that a
//! cluster does in there can outlive it, however it ends. Further nodes share the process
//! namespace: a process in it holds the network and the mounts of each, and ends with the
//! others.

use std::fs;
use std::io::{self, BufRead as _, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command as StdCommand, Stdio};
use std::time::Duration;

use rustix::process::WaitOptions;
use tokio::process::Command;

use super::daemons::Daemon;
use super::layout::{self, Layout};
use super::node::Node;
use super::processes::{self, HOLD, HOLD_NODE, Process};
use crate::command::{self, CommandError};

const READY: &str = "ready";
const READY_WITHIN: Duration = Duration::from_secs(20);
const QUICK: Duration = Duration::from_secs(20);
/// What programs inside find others by.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where the container runtime's network library keeps results; it has no setting.
pub(super) const NETWORK_RESULTS: &str = "/var/lib/cni";
/// Kernel settings that the kubelet would change for the whole machine. Inside, plain
/// files with the values that it wants are mounted over them.
const KERNEL_SETTINGS: [(&str, &str); 6] = [
    ("/proc/sys/vm/overcommit_memory", "1"),
    ("/proc/sys/vm/panic_on_oom", "0"),
    ("/proc/sys/kernel/panic", "10"),
    ("/proc/sys/kernel/panic_on_oops", "1"),
    ("/proc/sys/kernel/keys/root_maxkeys", "1000000"),
    ("/proc/sys/kernel/keys/root_maxbytes", "25000000"),
];

/// The namespaces could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A file or process could not be used.
    #[error("could not {action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The holder did not say that it was ready.
    #[error("the process that holds the namespaces did not start; see {}", log.display())]
    NotReady {
        /// Its log.
        log: PathBuf,
    },
    /// A program inside failed.
    #[error("could not set up the node's network")]
    Network(#[source] CommandError),
}

fn doing(action: impl Into<String>) -> impl FnOnce(io::Error) -> NamespaceError {
    let action = action.into();
    move |source| NamespaceError::Io { action, source }
}

/// The namespaces of a node of a running cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    holder: i32,
    /// Identifies the process namespace, which all nodes share.
    processes: Option<u64>,
    /// Identifies the node's network namespace.
    network: Option<u64>,
}

impl From<Process> for Namespace {
    fn from(holder: Process) -> Self {
        Self {
            holder: holder.pid,
            processes: holder.namespace,
            network: holder.network,
        }
    }
}

impl Namespace {
    /// Makes the namespaces of the cluster, which are the first node's, and their holder.
    /// `program` is llama-cluster.
    pub async fn create(program: &Path, layout: &Layout) -> Result<Self, NamespaceError> {
        let log = layout.log(HOLD);
        let errors = fs::File::create(&log).map_err(doing(format!("write {}", log.display())))?;
        let mut start = StdCommand::new("setsid");
        start
            .args(["unshare", "--mount", "--pid", "--net", "--fork"])
            .args([
                "--kill-child",
                "--mount-proc",
                "--propagation",
                "slave",
                "--",
            ])
            .arg(program)
            .args([HOLD, layout.name()])
            .stderr(errors);
        let ready = says_ready(start).await?;
        match Self::find(Node::first(layout))? {
            Some(namespace) if ready => Ok(namespace),
            _ => Err(NamespaceError::NotReady { log }),
        }
    }

    /// Makes the network and mounts of the further node `node`, and their holder. These
    /// namespaces are the first node's, in which nothing may have been mounted for a pod.
    pub async fn create_further(
        &self,
        program: &Path,
        node: Node<'_>,
    ) -> Result<Self, NamespaceError> {
        let log = node.log(HOLD);
        let errors = fs::File::create(&log).map_err(doing(format!("write {}", log.display())))?;
        let mut start = self.std_command(Path::new("unshare"));
        start
            .args(["--mount", "--net", "--propagation", "slave", "--"])
            .arg(program)
            .args([HOLD_NODE, node.layout().name(), &node.number().to_string()])
            .stderr(errors);
        let ready = says_ready(start).await?;
        match Self::find(node)? {
            Some(namespace) if ready => Ok(namespace),
            _ => Err(NamespaceError::NotReady { log }),
        }
    }

    /// The namespaces of the node `node`, if they exist.
    pub fn find(node: Node<'_>) -> Result<Option<Self>, NamespaceError> {
        let processes = processes::list().map_err(doing("read /proc"))?;
        let holder = processes::holder(&processes, node.layout());
        let of_node = match holder {
            Some(holder) if !node.is_first() => {
                processes::node_holder(&processes, node, holder.namespace)
            }
            holder => holder,
        };
        Ok(of_node.map(Self::from))
    }

    /// Process number of the holder.
    pub fn holder(&self) -> i32 {
        self.holder
    }

    /// The words to put before a command line so that it runs inside.
    pub fn prefix(&self) -> Vec<String> {
        let target = self.holder.to_string();
        ["nsenter", "-t", target.as_str(), "-m", "-p", "-n", "--"]
            .map(str::to_owned)
            .into()
    }

    fn std_command(&self, program: &Path) -> StdCommand {
        let mut command = StdCommand::new("setsid");
        command.args(self.prefix()).arg(program);
        command.env_clear().env("PATH", PATH).env("HOME", "/root");
        command
    }

    /// A command that runs `program` inside.
    pub fn command(&self, program: &Path) -> Command {
        self.std_command(program).into()
    }

    /// Starts a program that stays, with a log of its own.
    pub fn spawn(&self, daemon: &Daemon, node: Node<'_>) -> Result<(), NamespaceError> {
        self.spawn_with(daemon, node, Stdio::null())
    }

    /// Starts a program that stays and takes connections from `listener`, a socket
    /// outside, as its standard input.
    pub fn spawn_listening(
        &self,
        daemon: &Daemon,
        node: Node<'_>,
        listener: TcpListener,
    ) -> Result<(), NamespaceError> {
        self.spawn_with(daemon, node, OwnedFd::from(listener).into())
    }

    fn spawn_with(
        &self,
        daemon: &Daemon,
        node: Node<'_>,
        input: Stdio,
    ) -> Result<(), NamespaceError> {
        let path = node.log(daemon.name);
        let log = fs::File::create(&path).map_err(doing(format!("write {}", path.display())))?;
        let errors = log.try_clone().map_err(doing("share a log"))?;
        self.std_command(&daemon.program)
            .args(&daemon.arguments)
            .stdin(input)
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(doing(format!("start {}", daemon.name)))?;
        Ok(())
    }

    /// Which of the programs `names` run on this node, not in its pods.
    pub fn running(&self, names: &[&str]) -> Result<Vec<String>, NamespaceError> {
        let daemons = self.daemons(names)?.into_iter();
        Ok(daemons.map(|daemon| daemon.program().to_owned()).collect())
    }

    /// Kills the programs `names` that run on this node, as a failure of the node would;
    /// its pods stay. Says how many there were.
    pub fn kill(&self, names: &[&str]) -> Result<usize, NamespaceError> {
        let daemons = self.daemons(names)?;
        for daemon in &daemons {
            processes::kill(daemon).map_err(doing(format!("kill {}", daemon.program())))?;
        }
        Ok(daemons.len())
    }

    fn daemons(&self, names: &[&str]) -> Result<Vec<Process>, NamespaceError> {
        let processes = processes::list().map_err(doing("read /proc"))?;
        let on_node = |process: &Process| {
            process.namespace == self.processes && process.network == self.network
        };
        Ok(processes
            .into_iter()
            .filter(|process| on_node(process) && names.contains(&process.program()))
            .collect())
    }

    /// Gives the first node its link, addresses and routes, those to `others` too. There
    /// is no way out.
    pub async fn connect(
        &self,
        first: Node<'_>,
        others: &[Node<'_>],
    ) -> Result<(), NamespaceError> {
        let link = format!("link add {} type bridge\n", layout::NODE_LINK);
        self.set_up(first, others, &link).await
    }

    /// Joins the node `node`, whose namespaces `further` are, to the bridge of the first one.
    pub async fn join(
        &self,
        (node, further): (Node<'_>, &Self),
        others: &[Node<'_>],
    ) -> Result<(), NamespaceError> {
        let (bridge, number, holder) = (layout::NODE_LINK, node.number(), further.holder);
        let batch = format!(
            "link add {bridge}-{number} type veth peer name {bridge} netns {holder}\n\
             link set {bridge}-{number} master {bridge} up\n",
        );
        // Only into the network, so that the holder's number is one of this machine.
        let mut ip = Command::new("nsenter");
        ip.args(["-t", &self.holder.to_string(), "-n", "--", "ip"]);
        configure(&mut ip, &batch).await?;
        further.set_up(node, others, "").await
    }

    async fn set_up(
        &self,
        node: Node<'_>,
        others: &[Node<'_>],
        before: &str,
    ) -> Result<(), NamespaceError> {
        let link = layout::NODE_LINK;
        let routes: Vec<String> = others
            .iter()
            .filter(|other| **other != node)
            .map(|other| format!("route add {} via {}", other.pod_network(), other.address()))
            .collect();
        let batch = format!(
            "link set lo up\n\
             {before}\
             addr add {}/24 dev {link}\n\
             link set {link} up\n\
             route add {} dev {link}\n\
             {}\n",
            node.address(),
            layout::SERVICE_NETWORK,
            routes.join("\n"),
        );
        configure(&mut self.command(Path::new("ip")), &batch).await?;
        let mut forward = self.command(Path::new("sh"));
        forward.args(["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]);
        command::run(&mut forward, QUICK)
            .await
            .map_err(NamespaceError::Network)?;
        Ok(())
    }
}

/// Runs a batch of commands of the program `ip`.
async fn configure(ip: &mut Command, batch: &str) -> Result<(), NamespaceError> {
    command::run_with_input(ip.args(["-batch", "-"]), batch, QUICK)
        .await
        .map_err(NamespaceError::Network)?;
    Ok(())
}

/// Starts a holder; says whether it was ready within time.
async fn says_ready(mut start: StdCommand) -> Result<bool, NamespaceError> {
    let mut child = start
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(doing("start unshare"))?;
    let said = child.stdout.take();
    let line = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        said.map(|said| io::BufReader::new(said).read_line(&mut line))
            .transpose()
            .map(|_| line)
    });
    Ok(matches!(
        tokio::time::timeout(READY_WITHIN, line).await,
        Ok(Ok(Ok(line))) if line.trim() == READY
    ))
}

/// What the holder does: it makes the mounts that only the cluster sees, says that
/// it is ready, and then collects processes that end without a parent.
pub fn hold(layout: &Layout) -> Result<(), NamespaceError> {
    mount_own(Node::first(layout))?;
    // Absent where it was a link into /run: then no outside name resolves anyway.
    if Path::new("/etc/resolv.conf").exists() {
        bind(
            &layout.path("config/resolv.conf"),
            Path::new("/etc/resolv.conf"),
        )?;
    }
    for (index, (setting, value)) in KERNEL_SETTINGS.iter().enumerate() {
        let file = layout.path(&format!("hold/setting-{index}"));
        fs::write(&file, format!("{value}\n"))
            .map_err(doing(format!("write {}", file.display())))?;
        bind(&file, Path::new(setting))?;
    }
    say_ready()?;
    loop {
        // No child at all is an error; there will be some again.
        if rustix::process::wait(WaitOptions::empty()).is_err() {
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

/// What the holder of a further node does. The mounts of the first one are there too;
/// over some of them go this node's own.
pub fn hold_node(node: Node<'_>) -> Result<(), NamespaceError> {
    mount_own(node)?;
    bind(&node.volumes(), &node.layout().node_volumes())?;
    say_ready()?;
    loop {
        std::thread::park();
    }
}

/// Mounts what each node has of its own at the same path.
fn mount_own(node: Node<'_>) -> Result<(), NamespaceError> {
    mount(&["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"])?;
    if !fs::symlink_metadata("/var/run").is_ok_and(|meta| meta.is_symlink()) {
        bind(Path::new("/run"), Path::new("/var/run"))?;
    }
    bind(&node.path("node-logs"), Path::new("/var/log"))?;
    bind(&node.path("network-results"), Path::new(NETWORK_RESULTS))
}

fn say_ready() -> Result<(), NamespaceError> {
    let mut out = io::stdout();
    writeln!(out, "{READY}")
        .and_then(|()| out.flush())
        .map_err(doing("say that the namespaces are ready"))
}

fn bind(from: &Path, to: &Path) -> Result<(), NamespaceError> {
    mount(&["--bind", &from.to_string_lossy(), &to.to_string_lossy()])
}

fn mount(arguments: &[&str]) -> Result<(), NamespaceError> {
    let action = format!("mount {}", arguments.join(" "));
    let status = StdCommand::new("mount")
        .args(arguments)
        .status()
        .map_err(doing(action.clone()))?;
    if status.success() {
        Ok(())
    } else {
        Err(doing(action)(io::Error::other(status.to_string())))
    }
}
