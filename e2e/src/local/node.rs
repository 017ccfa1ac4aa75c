//! The nodes of a local cluster: names, folders and addresses of each.
//!
//! The first one is the cluster's own namespaces, where the control plane runs too. Each
//! further one has a network and mounts of its own, so that what programs find at fixed
//! paths (`/run`, `/var/log`, results of the network library) is another folder on each.

use std::path::PathBuf;

use super::layout::{self, Layout};

/// Most nodes of a cluster: each costs about 200 MB of memory, and its own copy of images.
pub const MOST_NODES: u8 = 8;

/// One node of the cluster `layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node<'a> {
    layout: &'a Layout,
    /// From 1.
    number: u8,
}

impl<'a> Node<'a> {
    /// The node that the control plane is on.
    pub fn first(layout: &'a Layout) -> Self {
        Self { layout, number: 1 }
    }

    /// The node with the number `number`, from 1 to [`MOST_NODES`].
    pub fn numbered(layout: &'a Layout, number: u8) -> Option<Self> {
        (1..=MOST_NODES)
            .contains(&number)
            .then_some(Self { layout, number })
    }

    /// The first `count` nodes, at most [`MOST_NODES`].
    pub fn all(layout: &'a Layout, count: u8) -> Vec<Self> {
        (1..=count.min(MOST_NODES))
            .map(|number| Self { layout, number })
            .collect()
    }

    /// The cluster.
    pub fn layout(self) -> &'a Layout {
        self.layout
    }

    /// Its number, from 1.
    pub fn number(self) -> u8 {
        self.number
    }

    /// Whether the control plane is on it.
    pub fn is_first(self) -> bool {
        self.number == 1
    }

    /// Name of the node object.
    pub fn name(self) -> String {
        self.file(&format!("{}-node", self.layout.name()))
    }

    /// What a file of this node is called among those of all nodes, where that of the
    /// first is `name`.
    pub fn file(self, name: &str) -> String {
        if self.is_first() {
            name.to_owned()
        } else {
            format!("{name}-{}", self.number)
        }
    }

    /// Its address on the network of nodes.
    pub fn address(self) -> String {
        format!("{}.{}", layout::NODE_NETWORK, self.number)
    }

    /// Addresses of its pods.
    pub fn pod_network(self) -> String {
        format!("{}.{}.0/24", layout::POD_NETWORKS, self.number - 1)
    }

    /// A path below the folder of what only this node reads and writes.
    pub fn path(self, relative: &str) -> PathBuf {
        if self.is_first() {
            self.layout.path(relative)
        } else {
            self.layout
                .path("nodes")
                .join(self.number.to_string())
                .join(relative)
        }
    }

    /// Its cgroup, below every cgroup hierarchy's root. That of the cluster is the first
    /// node's and holds all others.
    pub fn cgroup(self) -> String {
        if self.is_first() {
            self.layout.cgroup()
        } else {
            format!("{}/node-{}", self.layout.cgroup(), self.number)
        }
    }

    /// containerd's socket.
    pub fn containerd_socket(self) -> PathBuf {
        self.path("run/containerd.sock")
    }

    /// The folder that pods on this node find at [`Layout::node_volumes`].
    pub fn volumes(self) -> PathBuf {
        self.path(layout::NODE_VOLUMES)
    }

    /// What its daemon called `name` writes.
    pub fn log(self, name: &str) -> PathBuf {
        self.layout.log(&self.file(name))
    }

    /// The kubeconfig of its kubelet.
    pub fn kubelet_kubeconfig(self) -> PathBuf {
        self.layout.daemon_kubeconfig(&self.file("kubelet"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn nodes_share_nothing() {
        let layout = Layout::new("test").unwrap();
        let nodes = Node::all(&layout, u8::MAX);
        assert_eq!(nodes.len(), usize::from(MOST_NODES));
        let distinct = |of: &dyn Fn(&Node<'_>) -> String| {
            let all: BTreeSet<String> = nodes.iter().map(of).collect();
            assert_eq!(all.len(), nodes.len(), "{all:?}");
        };
        distinct(&|node| node.name());
        distinct(&|node| node.address());
        distinct(&|node| node.pod_network());
        distinct(&|node| node.cgroup());
        distinct(&|node| node.log("kubelet").display().to_string());
        distinct(&|node| node.path("run").display().to_string());
    }

    #[test]
    fn first_node_is_where_the_control_plane_is() {
        let layout = Layout::new("test").unwrap();
        let first = Node::first(&layout);
        assert_eq!(first.name(), "test-node");
        assert_eq!(first.address(), layout::API_ADDRESS);
        assert_eq!(first.cgroup(), layout.cgroup());
        assert_eq!(first.volumes(), layout.node_volumes());
        assert_eq!(Node::numbered(&layout, 1), Some(first));
        assert_eq!(Node::numbered(&layout, 0), None);
        assert_eq!(Node::numbered(&layout, MOST_NODES + 1), None);
    }

    #[test]
    fn longest_socket_path_fits() {
        let layout = Layout::new("abcdefghijklmnopqrstuvwx").unwrap();
        for node in Node::all(&layout, MOST_NODES) {
            for socket in [
                "run/containerd.sock.ttrpc",
                "kubelet/pod-resources/kubelet.sock",
            ] {
                let path = node.path(socket).display().to_string();
                assert!(path.len() < 108, "{path}");
            }
        }
    }
}
