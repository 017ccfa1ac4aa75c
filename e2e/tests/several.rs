//! Three real nodes or more: a model is fetched once a node however many deployments serve it, a
//! group runs over two nodes, and the loss of one of them is one recreation.
//!
//! `LLAMA_TEST_DEPLOYMENTS` says how many deployments of one model there are at once.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use llama_e2e::cache::Cache;
use llama_e2e::components;
use llama_e2e::local::layout::Layout;
use llama_e2e::local::namespace::Namespace;
use llama_e2e::local::node::Node;
use llama_e2e::local::start;
use llama_e2e::provider::Provider;
use llama_e2e::wait::Look;
use llama_model::fixture::TinyLlama;
use serde_json::{Value, json};
use support::small::thousandths;
use support::{
    CHILDREN, Place, READY_WITHIN, condition, deployment, make_claim, make_claim_of, place, store,
};

/// How many deployments of one model there are.
const COUNT_VARIABLE: &str = "LLAMA_TEST_DEPLOYMENTS";
const MOST: u32 = 300;
/// Thousandths of a CPU that a pod asks for, and that are left for the operator and the
/// store.
const ASKED: u64 = 5;
const OTHERS: u64 = 100;
const NODES: usize = 3;
const FILE: &str = "tiny.gguf";
/// Name of the claim and folder with the store's objects.
const OBJECTS: &str = "objects";
/// What one deployment more may take, on a machine that is busy.
const EACH_WITHIN: Duration = Duration::from_secs(6);
/// Objects that one call of kubectl creates.
const CHUNK: usize = 50;
/// Label of the fetching container's pods.
const OURS: &str = "llmops.dev/group";
/// Label of nodes that says which of them are near each other.
const RACK: &str = "llmops.dev/e2e-rack";
/// A deployment of a group of two ranks on two nodes.
const PAIR: &str = "pair";
/// What a node is said to have where nobody will start its pods again.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";
/// Kubernetes waits 50 s for a word of a node, then the pods wait as long as they tolerate.
const LOST_WITHIN: Duration = Duration::from_mins(3);

/// A place on a cluster of several nodes, with the store and a cache on each node; gives
/// the model's digest too.
async fn several_nodes(namespace: &str) -> anyhow::Result<Option<(Place, String)>> {
    let Some(place) = place(namespace).await? else {
        return Ok(None);
    };
    let count = place.cluster.nodes.len();
    if count < NODES {
        eprintln!("skipped: this cluster has {count} nodes that can be reached, not {NODES}");
        return Ok(None);
    }
    let volumes = place.cluster.volumes.as_ref().context("volumes")?;
    let bucket = volumes.here.join(OBJECTS).join(store::BUCKET);
    std::fs::create_dir_all(&bucket)?;
    let file = bucket.join(FILE);
    TinyLlama::default().gguf().write(&file)?;
    let digest = store::digest(&file).await?;
    let objects = volumes.on_node.join(OBJECTS);
    make_claim(&place, OBJECTS, &objects.to_string_lossy()).await?;
    let data = json!({"name": store::DATA, "persistentVolumeClaim": {"claimName": OBJECTS}});
    store::start(&place, &data, &json!([])).await?;

    for folder in cache_folders(&place) {
        store::empty_cache(&folder)?;
    }
    let on_node = place.cluster.nodes[0].volumes.on_node.join(store::CACHE);
    make_claim_of(
        &place,
        store::CACHE,
        &on_node.to_string_lossy(),
        "ReadWriteMany",
    )
    .await?;
    Ok(Some((place, digest)))
}

/// The folders that nodes see at the path of the cache's volume.
fn cache_folders(place: &Place) -> Vec<PathBuf> {
    let nodes = place.cluster.nodes.iter();
    nodes
        .map(|node| node.volumes.here.join(store::CACHE))
        .collect()
}

/// A rank of the smallest model there is, from the store by way of the cache.
fn tiny(name: &str, digest: &str, change: impl FnOnce(&mut Value)) -> Value {
    deployment(name, |object| {
        let spec = &mut object["spec"];
        spec["model"] = store::model(FILE, digest, store::STORE, "64Mi");
        spec["parallelism"] = json!({"tensor": 1});
        spec["resources"] =
            json!({"accelerator": "Cpu", "cpu": format!("{ASKED}m"), "memory": "96Mi"});
        spec["context"] = json!({"maxTokens": 128});
        // Otherwise a pod would read the model's headers from the store.
        spec["planPolicy"] = json!("Disabled");
        change(object);
    })
}

