//! What the end-to-end tests share: the cluster, the installed operator, a namespace
//! for each test, and questions to a model.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod births;
pub(crate) mod clients;
pub(crate) mod small;
pub(crate) mod store;
pub(crate) mod supplied;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::cluster::Cluster;
use llama_e2e::wait::Look;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// Names the cluster that the tests run on; without it they do not run.
const CLUSTER_VARIABLE: &str = "LLAMA_E2E_CLUSTER";
/// A Python that has the openai package.
pub(crate) const OPENAI_PYTHON_VARIABLE: &str = "LLAMA_E2E_OPENAI_PYTHON";
/// How long a group may take until it serves.
pub(crate) const READY_WITHIN: Duration = Duration::from_mins(3);
/// How long the operator may take to say what is wrong.
pub(crate) const SAID_WITHIN: Duration = Duration::from_mins(1);
/// How long anything may be left once nobody is being answered any more.
pub(crate) const GONE_WITHIN: Duration = Duration::from_secs(30);
/// What the operator makes.
pub(crate) const CHILDREN: &str = "pods,services,secrets,poddisruptionbudgets,controllerrevisions";
const FORWARD_WITHIN: Duration = Duration::from_secs(20);
const ANSWER_WITHIN: Duration = Duration::from_mins(2);
const IMAGE: &str = "llama-operator/smollm2-135m-instruct:q4_1";
pub(crate) const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// What the namespace of a test has.
const TEST_LABEL: &str = "llmops.dev/e2e=true";

/// The repository's folder.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The number that the environment variable `name` holds, 1 to `most`, or `usual`.
pub(crate) fn number_from(name: &str, usual: u32, most: u32) -> anyhow::Result<u32> {
    let Ok(text) = std::env::var(name) else {
        return Ok(usual);
    };
    let number = text
        .parse()
        .ok()
        .filter(|number| (1..=most).contains(number));
    number.with_context(|| format!("{name}={text}: expected 1 to {most}"))
}

/// A namespace of the cluster for one test.
pub(crate) struct Place {
    pub(crate) cluster: Cluster,
    pub(crate) namespace: String,
}

/// The cluster with the operator installed and an empty namespace; `None`, with a
/// line that says so, where no cluster was named.
pub(crate) async fn place(namespace: &str) -> anyhow::Result<Option<Place>> {
    let Ok(name) = std::env::var(CLUSTER_VARIABLE) else {
        eprintln!("skipped: {CLUSTER_VARIABLE} names no cluster; `make e2e` makes one");
        return Ok(None);
    };
    let cluster = Cluster::attach(&name)?;
    install(&cluster).await?;
    let place = Place {
        cluster,
        namespace: namespace.to_owned(),
    };
    // A test that failed has left its pods, and they take room.
    place
        .kubectl(["delete", "namespace", "--selector", TEST_LABEL])
        .await?;
    place.kubectl(["create", "namespace", namespace]).await?;
    // Worker pods must be admitted where the strictest standard is enforced.
    let standard = "pod-security.kubernetes.io/enforce=restricted";
    place
        .kubectl(["label", "namespace", namespace, standard, TEST_LABEL])
        .await?;
    Ok(Some(place))
}

/// Installs the chart, unless this cluster has it. Of several nodes the operator gets the
/// first, where the control plane is too, so that any other can be lost.
async fn install(cluster: &Cluster) -> anyhow::Result<()> {
    let chart = repository().join("charts/llama-operator");
    let mut helm = cluster.helm_command();
    helm.args(["upgrade", "--install", "llama-operator"])
        .arg(chart)
        .args(["--namespace", "llama-system", "--create-namespace"])
        .args(["--set", "image.tag=dev", "--set", "workerImage.tag=dev"])
        .args(["--wait", "--timeout", "3m"]);
    if let [first, _, ..] = &cluster.nodes[..] {
        let selector = format!("nodeSelector.kubernetes\\.io/hostname={}", first.name);
        helm.args(["--set", &selector]);
    }
    let output = helm.output().await.context("run helm")?;
    ensure!(
        output.status.success(),
        "helm: {}\n{}",
        String::from_utf8_lossy(&output.stderr),
        cluster.state("llama-system").await
    );
    Ok(())
}

