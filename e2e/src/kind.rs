//! A cluster of kind (<https://kind.sigs.k8s.io>), where a Docker engine answers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;

use crate::cache::Cache;
use crate::command::{self, CommandError};

/// Installed where there is no `kind` program; its node image runs Kubernetes 1.34,
/// as the local cluster does.
const MODULE: &str = "sigs.k8s.io/kind@v0.30.0";
const CONFIG: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../deploy/kind/cluster.yaml"
));
const VOLUMES_PLACEHOLDER: &str = "${VOLUMES}";
/// Where all nodes see the folder of volumes; `deploy/kind/cluster.yaml` says so too.
pub const SHARED_VOLUMES: &str = "/var/lib/llama-cluster/volumes";
/// Where each node sees a folder of its own.
pub const NODE_VOLUMES: &str = "/var/lib/llama-cluster/node-volumes";
/// The node of the control plane takes pods, as the only node of a cluster does.
const NO_TAINTS: &str = "kind: InitConfiguration\nnodeRegistration:\n  taints: []\n";
const QUICK: Duration = Duration::from_secs(30);
/// The node image may have to be downloaded first.
const CREATE_WITHIN: Duration = Duration::from_mins(15);
const LOAD_WITHIN: Duration = Duration::from_mins(5);

/// kind or Docker failed.
#[derive(Debug, thiserror::Error)]
pub enum KindError {
    /// The configuration is not what this program knows how to extend.
    #[error("deploy/kind/cluster.yaml names no node with mounts")]
    Config(#[source] Option<serde_yaml::Error>),
    /// A file could not be written.
    #[error("could not write {}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A command failed.
    #[error("could not {action}")]
    Command {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: CommandError,
    },
}

fn doing(action: &'static str) -> impl FnOnce(CommandError) -> KindError {
    move |source| KindError::Command { action, source }
}

/// The kind cluster of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    program: PathBuf,
    name: String,
    folder: PathBuf,
}

impl Kind {
    /// Finds kind, or installs it with `go install`.
    pub async fn find(cache: &Cache, name: &str) -> Result<Self, KindError> {
        let installed = cache.tools().join("kind");
        let found = command::find_program("kind")
            .or_else(|| installed.exists().then_some(installed.clone()));
        let program = if let Some(program) = found {
            program
        } else {
            eprintln!("  installing {MODULE}");
            let mut install = Command::new("go");
            install
                .args(["install", MODULE])
                .env("GOBIN", cache.tools());
            command::run(&mut install, CREATE_WITHIN)
                .await
                .map_err(doing("install kind"))?;
            installed
        };
        Ok(Self {
            program,
            name: name.to_owned(),
            folder: cache.cluster(name),
        })
    }

    /// Where `kubectl` finds the cluster.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// The folder of volumes on this machine; all nodes see it at [`SHARED_VOLUMES`].
    pub fn volumes(&self) -> PathBuf {
        self.folder.join("volumes")
    }

    /// Names of the first `count` nodes, and the folder of each on this machine that it
    /// alone sees, at [`NODE_VOLUMES`].
    pub fn nodes(&self, count: u8) -> Vec<(String, PathBuf)> {
        let name = |number: u8| match number {
            1 => format!("{}-control-plane", self.name),
            2 => format!("{}-worker", self.name),
            _ => format!("{}-worker{}", self.name, number - 1),
        };
        (1..=count)
            .map(|number| {
                let folder = self.folder.join("node-volumes").join(number.to_string());
                (name(number), folder)
            })
            .collect()
    }

