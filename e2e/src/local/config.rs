//! The text of every configuration file of a local cluster.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::certificates;
use super::layout::{self, Layout};
use super::node::Node;

/// The user that `CoreDNS` is, to the API server.
pub const DNS_USER: &str = "system:coredns";

/// containerd's configuration.
///
/// `snapshotter` is `overlayfs`, or `native` where overlays cannot be stacked.
pub fn containerd(node: Node<'_>, plugins: &Path, snapshotter: &str) -> String {
    let root = node.path("containerd");
    let root = root.display();
    let options = node.path("opt");
    let options = options.display();
    let networks = node.path("config/cni");
    let networks = networks.display();
    let socket = node.containerd_socket();
    let socket = socket.display();
    let plugins = plugins.display();
    let pause = layout::PAUSE_IMAGE;
    // A process without CAP_SYS_RESOURCE may not lower OOM scores, and an AppArmor
    // profile would be loaded into the host's kernel.
    format!(
        r#"version = 2
root = "{root}"
# Seen in the node's mount namespace only.
state = "/run/containerd"

[grpc]
address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{options}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
disable_apparmor = true
stream_server_address = "127.0.0.1"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
max_conf_num = 1

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"#
    )
}

/// How pods are connected: a link of its own from each pod to the node, so that
/// every packet between pods is routed, and translated, by the node.
pub fn network(node: Node<'_>) -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": node.layout().name(),
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "dataDir": node.path("addresses"),
                    "ranges": [[{"subnet": node.pod_network()}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// The kubelet's configuration.
pub fn kubelet(node: Node<'_>) -> Value {
    let layout = node.layout();
    let serving = node.file(certificates::KUBELET_SERVING);
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address(),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": layout.certificate(certificates::AUTHORITY)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": layout.certificate(&serving),
        "tlsPrivateKeyFile": layout.key(&serving),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", node.cgroup()),
        "clusterDNS": [layout::DNS_ADDRESS],
        "clusterDomain": layout::DOMAIN,
        "containerRuntimeEndpoint": format!("unix://{}", node.containerd_socket().display()),
        // The machine's disk is the user's: never evict pods or images for its sake.
        "evictionHard": {
            "imagefs.available": "0%",
            "memory.available": "100Mi",
            "nodefs.available": "0%",
            "nodefs.inodesFree": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "podLogsDir": "/var/log/pods",
        "resolvConf": layout.path("config/resolv.conf"),
        "volumePluginDir": node.path("volume-plugins"),
    })
}

/// kube-proxy's configuration.
pub fn kube_proxy(node: Node<'_>) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clientConnection": {"kubeconfig": node.layout().daemon_kubeconfig("kube-proxy")},
        "hostnameOverride": node.name(),
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "iptables": {"localhostNodePorts": false},
        // These limits are the host's; a network namespace cannot change them.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpCloseWaitTimeout": "0s",
            "tcpEstablishedTimeout": "0s",
        },
    })
}

/// `CoreDNS`'s configuration.
pub fn coredns(layout: &Layout) -> String {
    format!(
        ".:53 {{\n    errors\n    cache 5\n    kubernetes {} in-addr.arpa ip6.arpa {{\n        \
         kubeconfig {}\n        ttl 5\n    }}\n}}\n",
        layout::DOMAIN,
        layout.daemon_kubeconfig("coredns").display()
    )
}

/// What the node's programs and pods resolve names with, besides the cluster's DNS:
/// nothing, so that outside names fail at once.
pub fn resolver() -> String {
    format!("nameserver {}\n", layout::DNS_ADDRESS)
}

/// The contents of a client's credentials, PEM.
#[derive(Debug, Clone, Copy)]
pub struct Credentials<'a> {
    /// The authority's certificate.
    pub authority: &'a str,
    /// The client's certificate.
    pub certificate: &'a str,
    /// Its key.
    pub key: &'a str,
}

