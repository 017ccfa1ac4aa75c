//! A control plane on loopback with simulated nodes: etcd, kube-apiserver,
//! kube-controller-manager, kube-scheduler and kwok, new and empty each time.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Namespace, Node, ServiceAccount};
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use llama_e2e::components::Programs;
use llama_e2e::wait::{self, Look};
use rcgen::KeyPair;
use serde_json::json;

use crate::machine::{self, Usage};
use crate::process::Process;
use crate::prometheus::Metrics;

const READY_WITHIN: Duration = Duration::from_mins(3);
/// The namespace of the operator's service account.
const OPERATOR_NAMESPACE: &str = "llama-system";
/// Requests a second of each client of kube-controller-manager and kube-scheduler. Their
/// own limits, 20 and 50, would be what is measured.
const CLIENT_RATE: u32 = 1000;
/// The controllers of kube-controller-manager: those that are on anyway but the
/// `StatefulSet`s', which has a process of its own where it is measured.
const CONTROLLERS: &str = "--controllers=*,-statefulset-controller";

/// Who a client is to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// This program and kwok: never queued behind others.
    Admin,
    /// kube-controller-manager.
    Controllers,
    /// kube-scheduler.
    Scheduler,
    /// The operator, as the service account that it has in a cluster.
    Operator,
}

impl Identity {
    const ALL: [Self; 4] = [
        Self::Admin,
        Self::Controllers,
        Self::Scheduler,
        Self::Operator,
    ];

    fn token(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Controllers => "controllers",
            Self::Scheduler => "scheduler",
            Self::Operator => "operator",
        }
    }

    fn user(self) -> String {
        match self {
            Self::Admin => "admin".to_owned(),
            Self::Controllers => "system:kube-controller-manager".to_owned(),
            Self::Scheduler => "system:kube-scheduler".to_owned(),
            Self::Operator => {
                format!("system:serviceaccount:{OPERATOR_NAMESPACE}:llama-operator")
            }
        }
    }

    fn groups(self) -> String {
        match self {
            Self::Admin => "system:masters".to_owned(),
            Self::Controllers | Self::Scheduler => String::new(),
            Self::Operator => {
                format!("system:serviceaccounts,system:serviceaccounts:{OPERATOR_NAMESPACE}")
            }
        }
    }
}

/// What a control plane is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) programs: &'a Programs,
    /// The folder with kwok's stages that make pods ready as soon as they have a node.
    pub(crate) stages: &'a Path,
    pub(crate) nodes: usize,
}

/// The running control plane; it ends with this value.
pub(crate) struct ControlPlane {
    /// A client with every right.
    pub(crate) client: Client,
    config: Config,
    processes: Vec<Process>,
    /// Arguments of every program, with `DIR` for the folder of this run.
    pub(crate) flags: BTreeMap<&'static str, Vec<String>>,
    // Last, so that the processes have ended when it is removed.
    folder: tempfile::TempDir,
}

impl ControlPlane {
    /// Starts it all, and waits until the nodes are ready.
    pub(crate) async fn start(parts: Parts<'_>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let secure = free_port()?;
        write_credentials(folder.path(), secure)?;
        let config = config(folder.path()).await?;
        let mut plane = Self {
            client: Client::try_from(config.clone())?,
            config,
            processes: Vec::new(),
            flags: BTreeMap::new(),
            folder,
        };
        let etcd = format!("http://127.0.0.1:{}", free_port()?);
        plane.add("etcd", parts, etcd_flags(plane.path(), &etcd)?)?;
        plane.add(
            "kube-apiserver",
            parts,
            api_flags(plane.path(), &etcd, secure),
        )?;
        plane.until_ready().await?;
        plane.prepare().await?;
        let controllers = plane.controller_flags(CONTROLLERS, 0);
        plane.add("kube-controller-manager", parts, controllers)?;
        let scheduler = plane.scheduler_flags();
        plane.add("kube-scheduler", parts, scheduler)?;
        let kwok = plane.kwok_flags(parts.stages);
        plane.add("kwok", parts, kwok)?;
        plane.add_nodes(parts.nodes).await?;
        Ok(plane)
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a program that ends with the control plane.
    fn add(
        &mut self,
        name: &'static str,
        parts: Parts<'_>,
        arguments: Vec<String>,
    ) -> anyhow::Result<()> {
        let process = self.program(name, &parts.programs.path(name), arguments, &[])?;
        self.processes.push(process);
        Ok(())
    }

    /// Starts a program whose files are in this control plane's folder.
    pub(crate) fn program(
        &mut self,
        name: &'static str,
        program: &Path,
        arguments: Vec<String>,
        environment: &[(&str, &Path)],
    ) -> anyhow::Result<Process> {
        let process = Process::start(name, program, &arguments, environment, self.path())?;
        let folder = self.path().display().to_string();
        let shown = arguments
            .into_iter()
            .map(|argument| argument.replace(&folder, "DIR"))
            .collect();
        self.flags.insert(name, shown);
        Ok(process)
    }

    /// The kubeconfig of `identity`.
    pub(crate) fn kubeconfig(&self, identity: Identity) -> PathBuf {
        kubeconfig_path(self.path(), identity)
    }

    /// Fails if one of the programs has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        self.processes.iter_mut().try_for_each(Process::check)
    }

