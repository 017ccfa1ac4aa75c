//! Changes while answers stream: nothing that was begun is cut, and what answers wrong
//! never serves.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use support::{
    Forward, MODEL_FILE, Place, READY_WITHIN, SAID_WITHIN, condition, deployment, make_claim, place,
};
use tokio::task::JoinHandle;

const NAME: &str = "smollm2";
const LONG: &str = "Tell me a very long story about the sea and a lighthouse.";
/// Tokens of each answer, of the 2,048 that fit.
const TOKENS: u32 = 1900;

/// A deployment with `groups` groups of one small rank.
fn small(groups: u32, change: impl FnOnce(&mut Value)) -> Value {
    deployment(NAME, |object| {
        object["spec"]["replicas"] = json!(groups);
        object["spec"]["parallelism"] = json!({"tensor": 1});
        object["spec"]["resources"] = json!({
            "accelerator": "Cpu", "cpu": "200m", "memory": "600Mi",
        });
        object["spec"]["drain"] = json!({"timeout": "2m"});
        // A full node would have no room for the pod that inspects the model either.
        object["spec"]["planPolicy"] = json!("Disabled");
        change(object);
    })
}

/// Clients that ask for one long answer after the other until they are told to stop.
struct Clients {
    tasks: Vec<JoinHandle<anyhow::Result<usize>>>,
    stop: tokio::sync::watch::Sender<bool>,
}

impl Clients {
    fn begin(url: &str, count: usize) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let tasks = (0..count).map(|_| {
            let (url, stopped) = (url.to_owned(), stopped.clone());
            tokio::spawn(async move {
                let mut answers = 0;
                while !*stopped.borrow() {
                    let question = Forward::ask_at(&url, NAME, LONG, TOKENS)?;
                    let (answered, _, said) = question.end().await?;
                    ensure!(answered, "after {answers} answers: {said}");
                    answers += 1;
                }
                Ok(answers)
            })
        });
        Self {
            tasks: tasks.collect(),
            stop,
        }
    }

    /// Lets the answers under way finish, and gives how many there were.
    async fn end(self) -> anyhow::Result<usize> {
        self.stop.send_replace(true);
        let mut answers = 0;
        for task in self.tasks {
            answers += task.await??;
        }
        Ok(answers)
    }
}

#[tokio::test]
async fn no_answer_is_cut_by_a_change_or_by_fewer_groups() -> anyhow::Result<()> {
    let Some(place) = place("e2e-rollout").await? else {
        return Ok(());
    };
    place.apply(small(2, |_| ())).await?;
    place.wait_ready(NAME, 2).await?;
    let proxy = place.proxy(NAME).await?;
    let clients = Clients::begin(&proxy.url(), 2);

    // Room for more groups: a new one starts before an old one ends.
    place
        .apply(small(2, |object| {
            object["spec"]["context"]["maxTokens"] = json!(2047);
        }))
        .await?;
    let modes = watch_rollout(&place, 2).await?;
    ensure!(modes.least == 2 && modes.seen("Surge"), "{modes:?}");

    // No room: an old one ends before a new one starts.
    fill_the_node(&place).await?;
    place.apply(small(2, |_| ())).await?;
    let modes = watch_rollout(&place, 2).await?;
    ensure!(
        modes.least == 1 && modes.seen("DrainThenReplace") && !modes.seen("Surge"),
        "{modes:?}"
    );

    // Fewer groups.
    place
        .kubectl(["scale", "ld/smollm2", "--replicas=1"])
        .await?;
    place.wait_ready(NAME, 1).await?;
    let answers = clients.end().await?;
    ensure!(answers > 0, "nobody was answered");
    eprintln!("{answers} answers of {TOKENS} tokens, none cut");
    place.remove_namespace().await
}

/// What was seen of a rollout.
#[derive(Debug)]
struct Seen {
    modes: Vec<String>,
    least: i64,
}

impl Seen {
    fn seen(&self, mode: &str) -> bool {
        self.modes.iter().any(|seen| seen == mode)
    }
}

