//! Leaves a copy of this program in a folder that containers share.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use llama_contract::FailureCategory;

/// Name of the installed program in its folder.
const PROGRAM: &str = "llama-model-copy";

/// Why the program could not be installed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    /// The folder does not exist.
    #[error("cannot install into {folder}: it is not a folder; mount a volume there")]
    NoFolder {
        /// The folder.
        folder: PathBuf,
    },
    /// Copying failed.
    #[error("cannot install {program}")]
    Write {
        /// The file to be.
        program: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

impl InstallError {
    pub(crate) fn category(&self) -> FailureCategory {
        match self {
            Self::NoFolder { .. } => FailureCategory::InvalidConfiguration,
            Self::Write { source, .. } if llama_model_copy::space::is_full(source) => {
                FailureCategory::InsufficientStorage
            }
            Self::Write { .. } => FailureCategory::Internal,
        }
    }
}

/// Copies the running program into `folder`, executable by everybody, and returns
/// where it is. A copy that a former start left is replaced.
pub(crate) fn install(folder: &Path) -> Result<PathBuf, InstallError> {
    if !folder.is_dir() {
        return Err(InstallError::NoFolder {
            folder: folder.to_owned(),
        });
    }
    let program = folder.join(PROGRAM);
    let partial = folder.join(format!(".{PROGRAM}.part"));
    let place = || -> io::Result<()> {
        fs::copy("/proc/self/exe", &partial)?;
        fs::set_permissions(&partial, Permissions::from_mode(0o755))?;
        fs::rename(&partial, &program)
    };
    match place() {
        Ok(()) => Ok(program),
        Err(source) => Err(InstallError::Write { program, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_installed_name_is_that_of_the_worker_image() {
        let name = Path::new(llama_contract::MODEL_COPY_PROGRAM).file_name();
        assert_eq!(name, Some(PROGRAM.as_ref()));
    }
}
