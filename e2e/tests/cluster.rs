//! The local cluster itself, with two nodes: it comes up, its network, DNS, volumes and
//! images work, within a node and between them, it survives nothing by halves, and nothing
//! is left when it goes.
//!
//! Needs root, and a machine that no other cluster keeps busy, so it runs only where
//! `LLAMA_E2E_CLUSTER_TEST=1`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::cluster::{Cluster, ClusterNode};
use llama_e2e::local::layout::Layout;
use llama_e2e::local::namespace::Namespace;
use llama_e2e::local::node::Node;
use llama_e2e::local::{start, teardown};
use llama_e2e::static_programs::{self, REPOSITORY};
use llama_e2e::wait::Look;
use llama_e2e::{command, image};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

const VARIABLE: &str = "LLAMA_E2E_CLUSTER_TEST";
const NAME: &str = "selftest";
const IMAGE: &str = "llama-operator/probe:dev";
const PORT: u16 = 8080;
const UP_WITHIN: Duration = Duration::from_mins(5);
const PODS_WITHIN: Duration = Duration::from_mins(1);

#[tokio::test]
async fn local_cluster_works_and_leaves_nothing() -> anyhow::Result<()> {
    if std::env::var(VARIABLE).as_deref() != Ok("1") {
        eprintln!("skipped: {VARIABLE}=1 runs it, as root");
        return Ok(());
    }
    let layout = Layout::new(NAME)?;
    llama_cluster(&["down"]).await?;
    let before = Machine::look().await?;

    llama_cluster(&["up", "--provider", "local", "--nodes", "2"]).await?;
    let outcome = everything(&layout).await;
    if outcome.is_err()
        && let Ok(cluster) = Cluster::attach(NAME)
    {
        eprintln!("{}", cluster.state("default").await);
    }
    let down = llama_cluster(&["down"]).await;
    outcome?;
    down?;

    let left = teardown::leftovers(&layout)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(before == Machine::look().await?, "the machine has changed");
    let again = llama_cluster(&["down"]).await?;
    ensure!(again.contains("nothing was there"), "{again}");
    Ok(())
}

async fn everything(layout: &Layout) -> anyhow::Result<()> {
    let cluster = Cluster::attach(NAME)?;
    let archive = probe_image().await?;
    for _ in 0..2 {
        llama_cluster(&["load-image", archive.to_str().context("a path")?]).await?;
    }
    std::fs::write(layout.volumes().join("model"), "weights")?;
    for node in &cluster.nodes {
        std::fs::write(node.volumes.here.join("name"), &node.name)?;
    }
    start_pods(&cluster).await?;
    names_resolve(&cluster).await?;
    services_answer(&cluster).await?;
    reachable_from_the_machine(&cluster).await?;
    volumes_and_processes(&cluster).await?;

    let first = holder(layout)?;
    llama_cluster(&["up", "--provider", "local"]).await?;
    ensure!(holder(layout)? == first, "a healthy cluster was rebuilt");
    let refused = llama_cluster(&["up", "--nodes", "3"]).await;
    let said = refused.err().context("a third node")?.to_string();
    ensure!(
        said.contains("exists with 2 nodes") && said.contains("down"),
        "{said}"
    );
    ensure!(holder(layout)? == first, "a healthy cluster was rebuilt");
    broken_clusters_are_rebuilt(&cluster, layout).await?;
    start_pods_again(&archive).await?;
    kill(layout, 2, &["kube-proxy", "llama-cluster"])?;
    kill(layout, 1, &["containerd", "etcd", "kubelet"])
}

/// Runs the program under test; returns what it says on standard error.
async fn llama_cluster(arguments: &[&str]) -> anyhow::Result<String> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_llama-cluster"));
    child.args(["--name", NAME]).args(arguments);
    let output = tokio::time::timeout(UP_WITHIN, child.kill_on_drop(true).output()).await??;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "llama-cluster {arguments:?}: {said}"
    );
    Ok(said)
}

/// What of the machine a cluster must leave as it was.
#[derive(PartialEq, Eq)]
struct Machine {
    links: String,
    mounts: String,
    rules: String,
    forwarding: String,
    overcommit: String,
    panic: String,
}

impl Machine {
    async fn look() -> anyhow::Result<Self> {
        let quick = Duration::from_secs(10);
        let links = command::run(Command::new("ip").args(["-brief", "link"]), quick).await?;
        let rules = command::run(&mut Command::new("iptables-save"), quick).await?;
        let read = |path: &str| std::fs::read_to_string(path);
        Ok(Self {
            links,
            mounts: read("/proc/self/mountinfo")?,
            // Comments carry the time.
            rules: rules
                .lines()
                .filter(|line| !line.starts_with('#'))
                .collect(),
            forwarding: read("/proc/sys/net/ipv4/ip_forward")?,
            overcommit: read("/proc/sys/vm/overcommit_memory")?,
            panic: read("/proc/sys/kernel/panic")?,
        })
    }
}

