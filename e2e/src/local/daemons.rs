//! The programs of a local cluster and how each is started.

use std::path::{Path, PathBuf};

use super::certificates as certs;
use super::layout::{self, Layout};
use crate::components::Programs;

/// A program that runs as long as the cluster does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// Its name, also its log's.
    pub name: &'static str,
    /// The file.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
}

/// Names of all daemons, in the order in which they are started.
pub const NAMES: [&str; 8] = [
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
pub const FIRST: usize = 3;

/// Started first; the others need the API server to answer.
pub fn first(layout: &Layout, programs: &Programs, containerd: PathBuf) -> Vec<Daemon> {
    let config = layout.path("config/containerd.toml");
    vec![
        Daemon {
            name: "containerd",
            program: containerd,
            arguments: vec![format!("--config={}", config.display())],
        },
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

/// Started once the API server answers.
pub fn second(layout: &Layout, programs: &Programs) -> Vec<Daemon> {
    let daemon = |name, arguments| Daemon {
        name,
        program: programs.path(name),
        arguments,
    };
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
    let kubelet = vec![
        kubeconfig("kubelet"),
        path_flag("config", layout.path("config/kubelet.json")),
        path_flag("root-dir", layout.path("kubelet")),
        format!("--hostname-override={}", layout.node()),
        format!("--node-ip={}", layout::NODE_ADDRESS),
    ];
    let proxy = vec![path_flag("config", layout.path("config/kube-proxy.json"))];
    let dns = vec![
        "-conf".to_owned(),
        layout.path("config/Corefile").display().to_string(),
    ];
    vec![
        daemon("kube-controller-manager", controllers),
        daemon("kube-scheduler", scheduler),
        daemon("kubelet", kubelet),
        daemon("kube-proxy", proxy),
        daemon("coredns", dns),
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
        format!("--bind-address={}", layout::NODE_ADDRESS),
        format!("--advertise-address={}", layout::NODE_ADDRESS),
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
        let mut daemons = first(&layout, &programs, "containerd".into());
        daemons.extend(second(&layout, &programs));
        let names: Vec<&str> = daemons.iter().map(|daemon| daemon.name).collect();
        assert_eq!(names, NAMES);
    }

    #[test]
    fn nothing_listens_outside_the_node() {
        let layout = Layout::new("test").unwrap();
        let mut arguments = api_server(&layout);
        arguments.extend(etcd(&layout));
        for argument in arguments {
            if argument.contains("bind-address") || argument.contains("listen-") {
                assert!(
                    argument.contains("127.0.0.1") || argument.contains(layout::NODE_ADDRESS),
                    "{argument}"
                );
            }
        }
    }
}
