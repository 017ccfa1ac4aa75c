//! Clients that stream one long answer after the other through a Service, while the test
//! changes what is behind it.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use llama_e2e::provider::Provider;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::{Place, number_from, repository};

/// Tokens of each answer, unless the variable says otherwise: some seconds of work, so that
/// every change meets answers that are under way.
const TOKENS: u32 = 200;
const TOKENS_VARIABLE: &str = "LLAMA_TEST_ANSWER_TOKENS";
/// The context of 2,048 has room for the question besides.
const MOST_TOKENS: u32 = 2000;
/// What a token may take where all clients are answered at once by one small group.
const TOKEN_WITHIN: Duration = Duration::from_millis(300);
/// How long clients may take to read the beginning of an answer, or what is under way to
/// its end.
const ANSWERS_WITHIN: Duration = Duration::from_mins(1);
const PROXY_WITHIN: Duration = Duration::from_secs(20);

/// Tokens of each answer of the clients.
pub(crate) fn answer_tokens() -> anyhow::Result<u32> {
    number_from(TOKENS_VARIABLE, TOKENS, MOST_TOKENS)
}

/// How long an answer may take.
pub(crate) fn answer_within(tokens: u32) -> Duration {
    ANSWERS_WITHIN + tokens * TOKEN_WITHIN
}

/// Clients that ask until they are told to end.
pub(crate) struct Clients {
    child: Child,
    tokens: u32,
    lines: Lines<BufReader<ChildStdout>>,
    _proxy: Option<Proxy>,
}

/// A way through the API server, for as long as this lives.
struct Proxy {
    url: String,
    _child: Child,
    _lines: Lines<BufReader<ChildStdout>>,
}

impl Place {
    /// Starts `count` clients of the Service `name`, and waits until each of them is being
    /// answered.
    pub(crate) async fn clients(&self, name: &str, count: usize) -> anyhow::Result<Clients> {
        let (mut command, url, proxy) = match self.cluster.provider {
            // As a pod's traffic goes, by the address of the Service.
            Provider::Local => {
                let service = self.get(["service", name]).await?;
                let address = service["spec"]["clusterIP"]
                    .as_str()
                    .context("an address")?;
                let node = &self.cluster.nodes.first().context("a node")?.name;
                let mut words = self.cluster.node_prefix(node)?.into_iter();
                let mut command = Command::new(words.next().context("a command")?);
                command.args(words).arg("python3");
                (command, format!("http://{address}:8000/v1"), None)
            }
            Provider::Kind | Provider::Kubeconfig => {
                let proxy = self.proxy(name).await?;
                (Command::new("python3"), proxy.url.clone(), Some(proxy))
            }
        };
        let tokens = answer_tokens()?;
        let mut child = command
            .arg(repository().canonicalize()?.join("e2e/clients/streams.py"))
            .args([&url, name, &tokens.to_string(), &count.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("run streams.py")?;
        let lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let mut clients = Clients {
            child,
            tokens,
            lines,
            _proxy: proxy,
        };
        let said = clients.line().await?;
        ensure!(said["begun"] == count, "{said}");
        Ok(clients)
    }

    async fn proxy(&self, name: &str) -> anyhow::Result<Proxy> {
        let mut child = self
            .cluster
            .kubectl_command()
            .args(["proxy", "--port=0", "--address=127.0.0.1"])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("run kubectl proxy")?;
        let mut lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let line = tokio::time::timeout(PROXY_WITHIN, lines.next_line())
            .await
            .context("kubectl proxy says nothing")??
            .context("kubectl proxy ended")?;
        let address = line
            .strip_prefix("Starting to serve on ")
            .with_context(|| format!("kubectl proxy said {line:?}"))?;
        let services = format!("api/v1/namespaces/{}/services", self.namespace);
        Ok(Proxy {
            url: format!("http://{address}/{services}/{name}:8000/proxy/v1"),
            _child: child,
            _lines: lines,
        })
    }
}

impl Clients {
    async fn line(&mut self) -> anyhow::Result<Value> {
        let line = tokio::time::timeout(answer_within(self.tokens), self.lines.next_line())
            .await
            .context("streams.py says nothing")??;
        let Some(line) = line else {
            let mut said = String::new();
            if let Some(mut errors) = self.child.stderr.take() {
                errors.read_to_string(&mut said).await?;
            }
            anyhow::bail!("streams.py ended: {said}");
        };
        Ok(serde_json::from_str(&line)?)
    }

    /// Lets the answers under way finish; gives how many were whole.
    ///
    /// # Errors
    /// An answer was cut, was not as long as asked for, or was refused.
    pub(crate) async fn end(mut self) -> anyhow::Result<u64> {
        drop(self.child.stdin.take());
        let said = self.line().await?;
        let answers = said["answers"].as_u64().context("a number")?;
        ensure!(said["wrong"] == serde_json::json!([]), "{said}");
        ensure!(answers > 0, "nobody was answered");
        eprintln!("{answers} answers of {} tokens, all whole", self.tokens);
        Ok(answers)
    }
}
