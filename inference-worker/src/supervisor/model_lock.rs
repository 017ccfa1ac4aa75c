//! Says that a model that pods share is in use.

use std::fs::{File, TryLockError};
use std::path::Path;

use llama_contract::FailureCategory;

use crate::failure::Failure;

/// Holds the lock of the file at `path` together with other readers for as long as the
/// result lives: nobody removes the model meanwhile.
///
/// # Errors
/// When there is no such file, or when somebody holds the lock alone, which is whoever
/// fills or removes the model. Storage that knows no locks is only warned of.
pub(super) fn hold(path: &Path) -> Result<File, Failure> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| {
        let message = format!("cannot open the lock of the model, {shown}: {error}");
        Failure::new(FailureCategory::ModelNotFound, message)
    })?;
    match file.try_lock_shared() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Failure::new(
            FailureCategory::Internal,
            format!("another pod is filling or removing the model: it holds {shown}"),
        )),
        Err(TryLockError::Error(error)) => {
            tracing::warn!(
                "the cache of models knows no locks, so this model may be removed while it is \
                 used: {shown}: {error}"
            );
            Ok(file)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_keep_others_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lock");
        let other = File::create(&path).expect("a file");
        let (one, two) = (hold(&path), hold(&path));
        assert!(one.is_ok() && two.is_ok());
        assert!(other.try_lock().is_err());
        drop((one, two));
        other.try_lock().expect("nobody reads");
        let failure = hold(&path).expect_err("held alone");
        assert_eq!(failure.category, FailureCategory::Internal);
        let failure = hold(&folder.path().join("x")).expect_err("absent");
        assert_eq!(failure.category, FailureCategory::ModelNotFound);
    }
}
