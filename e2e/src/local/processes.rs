//! Finds a cluster's processes in `/proc`. Nothing is remembered in files that a
//! crash could leave behind: what runs is what `/proc` shows.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal};

use super::layout::Layout;
use super::node::Node;

/// The first word after the program's name in the command line of the process
/// that holds a cluster's namespaces.
pub const HOLD: &str = "hold";
/// Likewise for the process that holds the network and mounts of a further node.
pub const HOLD_NODE: &str = "hold-node";
/// Likewise for the process that carries connections into a cluster.
pub const FORWARD: &str = "forward";
/// Programs that start others inside the namespaces and wait for them outside.
const LAUNCHERS: [&str; 3] = ["setsid", "unshare", "nsenter"];

/// A running process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number in this namespace.
    pub pid: i32,
    /// Its command line.
    pub arguments: Vec<String>,
    /// Identifies its process namespace.
    pub namespace: Option<u64>,
    /// Identifies its network namespace.
    pub network: Option<u64>,
    /// The text of `/proc/PID/cgroup`.
    pub cgroups: String,
}

impl Process {
    /// The file name of its program.
    pub fn program(&self) -> &str {
        let first = self.arguments.first().map_or("", String::as_str);
        first.rsplit('/').next().unwrap_or_default()
    }

    /// Whether it holds the namespaces of the cluster `layout`.
    fn holds(&self, layout: &Layout) -> bool {
        self.program() != "unshare"
            && self.arguments.get(1).is_some_and(|word| word == HOLD)
            && self
                .arguments
                .get(2)
                .is_some_and(|word| word == layout.name())
    }

    /// Whether it holds the network and mounts of the further node `node`.
    fn holds_node(&self, node: Node<'_>) -> bool {
        let words = [HOLD_NODE, node.layout().name(), &node.number().to_string()];
        self.arguments
            .get(1..=words.len())
            .is_some_and(|found| found == words)
    }

    /// Whether it waits outside for a program of the cluster `layout`.
    fn launched(&self, layout: &Layout) -> bool {
        let below = format!("{}/", layout.root().display());
        let names = |pair: &[String]| {
            [HOLD, HOLD_NODE, FORWARD].contains(&pair[0].as_str()) && pair[1] == layout.name()
        };
        LAUNCHERS.contains(&self.program())
            && (self.arguments.iter().any(|word| word.contains(&below))
                || self.arguments.windows(2).any(names))
    }

    /// Whether it runs in a container of the cluster `layout`.
    fn contained(&self, layout: &Layout) -> bool {
        let cgroup = format!("/{}/", layout.cgroup());
        self.cgroups
            .lines()
            .any(|line| format!("{line}/").contains(&cgroup))
    }
}

/// All processes but zombies, which hold nothing any more.
pub fn list() -> io::Result<Vec<Process>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // A process may end while we look at it; then it does not count.
        processes.extend(pid.and_then(|pid| read(pid, &entry.path())));
    }
    Ok(processes)
}

fn read(pid: i32, folder: &Path) -> Option<Process> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    if state(&stat)? == 'Z' {
        return None;
    }
    let line = fs::read(folder.join("cmdline")).ok()?;
    let arguments = line
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    Some(Process {
        pid,
        arguments,
        namespace: inode(&folder.join("ns/pid")),
        network: inode(&folder.join("ns/net")),
        cgroups: fs::read_to_string(folder.join("cgroup")).unwrap_or_default(),
    })
}

/// What identifies the namespace behind a link in `/proc`.
fn inode(link: &Path) -> Option<u64> {
    fs::metadata(link).ok().map(|meta| meta.ino())
}

