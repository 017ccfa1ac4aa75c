//! The program itself against the real API server.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

#[path = "../../tests/support/control_plane.rs"]
mod control_plane;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use control_plane::{ControlPlane, control_plane, programs};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use llama_crds::v1alpha1::LlamaDeployment;
use serde_json::{Value, json};
use tokio::process::Command;

const WITHIN: Duration = Duration::from_mins(1);

/// The exit code, standard output and standard error of `kubectl llama LINE`.
async fn kubectl_llama(plane: &ControlPlane, line: &str) -> anyhow::Result<(i32, String, String)> {
    let run = Command::new(env!("CARGO_BIN_EXE_kubectl-llama"))
        .args(line.split(' '))
        .env("KUBECONFIG", plane.kubeconfig())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(WITHIN, run).await??;
    Ok((
        output.status.code().context("it was killed")?,
        String::from_utf8(output.stdout)?,
        String::from_utf8(output.stderr)?,
    ))
}

fn manifest(changes: &[(&str, &str)]) -> String {
    let mut text = "apiVersion: llmops.dev/v1alpha1
kind: LlamaDeployment
metadata: {name: m}
spec:
  model: {source: {pvc: {claimName: models, path: m.gguf}}}
  parallelism: {tensor: 4, nodes: 2}
  resources: {accelerator: Cpu, cpu: 2, memory: 1Gi}
"
    .to_owned();
    for (from, to) in changes {
        text = text.replace(from, to);
    }
    text
}

async fn plan_of(plane: &ControlPlane, folder: &Path, text: &str) -> anyhow::Result<(i32, String)> {
    let path = folder.join("m.yaml");
    std::fs::write(&path, text)?;
    let (code, out, errors) = kubectl_llama(plane, &format!("plan -f {}", path.display())).await?;
    ensure!(errors.is_empty(), "{errors}");
    Ok((code, out))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_an_empty_cluster_to_a_deployment() -> anyhow::Result<()> {
    let Some(programs) = programs() else {
        return Ok(());
    };
    let plane = control_plane(&programs).await?;
    nothing_is_installed(&plane).await?;
    install(&plane).await?;
    files_are_checked_by_both(&plane).await?;
    a_deployment_is_told(&plane).await
}

async fn nothing_is_installed(plane: &ControlPlane) -> anyhow::Result<()> {
    let (code, out, errors) = kubectl_llama(plane, "doctor").await?;
    ensure!(code == 1 && errors.is_empty(), "{out}{errors}");
    for line in [
        "FAIL  CustomResourceDefinition: llamadeployments.llmops.dev is not installed",
        "FAIL  operator: no Deployment with the labels",
        "FAIL  nodes: the cluster has no nodes",
    ] {
        ensure!(out.contains(line), "{line}: {out}");
    }
    let (code, out, errors) = kubectl_llama(plane, "status m").await?;
    ensure!(code == 1 && out.is_empty(), "{out}");
    ensure!(
        errors.starts_with("error: cannot read LlamaDeployment default/m: ")
            && errors.lines().count() == 1,
        "{errors}"
    );
    Ok(())
}

async fn install(plane: &ControlPlane) -> anyhow::Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(plane.client.clone());
    let crd = llama_crds::crd();
    crds.create(&PostParams::default(), &crd).await?;
    let name = crd.metadata.name.context("a name")?;
    let established = await_condition(crds, &name, conditions::is_crd_established());
    tokio::time::timeout(WITHIN, established).await??;
    let (code, out, errors) = kubectl_llama(plane, "status").await?;
    assert_eq!((code, &*out), (0, ""));
    assert_eq!(errors, "No LlamaDeployments found in namespace default.\n");
    let (_, out, _) = kubectl_llama(plane, "doctor").await?;
    let line = "OK    CustomResourceDefinition: llamadeployments.llmops.dev v1alpha1 is served\n";
    ensure!(out.starts_with(line), "{out}");
    Ok(())
}

async fn files_are_checked_by_both(plane: &ControlPlane) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (code, out) = plan_of(plane, folder.path(), &manifest(&[])).await?;
    ensure!(
        code == 0
            && out.contains("Operator     accepts it")
            && out.contains("API server   accepts it (dry run: nothing was changed)")
            && out.contains("Each pod     2 ranks"),
        "{out}"
    );
    let api: Api<LlamaDeployment> = Api::default_namespaced(plane.client.clone());
    ensure!(
        api.get_opt("m").await?.is_none(),
        "a dry run creates nothing"
    );
    let uneven = manifest(&[("nodes: 2", "nodes: 3")]);
    let (code, out) = plan_of(plane, folder.path(), &uneven).await?;
    ensure!(
        code == 1
            && out.contains("Operator     refuses it: spec.parallelism.tensor 4 times pipeline 1")
            && out.contains("API server   refuses it: ")
            && out.contains("must be a multiple of nodes"),
        "{out}"
    );
    let misspelt = manifest(&[("resources:", "replica: 2\n  resources:")]);
    let (code, out) = plan_of(plane, folder.path(), &misspelt).await?;
    ensure!(
        code == 1 && out.contains("API server   refuses it: ") && out.contains("replica"),
        "what only the API server can see: {out}"
    );
    Ok(())
}

async fn a_deployment_is_told(plane: &ControlPlane) -> anyhow::Result<()> {
    let api: Api<LlamaDeployment> = Api::default_namespaced(plane.client.clone());
    let object: Value = json!({
        "apiVersion": "llmops.dev/v1alpha1", "kind": "LlamaDeployment",
        "metadata": {"name": "m"},
        "spec": {
            "model": {"source": {"pvc": {"claimName": "models", "path": "m.gguf"}}},
            "parallelism": {"tensor": 4, "nodes": 2},
            "resources": {"accelerator": "Cpu", "cpu": 2, "memory": "1Gi"},
        },
    });
    api.create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    let (code, out, _) = kubectl_llama(plane, "status -A").await?;
    ensure!(
        code == 1 && out.contains("the operator has not looked at this spec yet"),
        "{out}"
    );
    let said = json!({"status": {
        "observedGeneration": 1, "readyReplicas": 1, "servedName": "m",
        "conditions": [{
            "type": "Ready", "status": "True", "reason": "AllGroupsReady",
            "message": "1 of 1 group ready.", "lastTransitionTime": "2026-01-01T00:00:00Z",
        }],
    }});
    api.patch_status("m", &PatchParams::default(), &Patch::Merge(said))
        .await?;
    let (code, out, errors) = kubectl_llama(plane, "status m").await?;
    ensure!(
        code == 0 && out.starts_with("LlamaDeployment default/m: ready (AllGroupsReady)"),
        "{out}{errors}"
    );
    let (code, out, errors) = kubectl_llama(plane, "logs m").await?;
    assert_eq!(
        (code, &*out, &*errors),
        (0, "", "LlamaDeployment m has no pods.\n")
    );
    let (code, out, _) = kubectl_llama(plane, "doctor m").await?;
    let line = "FAIL  default/m: PersistentVolumeClaim models does not exist in namespace default";
    ensure!(code == 1 && out.contains(line), "{out}");
    let (code, out, errors) = kubectl_llama(plane, "bench m --requests 2").await?;
    ensure!(
        code == 1
            && out.starts_with("0 of 2 chats answered")
            && out.contains("Errors\n  2 times: "),
        "nothing serves: {out}{errors}"
    );
    let (code, out, errors) = kubectl_llama(plane, "plan m --context other").await?;
    ensure!(
        code == 1 && out.is_empty() && errors.starts_with("error: cannot use the kubeconfig: "),
        "{errors}"
    );
    Ok(())
}
