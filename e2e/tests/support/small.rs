//! A deployment of small groups on one node, which start within seconds.

use anyhow::Context as _;
use serde_json::{Value, json};

use super::{Place, deployment};

/// The name of the deployment.
pub(crate) const NAME: &str = "smollm2";
/// CPU of each group where room plays no part.
const CPU: &str = "100m";
/// Thousandths of a CPU that are left for others.
const SPARED: u64 = 100;

/// A deployment with `groups` groups of one rank.
pub(crate) fn small(groups: u32, change: impl FnOnce(&mut Value)) -> Value {
    deployment(NAME, |object| {
        object["spec"]["replicas"] = json!(groups);
        object["spec"]["parallelism"] = json!({"tensor": 1});
        object["spec"]["resources"] = json!({
            "accelerator": "Cpu", "cpu": CPU, "memory": "600Mi",
        });
        object["spec"]["drain"] = json!({"timeout": "2m"});
        // Inspected elsewhere; on a full node there is no room for that pod either.
        object["spec"]["planPolicy"] = json!("Disabled");
        change(object);
    })
}

/// Asks for a share of the CPU that is free on the first node, and for that node, so that
/// exactly `groups` groups have room, and a pod of the operator.
pub(crate) async fn with_room_for(
    place: &Place,
    groups: u64,
) -> anyhow::Result<impl Fn(&mut Value) + use<>> {
    let (node, free) = free_cpu(place).await?;
    let share = format!("{}m", free.saturating_sub(SPARED) / groups);
    Ok(move |object: &mut Value| {
        object["spec"]["resources"]["cpu"] = json!(share);
        object["spec"]["placement"] = json!({"nodeSelector": {"kubernetes.io/hostname": node}});
    })
}

/// Name of the first node and the thousandths of a CPU that no pod there asks for.
async fn free_cpu(place: &Place) -> anyhow::Result<(String, u64)> {
    let nodes = place.get(["nodes"]).await?;
    let node = &nodes["items"][0];
    let name = node["metadata"]["name"].as_str().context("a node")?;
    let whole = thousandths(&node["status"]["allocatable"]["cpu"])?;
    let pods = place.get(["pods", "--all-namespaces"]).await?;
    let mut taken = 0;
    for pod in pods["items"].as_array().context("pods")? {
        if pod["spec"]["nodeName"] == name {
            for container in pod["spec"]["containers"].as_array().context("containers")? {
                taken += thousandths(&container["resources"]["requests"]["cpu"])?;
            }
        }
    }
    Ok((name.to_owned(), whole.saturating_sub(taken)))
}

/// An amount of CPU, such as "2" or "100m"; nothing is 0.
pub(crate) fn thousandths(quantity: &Value) -> anyhow::Result<u64> {
    let Some(text) = quantity.as_str() else {
        return Ok(0);
    };
    match text.strip_suffix('m') {
        Some(milli) => Ok(milli.parse()?),
        None => Ok(text.parse::<u64>()? * 1000),
    }
}
