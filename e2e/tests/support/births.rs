//! Which pods are created while a test looks on.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use super::Place;

const TEMPLATE: &str = "jsonpath={.type} {.object.metadata.name} {.object.metadata.uid}{'\\n'}";
const FIRST_WITHIN: Duration = Duration::from_secs(20);
/// How long events may be on their way.
const LAST_WITHIN: Duration = Duration::from_secs(1);

/// A watch of the pods of a namespace.
pub(crate) struct Births {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    known: BTreeSet<String>,
}

impl Births {
    /// Begins to look on. There must be a pod.
    pub(crate) async fn begin(place: &Place) -> anyhow::Result<Self> {
        let mut child = place
            .cluster
            .kubectl_command()
            .args(["--namespace", &place.namespace, "get", "pods", "--watch"])
            .args(["--output-watch-events", "--output", TEMPLATE])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("run kubectl get --watch")?;
        let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let first = tokio::time::timeout(FIRST_WITHIN, lines.next_line()).await;
        let first = first.context("no pod is told of")??.context("a line")?;
        ensure!(first.starts_with("ADDED "), "{first}");
        let pods = place.get(["pods"]).await?;
        let known = pods["items"].as_array().context("pods")?.iter();
        let known = known
            .filter_map(|pod| pod["metadata"]["uid"].as_str().map(str::to_owned))
            .collect();
        Ok(Self {
            _child: child,
            lines,
            known,
        })
    }

    /// Ends looking on; fails where a pod was created since the beginning.
    pub(crate) async fn none(mut self) -> anyhow::Result<()> {
        let mut deleted = 0;
        loop {
            match tokio::time::timeout(LAST_WITHIN, self.lines.next_line()).await {
                Err(_) => break,
                Ok(line) => {
                    let Some(line) = line? else { break };
                    let uid = line.rsplit(' ').next().unwrap_or_default();
                    ensure!(self.known.contains(uid), "created meanwhile: {line}");
                    deleted += usize::from(line.starts_with("DELETED "));
                }
            }
        }
        // Otherwise nothing was seen at all.
        ensure!(deleted >= self.known.len(), "{deleted} of {:?}", self.known);
        Ok(())
    }
}
