//! The container's termination message.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

/// Leaves `text` as the termination message. The kubelet has made the file; outside of a
/// pod there is none, and nothing is written.
pub(crate) fn write(path: &Path, text: &str) {
    let written = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()));
    if let Err(error) = written {
        tracing::info!(path = %path.display(), %error, "no termination message written");
    }
}