    /// What every program, and this one, has taken.
    pub(crate) fn usage(&self) -> anyhow::Result<BTreeMap<&'static str, Usage>> {
        let mut usage = BTreeMap::from([("bench", machine::usage(std::process::id())?)]);
        for process in &self.processes {
            usage.insert(process.name, process.usage()?);
        }
        Ok(usage)
    }

    /// The metrics of the API server.
    pub(crate) async fn metrics(&self) -> anyhow::Result<Metrics> {
        text(&self.client, "/metrics")
            .await
            .map(|text| Metrics::parse(&text))
    }

    /// The metrics of a Kubernetes program that serves them with TLS on loopback.
    pub(crate) async fn metrics_of(&self, port: u16) -> anyhow::Result<Metrics> {
        let mut config = self.config.clone();
        config.cluster_url = format!("https://127.0.0.1:{port}").parse()?;
        let client = Client::try_from(config)?;
        text(&client, "/metrics")
            .await
            .map(|text| Metrics::parse(&text))
    }

    async fn until_ready(&mut self) -> anyhow::Result<()> {
        let client = self.client.clone();
        wait::until("the API server", READY_WITHIN, async || {
            match self.check() {
                Ok(()) => Look::retrying(text(&client, "/readyz").await),
                Err(error) => Look::Never(error.to_string()),
            }
        })
        .await?;
        Ok(())
    }

    /// What has to be there before controllers start: the resource and the operator's rights.
    async fn prepare(&self) -> anyhow::Result<()> {
        let client = &self.client;
        let params = PostParams::default();
        let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
        for crd in llama_crds::crds() {
            definitions.create(&params, &crd).await?;
        }
        self.add_namespace(OPERATOR_NAMESPACE).await?;
        let binding: ClusterRoleBinding = serde_json::from_value(json!({
            "metadata": {"name": "llama-operator"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "cluster-admin",
            },
            "subjects": [{
                "kind": "ServiceAccount",
                "name": "llama-operator",
                "namespace": OPERATOR_NAMESPACE,
            }],
        }))?;
        let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
        bindings.create(&params, &binding).await?;
        let served = format!(
            "/apis/{}/v1alpha1/{}",
            llama_crds::GROUP,
            llama_crds::PLURAL
        );
        wait::until("the LlamaDeployment resource", READY_WITHIN, async || {
            Look::retrying(text(client, &served).await)
        })
        .await?;
        Ok(())
    }

    async fn add_namespace(&self, name: &str) -> anyhow::Result<()> {
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces
            .create(&PostParams::default(), &namespace)
            .await?;
        Ok(())
    }

    /// Makes a namespace, and waits until pods can be created in it.
    pub(crate) async fn namespace(&self, name: &str) -> anyhow::Result<()> {
        self.add_namespace(name).await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), name);
        wait::until(
            "the namespace's service account",
            READY_WITHIN,
            async || Look::retrying(accounts.get("default").await),
        )
        .await?;
        Ok(())
    }

    async fn add_nodes(&mut self, count: usize) -> anyhow::Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        for index in 0..count {
            let name = format!("node-{index}");
            let room = json!({"cpu": "64", "memory": "256Gi", "pods": "250"});
            let node: Node = serde_json::from_value(json!({
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {"capacity": room, "allocatable": room},
            }))?;
            nodes.create(&PostParams::default(), &node).await?;
        }
        wait::until("every node", READY_WITHIN, async || {
            if let Err(error) = self.check() {
                return Look::Never(error.to_string());
            }
            match nodes.list(&kube::api::ListParams::default()).await {
                Ok(list) if list.items.iter().all(takes_pods) => Look::Done(()),
                Ok(list) => {
                    let ready = list.items.iter().filter(|node| takes_pods(node)).count();
                    Look::NotYet(format!("{ready} of {count} take pods"))
                }
                Err(error) => Look::NotYet(error.to_string()),
            }
        })
        .await?;
        Ok(())
    }

    /// Arguments of a kube-controller-manager with the controllers that `controllers`
    /// names, and metrics at `port` unless that is 0.
    pub(crate) fn controller_flags(&self, controllers: &str, port: u16) -> Vec<String> {
        let kubeconfig = self.kubeconfig(Identity::Controllers);
        let mut flags = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            controllers.to_owned(),
            "--leader-elect=false".to_owned(),
            "--use-service-account-credentials=true".to_owned(),
            format!(
                "--service-account-private-key-file={}",
                self.path().join("sa.key").display()
            ),
            format!("--kube-api-qps={CLIENT_RATE}"),
            format!("--kube-api-burst={CLIENT_RATE}"),
            format!("--secure-port={port}"),
        ];
        if port != 0 {
            flags.extend([
                "--bind-address=127.0.0.1".to_owned(),
                "--authorization-always-allow-paths=/metrics".to_owned(),
            ]);
        }
        flags
    }

    fn scheduler_flags(&self) -> Vec<String> {
        let kubeconfig = self.kubeconfig(Identity::Scheduler);
        vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            "--leader-elect=false".to_owned(),
            format!("--kube-api-qps={CLIENT_RATE}"),
            format!("--kube-api-burst={CLIENT_RATE}"),
            "--secure-port=0".to_owned(),
        ]
    }

    fn kwok_flags(&self, stages: &Path) -> Vec<String> {
        let kubeconfig = self.kubeconfig(Identity::Admin);
        vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--config={}", stages.display()),
            "--manage-all-nodes=true".to_owned(),
            "--node-lease-duration-seconds=40".to_owned(),
            "--cidr=10.244.0.0/16".to_owned(),
        ]
    }
}

