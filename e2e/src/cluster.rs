//! A running cluster as tests and scripts use it, whichever provider made it.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::process::Command;

use crate::cache::{Cache, NoCache};
use crate::command::{self, CommandError};
use crate::digest;
use crate::image::archive;
use crate::kind::{Kind, KindError};
use crate::local::layout::{BadName, Layout};
use crate::local::namespace::{Namespace, NamespaceError};
use crate::local::node::Node;
use crate::local::start;
use crate::provider::Provider;
use crate::wait::{self, Look, WaitError};

/// One call of kubectl may take this long.
const KUBECTL_WITHIN: Duration = Duration::from_mins(2);
const ON_NODE_WITHIN: Duration = Duration::from_secs(20);
const HANDLE: &str = "cluster.json";

/// The cluster could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// `llama-cluster up` was not run, or not for this name.
    #[error("there is no cluster called {name}; `llama-cluster up --name {name}` makes it")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The name cannot be a cluster's.
    #[error("not a cluster")]
    Name(#[from] BadName),
    /// There is no cache folder.
    #[error("no place to look for the cluster")]
    Cache(#[from] NoCache),
    /// A file cannot be read or written.
    #[error("could not read or write {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// kubectl's answer is not the JSON it should be.
    #[error("could not understand what kubectl answered")]
    Json(#[from] serde_json::Error),
    /// kind failed.
    #[error(transparent)]
    Kind(#[from] KindError),
    /// The local cluster's namespaces cannot be found.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The cluster has no such node.
    #[error("{cluster} has no node {node:?}; its nodes are {}", nodes.join(", "))]
    NoNode {
        /// The name asked for.
        node: String,
        /// The cluster.
        cluster: String,
        /// What there is.
        nodes: Vec<String>,
    },
    /// This needs the node itself, which a plain kubeconfig does not give.
    #[error("{action} needs a local or kind cluster; {name} is only known by its kubeconfig")]
    OnlyKubeconfig {
        /// What was asked for.
        action: &'static str,
        /// The cluster.
        name: String,
    },
    /// The pod has no running container of that name.
    #[error("pod {namespace}/{pod} has no running container {container:?}")]
    NoContainer {
        /// The pod's namespace.
        namespace: String,
        /// The pod.
        pod: String,
        /// The container.
        container: String,
    },
    /// The awaited thing did not come; the cluster's state follows.
    #[error("{source}\n{state}")]
    Wait {
        /// What was awaited and seen last.
        source: WaitError,
        /// Pods, events and logs at that time.
        state: String,
    },
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> ClusterError {
    let path = path.to_owned();
    move |source| ClusterError::File { path, source }
}

/// A folder that pods reach with `hostPath` volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volumes {
    /// The folder on this machine.
    pub here: PathBuf,
    /// The same folder as the node sees it.
    pub on_node: PathBuf,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterNode {
    /// Name of the node object.
    pub name: String,
    /// A folder of this node alone. Every node sees its own at the same path.
    pub volumes: Volumes,
}

/// A cluster and the programs to use it with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// What made it.
    pub provider: Provider,
    /// How to reach it, as administrator.
    pub kubeconfig: PathBuf,
    /// The kubectl program.
    pub kubectl: PathBuf,
    /// The helm program.
    pub helm: PathBuf,
    /// Files to share with pods, the same on all nodes; none where there is only a
    /// kubeconfig.
    pub volumes: Option<Volumes>,
    /// Its nodes, the one with the control plane first; none where there is only a
    /// kubeconfig.
    #[serde(default)]
    pub nodes: Vec<ClusterNode>,
}

/// A process in a container, as its node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeProcess {
    /// Its number on the node, to be used with [`Cluster::signal`].
    pub pid: u32,
    /// Its command line.
    pub arguments: Vec<String>,
}

impl Cluster {
    /// The cluster called `name` that `llama-cluster up` made.
    pub fn attach(name: &str) -> Result<Self, ClusterError> {
        for provider in [Provider::Local, Provider::Kind] {
            let path = handle(name, provider)?;
            match fs::read(&path) {
                Ok(text) => return Ok(serde_json::from_slice(&text)?),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(file_error(&path)(source)),
            }
        }
        let name = name.to_owned();
        Err(ClusterError::Unknown { name })
    }

    /// Writes down what [`Self::attach`] reads.
    pub fn save(&self) -> Result<(), ClusterError> {
        let path = handle(&self.name, self.provider)?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(file_error(folder))?;
        }
        fs::write(&path, serde_json::to_string_pretty(self)?).map_err(file_error(&path))
    }

    /// A kubectl command for this cluster.
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        command
    }

    /// A helm command for this cluster.
    pub fn helm_command(&self) -> Command {
        let mut command = Command::new(&self.helm);
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        command
    }

    /// Runs kubectl and returns what it prints.
    pub async fn kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<String, ClusterError> {
        let mut command = self.kubectl_command();
        Ok(command::run(command.args(arguments), KUBECTL_WITHIN).await?)
    }

    /// Runs `kubectl get ARGUMENTS -o json`.
    pub async fn get<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Value, ClusterError> {
        let mut command = self.kubectl_command();
        command.arg("get").args(arguments).args(["-o", "json"]);
        let text = command::run(&mut command, KUBECTL_WITHIN).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Applies objects, server-side. `objects` is YAML or JSON.
    pub async fn apply(&self, objects: &str) -> Result<String, ClusterError> {
        let mut command = self.kubectl_command();
        command.args(["apply", "--server-side", "-f", "-"]);
        Ok(command::run_with_input(&mut command, objects, KUBECTL_WITHIN).await?)
    }

    /// Waits until `look` is done; on failure the error tells the state of `namespace`.
    pub async fn wait_for<T>(
        &self,
        namespace: &str,
        what: &str,
        deadline: Duration,
        look: impl AsyncFnMut() -> Look<T>,
    ) -> Result<T, ClusterError> {
        match wait::until(what, deadline, look).await {
            Ok(value) => Ok(value),
            Err(source) => Err(ClusterError::Wait {
                source,
                state: self.state(namespace).await,
            }),
        }
    }

    /// Pods, events, descriptions and the ends of logs in `namespace`, for people.
    pub async fn state(&self, namespace: &str) -> String {
        let questions = [
            "get pods -o wide",
            "get events --sort-by=.lastTimestamp",
            "describe pods",
        ];
        let mut state = String::new();
        let mut ask = async |question: &str| {
            let arguments = ["-n", namespace].into_iter().chain(question.split(' '));
            let answer = match self.kubectl(arguments).await {
                Ok(answer) => answer,
                Err(error) => format!("{error}\n"),
            };
            // Writing to a String cannot fail.
            let _ = write!(state, "--- kubectl {question}\n{answer}");
        };
        for question in questions {
            ask(question).await;
        }
        let names = self
            .kubectl(["-n", namespace, "get", "pods", "-o", "name"])
            .await;
        for pod in names.unwrap_or_default().lines() {
            ask(&format!("logs {pod} --all-containers --prefix --tail=40")).await;
        }
        state
    }

    /// Makes an image archive known to the cluster's nodes. Where the same archive
    /// is there already, this takes no time.
    pub async fn load_image(&self, tar: &Path) -> Result<(), ClusterError> {
        match self.provider {
            Provider::Local => {
                let layout = Layout::new(&self.name)?;
                let reference = archive::reference(tar).map_err(file_error(tar))?;
                let mark = layout.path("loaded").join(reference.replace('/', "_"));
                let digest = digest::of_file(tar).map_err(file_error(tar))?;
                if fs::read_to_string(&mark).is_ok_and(|loaded| loaded == digest) {
                    return Ok(());
                }
                let nodes: Result<Vec<Node<'_>>, ClusterError> = self
                    .nodes
                    .iter()
                    .map(|node| self.local_node(&layout, &node.name))
                    .collect();
                start::load_image(&nodes?, tar).await?;
                let folder = layout.path("loaded");
                fs::create_dir_all(&folder).map_err(file_error(&folder))?;
                fs::write(&mark, digest).map_err(file_error(&mark))
            }
            Provider::Kind => {
                let kind = Kind::find(&Cache::from_environment()?, &self.name).await?;
                Ok(kind.load_image(tar).await?)
            }
            Provider::Kubeconfig => Err(self.only_kubeconfig("loading an image")),
        }
    }

    fn only_kubeconfig(&self, action: &'static str) -> ClusterError {
        let name = self.name.clone();
        ClusterError::OnlyKubeconfig { action, name }
    }

    fn local_node<'a>(&self, layout: &'a Layout, name: &str) -> Result<Node<'a>, ClusterError> {
        let count = u8::try_from(self.nodes.len()).unwrap_or(u8::MAX);
        let mut nodes = Node::all(layout, count).into_iter();
        nodes
            .find(|node| node.name() == name)
            .ok_or_else(|| ClusterError::NoNode {
                node: name.to_owned(),
                cluster: self.name.clone(),
                nodes: self.nodes.iter().map(|node| node.name.clone()).collect(),
            })
    }

    /// The words to put before a command line so that it runs on the node `node`.
    pub fn node_prefix(&self, node: &str) -> Result<Vec<String>, ClusterError> {
        match self.provider {
            Provider::Local => {
                let layout = Layout::new(&self.name)?;
                let name = self.name.clone();
                let namespace = Namespace::find(self.local_node(&layout, node)?)?
                    .ok_or(ClusterError::Unknown { name })?;
                Ok(namespace.prefix())
            }
            Provider::Kind => Ok(Kind::node_prefix(node)),
            Provider::Kubeconfig => Err(self.only_kubeconfig("a command on a node")),
        }
    }

    /// Runs a command line on the node `node` and returns what it prints.
    pub async fn on_node(&self, node: &str, line: &[&str]) -> Result<String, ClusterError> {
        let prefix = self.node_prefix(node)?;
        let mut words = prefix
            .iter()
            .map(String::as_str)
            .chain(line.iter().copied());
        let mut command = Command::new(words.next().unwrap_or_default());
        Ok(command::run(command.args(words), ON_NODE_WITHIN).await?)
    }

    /// The processes of a running container, in the order of their numbers.
    pub async fn processes(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
    ) -> Result<Vec<NodeProcess>, ClusterError> {
        let object = self.get(["-n", namespace, "pod", pod]).await?;
        let node = object["spec"]["nodeName"].as_str().unwrap_or_default();
        let id = container_id(&object, container).ok_or_else(|| ClusterError::NoContainer {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            container: container.to_owned(),
        })?;
        // Prints number and command line, whose zero bytes become tabs, of each
        // process whose cgroup is the container's. A process may end meanwhile.
        let script = format!(
            "for p in /proc/[0-9]*; do grep -qs {id} $p/cgroup || continue; \
             printf '%s\\t' \"${{p#/proc/}}\"; tr '\\0' '\\t' <$p/cmdline; echo; done; true"
        );
        let text = self.on_node(node, &["sh", "-c", &script]).await?;
        Ok(parse_processes(&text))
    }

    /// Sends the signal `signal`, such as KILL, to a process of a pod on `node`.
    pub async fn signal(
        &self,
        node: &str,
        process: &NodeProcess,
        signal: &str,
    ) -> Result<(), ClusterError> {
        let pid = process.pid.to_string();
        // `kill` is a word of the shell, and not every node has it as a program.
        let script = "kill -s \"$1\" \"$0\"";
        self.on_node(node, &["sh", "-c", script, &pid, signal])
            .await
            .map(|_| ())
    }
}