/// Two a node or more, or every one would fetch the model.
fn wanted_count(nodes: usize) -> anyhow::Result<u32> {
    let least = 2 * u32::try_from(nodes)?;
    let Ok(text) = std::env::var(COUNT_VARIABLE) else {
        return Ok(least);
    };
    let count = text
        .parse()
        .ok()
        .filter(|count| (least..=MOST).contains(count));
    count.with_context(|| format!("{COUNT_VARIABLE}={text}: expected {least} to {MOST}"))
}

#[tokio::test]
async fn many_deployments_fetch_a_model_once_a_node() -> anyhow::Result<()> {
    let Some((place, digest)) = several_nodes("e2e-several").await? else {
        return Ok(());
    };
    let nodes = &place.cluster.nodes;
    let count = wanted_count(nodes.len())?;
    let node = place.get(["node", &nodes[0].name]).await?;
    let each = thousandths(&node["status"]["allocatable"]["cpu"])?.saturating_sub(OTHERS) / ASKED;
    ensure!(
        u64::from(count).div_ceil(nodes.len().try_into()?) <= each,
        "a node has room for {each} deployments; {count} need more than {} nodes",
        nodes.len()
    );
    let within = READY_WITHIN + EACH_WITHIN * count;
    let start = Instant::now();
    let told = |what: &str| eprintln!("{what} after {:.1} s", start.elapsed().as_secs_f32());
    let mut objects = Vec::new();
    for (number, node) in (0..count).zip(nodes.iter().cycle()) {
        let mut object = tiny(&format!("d{number}"), &digest, |object| {
            object["spec"]["placement"] =
                json!({"nodeSelector": {"kubernetes.io/hostname": node.name}});
        });
        object["metadata"]["namespace"] = json!(place.namespace);
        objects.push(object);
    }
    for chunk in objects.chunks(CHUNK) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": chunk});
        place.cluster.apply(&list.to_string()).await?;
    }
    told(&format!("{count} deployments are applied"));
    all_ready(&place, count, within).await?;
    told("all are Ready");
    fetched_once_a_node(&place, count).await?;
    let mut answers = Vec::new();
    for number in 0..NODES {
        answers.push(answer(&place, &format!("d{number}")).await?);
    }
    ensure!(
        answers.iter().all(|text| *text == answers[0]),
        "{answers:?}"
    );

    let start = Instant::now();
    place
        .kubectl(["delete", "ld", "--all", "--wait=false"])
        .await?;
    all_gone(&place, within).await?;
    eprintln!("all are gone after {:.1} s", start.elapsed().as_secs_f32());
    place.remove_namespace().await
}

/// Waits until all deployments serve.
async fn all_ready(place: &Place, count: u32, within: Duration) -> anyhow::Result<()> {
    let said = "jsonpath={range .items[*]}{.status.conditions[?(@.type==\"Ready\")].status} {.status.readyReplicas}{\"\\n\"}{end}";
    let look = async || match place.kubectl(["get", "ld", "--output", said]).await {
        Ok(text) => {
            let ready = text.lines().filter(|line| *line == "True 1").count();
            if u32::try_from(ready) == Ok(count) {
                Look::Done(())
            } else {
                pause().await;
                Look::NotYet(format!("{ready} of {count} are Ready"))
            }
        }
        Err(error) => Look::NotYet(error.to_string()),
    };
    let what = "every deployment Ready";
    place
        .cluster
        .wait_for(&place.namespace, what, within, look)
        .await?;
    Ok(())
}

/// Looks at hundreds of objects cost the cluster something.
async fn pause() {
    tokio::time::sleep(Duration::from_secs(1)).await;
}

