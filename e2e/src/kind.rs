//! A cluster of kind (<https://kind.sigs.k8s.io>), where a Docker engine answers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
/// Where the node sees the folder of volumes; `deploy/kind/cluster.yaml` says so too.
pub const NODE_VOLUMES: &str = "/var/lib/llama-cluster/volumes";
const QUICK: Duration = Duration::from_secs(30);
/// The node image may have to be downloaded first.
const CREATE_WITHIN: Duration = Duration::from_mins(15);
const LOAD_WITHIN: Duration = Duration::from_mins(5);

/// kind or Docker failed.
#[derive(Debug, thiserror::Error)]
pub enum KindError {
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

    /// The folder of volumes on this machine; the node sees it at [`NODE_VOLUMES`].
    pub fn volumes(&self) -> PathBuf {
        self.folder.join("volumes")
    }

    fn kind(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).args(["--name", &self.name]);
        command
    }

    /// Creates the cluster unless it exists.
    pub async fn up(&self) -> Result<(), KindError> {
        let volumes = self.volumes();
        let write_error = |path: &Path| {
            let path = path.to_owned();
            move |source| KindError::Write { path, source }
        };
        fs::create_dir_all(&volumes).map_err(write_error(&volumes))?;
        if self.exists().await? {
            let mut export = self.kind(&["export", "kubeconfig"]);
            export.arg("--kubeconfig").arg(self.kubeconfig());
            command::run(&mut export, QUICK)
                .await
                .map_err(doing("export the kubeconfig of the kind cluster"))?;
            return Ok(());
        }
        let config = self.folder.join("kind.yaml");
        fs::write(&config, render(&volumes)).map_err(write_error(&config))?;
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

fn render(volumes: &Path) -> String {
    // JSON's strings are YAML's, whatever the path holds.
    let path = serde_json::Value::from(volumes.to_string_lossy());
    CONFIG.replace(VOLUMES_PLACEHOLDER, &path.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_mounts_the_folder_of_volumes() {
        let text = render(Path::new("/home/a b/volumes"));
        let config: serde_yaml::Value = serde_yaml::from_str(&text).unwrap();
        let mount = &config["nodes"][0]["extraMounts"][0];
        assert_eq!(mount["hostPath"], "/home/a b/volumes");
        assert_eq!(mount["containerPath"], NODE_VOLUMES);
        assert_eq!(config["networking"]["apiServerAddress"], "127.0.0.1");
    }
}