fn handle(name: &str, provider: Provider) -> Result<PathBuf, ClusterError> {
    let layout = Layout::new(name)?;
    Ok(match provider {
        Provider::Local => layout.path(HANDLE),
        Provider::Kind | Provider::Kubeconfig => {
            Cache::from_environment()?.cluster(name).join(HANDLE)
        }
    })
}

/// The ID of a pod's running container, without the runtime's name.
fn container_id<'a>(pod: &'a Value, container: &str) -> Option<&'a str> {
    let statuses = pod["status"]["containerStatuses"].as_array()?;
    let status = statuses.iter().find(|status| status["name"] == container)?;
    status["state"].get("running")?;
    Some(status["containerID"].as_str()?.rsplit_once("//")?.1)
}

fn parse_processes(text: &str) -> Vec<NodeProcess> {
    let mut processes: Vec<NodeProcess> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split('\t').map(str::to_owned);
            let pid = words.next()?.parse().ok()?;
            let mut arguments: Vec<String> = words.collect();
            // The last zero byte ends the last word and begins none.
            arguments.pop_if(|last| last.is_empty());
            Some(NodeProcess { pid, arguments })
        })
        .collect();
    processes.sort_by_key(|process| process.pid);
    processes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn processes_are_read_in_order() {
        let processes = parse_processes("12\t/bin/a\t--rank\t1\t\n7\t/bin/a\t\t\n\nnoise\n");
        assert_eq!(processes[0].pid, 7);
        assert_eq!(processes[0].arguments, ["/bin/a", ""]);
        assert_eq!(processes[1].arguments, ["/bin/a", "--rank", "1"]);
        assert_eq!(processes.len(), 2);
    }

    #[test]
    fn only_running_containers_have_processes() {
        let pod = json!({"status": {"containerStatuses": [
            {"name": "a", "containerID": "containerd://abc", "state": {"running": {}}},
            {"name": "b", "containerID": "containerd://def", "state": {"terminated": {}}},
        ]}});
        assert_eq!(container_id(&pod, "a"), Some("abc"));
        assert_eq!(container_id(&pod, "b"), None);
        assert_eq!(container_id(&pod, "c"), None);
    }

    #[test]
    fn unknown_cluster_says_how_to_make_it() {
        let message = Cluster::attach("never-made").unwrap_err().to_string();
        assert!(
            message.contains("llama-cluster up --name never-made"),
            "{message}"
        );
    }
}
