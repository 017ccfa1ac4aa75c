//! Names, folders and addresses of a local cluster.

use std::path::{Path, PathBuf};

/// Folder that holds one folder a cluster.
const STATE: &str = "/var/lib/llama-cluster";
/// Unix socket paths are at most 107 bytes long.
const LONGEST_NAME: usize = 24;

/// The network of nodes, of 24 bits, which a bridge on the first one connects. All
/// addresses are inside the cluster's network namespaces and mean nothing outside.
pub const NODE_NETWORK: &str = "10.240.0";
/// Address of the first node, where the API server is.
pub const API_ADDRESS: &str = "10.240.0.1";
/// Name of each node's link to the others; the first one's is the bridge.
pub const NODE_LINK: &str = "node0";
/// The networks of pods, of 24 bits for each node.
pub const POD_NETWORKS: &str = "10.244";
/// Addresses of Services.
pub const SERVICE_NETWORK: &str = "10.96.0.0/16";
/// The `kubernetes` Service: the first of [`SERVICE_NETWORK`].
pub const API_SERVICE_ADDRESS: &str = "10.96.0.1";
/// The `kube-dns` Service.
pub const DNS_ADDRESS: &str = "10.96.0.10";
/// Domain of Services.
pub const DOMAIN: &str = "cluster.local";
/// Port of the API server, on [`API_ADDRESS`].
pub const API_PORT: u16 = 6443;
/// Where etcd listens.
pub const ETCD_URL: &str = "http://127.0.0.1:2379";
/// Where etcd would listen to its peers; it has none.
pub const ETCD_PEER_URL: &str = "http://127.0.0.1:2380";
/// Name of the folders of [`Layout::node_volumes`].
pub const NODE_VOLUMES: &str = "node-volumes";
/// Holds a pod's namespaces open.
pub const PAUSE_IMAGE: &str = "llama-operator/pause:dev";

/// The name cannot be a cluster's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("cluster name {0:?}: expected 1 to {LONGEST_NAME} of a-z, 0-9 and -, not at the ends")]
pub struct BadName(String);

/// Where a local cluster keeps its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    name: String,
    root: PathBuf,
}

impl Layout {
    /// The layout of the cluster called `name`.
    pub fn new(name: &str) -> Result<Self, BadName> {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let good = (1..=LONGEST_NAME).contains(&name.len())
            && name.chars().all(inner)
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !good {
            return Err(BadName(name.to_owned()));
        }
        Ok(Self {
            name: name.to_owned(),
            root: Path::new(STATE).join(name),
        })
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Everything of this cluster on disk lies below.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below [`Self::root`].
    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The folder of all clusters.
    pub fn state() -> &'static Path {
        Path::new(STATE)
    }

    /// There where a cluster made the folder of the network library's results, which
    /// all clusters share as a mount point.
    pub fn made_network_results() -> PathBuf {
        Path::new(STATE).join(".made-network-results")
    }

    /// Only one run at a time changes the cluster; beside the folder, which `down` removes.
    pub fn lock(&self) -> PathBuf {
        Path::new(STATE).join(format!(".{}.lock", self.name))
    }

    /// Below every cgroup hierarchy's root.
    pub fn cgroup(&self) -> String {
        format!("llama-cluster-{}", self.name)
    }

    /// For `kubectl` on this machine, as administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("kubeconfig")
    }

    /// For pods' `hostPath` volumes: the same folder on all nodes.
    pub fn volumes(&self) -> PathBuf {
        self.path("volumes")
    }

    /// Likewise, but another folder on each node.
    pub fn node_volumes(&self) -> PathBuf {
        self.path(NODE_VOLUMES)
    }

    /// What the daemon called `name` writes.
    pub fn log(&self, name: &str) -> PathBuf {
        self.path("logs").join(format!("{name}.log"))
    }

    /// A kubeconfig for the daemon called `name`.
    pub fn daemon_kubeconfig(&self, name: &str) -> PathBuf {
        self.path("config").join(format!("{name}.kubeconfig"))
    }

    /// A certificate called `name`, PEM.
    pub fn certificate(&self, name: &str) -> PathBuf {
        self.path("certificates").join(format!("{name}.crt"))
    }

    /// The public half of [`Self::key`], PEM, where there is no certificate.
    pub fn public_key(&self, name: &str) -> PathBuf {
        self.path("certificates").join(format!("{name}.pub"))
    }

    /// The key to [`Self::certificate`], PEM.
    pub fn key(&self, name: &str) -> PathBuf {
        self.path("certificates").join(format!("{name}.key"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "llama", "e2e-1", "abcdefghijklmnopqrstuvwx"] {
            assert!(Layout::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a.b",
            "../x",
            "abcdefghijklmnopqrstuvwxy",
        ] {
            assert_eq!(Layout::new(bad), Err(BadName(bad.to_owned())));
        }
    }
}
