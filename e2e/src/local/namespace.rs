//! The namespaces that a local cluster lives in, held by one process.
//!
//! Network, mounts and processes are the cluster's own. When the holder, the first
//! process of the process namespace, ends, the kernel ends all others with it, and
//! with them go mounts, links, addresses and packet filter rules. So nothing that a
//! cluster does in there can outlive it, however it ends.

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
use super::processes::{self, HOLD};
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

/// The namespaces of a running cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    holder: i32,
    identity: Option<u64>,
}

impl Namespace {
    /// Makes the namespaces and their holder. `program` is llama-cluster.
    pub async fn create(program: &Path, layout: &Layout) -> Result<Self, NamespaceError> {
        let log = layout.log(HOLD);
        let errors = fs::File::create(&log).map_err(doing(format!("write {}", log.display())))?;
        let mut child = StdCommand::new("setsid")
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
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(doing("start unshare"))?;
        let said = child.stdout.take();
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            said.map(|said| io::BufReader::new(said).read_line(&mut line))
                .transpose()
                .map(|_| line)
        });
        let ready = matches!(
            tokio::time::timeout(READY_WITHIN, line).await,
            Ok(Ok(Ok(line))) if line.trim() == READY
        );
        match Self::find(layout)? {
            Some(namespace) if ready => Ok(namespace),
            _ => Err(NamespaceError::NotReady { log }),
        }
    }

    /// The namespaces of the cluster `layout`, if they exist.
    pub fn find(layout: &Layout) -> Result<Option<Self>, NamespaceError> {
        let processes = processes::list().map_err(doing("read /proc"))?;
        Ok(processes::holder(&processes, layout).map(|holder| Self {
            holder: holder.pid,
            identity: holder.namespace,
        }))
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
    pub fn spawn(&self, daemon: &Daemon, layout: &Layout) -> Result<(), NamespaceError> {
        self.spawn_with(daemon, layout, Stdio::null())
    }

    /// Starts a program that stays and takes connections from `listener`, a socket
    /// outside, as its standard input.
    pub fn spawn_listening(
        &self,
        daemon: &Daemon,
        layout: &Layout,
        listener: TcpListener,
    ) -> Result<(), NamespaceError> {
        self.spawn_with(daemon, layout, OwnedFd::from(listener).into())
    }

    fn spawn_with(
        &self,
        daemon: &Daemon,
        layout: &Layout,
        input: Stdio,
    ) -> Result<(), NamespaceError> {
        let path = layout.log(daemon.name);
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

    /// Which of the programs `names` run inside.
    pub fn running(&self, names: &[&str]) -> Result<Vec<String>, NamespaceError> {
        let processes = processes::list().map_err(doing("read /proc"))?;
        Ok(processes
            .iter()
            .filter(|process| process.namespace == self.identity)
            .map(|process| process.program().to_owned())
            .filter(|program| names.contains(&program.as_str()))
            .collect())
    }

    /// Gives the node its link, addresses and routes. There is no way out.
    pub async fn connect(&self) -> Result<(), NamespaceError> {
        let link = layout::NODE_LINK;
        let batch = format!(
            "link set lo up\n\
             link add {link} type bridge\n\
             addr add {}/{} dev {link}\n\
             link set {link} up\n\
             route add {} dev {link}\n",
            layout::NODE_ADDRESS,
            layout::NODE_NETWORK_BITS,
            layout::SERVICE_NETWORK,
        );
        let mut ip = self.command(Path::new("ip"));
        command::run_with_input(ip.args(["-batch", "-"]), &batch, QUICK)
            .await
            .map_err(NamespaceError::Network)?;
        let mut forward = self.command(Path::new("sh"));
        forward.args(["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]);
        command::run(&mut forward, QUICK)
            .await
            .map_err(NamespaceError::Network)?;
        Ok(())
    }
}

/// What the holder does: it makes the mounts that only the cluster sees, says that
/// it is ready, and then collects processes that end without a parent.
pub fn hold(layout: &Layout) -> Result<(), NamespaceError> {
    mount(&["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"])?;
    if !fs::symlink_metadata("/var/run").is_ok_and(|meta| meta.is_symlink()) {
        bind(Path::new("/run"), Path::new("/var/run"))?;
    }
    bind(&layout.path("node-logs"), Path::new("/var/log"))?;
    bind(&layout.path("network-results"), Path::new(NETWORK_RESULTS))?;
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
    let mut out = io::stdout();
    writeln!(out, "{READY}")
        .and_then(|()| out.flush())
        .map_err(doing("say that the namespaces are ready"))?;
    loop {
        // No child at all is an error; there will be some again.
        if rustix::process::wait(WaitOptions::empty()).is_err() {
            std::thread::sleep(Duration::from_millis(500));
        }
    }
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
