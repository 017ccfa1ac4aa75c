//! Writes what is generated from the API types: the CRD, the chart's copy of it and the
//! reference page.
//!
//! `crdgen` prints the CRD, `crdgen docs` the reference page, `crdgen write` writes all
//! files, `crdgen check` fails when a committed file differs.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

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
        None => print!("{}", crd_yaml()?),
        Some("docs") => print!("{}", llama_crds::reference::page(&llama_crds::crd())?),
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

fn crd_yaml() -> Result<String, Box<dyn Error>> {
    Ok(format!(
        "{HEADER}{}",
        serde_yaml::to_string(&llama_crds::crd())?
    ))
}

/// Every generated file with its text.
fn files() -> Result<Vec<(PathBuf, String)>, Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let yaml = crd_yaml()?;
    Ok(vec![
        (root.join("crds/llamadeployments.yaml"), yaml.clone()),
        (
            root.join("charts/llama-operator/crd/llamadeployments.yaml"),
            yaml,
        ),
        (
            root.join("docs/reference/llamadeployment.md"),
            llama_crds::reference::page(&llama_crds::crd())?,
        ),
    ])
}
