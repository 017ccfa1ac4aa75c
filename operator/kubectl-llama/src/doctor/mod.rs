//! `kubectl llama doctor`: looks for what is wrong and says what to do next.

pub mod checks;
pub mod facts;
pub mod finding;
mod observe;

use std::io::Write;

use jiff::Timestamp;

use crate::Health;
use crate::args::DoctorFlags;
use crate::cluster::Cluster;
use crate::error::Error;
use crate::output::formed;

/// Writes what is wrong with the LlamaDeployments that `flags` name and around them.
pub async fn run(
    cluster: &Cluster,
    flags: &DoctorFlags,
    out: &mut (dyn Write + Send),
) -> Result<Health, Error> {
    let facts = observe::facts(cluster, flags).await?;
    let findings = checks::all(&facts, Timestamp::now());
    let text = match flags.output {
        Some(form) => formed(&findings, form)?,
        None => finding::page(&findings),
    };
    out.write_all(text.as_bytes())?;
    Ok(finding::health(&findings))
}
