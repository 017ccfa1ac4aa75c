//! The programs of a local cluster and how each is started.

use std::path::{Path, PathBuf};

use super::certificates as certs;
use super::layout::{self, Layout};
use super::node::Node;
use crate::components::Programs;

/// A program that runs as long as the cluster does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// Its name, also its log's on the first node.
    pub name: &'static str,
    /// The file.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// Names of all daemons of the first node, in the order in which they are started.
const NAMES: [&str; 8] = [
    "containerd",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "coredns",
];

/// How many of [`NAMES`] are started before the API server answers.
const FIRST: usize = 3;
/// Likewise of further nodes.
const FURTHER_NAMES: [&str; 3] = ["containerd", "kubelet", "kube-proxy"];
const FURTHER_FIRST: usize = 1;

/// Names of all daemons of a node, in the order in which they are started.
pub fn names(node: Node<'_>) -> &'static [&'static str] {
    if node.is_first() {
        &NAMES
    } else {
        &FURTHER_NAMES
    }
}

/// Those of [`names`] that are started before the API server answers.
pub fn first_names(node: Node<'_>) -> &'static [&'static str] {
    let count = if node.is_first() {
        FIRST
    } else {
        FURTHER_FIRST
    };
    &names(node)[..count]
}

/// Started first on a node; the others need the API server to answer.
pub fn first(node: Node<'_>, programs: &Programs, containerd: &Path) -> Vec<Daemon> {
    let config = path_flag("config", node.path("config/containerd.toml"));
    let mut daemons = vec![Daemon {
        name: "containerd",
        program: containerd.to_owned(),
        arguments: vec![config],
    }];
    if node.is_first() {
        daemons.extend(etcd_and_api(node.layout(), programs));
    }
    daemons
}

fn etcd_and_api(layout: &Layout, programs: &Programs) -> [Daemon; 2] {
    [
        Daemon {
            name: "etcd",
            program: programs.path("etcd"),
            arguments: etcd(layout),
        },
        Daemon {
            name: "kube-apiserver",
            program: programs.path("kube-apiserver"),
            arguments: api_server(layout),
        },
    ]
}

/// Started on a node once the API server answers.
pub fn second(node: Node<'_>, programs: &Programs) -> Vec<Daemon> {
    let layout = node.layout();
    let daemon = |name, arguments| Daemon {
        name,
        program: programs.path(name),
        arguments,
    };
    let kubelet = vec![
        path_flag("kubeconfig", node.kubelet_kubeconfig()),
        path_flag("config", node.path("config/kubelet.json")),
        path_flag("root-dir", node.path("kubelet")),
        format!("--hostname-override={}", node.name()),
        format!("--node-ip={}", node.address()),
    ];
    let proxy = vec![path_flag("config", node.path("config/kube-proxy.json"))];
    let mut daemons = vec![daemon("kubelet", kubelet), daemon("kube-proxy", proxy)];
    if node.is_first() {
        let dns = vec![
            "-conf".to_owned(),
            layout.path("config/Corefile").display().to_string(),
        ];
        daemons.splice(
            0..0,
            controllers(layout).map(|(name, arguments)| daemon(name, arguments)),
        );
        daemons.push(daemon("coredns", dns));
    }
    daemons
}

fn controllers(layout: &Layout) -> [(&'static str, Vec<String>); 2] {
    let kubeconfig = |name| path_flag("kubeconfig", layout.daemon_kubeconfig(name));
    let controllers = vec![
        kubeconfig("kube-controller-manager"),
        path_flag("root-ca-file", layout.certificate(certs::AUTHORITY)),
        path_flag(
            "service-account-private-key-file",
            layout.key(certs::SERVICE_ACCOUNTS),
        ),
        "--use-service-account-credentials=true".to_owned(),
        "--bind-address=127.0.0.1".to_owned(),
        "--leader-elect=false".to_owned(),
    ];
    let scheduler = vec![
        kubeconfig("kube-scheduler"),
        "--bind-address=127.0.0.1".to_owned(),
        "--leader-elect=false".to_owned(),
    ];
    [
        ("kube-controller-manager", controllers),
        ("kube-scheduler", scheduler),
    ]
}

fn path_flag(name: &str, path: impl AsRef<Path>) -> String {
    format!("--{name}={}", path.as_ref().display())
}

fn etcd(layout: &Layout) -> Vec<String> {
    vec![
        path_flag("data-dir", layout.path("etcd")),
        format!("--listen-client-urls={}", layout::ETCD_URL),
        format!("--advertise-client-urls={}", layout::ETCD_URL),
        format!("--listen-peer-urls={}", layout::ETCD_PEER_URL),
        format!("--initial-advertise-peer-urls={}", layout::ETCD_PEER_URL),
        format!("--initial-cluster=default={}", layout::ETCD_PEER_URL),
        // The data need not survive the machine, and disks may be slow.
        "--unsafe-no-fsync".to_owned(),
    ]
}

fn api_server(layout: &Layout) -> Vec<String> {
    vec![
        format!("--etcd-servers={}", layout::ETCD_URL),
        format!("--bind-address={}", layout::API_ADDRESS),
        format!("--advertise-address={}", layout::API_ADDRESS),
        format!("--secure-port={}", layout::API_PORT),
        format!("--service-cluster-ip-range={}", layout::SERVICE_NETWORK),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        path_flag("client-ca-file", layout.certificate(certs::AUTHORITY)),
        path_flag("tls-cert-file", layout.certificate(certs::API_SERVER)),
        path_flag("tls-private-key-file", layout.key(certs::API_SERVER)),
        path_flag(
            "kubelet-certificate-authority",
            layout.certificate(certs::AUTHORITY),
        ),
        path_flag(
            "kubelet-client-certificate",
            layout.certificate(certs::API_SERVER_CLIENT),
        ),
        path_flag("kubelet-client-key", layout.key(certs::API_SERVER_CLIENT)),
        format!(
            "--service-account-issuer=https://kubernetes.default.svc.{}",
            layout::DOMAIN
        ),
        path_flag(
            "service-account-key-file",
            layout.public_key(certs::SERVICE_ACCOUNTS),
        ),
        path_flag(
            "service-account-signing-key-file",
            layout.key(certs::SERVICE_ACCOUNTS),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_daemon_is_started_once_in_order() {
        let layout = Layout::new("test").unwrap();
        let programs = Programs::default();
        for node in Node::all(&layout, 2) {
            let early = first(node, &programs, Path::new("containerd"));
            let mut started: Vec<&str> = early.iter().map(|daemon| daemon.name).collect();
            assert_eq!(started, first_names(node));
            let late = second(node, &programs);
            started.extend(late.iter().map(|daemon| daemon.name));
            assert_eq!(started, names(node));
        }
    }

    #[test]
    fn nothing_listens_outside_the_node() {
        let layout = Layout::new("test").unwrap();
        let mut arguments = api_server(&layout);
        arguments.extend(etcd(&layout));
        for argument in arguments {
            if argument.contains("bind-address") || argument.contains("listen-") {
                assert!(
                    argument.contains("127.0.0.1") || argument.contains(layout::API_ADDRESS),
                    "{argument}"
                );
            }
        }
    }
}
