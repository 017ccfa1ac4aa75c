//! What the container may use: its memory limit and its cores.

use std::path::{Path, PathBuf};

/// Where the kernel shows the container its own control group.
const ROOT: &str = "/sys/fs/cgroup";
/// Version 1 writes "no limit" as the largest multiple of a page in an i64.
const UNLIMITED_V1: u64 = i64::MAX as u64 / 4096 * 4096;

/// The control group of this container.
#[derive(Clone, Debug)]
pub struct Cgroup {
    root: PathBuf,
}

impl Default for Cgroup {
    fn default() -> Self {
        Self { root: ROOT.into() }
    }
}

impl Cgroup {
    /// The control group shown under `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The memory limit in bytes; `None` without one.
    pub fn memory_limit(&self) -> Option<u64> {
        let version_2 = self.read("memory.max").map(|text| text.parse().ok());
        let version_1 = || {
            let limit = self.read("memory/memory.limit_in_bytes")?.parse().ok()?;
            (limit < UNLIMITED_V1).then_some(limit)
        };
        version_2.unwrap_or_else(version_1)
    }

    /// Cores that the CPU quota allows; `None` without a quota.
    pub fn cores(&self) -> Option<f64> {
        let version_2 = || {
            let text = self.read("cpu.max")?;
            let (quota, period) = text.split_once(' ')?;
            Some((quota.parse().ok()?, period.parse().ok()?))
        };
        let version_1 = || {
            let quota = self.read("cpu/cpu.cfs_quota_us")?.parse().ok()?;
            Some((quota, self.read("cpu/cpu.cfs_period_us")?.parse().ok()?))
        };
        let (quota, period): (f64, f64) = version_2().or_else(version_1)?;
        (quota > 0.0 && period > 0.0).then(|| quota / period)
    }

    /// Processes of the container that the kernel has killed for memory.
    pub fn out_of_memory_kills(&self) -> u64 {
        let events = self
            .read("memory.events")
            .or_else(|| self.read("memory/memory.oom_control"))
            .unwrap_or_default();
        events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0)
    }

    fn read(&self, file: &str) -> Option<String> {
        let text = std::fs::read_to_string(Path::new(&self.root).join(file)).ok()?;
        Some(text.trim().to_owned())
    }
}

/// Whole cores that this container may use at once: those that the scheduler
/// gives it, or fewer where a quota says so. At least one.
pub fn usable_cores(cgroup: &Cgroup) -> usize {
    // This already counts affinity, and on some systems the quota.
    let given = std::thread::available_parallelism().map_or(1, usize::from);
    let quota = cgroup.cores().map_or(given, whole_cores);
    given.min(quota).max(1)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float to integer cast saturates, and a quota is positive"
)]
fn whole_cores(quota: f64) -> usize {
    quota.floor() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn cgroup(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let cgroup = Cgroup::at(folder.path());
        (folder, cgroup)
    }

    #[test]
    fn version_2_limits_are_read() {
        let (_folder, limited) = cgroup(&[
            ("memory.max", "1073741824\n"),
            ("cpu.max", "150000 100000\n"),
            ("memory.events", "low 0\noom 2\noom_kill 1\n"),
        ]);
        assert_eq!(limited.memory_limit(), Some(1 << 30));
        assert_eq!(limited.cores(), Some(1.5));
        assert_eq!(limited.out_of_memory_kills(), 1);
        assert_eq!(usable_cores(&limited), 1);
        let (_folder, free) = cgroup(&[("memory.max", "max\n"), ("cpu.max", "max 100000\n")]);
        assert_eq!((free.memory_limit(), free.cores()), (None, None));
    }

    #[test]
    fn version_1_limits_are_read() {
        let (_folder, limited) = cgroup(&[
            ("memory/memory.limit_in_bytes", "536870912\n"),
            ("cpu/cpu.cfs_quota_us", "200000\n"),
            ("cpu/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(limited.memory_limit(), Some(512 << 20));
        assert_eq!(limited.cores(), Some(2.0));
        let (_folder, free) = cgroup(&[
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cpu/cpu.cfs_quota_us", "-1\n"),
            ("cpu/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!((free.memory_limit(), free.cores()), (None, None));
    }

    #[test]
    fn a_machine_without_control_groups_has_no_limits() {
        let (_folder, bare) = cgroup(&[]);
        assert_eq!((bare.memory_limit(), bare.cores()), (None, None));
        assert_eq!(bare.out_of_memory_kills(), 0);
        assert!(usable_cores(&bare) >= 1);
    }
}