fn holder(layout: &Layout) -> anyhow::Result<i32> {
    Ok(Namespace::find(Node::first(layout))?
        .context("no holder")?
        .holder())
}

async fn probe_image() -> anyhow::Result<PathBuf> {
    let programs = static_programs::build(&["llama-pause"]).await?;
    let definition = Path::new(REPOSITORY).join("deploy/images/probe.yaml");
    let inputs = BTreeMap::from([("llama-probe".to_owned(), programs.join("llama-probe"))]);
    let archive = programs.join("probe.tar");
    image::build(&definition, &inputs, &archive)?;
    Ok(archive)
}

/// A pod on a node that answers with its name and sees the node's own folder.
fn pod(name: &str, node: &ClusterNode) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "hostname": format!("{name}-0"), "subdomain": "inner",
            "nodeSelector": {"kubernetes.io/hostname": node.name},
            "volumes": [{"name": "node", "hostPath": {"path": node.volumes.on_node}}],
            "containers": [{
                "name": "probe", "image": IMAGE, "args": ["serve", PORT.to_string(), name],
                "volumeMounts": [{"name": "node", "mountPath": "/node", "readOnly": true}],
                "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
                "resources": {"limits": {"cpu": "100m", "memory": "32Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                    "runAsNonRoot": true, "capabilities": {"drop": ["ALL"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }],
        },
    })
}

async fn start_pods(cluster: &Cluster) -> anyhow::Result<()> {
    let service = |name: &str, spec: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec});
    let (first, second) = (&cluster.nodes[0], &cluster.nodes[1]);
    let mut client = pod("client", second);
    let spec = &mut client["spec"];
    let models = json!({"name": "models", "persistentVolumeClaim": {"claimName": "models"}});
    spec["volumes"] = json!([spec["volumes"][0], models]);
    let mounts = &mut spec["containers"][0]["volumeMounts"];
    let models = json!({"name": "models", "mountPath": "/models", "readOnly": true});
    *mounts = json!([mounts[0], models]);
    let mut missing = pod("missing", second);
    missing["spec"]["containers"][0]["image"] = json!("llama-operator/no-such-image:dev");
    let volumes = cluster.volumes.as_ref().context("volumes")?;
    let claim = json!({
        "storageClassName": "", "accessModes": ["ReadOnlyMany"],
        "resources": {"requests": {"storage": "1Gi"}},
    });
    let items = [
        pod("server", first),
        pod("neighbour", second),
        client,
        missing,
        service(
            "server",
            json!({"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": PORT}]}),
        ),
        service(
            "neighbour",
            json!({"selector": {"app": "neighbour"}, "ports": [{"port": 80, "targetPort": PORT}]}),
        ),
        service(
            "inner",
            json!({"clusterIP": "None", "selector": {"app": "server"}}),
        ),
        json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "models"},
            "spec": {
                "storageClassName": "", "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadOnlyMany"], "hostPath": {"path": volumes.on_node},
            },
        }),
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": claim}),
    ];
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    cluster.apply(&list.to_string()).await?;
    for name in ["server", "neighbour", "client"] {
        ready(cluster, name).await?;
    }
    let what = "the refusal of an image that is nowhere";
    cluster
        .wait_for("default", what, PODS_WITHIN, async || {
            let Ok(pod) = cluster.get(["pod", "missing"]).await else {
                return Look::NotYet("no pod".to_owned());
            };
            let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"];
            match waiting.as_str() {
                Some("ErrImagePull" | "ImagePullBackOff") => Look::Done(()),
                _ => Look::NotYet(waiting.to_string()),
            }
        })
        .await?;
    Ok(())
}

async fn ready(cluster: &Cluster, pod: &str) -> anyhow::Result<()> {
    let pod = format!("pod/{pod}");
    cluster
        .wait_for("default", &pod, PODS_WITHIN, async || {
            let wait = ["wait", "--for=condition=Ready", &pod, "--timeout=5s"];
            Look::retrying(cluster.kubectl(wait).await)
        })
        .await?;
    Ok(())
}

/// Runs the probe in the pod `client`.
async fn probe(cluster: &Cluster, arguments: [&str; 2]) -> anyhow::Result<String> {
    let exec = ["exec", "client", "--", "/llama-probe"];
    let said = cluster.kubectl(exec.into_iter().chain(arguments)).await?;
    Ok(said.trim().to_owned())
}

async fn names_resolve(cluster: &Cluster) -> anyhow::Result<()> {
    let address = cluster.get(["pod", "server"]).await?["status"]["podIP"].clone();
    let service = cluster.get(["service", "server"]).await?["spec"]["clusterIP"].clone();
    let cases = [
        ("server", &service),
        ("server.default.svc.cluster.local", &service),
        ("inner", &address),
        ("server-0.inner", &address),
        ("server-0.inner.default.svc", &address),
    ];
    for (name, expected) in cases {
        let found = probe(cluster, ["lookup", name]).await?;
        ensure!(
            json!(found) == *expected,
            "{name} is {found}, not {expected}"
        );
    }
    for unknown in ["no-such-service", "example.com"] {
        ensure!(
            probe(cluster, ["lookup", unknown]).await.is_err(),
            "{unknown} resolves"
        );
    }
    Ok(())
}

