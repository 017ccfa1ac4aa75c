//! The cgroup below which all containers of a cluster run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::layout::Layout;
use super::node::Node;

/// File of a cgroup of version 2 that names its controllers.
const CONTROLLERS: &str = "cgroup.controllers";

/// Where every cgroup hierarchy is mounted, from the text of `/proc/self/mountinfo`.
pub fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| {
            let (fields, rest) = line.split_once(" - ")?;
            let kind = rest.split(' ').next()?;
            // A hierarchy that a container was given a part of is not ours to use.
            let mut fields = fields.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            let whole = root == "/" && matches!(kind, "cgroup" | "cgroup2");
            whole.then(|| PathBuf::from(point))
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

/// Paths at which the cluster's cgroup is or would be.
pub fn paths(layout: &Layout) -> io::Result<Vec<PathBuf>> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(hierarchies(&mountinfo)
        .into_iter()
        .map(|hierarchy| hierarchy.join(layout.cgroup()))
        .collect())
}

/// Makes the cgroups of the nodes in every hierarchy, those that hold others first.
pub fn create(nodes: &[Node<'_>]) -> io::Result<()> {
    let hierarchies = hierarchies(&fs::read_to_string("/proc/self/mountinfo")?);
    if hierarchies.is_empty() {
        return Err(io::Error::other("no cgroup hierarchy is mounted"));
    }
    for hierarchy in hierarchies {
        for node in nodes {
            let path = hierarchy.join(node.cgroup());
            let parent = path.parent().unwrap_or(&hierarchy);
            if parent != hierarchy {
                hand_down(parent)?;
            }
            fs::create_dir_all(&path)?;
            // A new cpuset has no CPUs until it is given its parent's (cgroup v1 only).
            for setting in ["cpuset.cpus", "cpuset.mems"] {
                let file = path.join(setting);
                if file.exists() && !path.join(CONTROLLERS).exists() {
                    fs::write(file, fs::read(parent.join(setting))?)?;
                }
            }
        }
    }
    Ok(())
}

/// Lets the cgroups below `path` have every controller that it has (cgroup v2 only).
fn hand_down(path: &Path) -> io::Result<()> {
    let controllers = match fs::read_to_string(path.join(CONTROLLERS)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        controllers => controllers?,
    };
    let wanted: Vec<String> = controllers
        .split_whitespace()
        .map(|controller| format!("+{controller}"))
        .collect();
    fs::write(path.join("cgroup.subtree_control"), wanted.join(" "))
}

/// Removes the cgroup at `path` and all below; says how many there were.
///
/// The kernel refuses while a process is left in one.
pub fn remove(path: &Path) -> io::Result<usize> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            removed += remove(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Ok(()) => Ok(removed + 1),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(removed),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let mountinfo = "\
30 24 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
32 30 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
33 30 0:29 /docker/1 /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
";
        let paths = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/unified"];
        assert_eq!(hierarchies(mountinfo), paths.map(PathBuf::from));
    }

    #[test]
    fn controllers_are_handed_down_where_there_are_any() {
        let folder = tempfile::tempdir().unwrap();
        hand_down(folder.path()).unwrap();
        let file = folder.path().join("cgroup.subtree_control");
        assert!(!file.exists());
        fs::write(folder.path().join(CONTROLLERS), "cpu memory\n").unwrap();
        hand_down(folder.path()).unwrap();
        assert_eq!(fs::read_to_string(file).unwrap(), "+cpu +memory");
    }

    #[test]
    fn removal_goes_bottom_up_and_is_repeatable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster");
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::create_dir_all(path.join("c")).unwrap();
        assert_eq!(remove(&path).unwrap(), 4);
        assert_eq!(remove(&path).unwrap(), 0);
    }
}