/// The state letter in `/proc/PID/stat`, which follows the name in parentheses.
fn state(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The process that holds the namespaces of `layout`, seen from outside them.
pub fn holder(processes: &[Process], layout: &Layout) -> Option<Process> {
    let outside = inode(Path::new("/proc/self/ns/pid"));
    processes
        .iter()
        .find(|process| process.holds(layout) && process.namespace != outside)
        .cloned()
}

/// The process in the process namespace `namespace` that holds the further node `node`.
pub fn node_holder(
    processes: &[Process],
    node: Node<'_>,
    namespace: Option<u64>,
) -> Option<Process> {
    processes
        .iter()
        .find(|process| process.holds_node(node) && process.namespace == namespace)
        .cloned()
}

/// Every process of the cluster: in its process namespace (`namespace`, where the
/// holder lived to tell it), in its containers, or waiting outside for one.
pub fn of_cluster(processes: &[Process], layout: &Layout, namespace: Option<u64>) -> Vec<Process> {
    processes
        .iter()
        .filter(|process| {
            (namespace.is_some() && process.namespace == namespace)
                || process.contained(layout)
                || process.launched(layout)
        })
        .cloned()
        .collect()
}

/// Kills `process`, unless its number has come to mean another one.
pub fn kill(process: &Process) -> io::Result<()> {
    let Some(pid) = Pid::from_raw(process.pid) else {
        return Err(io::Error::other("not a process number"));
    };
    let handle = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(handle) => handle,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // Looked at again while the handle pins which process is meant.
    let now = read(
        process.pid,
        &Path::new("/proc").join(process.pid.to_string()),
    );
    if now.is_none_or(|now| now.arguments != process.arguments) {
        return Ok(());
    }
    match rustix::process::pidfd_send_signal(&handle, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(words: &[&str], cgroups: &str) -> Process {
        Process {
            pid: 1,
            arguments: words.iter().map(|word| (*word).to_owned()).collect(),
            namespace: Some(9),
            network: Some(8),
            cgroups: cgroups.to_owned(),
        }
    }

    #[test]
    fn holder_is_known_by_its_command_line() {
        let layout = Layout::new("a").unwrap();
        let holder_line = ["/x/llama-cluster", HOLD, "a"];
        let processes = [
            process(&["unshare", "--net", "/x/llama-cluster", HOLD, "a"], ""),
            process(&["/x/llama-cluster", HOLD, "ab"], ""),
            process(&holder_line, ""),
        ];
        let found = holder(&processes, &layout).unwrap();
        assert_eq!(found.arguments, holder_line);
    }

    #[test]
    fn holders_of_nodes_are_told_from_each_other() {
        let layout = Layout::new("a").unwrap();
        let node = |number| Node::numbered(&layout, number).unwrap();
        let processes = [
            process(
                &["unshare", "--net", "llama-cluster", HOLD_NODE, "a", "2", ""],
                "",
            ),
            process(&["/x/llama-cluster", HOLD_NODE, "ab", "2", ""], ""),
            process(&["/x/llama-cluster", HOLD_NODE, "a", "2", ""], ""),
        ];
        let found = node_holder(&processes, node(2), Some(9)).unwrap();
        assert_eq!(found.arguments, processes[2].arguments);
        assert_eq!(node_holder(&processes, node(3), Some(9)), None);
        assert_eq!(node_holder(&processes, node(2), Some(7)), None);
        assert_eq!(holder(&processes, &layout), None);
    }

    #[test]
    fn processes_of_a_cluster_are_told_from_others() {
        let layout = Layout::new("a").unwrap();
        let ours = [
            process(&["nsenter", "x", "/var/lib/llama-cluster/a/config"], ""),
            process(&["unshare", "--net", "llama-cluster", HOLD, "a"], ""),
            process(&["nsenter", "--", "unshare", HOLD_NODE, "a", "2"], ""),
            process(&["/pause"], "4:cpu:/llama-cluster-a/kubepods/x\n"),
        ];
        let others = [
            process(
                &["tail", "-f", "/var/lib/llama-cluster/a/logs/etcd.log"],
                "",
            ),
            process(&["nsenter", "/var/lib/llama-cluster/ab/config"], ""),
            process(&["/pause"], "4:cpu:/llama-cluster-ab/kubepods/x\n"),
        ];
        assert_eq!(of_cluster(&ours, &layout, None).len(), 4);
        assert_eq!(of_cluster(&others, &layout, None).len(), 0);
        assert_eq!(of_cluster(&others, &layout, Some(9)).len(), 3);
    }

    #[test]
    fn state_is_read_behind_a_name_with_parentheses() {
        assert_eq!(state("12 (a) b) Z 1 2"), Some('Z'));
        assert_eq!(state("garbage"), None);
    }

    #[test]
    fn own_process_is_listed() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(list().unwrap().iter().any(|process| process.pid == own));
    }

    #[test]
    fn kill_spares_a_process_that_is_not_the_one_meant() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let stranger = Process {
            pid,
            ..process(&["another"], "")
        };
        kill(&stranger).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "still running");
        let mut seen = read(pid, &Path::new("/proc").join(pid.to_string())).unwrap();
        while seen.program() != "sleep" {
            seen = read(pid, &Path::new("/proc").join(pid.to_string())).unwrap();
        }
        kill(&seen).unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
