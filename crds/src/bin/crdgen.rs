//! Writes what is generated from the API types: the CRDs, the chart's copies of them and the
//! reference pages.
//!
//! `crdgen` prints the CRDs, `crdgen docs` the reference pages, `crdgen write` writes all
//! files, `crdgen check` fails when a committed file differs.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;

const HEADER: &str = "# Written by crdgen from crds/src; do not edit.\n";

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "printing is what this program is for")]
fn run() -> Result<ExitCode, Box<dyn Error>> {
    let task = std::env::args().nth(1);
    match task.as_deref() {
        None => {
            for crd in llama_crds::crds() {
                print!("---\n{}", crd_yaml(&crd)?);
            }
        }
        Some("docs") => {
            for crd in llama_crds::crds() {
                print!("{}", llama_crds::reference::page(&crd)?);
            }
        }
        Some("write") => {
            for (path, text) in files()? {
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder)?;
                }
                std::fs::write(&path, text)?;
            }
        }
        Some("check") => return check(),
        Some(other) => {
            eprintln!("crdgen: unknown task {other:?}; expected none, docs, write or check");
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check() -> Result<ExitCode, Box<dyn Error>> {
    let mut code = ExitCode::SUCCESS;
    for (path, text) in files()? {
        if std::fs::read_to_string(&path).ok().as_deref() != Some(text.as_str()) {
            eprintln!(
                "crdgen: {} is not what the types give; run `make generate`",
                path.display()
            );
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

fn crd_yaml(crd: &CustomResourceDefinition) -> Result<String, Box<dyn Error>> {
    Ok(format!("{HEADER}{}", serde_yaml::to_string(crd)?))
}

/// Every generated file with its text.
fn files() -> Result<Vec<(PathBuf, String)>, Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut all = Vec::new();
    for crd in llama_crds::crds() {
        let (yaml, names) = (crd_yaml(&crd)?, &crd.spec.names);
        let file = format!("{}.yaml", names.plural);
        all.push((root.join("crds").join(&file), yaml.clone()));
        all.push((root.join("charts/llama-operator/crd").join(&file), yaml));
        let page = format!("{}.md", names.kind.to_lowercase());
        let page = root.join("docs/reference").join(page);
        all.push((page, llama_crds::reference::page(&crd)?));
    }
    Ok(all)
}
