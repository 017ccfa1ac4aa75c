//! `kubectl llama plan`: what the model takes of the memory, and what would fit.

pub mod file;
pub mod page;

use std::io::{Read as _, Write};
use std::path::Path;

use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams, ValidationDirective};
use llama_crds::v1alpha1::{DeploymentPlan, LlamaDeployment};

use crate::Health;
use crate::args::PlanFlags;
use crate::cluster::Cluster;
use crate::error::{Error, problem};
use crate::output::{formed, yaml};

/// Largest file that is read, in bytes: the API server takes no larger objects.
const FILE: u64 = 3 << 20;
/// Owner of the fields in dry runs.
const FIELD_MANAGER: &str = "kubectl-llama";

/// Writes the plan that `flags` name, or what is wrong with their file.
pub async fn run(
    cluster: &Cluster,
    flags: &PlanFlags,
    out: &mut (dyn Write + Send),
) -> Result<Health, Error> {
    if let Some(path) = &flags.file {
        return check_file(cluster, path, out).await;
    }
    let name = flags.name.as_deref().unwrap_or_default();
    let deployment = cluster.deployment(name).await?;
    let plan = deployment
        .status
        .as_ref()
        .and_then(|status| status.plan.as_ref());
    let text = if let Some(number) = flags.alternative {
        patch(&deployment, plan, number)?
    } else if let Some(form) = flags.output {
        let none = || Error::Unexpected(format!("LlamaDeployment {name} has no plan"));
        formed(plan.ok_or_else(none)?, form)?
    } else {
        page::page(&deployment)?
    };
    out.write_all(text.as_bytes())?;
    // Whoever asks for a change that fits has it.
    Ok(Health::of(
        flags.alternative.is_some() || page::verdict(&deployment).is_good(),
    ))
}

/// The alternative `number` of `plan`, from 1, as a patch.
fn patch(
    deployment: &LlamaDeployment,
    plan: Option<&DeploymentPlan>,
    number: u8,
) -> Result<String, Error> {
    let all = plan.map(|plan| &*plan.alternatives).unwrap_or_default();
    match all.get(usize::from(number).saturating_sub(1)) {
        Some(alternative) => yaml(&page::patch(alternative)),
        None => Err(Error::Unexpected(format!(
            "--alternative is {number}, but the plan of LlamaDeployment {} has {}",
            deployment.metadata.name.as_deref().unwrap_or_default(),
            crate::words::count(i64::try_from(all.len()).unwrap_or(i64::MAX), "alternative")
        ))),
    }
}

/// Checks each LlamaDeployment of the file at `path`.
async fn check_file(
    cluster: &Cluster,
    path: &Path,
    out: &mut (dyn Write + Send),
) -> Result<Health, Error> {
    let shown = path.display().to_string();
    let wrong = |problem| Error::Manifest {
        path: shown.clone(),
        problem,
    };
    let text = read(path)?;
    let mut good = true;
    for manifest in file::manifests(&text, &cluster.namespace).map_err(wrong)? {
        let checked = file::check(&manifest);
        let answer = dry_run(cluster, &manifest).await?;
        good &= checked.is_ok() && answer.is_ok();
        let page = file::page(&manifest, &checked, &answer);
        out.write_all(page.as_bytes())?;
    }
    Ok(Health::of(good))
}

fn read(path: &Path) -> Result<String, Error> {
    let mut text = String::new();
    let result = if path == Path::new("-") {
        std::io::stdin().take(FILE + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(FILE + 1).read_to_string(&mut text))
    };
    let path = path.display().to_string();
    match result {
        Err(source) => Err(Error::File { path, source }),
        Ok(length) if length as u64 > FILE => Err(Error::Manifest {
            path,
            problem: format!("expected at most {FILE} bytes"),
        }),
        Ok(_) => Ok(text),
    }
}

/// What the API server would say to `manifest`: `Err` holds its refusal.
async fn dry_run(
    cluster: &Cluster,
    manifest: &file::Manifest,
) -> Result<Result<(), String>, Error> {
    let resource = ApiResource::erase::<LlamaDeployment>(&());
    let api: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &manifest.namespace, &resource);
    let params = PatchParams {
        dry_run: true,
        force: true,
        field_manager: Some(FIELD_MANAGER.to_owned()),
        field_validation: Some(ValidationDirective::Strict),
    };
    let attempt = format!(
        "try LlamaDeployment {}/{}",
        manifest.namespace, manifest.name
    );
    let patch = Patch::Apply(&manifest.value);
    match cluster
        .ask(&attempt, api.patch(&manifest.name, &params, &patch))
        .await
    {
        Ok(_) => Ok(Ok(())),
        Err(Error::Api { answer, .. }) if matches!(&*answer, kube::Error::Api(_)) => {
            Ok(Err(problem(&answer)))
        }
        Err(other) => Err(other),
    }
}