/// Of each node's pods one fetched the model and the others found it, by what they said
/// and by what the store answered.
async fn fetched_once_a_node(place: &Place, count: u32) -> anyhow::Result<()> {
    let pods = place.get(["pods", "--selector", OURS]).await?;
    let mut nodes = BTreeMap::new();
    for pod in pods["items"].as_array().context("pods")? {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let node = text(&pod["spec"]["nodeName"]);
        nodes.insert(text(&pod["metadata"]["name"]), node.clone());
        nodes.insert(text(&pod["status"]["podIP"]), node);
    }
    let logs = place
        .kubectl([
            "logs",
            "--selector",
            OURS,
            "--container",
            "fetch-model",
            "--prefix",
            "--tail=-1",
            &format!("--max-log-requests={MOST}"),
        ])
        .await?;
    let found: Vec<&str> = logs
        .lines()
        .filter(|line| line.contains("the cache has the model"))
        .filter_map(|line| line.strip_prefix("[pod/")?.split('/').next())
        .collect();
    let mut fetched: BTreeMap<&str, u32> = BTreeMap::new();
    for (pod, node) in nodes.iter().filter(|(pod, _)| pod.starts_with('d')) {
        *fetched.entry(node).or_default() += u32::from(!found.contains(&pod.as_str()));
    }
    ensure!(nodes.len() == 2 * usize::try_from(count)?, "{nodes:?}");
    let all = place.cluster.nodes.len();
    let once = |by_node: &BTreeMap<&str, u32>| {
        by_node.len() == all && by_node.values().all(|fetches| *fetches == 1)
    };
    ensure!(once(&fetched), "pods that fetched, by node: {fetched:?}");

    let log = place.kubectl(["logs", store::STORE, "--tail=-1"]).await?;
    let (mut served, mut clients) = (BTreeMap::new(), BTreeSet::new());
    for line in log.lines().filter(|line| line.contains(FILE)) {
        let words: Vec<&str> = line.split('|').map(str::trim).collect();
        let client = words.iter().find(|word| nodes.contains_key(**word));
        let client = *client.with_context(|| format!("a pod of ours in {line:?}"))?;
        clients.insert(client);
        // A part of it (206) only tells how long it is.
        let whole = words.contains(&"200") && words.contains(&"GET");
        *served.entry(nodes[client].as_str()).or_default() += u32::from(whole);
    }
    ensure!(
        once(&served) && clients.len() == all,
        "whole answers of the store, by node: {served:?}\n{log}"
    );
    Ok(())
}

async fn answer(place: &Place, name: &str) -> anyhow::Result<String> {
    let forward = place.forward(name).await?;
    forward.complete(name, "the", 16).await
}

