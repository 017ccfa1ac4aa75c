//! Writes the files and makes the folders and cgroups that a local cluster starts from.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::certificates::{self, CertificateError};
use super::cgroups;
use super::config::{self, Credentials};
use super::layout::{self, Layout};
use super::namespace::NETWORK_RESULTS;
use super::node::Node;

/// The files of a cluster could not be written.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A file, folder or cgroup.
    #[error("could not write {what}")]
    Write {
        /// What was to be written.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificates could not be made.
    #[error("could not make the cluster's certificates")]
    Certificates(#[from] CertificateError),
}

fn writing(what: impl AsRef<Path>) -> impl FnOnce(io::Error) -> PrepareError {
    let what = what.as_ref().display().to_string();
    move |source| PrepareError::Write { what, source }
}

/// Writes everything that the daemons of `nodes` read. `plugins` is the folder of network
/// plugins; the administrator reaches the API server through `port`.
pub fn prepare(nodes: &[Node<'_>], plugins: &Path, port: u16) -> Result<(), PrepareError> {
    let Some(layout) = nodes.first().map(|node| node.layout()) else {
        return Ok(());
    };
    let root = layout.root();
    let shared = ["certificates", "config", "etcd", "hold", "logs"];
    let mut folders: Vec<PathBuf> = shared.iter().map(|name| layout.path(name)).collect();
    folders.push(layout.volumes());
    for node in nodes {
        let own = [
            "config/cni",
            "containerd",
            "kubelet",
            "network-results",
            "node-logs",
            "opt",
            "run",
            layout::NODE_VOLUMES,
        ];
        folders.extend(own.map(|name| node.path(name)));
    }
    for folder in folders {
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
    cgroups::create(nodes).map_err(writing("the cluster's cgroups"))?;
    certificates::write_all(layout, nodes)?;
    let mut files = vec![
        (layout.path("config/Corefile"), config::coredns(layout)),
        (layout.path("config/resolv.conf"), config::resolver()),
    ];
    for node in nodes {
        files.extend(node_files(*node, plugins));
    }
    for (path, text) in files {
        fs::write(&path, text).map_err(writing(&path))?;
    }
    write_kubeconfigs(nodes, port)
}

fn node_files(node: Node<'_>, plugins: &Path) -> [(PathBuf, String); 4] {
    let containerd = config::containerd(node, plugins, snapshotter(node.layout().root()));
    [
        (node.path("config/containerd.toml"), containerd),
        (
            node.path("config/cni/llama.conflist"),
            config::network(node).to_string(),
        ),
        (
            node.path("config/kubelet.json"),
            config::kubelet(node).to_string(),
        ),
        (
            node.path("config/kube-proxy.json"),
            config::kube_proxy(node).to_string(),
        ),
    ]
}

fn write_kubeconfigs(nodes: &[Node<'_>], port: u16) -> Result<(), PrepareError> {
    let Some(layout) = nodes.first().map(|node| node.layout()) else {
        return Ok(());
    };
    let inside = format!("https://{}:{}", layout::API_ADDRESS, layout::API_PORT);
    let outside = format!("https://127.0.0.1:{port}");
    let clients = [
        "kube-controller-manager",
        "kube-scheduler",
        "kube-proxy",
        "coredns",
    ];
    let kubelets = nodes.iter().map(|node| node.file("kubelet"));
    let mut wanted: Vec<(String, &str, PathBuf)> = clients
        .map(str::to_owned)
        .into_iter()
        .chain(kubelets)
        .map(|name| {
            let path = layout.daemon_kubeconfig(&name);
            (name, inside.as_str(), path)
        })
        .collect();
    wanted.push((
        certificates::ADMIN.to_owned(),
        &outside,
        layout.kubeconfig(),
    ));
    let read = |path: PathBuf| fs::read_to_string(&path).map_err(writing(&path));
    let authority = read(layout.certificate(certificates::AUTHORITY))?;
    for (name, server, path) in wanted {
        let (certificate, key) = (read(layout.certificate(&name))?, read(layout.key(&name))?);
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
pub fn snapshotter(root: &Path) -> &'static str {
    const OVERLAYFS_MAGIC: i64 = 0x794c_7630;
    match rustix::fs::statfs(root) {
        Ok(stat) if stat.f_type == OVERLAYFS_MAGIC => "native",
        _ => "overlayfs",
    }
}