/// Looks on until all groups have the new revision.
async fn watch_rollout(place: &Place, groups: i64) -> anyhow::Result<Seen> {
    let mut seen = Seen {
        modes: Vec::new(),
        least: groups,
    };
    let deadline = Instant::now() + READY_WITHIN * 2;
    loop {
        let object = place.get(["ld", NAME]).await?;
        let status = &object["status"];
        if status["observedGeneration"] == object["metadata"]["generation"] {
            seen.least = seen
                .least
                .min(status["readyReplicas"].as_i64().unwrap_or(0));
            if let Some(mode) = status["rollout"]["mode"].as_str()
                && !seen.seen(mode)
            {
                seen.modes.push(mode.to_owned());
            }
            let over = condition(&object, "Ready").starts_with("True")
                && status["rollout"].is_null()
                && status["replicas"] == groups;
            if over {
                return Ok(seen);
            }
        }
        ensure!(Instant::now() < deadline, "{seen:?}: {status}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Pods that never run but take all CPU that is left.
async fn fill_the_node(place: &Place) -> anyhow::Result<()> {
    for size in ["800m", "400m", "200m", "100m", "100m"] {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"generateName": "filler-", "namespace": place.namespace},
            "spec": {
                "containers": [{
                    "name": "pause", "image": "llama-operator/none:none",
                    "imagePullPolicy": "Never",
                    "resources": {"requests": {"cpu": size}},
                    "securityContext": {
                        "allowPrivilegeEscalation": false, "runAsNonRoot": true,
                        "runAsUser": 65532, "capabilities": {"drop": ["ALL"]},
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                }],
                "terminationGracePeriodSeconds": 0,
            },
        });
        place.cluster.create(&pod.to_string()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn weights_with_a_flipped_bit_never_serve() -> anyhow::Result<()> {
    let Some(place) = place("e2e-flipped").await? else {
        return Ok(());
    };
    let Some(volumes) = place.cluster.volumes.clone() else {
        eprintln!("skipped: this cluster shares no folder with its node");
        return Ok(());
    };
    let Ok(model) = std::env::var("LLAMA_TEST_MODEL") else {
        eprintln!("skipped: LLAMA_TEST_MODEL names no model");
        return Ok(());
    };
    let folder = volumes.here.join("e2e-flipped");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join(MODEL_FILE);
    std::fs::copy(&model, &file)?;
    let on_node = volumes.on_node.join("e2e-flipped");
    make_claim(&place, "flipped", &on_node.to_string_lossy()).await?;
    let from_claim = |object: &mut Value| {
        object["spec"]["model"]["source"] =
            json!({"pvc": {"claimName": "flipped", "path": MODEL_FILE}});
    };
    place.apply(small(1, from_claim)).await?;
    place.wait_ready(NAME, 1).await?;
    place
        .wait_for(NAME, "the golden answer on record", SAID_WITHIN, |object| {
            object["status"]["selfTests"][0]["answer"].is_string()
        })
        .await?;

    flip_weights(&file)?;
    place
        .apply(small(1, |object| {
            from_claim(object);
            object["spec"]["restart"] = json!({"id": "flipped"});
        }))
        .await?;
    let object = place
        .wait_for(NAME, "a halted rollout", READY_WITHIN, |object| {
            condition(object, "Ready").starts_with("False RolloutHalted")
        })
        .await?;
    let failure = &object["status"]["rollout"]["failure"];
    ensure!(failure["reason"] == "SelfTestMismatch", "{failure}");
    ensure!(
        condition(&object, "Available").starts_with("True"),
        "{object}"
    );
    let proxy = place.proxy(NAME).await?;
    let question = Forward::ask_at(&proxy.url(), NAME, "What is 2+2?", 24)?;
    let (answered, answer, said) = question.end().await?;
    ensure!(answered, "the old revision serves on: {answer} {said}");

    place.remove_namespace().await?;
    place.kubectl(["delete", "pv", "e2e-flipped"]).await?;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

/// Flips one bit in many places of the second half, which is all weights.
fn flip_weights(file: &std::path::Path) -> anyhow::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(file)?;
    let size = file.metadata()?.len();
    let step = usize::try_from(size / 2 / 1000).context("a small file")?;
    for place in (size / 2..size).step_by(step) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place)?;
        byte[0] ^= 0x10;
        file.write_all_at(&byte, place)?;
    }
    Ok(())
}