/// Waits until nothing of any deployment is left.
async fn all_gone(place: &Place, within: Duration) -> anyhow::Result<()> {
    let kinds = format!("{CHILDREN},endpointslices");
    let ours = "llmops.dev/deployment";
    let look = async || {
        let children = place.kubectl(["get", &kinds, "--selector", ours, "--output", "name"]);
        let itself = place.kubectl(["get", "ld", "--output", "name"]);
        match tokio::try_join!(children, itself) {
            Ok((children, itself)) if children.is_empty() && itself.is_empty() => Look::Done(()),
            Ok((children, itself)) => {
                pause().await;
                let (children, itself) = (children.lines().count(), itself.lines().count());
                Look::NotYet(format!(
                    "{itself} deployments and {children} objects of them"
                ))
            }
            Err(error) => Look::NotYet(error.to_string()),
        }
    };
    let what = "the end of all deployments";
    place
        .cluster
        .wait_for(&place.namespace, what, within, look)
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_lost_node_is_one_recreation_elsewhere() -> anyhow::Result<()> {
    let Some((place, digest)) = several_nodes("e2e-lost").await? else {
        return Ok(());
    };
    if place.cluster.provider != Provider::Local {
        eprintln!("skipped: only of the local cluster a node can be lost");
        return Ok(());
    }
    let layout = Layout::new(&place.cluster.name)?;
    let lost = Node::numbered(&layout, 3).context("a third node")?;
    let outcome = spread_and_lost(&place, &digest, lost).await;
    // Whatever happened: other tests need the nodes.
    repair(&place, lost).await?;
    outcome?;
    place.remove_namespace().await
}

async fn spread_and_lost(place: &Place, digest: &str, lost: Node<'_>) -> anyhow::Result<()> {
    let [first, second, third] = [0, 1, 2].map(|index| &place.cluster.nodes[index].name);
    for (node, rack) in [(first, "a"), (second, "b"), (third, "b")] {
        label(place, node, &format!("{RACK}={rack}")).await?;
    }
    place.apply(tiny("single", digest, |_| ())).await?;
    place.apply(pair(place, digest).await?).await?;
    place.wait_ready("single", 1).await?;
    let expected = answer(place, "single").await?;
    place.kubectl(["delete", "ld", "single"]).await?;
    let before = place.wait_ready(PAIR, 1).await?;
    // The first node has room for one of them, but is in another rack.
    runs_on(&before, [second, third])?;
    let said = answer(place, PAIR).await?;
    ensure!(said == expected, "{said:?}, and one rank said {expected:?}");

    label(place, first, &format!("{RACK}=b")).await?;
    let daemons = ["kubelet", "containerd"];
    let killed = Namespace::find(lost)?.context("a node")?.kill(&daemons)?;
    ensure!(killed == daemons.len(), "{killed} daemons were killed");
    let start = Instant::now();
    let told = |what: &str| eprintln!("{what} after {:.1} s", start.elapsed().as_secs_f32());
    let failure = |object: &Value| object["status"]["groups"][0]["lastFailure"].clone();
    let object = place
        .wait_for(PAIR, "the lost node by name", LOST_WITHIN, |object| {
            failure(object)["reason"] == "NodeLost"
        })
        .await?;
    told(&format!("{}", failure(&object)));
    ensure!(
        failure(&object)["node"] == json!(third),
        "{}",
        failure(&object)
    );
    // Somebody has to say that nothing runs there any more; until then a group that is
    // made again could meet the old one.
    place
        .kubectl(["taint", "node", third, OUT_OF_SERVICE, "--overwrite"])
        .await?;
    let epoch = |object: &Value| object["status"]["groups"][0]["epoch"].as_i64();
    let next = epoch(&before).map(|epoch| epoch + 1);
    let object = place
        .wait_for(PAIR, "the next epoch", LOST_WITHIN, |object| {
            epoch(object) >= next && condition(object, "Ready").starts_with("True")
        })
        .await?;
    told("Ready elsewhere");
    ensure!(epoch(&object) == next, "more than one recreation: {object}");
    runs_on(&object, [first, second])?;
    let said = answer(place, PAIR).await?;
    ensure!(said == expected, "{said:?}, and one rank said {expected:?}");
    Ok(())
}

/// A group of two ranks, each of which takes more than half of a node, on nodes of one rack.
async fn pair(place: &Place, digest: &str) -> anyhow::Result<Value> {
    let node = place.get(["node", &place.cluster.nodes[0].name]).await?;
    let half = thousandths(&node["status"]["allocatable"]["cpu"])? / 2;
    Ok(tiny(PAIR, digest, |object| {
        let spec = &mut object["spec"];
        spec["parallelism"] = json!({"tensor": 2, "nodes": 2});
        spec["resources"]["cpu"] = json!(format!("{}m", half + 100));
        spec["placement"] = json!({
            "topology": {"required": RACK},
            "tolerations": [{
                "key": "node.kubernetes.io/unreachable", "operator": "Exists",
                "effect": "NoExecute", "tolerationSeconds": 5,
            }],
        });
    }))
}

fn runs_on(object: &Value, nodes: [&String; 2]) -> anyhow::Result<()> {
    let found = &object["status"]["groups"][0]["nodes"];
    let mut names: Vec<&str> = found
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    names.sort_unstable();
    ensure!(names == nodes, "on {names:?}, not {nodes:?}");
    Ok(())
}

async fn label(place: &Place, node: &str, label: &str) -> anyhow::Result<()> {
    place
        .kubectl(["label", "node", node, label, "--overwrite"])
        .await?;
    Ok(())
}

/// Brings the node back as it was before.
async fn repair(place: &Place, lost: Node<'_>) -> anyhow::Result<()> {
    let cache = Cache::from_environment()?;
    let programs = components::build(&cache, &components::ALL).await?;
    start::restart(lost, &programs).await?;
    let name = lost.name();
    let taints = place.get(["node", &name]).await?["spec"]["taints"].to_string();
    let key = OUT_OF_SERVICE.split('=').next().unwrap_or_default();
    if taints.contains(key) {
        place
            .kubectl(["taint", "node", &name, &format!("{key}-")])
            .await?;
    }
    for node in &place.cluster.nodes {
        label(place, &node.name, &format!("{RACK}-")).await?;
    }
    Ok(())
}