    fn kind(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).args(["--name", &self.name]);
        command
    }

    /// Creates the cluster with `count` nodes unless it exists.
    pub async fn up(&self, count: u8) -> Result<(), KindError> {
        let volumes = self.volumes();
        let of_nodes: Vec<PathBuf> = self.nodes(count).into_iter().map(|node| node.1).collect();
        let write_error = |path: &Path| {
            let path = path.to_owned();
            move |source| KindError::Write { path, source }
        };
        for folder in of_nodes.iter().chain([&volumes]) {
            fs::create_dir_all(folder).map_err(write_error(folder))?;
        }
        if self.exists().await? {
            let mut export = self.kind(&["export", "kubeconfig"]);
            export.arg("--kubeconfig").arg(self.kubeconfig());
            command::run(&mut export, QUICK)
                .await
                .map_err(doing("export the kubeconfig of the kind cluster"))?;
            return Ok(());
        }
        let config = self.folder.join("kind.yaml");
        let text = render(&volumes, &of_nodes)?;
        fs::write(&config, text).map_err(write_error(&config))?;
        eprintln!("  creating the kind cluster {} (some minutes)", self.name);
        let mut create = self.kind(&["create", "cluster", "--wait", "120s"]);
        create.arg("--config").arg(&config);
        create.arg("--kubeconfig").arg(self.kubeconfig());
        command::run(&mut create, CREATE_WITHIN)
            .await
            .map_err(doing("create the kind cluster"))?;
        Ok(())
    }

    /// Whether kind knows a cluster of this name.
    pub async fn exists(&self) -> Result<bool, KindError> {
        let mut get = Command::new(&self.program);
        let names = command::run(get.args(["get", "clusters"]), QUICK)
            .await
            .map_err(doing("list kind's clusters"))?;
        Ok(names.lines().any(|line| line.trim() == self.name))
    }

    /// Deletes the cluster; one that does not exist is no error.
    pub async fn down(&self) -> Result<(), KindError> {
        let mut delete = self.kind(&["delete", "cluster"]);
        delete.arg("--kubeconfig").arg(self.kubeconfig());
        command::run(&mut delete, LOAD_WITHIN)
            .await
            .map_err(doing("delete the kind cluster"))?;
        Ok(())
    }

    /// Makes an image archive known to the nodes.
    pub async fn load_image(&self, archive: &Path) -> Result<(), KindError> {
        let mut load = self.kind(&["load", "image-archive"]);
        command::run(load.arg(archive), LOAD_WITHIN)
            .await
            .map_err(doing("load an image into the kind cluster"))?;
        Ok(())
    }

    /// The words to put before a command line so that it runs on the node `node`.
    pub fn node_prefix(node: &str) -> Vec<String> {
        ["docker", "exec", "-i", node].map(str::to_owned).into()
    }
}

/// The configuration of a cluster with a node for each of the folders `of_nodes`.
fn render(volumes: &Path, of_nodes: &[PathBuf]) -> Result<String, KindError> {
    // JSON's strings are YAML's, whatever the path holds.
    let path = Value::from(volumes.to_string_lossy());
    let text = CONFIG.replace(VOLUMES_PLACEHOLDER, &path.to_string());
    let mut config: Value =
        serde_yaml::from_str(&text).map_err(|error| KindError::Config(Some(error)))?;
    let template = config["nodes"][0].clone();
    let mut nodes = Vec::new();
    for (index, folder) in of_nodes.iter().enumerate() {
        let mut node = template.clone();
        if index > 0 {
            node["role"] = json!("worker");
        } else if of_nodes.len() > 1 {
            node["kubeadmConfigPatches"] = json!([NO_TAINTS]);
        }
        let mount = json!({
            "hostPath": folder.to_string_lossy(), "containerPath": NODE_VOLUMES,
        });
        node["extraMounts"]
            .as_array_mut()
            .ok_or(KindError::Config(None))?
            .push(mount);
        nodes.push(node);
    }
    config["nodes"] = Value::from(nodes);
    serde_yaml::to_string(&config).map_err(|error| KindError::Config(Some(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(count: usize) -> Value {
        let folders = ["/1", "/2", "/3"].map(PathBuf::from);
        let text = render(Path::new("/home/a b/volumes"), &folders[..count]).unwrap();
        serde_yaml::from_str(&text).unwrap()
    }

    #[test]
    fn configuration_mounts_the_folders_of_volumes() {
        let config = rendered(1);
        assert_eq!(config["nodes"].as_array().unwrap().len(), 1);
        let mounts = &config["nodes"][0]["extraMounts"];
        assert_eq!(mounts[0]["hostPath"], "/home/a b/volumes");
        assert_eq!(mounts[0]["containerPath"], SHARED_VOLUMES);
        assert_eq!(mounts[1]["hostPath"], "/1");
        assert_eq!(mounts[1]["containerPath"], NODE_VOLUMES);
        assert_eq!(config["networking"]["apiServerAddress"], "127.0.0.1");
        assert!(config["nodes"][0].get("kubeadmConfigPatches").is_none());
    }

    #[test]
    fn every_node_of_several_takes_pods_and_has_a_folder_of_its_own() {
        let config = rendered(3);
        let nodes = config["nodes"].as_array().unwrap();
        let roles: Vec<_> = nodes.iter().map(|node| node["role"].as_str()).collect();
        let expected = ["control-plane", "worker", "worker"].map(Some);
        assert_eq!(roles, expected);
        assert_eq!(nodes[0]["kubeadmConfigPatches"][0], NO_TAINTS);
        for (node, folder) in nodes.iter().zip(["/1", "/2", "/3"]) {
            assert_eq!(node["extraMounts"][1]["hostPath"], folder);
        }
    }
}
