//! Groups get their nodes whole or not at all: the real API server, the real scheduler,
//! nodes without a kubelet.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

#[path = "support/control_plane.rs"]
mod control_plane;
#[path = "support/groups.rs"]
mod groups;

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use control_plane::{control_plane, programs};
use groups::{
    NAMESPACE, bound, create_with, end_deleted_pods, install_crd, make_node, remove, scheduled,
    until,
};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::args::Args;
use serde_json::json;

/// How often two groups compete, unless the variable says otherwise.
const TRIES: usize = 8;
const TRIES_VARIABLE: &str = "LLAMA_TEST_TRIES";

#[tokio::test]
async fn two_groups_that_want_most_gpus_never_hold_half_each() -> anyhow::Result<()> {
    let Some(programs) = programs() else {
        return Ok(());
    };
    let mut plane = control_plane(&programs).await?;
    plane.start_scheduler(&programs)?;
    let client = plane.client.clone();
    install_crd(&client).await?;
    for (index, name) in ["gpu-0", "gpu-1"].into_iter().enumerate() {
        make_node(&client, name, ["r1", "r2"][index]).await?;
    }
    let args = Args::try_parse_from([
        "llama-operator",
        "--worker-image=llama-operator/worker:test",
        "--listen=127.0.0.1:0",
    ])?;
    let program = llama_operator::run::run_with(client.clone(), args);
    let story = async {
        let tries = std::env::var(TRIES_VARIABLE).map_or(Ok(TRIES), |tries| tries.parse())?;
        for attempt in 0..tries {
            compete(&client)
                .await
                .with_context(|| format!("try {attempt}"))?;
        }
        the_topology_that_is_required_is_waited_for(&client).await?;
        a_group_lies_in_the_first_pool_with_room(&client).await
    };
    tokio::select! {
        ended = program => bail!("the operator ended: {ended:?}"),
        result = story => result,
    }
}

/// Two groups of two pods, of which each wants six of eight GPUs of each of two nodes.
async fn compete(client: &Client) -> anyhow::Result<()> {
    let names = ["a", "b"];
    let (one, other) = tokio::join!(create(client, "a", None), create(client, "b", None));
    one.and(other)?;
    let runs = until("one runs and one waits", async || {
        let bound = [bound(client, "a").await?, bound(client, "b").await?];
        ensure!(
            bound.iter().any(Vec::is_empty),
            "both groups hold a part of the nodes: {bound:?}"
        );
        let first = bound.iter().position(|nodes| nodes.len() == 2);
        let waits = bound.iter().position(Vec::is_empty);
        let (Some(first), Some(waits)) = (first, waits) else {
            return Ok(None);
        };
        let said = scheduled(client, names[waits]).await?;
        Ok(said
            .starts_with("False/InsufficientRoom")
            .then_some((first, said)))
    })
    .await?;
    let (first, said) = runs;
    ensure!(
        said.contains("2 pods each need 6 nvidia.com/gpu") && said.contains("gpu-0 has 2"),
        "{said}"
    );
    let waits = names[1 - first];
    remove(client, names[first]).await?;
    until("the other gets its place", async || {
        end_deleted_pods(client).await?;
        Ok((bound(client, waits).await?.len() == 2).then_some(()))
    })
    .await?;
    remove(client, waits).await
}

async fn the_topology_that_is_required_is_waited_for(client: &Client) -> anyhow::Result<()> {
    create(client, "c", Some("example.com/rack")).await?;
    let said = until("it waits for one rack", async || {
        let said = scheduled(client, "c").await?;
        Ok(said.starts_with("False/InsufficientRoom").then_some(said))
    })
    .await?;
    ensure!(said.contains("within one example.com/rack"), "{said}");
    make_node(client, "gpu-2", "r2").await?;
    let nodes = until("it gets one rack", async || {
        let nodes = bound(client, "c").await?;
        Ok((nodes.len() == 2).then_some(nodes))
    })
    .await?;
    ensure!(nodes == ["gpu-1", "gpu-2"], "{nodes:?}");
    remove(client, "c").await
}