/// A kubeconfig with the credentials in it.
pub fn kubeconfig(layout: &Layout, server: &str, credentials: Credentials<'_>) -> Value {
    let name = format!("llama-{}", layout.name());
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": {
            "server": server,
            "certificate-authority-data": STANDARD.encode(credentials.authority),
        }}],
        "users": [{"name": name, "user": {
            "client-certificate-data": STANDARD.encode(credentials.certificate),
            "client-key-data": STANDARD.encode(credentials.key),
        }}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
    })
}

/// Objects that the cluster starts with: what `CoreDNS` may read, and the Service at
/// the address that pods ask, whose endpoint is the `CoreDNS` process on the node.
pub fn first_objects() -> Value {
    let labels = json!({"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"});
    let read = json!(["get", "list", "watch"]);
    let port = |protocol: &str| {
        let name = if protocol == "UDP" { "dns" } else { "dns-tcp" };
        json!({"name": name, "protocol": protocol, "port": 53})
    };
    let ports = json!([port("UDP"), port("TCP")]);
    let items = json!([
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": DNS_USER},
            "rules": [
                {"apiGroups": [""], "resources": ["namespaces", "services"], "verbs": read},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": read},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": DNS_USER},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": DNS_USER,
            },
            "subjects": [
                {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": DNS_USER},
            ],
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": labels},
            "spec": {"clusterIP": layout::DNS_ADDRESS, "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns",
                "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": [layout::API_ADDRESS], "conditions": {"ready": true}},
            ],
            "ports": ports,
        },
    ]);
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new("test").unwrap()
    }

    #[test]
    fn containerd_uses_only_paths_of_its_own() {
        let layout = layout();
        let node = Node::numbered(&layout, 2).unwrap();
        let text = containerd(node, Path::new("/usr/lib/cni"), "overlayfs");
        for line in text.lines().filter(|line| line.contains("\"/")) {
            assert!(
                [
                    "/var/lib/llama-cluster/test/nodes/2/",
                    "\"/run/containerd\"",
                    "/usr/lib/cni"
                ]
                .iter()
                .any(|path| line.contains(path)),
                "{line}"
            );
        }
        assert!(text.contains("restrict_oom_score_adj = true"));
        assert!(text.contains(layout::PAUSE_IMAGE));
    }

    #[test]
    fn kubelet_refuses_strangers_and_stays_in_its_cgroup() {
        let layout = layout();
        let config = kubelet(Node::first(&layout));
        assert_eq!(config["authentication"]["anonymous"]["enabled"], false);
        assert_eq!(config["authorization"]["mode"], "Webhook");
        assert_eq!(config["cgroupRoot"], "/llama-cluster-test");
        let config = kubelet(Node::numbered(&layout, 3).unwrap());
        assert_eq!(config["cgroupRoot"], "/llama-cluster-test/node-3");
        assert_eq!(config["address"], "10.240.0.3");
    }

    #[test]
    fn kubeconfig_carries_its_credentials() {
        let credentials = Credentials {
            authority: "a",
            certificate: "b",
            key: "c",
        };
        let config = kubeconfig(&layout(), "https://127.0.0.1:1", credentials);
        assert_eq!(
            config["clusters"][0]["cluster"]["server"],
            "https://127.0.0.1:1"
        );
        assert_eq!(config["users"][0]["user"]["client-key-data"], "Yw==");
        assert_eq!(config["contexts"][0]["name"], config["current-context"]);
    }

    #[test]
    fn dns_service_and_its_endpoints_have_the_same_ports() {
        let objects = first_objects();
        let items = objects["items"].as_array().unwrap();
        let of = |kind: &str| items.iter().find(|item| item["kind"] == kind).unwrap();
        assert_eq!(of("Service")["spec"]["ports"], of("EndpointSlice")["ports"]);
        assert_eq!(of("Service")["spec"]["clusterIP"], layout::DNS_ADDRESS);
    }

    #[test]
    fn corefile_serves_the_cluster_domain() {
        let text = coredns(&layout());
        assert!(text.contains("kubernetes cluster.local"), "{text}");
        assert_eq!(text.matches('{').count(), text.matches('}').count());
    }
}
