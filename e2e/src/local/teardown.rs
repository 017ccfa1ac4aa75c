//! Removes everything of a local cluster, whatever state it is in.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cgroups;
use super::layout::Layout;
use super::namespace::NETWORK_RESULTS;
use super::processes::{self, Process};
use crate::wait::{self, Look};

const ENDED_WITHIN: Duration = Duration::from_secs(30);
const CGROUPS_EMPTY_WITHIN: Duration = Duration::from_secs(10);

/// What was found and removed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Processes that were ended, in the namespace or in containers.
    pub processes: usize,
    /// Mounts in this machine's own mount table.
    pub mounts: usize,
    /// Cgroups, over all hierarchies.
    pub cgroups: usize,
    /// Folders and files outside `/proc` and the cgroups.
    pub folders: Vec<PathBuf>,
}

impl Removed {
    /// Whether there was nothing to remove.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_nothing() {
            return f.write_str("nothing was there");
        }
        let Self {
            processes,
            mounts,
            cgroups,
            folders,
        } = self;
        write!(
            f,
            "{processes} processes, {cgroups} cgroups, {mounts} mounts"
        )?;
        for folder in folders {
            write!(f, ", {}", folder.display())?;
        }
        Ok(())
    }
}

/// Something of the cluster could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum TeardownError {
    /// A file, folder or cgroup.
    #[error("could not remove {what}")]
    Io {
        /// What was to go.
        what: String,
        /// Why it stayed.
        #[source]
        source: io::Error,
    },
    /// It was removed and is still there.
    #[error("left behind after all: {}", .0.join(", "))]
    Left(Vec<String>),
}

fn removing(what: impl Into<String>) -> impl FnOnce(io::Error) -> TeardownError {
    let what = what.into();
    move |source| TeardownError::Io { what, source }
}

/// Removes the cluster and then checks that nothing of it is left. To do so again
/// changes nothing.
pub async fn remove(layout: &Layout) -> Result<Removed, TeardownError> {
    let mut removed = Removed {
        processes: end_processes(layout).await?,
        mounts: unmount(layout)?,
        ..Removed::default()
    };
    removed.cgroups = remove_cgroups(layout).await?;
    if remove_folder(layout.root())? {
        removed.folders.push(layout.root().to_owned());
    }
    if remove_network_results().map_err(removing(NETWORK_RESULTS))? {
        removed.folders.push(NETWORK_RESULTS.into());
    }
    let left = leftovers(layout).map_err(removing("the cluster"))?;
    if left.is_empty() {
        Ok(removed)
    } else {
        Err(TeardownError::Left(left))
    }
}

async fn end_processes(layout: &Layout) -> Result<usize, TeardownError> {
    let list = || processes::list().map_err(removing("processes"));
    let before = list()?;
    let holder = processes::holder(&before, layout);
    let namespace = holder.as_ref().and_then(|holder| holder.namespace);
    let count = processes::of_cluster(&before, layout, namespace).len();
    if let Some(holder) = &holder {
        // The kernel ends the rest of its namespace with it.
        processes::kill(holder).map_err(removing(format!("process {}", holder.pid)))?;
    }
    let ended = wait::until("the end of all processes", ENDED_WITHIN, async || {
        let left = match processes::list() {
            Ok(now) => processes::of_cluster(&now, layout, namespace),
            Err(error) => return Look::NotYet(error.to_string()),
        };
        // Only what the namespace did not take along, such as a waiting launcher.
        for process in &left {
            if let Err(error) = processes::kill(process) {
                return Look::NotYet(error.to_string());
            }
        }
        if left.is_empty() {
            Look::Done(())
        } else {
            Look::NotYet(describe(&left).join(", "))
        }
    });
    ended
        .await
        .map_err(|error| TeardownError::Left(vec![error.to_string()]))?;
    Ok(count)
}

fn describe(processes: &[Process]) -> Vec<String> {
    processes
        .iter()
        .map(|process| format!("process {} ({})", process.pid, process.program()))
        .collect()
}

/// Mounts below the cluster's folder, deepest first. Its own mount namespace went
/// with its processes; these are what somebody mounted there from outside.
fn mounts(layout: &Layout) -> io::Result<Vec<PathBuf>> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    let mut points: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(layout.root()))
        .collect();
    points.sort();
    points.reverse();
    Ok(points)
}

fn unmount(layout: &Layout) -> Result<usize, TeardownError> {
    let points = mounts(layout).map_err(removing("mounts"))?;
    for point in &points {
        rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH)
            .map_err(|error| removing(format!("the mount {}", point.display()))(error.into()))?;
    }
    Ok(points.len())
}

async fn remove_cgroups(layout: &Layout) -> Result<usize, TeardownError> {
    let mut removed = 0;
    for path in cgroups::paths(layout).map_err(removing("cgroups"))? {
        // A process that has ended leaves its cgroup a moment later.
        let wait =
            wait::until(
                "an empty cgroup",
                CGROUPS_EMPTY_WITHIN,
                async || match cgroups::remove(&path) {
                    Ok(count) => Look::Done(Ok(count)),
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                        Look::NotYet(error.to_string())
                    }
                    Err(error) => Look::Done(Err(error)),
                },
            );
        let what = format!("the cgroup {}", path.display());
        removed += wait
            .await
            .map_err(|error| TeardownError::Left(vec![format!("{what}: {error}")]))?
            .map_err(removing(what))?;
    }
    Ok(removed)
}

/// Removes the folder that clusters mount over, where one of them made it and none
/// is left; says whether it did.
fn remove_network_results() -> io::Result<bool> {
    let mark = Layout::made_network_results();
    if !mark.exists() {
        return Ok(false);
    }
    for entry in fs::read_dir(Layout::state())? {
        if entry?.file_type()?.is_dir() {
            return Ok(false);
        }
    }
    fs::remove_file(mark)?;
    // Refuses where somebody else put something in.
    Ok(fs::remove_dir(NETWORK_RESULTS).is_ok())
}

fn remove_folder(folder: &Path) -> Result<bool, TeardownError> {
    match fs::remove_dir_all(folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(removing(folder.display().to_string())(source)),
    }
}

/// What of the cluster is there, in words; empty after [`remove`].
pub fn leftovers(layout: &Layout) -> io::Result<Vec<String>> {
    let list = processes::list()?;
    let holder = processes::holder(&list, layout);
    let namespace = holder.as_ref().and_then(|holder| holder.namespace);
    let mut left = describe(&processes::of_cluster(&list, layout, namespace));
    left.extend(
        mounts(layout)?
            .iter()
            .map(|point| format!("mount {}", point.display())),
    );
    let cgroups = cgroups::paths(layout)?
        .into_iter()
        .filter(|path| path.exists());
    left.extend(cgroups.map(|path| format!("cgroup {}", path.display())));
    if layout.root().exists() {
        left.push(format!("folder {}", layout.root().display()));
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_removed_is_said_in_words() {
        assert_eq!(Removed::default().to_string(), "nothing was there");
        let removed = Removed {
            processes: 3,
            cgroups: 20,
            mounts: 0,
            folders: vec!["/var/lib/llama-cluster/a".into()],
        };
        assert_eq!(
            removed.to_string(),
            "3 processes, 20 cgroups, 0 mounts, /var/lib/llama-cluster/a"
        );
    }

    #[tokio::test]
    async fn folders_that_never_were_are_no_error() {
        assert!(!remove_folder(Path::new("/no/such/folder")).unwrap());
    }
}