async fn services_answer(cluster: &Cluster) -> anyhow::Result<()> {
    let service = cluster.get(["service", "server"]).await?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("a ClusterIP")?;
    for target in ["server:80", &format!("{address}:80"), "server-0.inner:8080"] {
        let said = probe(cluster, ["get", target]).await?;
        ensure!(said == "server", "{target} said {said}");
    }
    // A pod reaches itself through its Service, too, its neighbour on the same node, and
    // the other way from the first node to the second.
    for (from, to) in [
        ("server", "server"),
        ("client", "neighbour"),
        ("server", "neighbour"),
    ] {
        let target = format!("{to}:80");
        let get = ["exec", from, "--", "/llama-probe", "get", &target];
        let said = cluster.kubectl(get).await?;
        ensure!(said.trim() == to, "{target} said {said} to {from}");
    }
    Ok(())
}

async fn reachable_from_the_machine(cluster: &Cluster) -> anyhow::Result<()> {
    for pod in ["server", "neighbour"] {
        let log = cluster.kubectl(["logs", pod]).await?;
        ensure!(log.contains("serving on port 8080"), "{log}");
    }
    let mut forward = cluster
        .kubectl_command()
        .args(["port-forward", "service/server", ":80"])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut line = String::new();
    let mut said = BufReader::new(forward.stdout.take().context("standard output")?);
    tokio::time::timeout(PODS_WITHIN, said.read_line(&mut line)).await??;
    let address = line.split(' ').nth(2).context("an address")?;
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await?;
    let mut answer = String::new();
    tokio::time::timeout(PODS_WITHIN, stream.read_to_string(&mut answer)).await??;
    ensure!(answer.ends_with("\r\n\r\nserver"), "{answer}");
    forward.kill().await?;
    Ok(())
}

async fn volumes_and_processes(cluster: &Cluster) -> anyhow::Result<()> {
    let processes = cluster.processes("default", "client", "probe").await?;
    let process = processes.first().context("a process")?;
    ensure!(
        process.arguments[..2] == ["/llama-probe", "serve"],
        "{process:?}"
    );
    let inside = format!("/proc/{}/root/models/model", process.pid);
    let node = cluster.nodes[1].name.as_str();
    ensure!(cluster.on_node(node, &["cat", &inside]).await? == "weights");
    // One path, and another folder on each node.
    for (pod, node) in [("server", &cluster.nodes[0]), ("client", &cluster.nodes[1])] {
        let processes = cluster.processes("default", pod, "probe").await?;
        let pid = processes.first().context("a process")?.pid;
        let inside = format!("/proc/{pid}/root/node/name");
        let said = cluster.on_node(&node.name, &["cat", &inside]).await?;
        ensure!(said == node.name, "{pod} sees the folder of {said}");
    }

    cluster.signal(node, process, "KILL").await?;
    cluster
        .wait_for("default", "a restart", PODS_WITHIN, async || {
            let pod = cluster.get(["pod", "client"]).await.unwrap_or_default();
            let count = &pod["status"]["containerStatuses"][0]["restartCount"];
            if *count == json!(1) {
                Look::Done(())
            } else {
                Look::NotYet(format!("restarts: {count}"))
            }
        })
        .await?;
    Ok(())
}

/// Kills daemons of a node.
fn kill(layout: &Layout, number: u8, names: &[&str]) -> anyhow::Result<()> {
    let node = Node::numbered(layout, number).context("a number")?;
    let killed = Namespace::find(node)?.context("a node")?.kill(names)?;
    ensure!(killed == names.len(), "{killed} of {names:?} ran");
    Ok(())
}

async fn broken_clusters_are_rebuilt(cluster: &Cluster, layout: &Layout) -> anyhow::Result<()> {
    let first = holder(layout)?;
    kill(layout, 2, &["kubelet"])?;
    ensure!(llama_cluster(&["status"]).await.is_err(), "status is well");
    let well = start::daemons(Node::first(layout))?;
    ensure!(well.iter().all(|(_, runs)| *runs), "{well:?}");
    llama_cluster(&["up", "--provider", "local"]).await?;
    let second = holder(layout)?;
    ensure!(second != first, "a broken cluster was kept");
    ensure!(Cluster::attach(NAME)?.nodes == cluster.nodes, "other nodes");
    kill(layout, 1, &["coredns", "kubelet"])?;
    llama_cluster(&["up", "--provider", "local"]).await?;
    ensure!(holder(layout)? != second, "a broken cluster was kept");
    Ok(())
}

async fn start_pods_again(archive: &Path) -> anyhow::Result<()> {
    let cluster = Cluster::attach(NAME)?;
    cluster.load_image(archive).await?;
    for (name, node) in ["server", "client"].iter().zip(&cluster.nodes) {
        cluster.apply(&pod(name, node).to_string()).await?;
    }
    ready(&cluster, "server").await?;
    ready(&cluster, "client").await
}