fn takes_pods(node: &Node) -> bool {
    let tainted = node
        .spec
        .as_ref()
        .and_then(|spec| spec.taints.as_ref())
        .is_some_and(|taints| !taints.is_empty());
    let ready = node
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready && !tainted
}

async fn text(client: &Client, path: &str) -> anyhow::Result<String> {
    let request = http::Request::get(path).body(Vec::new())?;
    client
        .request_text(request)
        .await
        .with_context(|| format!("ask for {path}"))
}

/// A port of loopback that nobody listens at.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn kubeconfig_path(folder: &Path, identity: Identity) -> PathBuf {
    folder.join(format!("{}.kubeconfig", identity.token()))
}

/// The key pair of service accounts, the token of every identity, and its kubeconfig.
fn write_credentials(folder: &Path, port: u16) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    fs::write(folder.join("sa.key"), key.serialize_pem())?;
    fs::write(folder.join("sa.pub"), key.public_key_pem())?;
    let mut tokens = String::new();
    for identity in Identity::ALL {
        let (token, user, groups) = (identity.token(), identity.user(), identity.groups());
        writeln!(tokens, "{token},{user},{token},\"{groups}\"")?;
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {
                "server": format!("https://127.0.0.1:{port}"),
                "insecure-skip-tls-verify": true,
            }}],
            "users": [{"name": token, "user": {"token": token}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": token}}],
        });
        fs::write(kubeconfig_path(folder, identity), config.to_string())?;
    }
    fs::write(folder.join("tokens.csv"), tokens)?;
    Ok(())
}

async fn config(folder: &Path) -> anyhow::Result<Config> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig_path(folder, Identity::Admin))?;
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
    // Whatever the environment says: everything here is on loopback.
    config.proxy_url = None;
    Ok(config)
}

fn etcd_flags(folder: &Path, url: &str) -> anyhow::Result<Vec<String>> {
    let peer = format!("http://127.0.0.1:{}", free_port()?);
    Ok(vec![
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // Disks differ more than anything that is measured here.
        "--unsafe-no-fsync".to_owned(),
    ])
}

fn api_flags(folder: &Path, etcd: &str, port: u16) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    vec![
        format!("--etcd-servers={etcd}"),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--secure-port={port}"),
        format!("--cert-dir={}", file("certificates")),
        format!("--service-account-key-file={}", file("sa.pub")),
        format!("--service-account-signing-key-file={}", file("sa.key")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--token-auth-file={}", file("tokens.csv")),
        "--authorization-mode=RBAC".to_owned(),
        "--endpoint-reconciler-type=none".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_listens_outside_loopback() {
        let folder = Path::new("/x");
        let mut flags = api_flags(folder, "http://127.0.0.1:1", 2);
        flags.extend(etcd_flags(folder, "http://127.0.0.1:1").unwrap());
        for flag in flags {
            if flag.contains("bind-address") || flag.contains("listen-") {
                assert!(flag.contains("127.0.0.1"), "{flag}");
            }
        }
    }

    #[test]
    fn the_operator_is_no_administrator_to_the_request_queues() {
        let folder = tempfile::tempdir().unwrap();
        write_credentials(folder.path(), 1).unwrap();
        let tokens = fs::read_to_string(folder.path().join("tokens.csv")).unwrap();
        let line = tokens.lines().find(|line| line.starts_with("operator,"));
        let line = line.unwrap();
        assert!(line.contains("system:serviceaccount:llama-system:llama-operator"));
        assert!(!line.contains("system:masters"), "{line}");
        for identity in Identity::ALL {
            assert!(kubeconfig_path(folder.path(), identity).is_file());
        }
    }
}
