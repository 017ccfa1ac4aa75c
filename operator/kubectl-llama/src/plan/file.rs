//! A file with LlamaDeployments, checked by the operator's own rules. Pure.

use std::fmt::Write as _;

use llama_crds::v1alpha1::LlamaDeployment;
use llama_operator::reconcile::observe::Observed;
use llama_operator::reconcile::validate::{ValidDeployment, validate};
use serde_json::{Value, json};

use crate::status::page::source;
use crate::words::count;

/// One LlamaDeployment of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Its name.
    pub name: String,
    /// Its namespace, or that of the command.
    pub namespace: String,
    /// It, as the file has it but for the namespace.
    pub value: Value,
}

/// The LlamaDeployments of `text`, in YAML or JSON. Those without a namespace get
/// `namespace`; objects of other kinds are left out.
///
/// # Errors
/// What was expected and is not there.
pub fn manifests(text: &str, namespace: &str) -> Result<Vec<Manifest>, String> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)
        .map_err(|error| format!("expected YAML or JSON: {}", in_one_line(&error.to_string())))?;
    let (api_version, kind) = (api_version(), "LlamaDeployment");
    let mut all = Vec::new();
    for mut value in documents {
        if value["kind"] != kind {
            continue;
        }
        if value["apiVersion"] != api_version {
            let found = &value["apiVersion"];
            return Err(format!("apiVersion is {found}; expected {api_version}"));
        }
        let Some(name) = value["metadata"]["name"].as_str().map(str::to_owned) else {
            return Err("metadata.name is missing; expected a name".to_owned());
        };
        let own = value["metadata"]["namespace"].as_str().map(str::to_owned);
        let namespace = own.unwrap_or_else(|| namespace.to_owned());
        value["metadata"]["namespace"] = json!(namespace);
        all.push(Manifest {
            name,
            namespace,
            value,
        });
    }
    if all.is_empty() {
        return Err(format!("expected a {kind} of {api_version}, found none"));
    }
    Ok(all)
}

fn api_version() -> String {
    <LlamaDeployment as kube::Resource>::api_version(&()).into_owned()
}

fn in_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What the operator would make of `manifest`.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(manifest: &Manifest) -> Result<(LlamaDeployment, ValidDeployment), String> {
    let mut value = manifest.value.clone();
    // The API server would give it one.
    value["metadata"]["uid"] = json!("not-created-yet");
    let object: LlamaDeployment =
        serde_json::from_value(value).map_err(|error| error.to_string())?;
    let valid = validate(&object, &Observed::default()).map_err(|error| error.to_string())?;
    Ok((object, valid))
}

/// What is said of `manifest`: `checked` by the operator's rules, `answer` by the API
/// server.
pub fn page(
    manifest: &Manifest,
    checked: &Result<(LlamaDeployment, ValidDeployment), String>,
    answer: &Result<(), String>,
) -> String {
    let mut page = format!("LlamaDeployment {}/{}\n", manifest.namespace, manifest.name);
    match checked {
        Ok((object, valid)) => {
            page.push_str("Operator     accepts it\n");
            layout(&mut page, object, valid);
        }
        Err(problem) => {
            let _ = writeln!(page, "Operator     refuses it: {problem}");
        }
    }
    let _ = match answer {
        Ok(()) => writeln!(
            page,
            "API server   accepts it (dry run: nothing was changed)"
        ),
        Err(problem) => writeln!(page, "API server   refuses it: {}", in_one_line(problem)),
    };
    page
}

fn layout(page: &mut String, object: &LlamaDeployment, valid: &ValidDeployment) {
    let (ranks, groups) = (valid.tensor * valid.pipeline, valid.wanted_groups());
    let _ = writeln!(
        page,
        "Model        {}, from {}",
        valid.served_name,
        source(&object.spec.model.source)
    );
    let _ = writeln!(
        page,
        "Group        {} (tensor {}, pipeline {}) in {}",
        count(ranks, "rank"),
        valid.tensor,
        valid.pipeline,
        count(valid.nodes, "pod")
    );
    let each = valid.ranks_per_pod();
    let gpus = |number: u32| match &valid.gpu {
        None => String::new(),
        Some(gpu) => format!(", {number} {}", gpu.resource_name),
    };
    let _ = writeln!(
        page,
        "Each pod     {}, {} CPU ({} each), {} of memory{}",
        count(each, "rank"),
        valid.cpu,
        count(valid.threads_per_rank, "thread"),
        valid.memory,
        gpus(each)
    );
    let _ = writeln!(
        page,
        "In all       {}, {}, {}{}",
        count(groups, "group"),
        count(groups * valid.nodes, "pod"),
        count(groups * ranks, "rank"),
        gpus(groups * ranks)
    );
}