/// Two kinds of nodes, each tainted: admission adds tolerations of its own, which stay.
async fn a_group_lies_in_the_first_pool_with_room(client: &Client) -> anyhow::Result<()> {
    for (name, kind) in [("h-0", "h100"), ("a-0", "a100"), ("a-1", "a100")] {
        make_node(client, name, "r3").await?;
        let taint = json!({"key": "kind", "value": kind, "effect": "NoSchedule"});
        let of_kind = json!({
            "metadata": {"labels": {"kind": kind}}, "spec": {"taints": [taint]},
        });
        let nodes: Api<Node> = Api::all(client.clone());
        let params = PatchParams::default();
        nodes.patch(name, &params, &Patch::Merge(of_kind)).await?;
    }
    let pools = ["h100", "a100"].map(|kind| {
        let toleration = json!({"key": "kind", "value": kind, "effect": "NoSchedule"});
        json!({"name": kind, "nodeSelector": {"kind": kind}, "tolerations": [toleration]})
    });
    let placement = json!({"pools": pools});
    // One node of the first pool: two pods lie in the second, although the first takes one.
    create_with(client, "d", 2, placement.clone()).await?;
    let nodes = until("a group of two gets the second pool", async || {
        let nodes = bound(client, "d").await?;
        Ok((nodes.len() == 2).then_some(nodes))
    })
    .await?;
    ensure!(nodes == ["a-0", "a-1"], "{nodes:?}");
    create_with(client, "e", 1, placement.clone()).await?;
    let nodes = until("a pod alone gets the first pool", async || {
        let nodes = bound(client, "e").await?;
        Ok((nodes.len() == 1).then_some(nodes))
    })
    .await?;
    ensure!(nodes == ["h-0"], "{nodes:?}");
    until("status tells the pools", async || {
        let told = [pool(client, "d").await?, pool(client, "e").await?];
        Ok((told == ["a100", "h100"]).then_some(()))
    })
    .await?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let tolerations = pods
        .get("e-0-0")
        .await?
        .spec
        .and_then(|spec| spec.tolerations);
    let keys: Vec<_> = tolerations
        .iter()
        .flatten()
        .filter_map(|toleration| toleration.key.as_deref())
        .collect();
    ensure!(keys.contains(&"kind"), "{keys:?}");
    ensure!(keys.contains(&"node.kubernetes.io/not-ready"), "{keys:?}");
    create_with(client, "f", 1, placement).await?;
    let said = until("the next waits", async || {
        let said = scheduled(client, "f").await?;
        Ok(said.starts_with("False/InsufficientRoom").then_some(said))
    })
    .await?;
    ensure!(said.contains("pool h100: none has 6, h-0 has 2"), "{said}");
    ensure!(said.contains("pool a100: none has 6, a-0 has 2"), "{said}");
    remove(client, "e").await?;
    until("the next gets the room that is free again", async || {
        end_deleted_pods(client).await?;
        Ok((bound(client, "f").await? == ["h-0"]).then_some(()))
    })
    .await?;
    remove(client, "d").await?;
    remove(client, "f").await
}

/// The pool of the first group.
async fn pool(client: &Client, name: &str) -> anyhow::Result<String> {
    let deployments: Api<LlamaDeployment> = Api::namespaced(client.clone(), NAMESPACE);
    let status = deployments.get(name).await?.status.unwrap_or_default();
    let group = status.groups.into_iter().next();
    Ok(group.and_then(|group| group.pool).unwrap_or_default())
}

async fn create(client: &Client, name: &str, rack: Option<&str>) -> anyhow::Result<()> {
    let topology = rack.map(|key| json!({"topology": {"required": key}}));
    create_with(client, name, 2, topology.unwrap_or(json!({}))).await
}
