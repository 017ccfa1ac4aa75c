//! Programs of this repository that need no shared library.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use crate::command::{self, CommandError};

/// The repository that this program was built from.
pub const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const BUILD_WITHIN: Duration = Duration::from_mins(10);

/// Builds `packages` of the repository as static programs; returns their folder.
pub async fn build(packages: &[&str]) -> Result<PathBuf, CommandError> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .and_then(|folder| std::path::absolute(folder).ok())
        .unwrap_or_else(|| Path::new(REPOSITORY).join("target"));
    // A folder of its own: other flags would make cargo build everything again.
    let target = target.join("static");
    // With a target named, the flags are not those of build scripts too.
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(REPOSITORY)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "--quiet", "--release", "--target", &triple])
        .arg("--target-dir")
        .arg(&target);
    for package in packages {
        cargo.args(["-p", package]);
    }
    command::run(&mut cargo, BUILD_WITHIN).await?;
    Ok(target.join(triple).join("release"))
}