/// A LlamaDeployment of the real model with three ranks, changed by `change`.
pub(crate) fn deployment(name: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut object = json!({
        "apiVersion": "llmops.dev/v1alpha1",
        "kind": "LlamaDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": {"image": {
                "reference": IMAGE,
                "path": format!("/models/{MODEL_FILE}"),
                "pullPolicy": "IfNotPresent",
            }}},
            "parallelism": {"tensor": 3},
            "resources": {"accelerator": "Cpu", "cpu": "300m", "memory": "1Gi"},
            "context": {"maxTokens": 2048},
        },
    });
    change(&mut object);
    object
}

/// The status of the condition `kind` with its reason and message, as one line.
pub(crate) fn condition(object: &Value, kind: &str) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    object["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == kind)
        .map_or_else(
            || "absent".to_owned(),
            |found| {
                let (status, reason) = (text(&found["status"]), text(&found["reason"]));
                format!("{status} {reason}: {}", text(&found["message"]))
            },
        )
}

impl Place {
    pub(crate) async fn kubectl<const N: usize>(
        &self,
        arguments: [&str; N],
    ) -> anyhow::Result<String> {
        let place = ["--namespace", self.namespace.as_str()];
        Ok(self
            .cluster
            .kubectl(place.into_iter().chain(arguments))
            .await?)
    }

    pub(crate) async fn get<const N: usize>(&self, arguments: [&str; N]) -> anyhow::Result<Value> {
        let place = ["--namespace", self.namespace.as_str()];
        Ok(self.cluster.get(place.into_iter().chain(arguments)).await?)
    }

    pub(crate) async fn apply(&self, mut object: Value) -> anyhow::Result<()> {
        object["metadata"]["namespace"] = json!(self.namespace);
        self.cluster.apply(&object.to_string()).await?;
        Ok(())
    }

    /// Waits until the LlamaDeployment `name` is as `look` wants it, and returns it.
    pub(crate) async fn wait_for(
        &self,
        name: &str,
        what: &str,
        within: Duration,
        look: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let found = self
            .cluster
            .wait_for(&self.namespace, what, within, async || {
                match self.get(["ld", name]).await {
                    Ok(object) if look(&object) => Look::Done(object),
                    Ok(object) => Look::NotYet(object["status"].to_string()),
                    Err(error) => Look::NotYet(error.to_string()),
                }
            })
            .await?;
        Ok(found)
    }

    /// Waits until `groups` groups of `name` serve.
    pub(crate) async fn wait_ready(&self, name: &str, groups: i64) -> anyhow::Result<Value> {
        self.wait_ready_within(name, groups, READY_WITHIN).await
    }

    /// The same within another time.
    pub(crate) async fn wait_ready_within(
        &self,
        name: &str,
        groups: i64,
        within: Duration,
    ) -> anyhow::Result<Value> {
        self.wait_for(
            name,
            &format!("{groups} ready groups of {name}"),
            within,
            |object| {
                object["status"]["observedGeneration"] == object["metadata"]["generation"]
                    && object["status"]["readyReplicas"] == groups
                    && object["status"]["replicas"] == groups
                    && condition(object, "Ready").starts_with("True")
            },
        )
        .await
    }

    /// Waits until no object of the LlamaDeployment `name` is left in the namespace.
    pub(crate) async fn wait_gone(&self, name: &str) -> anyhow::Result<()> {
        let selector = format!("llmops.dev/deployment={name}");
        let kinds = format!("{CHILDREN},endpointslices");
        self.cluster
            .wait_for(
                &self.namespace,
                &format!("end of {name}"),
                GONE_WITHIN,
                async || {
                    let left = self.get([&kinds, "--selector", &selector]).await;
                    let itself = self.kubectl(["get", "ld", "--output", "name"]).await;
                    match (left, itself) {
                        (Ok(left), Ok(itself))
                            if left["items"] == json!([]) && itself.is_empty() =>
                        {
                            Look::Done(())
                        }
                        (left, itself) => {
                            let names: Vec<_> = left
                                .iter()
                                .filter_map(|left| left["items"].as_array())
                                .flatten()
                                .map(|item| item["metadata"]["name"].to_string())
                                .collect();
                            Look::NotYet(format!("{names:?} {itself:?}"))
                        }
                    }
                },
            )
            .await?;
        Ok(())
    }

    pub(crate) async fn remove_namespace(&self) -> anyhow::Result<()> {
        let namespace = self.namespace.as_str();
        let mut kubectl = self.cluster.kubectl_command();
        kubectl.args([
            "delete",
            "namespace",
            namespace,
            "--ignore-not-found",
            "--timeout=120s",
        ]);
        let output = kubectl.output().await.context("run kubectl")?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// A way from this machine to the Service `name`.
    pub(crate) async fn forward(&self, name: &str) -> anyhow::Result<Forward> {
        let mut child = self
            .cluster
            .kubectl_command()
            .args([
                "--namespace",
                &self.namespace,
                "port-forward",
                "--address",
                "127.0.0.1",
            ])
            .args([&format!("service/{name}"), ":8000"])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("run kubectl port-forward")?;
        let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let line = tokio::time::timeout(FORWARD_WITHIN, lines.next_line())
            .await
            .context("kubectl port-forward says nothing")??
            .context("kubectl port-forward ended")?;
        let port = line
            .strip_prefix("Forwarding from 127.0.0.1:")
            .and_then(|rest| rest.split_once(' '))
            .with_context(|| format!("kubectl port-forward said {line:?}"))?
            .0
            .parse()?;
        Ok(Forward {
            port,
            _child: child,
            _lines: lines,
        })
    }
}

/// A forwarded port, for as long as this lives.
pub(crate) struct Forward {
    pub(crate) port: u16,
    _child: Child,
    /// kubectl says a line for each connection, and ends when nobody can read it.
    _lines: Lines<BufReader<ChildStdout>>,
}

/// A question on its way.
pub(crate) struct Question {
    child: Child,
    answer: BufReader<ChildStdout>,
}

impl Forward {
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    /// Begins to ask for an answer of up to `tokens` tokens, as a stream.
    pub(crate) fn ask(&self, model: &str, question: &str, tokens: u32) -> anyhow::Result<Question> {
        let mut child = Command::new("python3")
            .arg(repository().join("e2e/clients/ask.py"))
            .args([&self.url(), model, question, &tokens.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("run ask.py")?;
        let answer = BufReader::new(child.stdout.take().context("its output")?);
        Ok(Question { child, answer })
    }

    /// What the model continues `prompt` with, at temperature 0.
    pub(crate) async fn complete(
        &self,
        model: &str,
        prompt: &str,
        tokens: usize,
    ) -> anyhow::Result<String> {
        let body =
            json!({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0});
        let request = Command::new("python3")
            .args(["-c", "import sys,urllib.request as u; sys.stdout.buffer.write(u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode(), {'Content-Type': 'application/json'}), timeout=120).read())"])
            .arg(format!("{}/completions", self.url()))
            .arg(body.to_string())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(ANSWER_WITHIN, request).await??;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        Ok(answer["choices"][0]["text"]
            .as_str()
            .context("a text")?
            .to_owned())
    }
}

impl Question {
    /// Waits for the first bytes of the answer.
    pub(crate) async fn begun(&mut self) -> anyhow::Result<()> {
        let first = tokio::time::timeout(ANSWER_WITHIN, self.answer.fill_buf()).await??;
        ensure!(!first.is_empty(), "the answer ended before it began");
        Ok(())
    }

    /// Waits for the end: whether it was answered, the answer, and the rest of what
    /// was said, such as an error.
    pub(crate) async fn end(mut self) -> anyhow::Result<(bool, String, String)> {
        let (mut answer, mut said) = (String::new(), String::new());
        let mut errors = self.child.stderr.take().context("its errors")?;
        let whole = async {
            tokio::try_join!(
                self.answer.read_to_string(&mut answer),
                errors.read_to_string(&mut said)
            )?;
            self.child.wait().await
        };
        let status = tokio::time::timeout(ANSWER_WITHIN, whole)
            .await
            .context("the answer does not end")??;
        Ok((status.success(), answer, said))
    }
}

/// A volume over the node's folder `folder` that is only read, and the claim `name` for it.
pub(crate) async fn make_claim(place: &Place, name: &str, folder: &str) -> anyhow::Result<()> {
    make_claim_of(place, name, folder, "ReadOnlyMany").await
}

/// The same with an access mode.
pub(crate) async fn make_claim_of(
    place: &Place,
    name: &str,
    folder: &str,
    mode: &str,
) -> anyhow::Result<()> {
    let volume_name = format!("e2e-{name}");
    place
        .kubectl(["delete", "pv", &volume_name, "--ignore-not-found"])
        .await?;
    let spec = json!({
        "accessModes": [mode],
        "storageClassName": "",
        "resources": {"requests": {"storage": "1Gi"}},
        "volumeName": volume_name,
    });
    let volume = json!({
        "accessModes": [mode],
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": folder},
    });
    for object in [
        json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume_name}, "spec": volume}),
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": place.namespace},
            "spec": spec,
        }),
    ] {
        place.cluster.apply(&object.to_string()).await?;
    }
    Ok(())
}
