//! What rank processes take of memory, from what the kernel says of them.

use std::sync::OnceLock;

/// Written to `clear_refs` it makes the kernel forget how much a process once took.
/// proc(5).
const FORGET_PEAK: &str = "5";

/// What the ranks of a pod took at most since they serve.
#[derive(Debug, Default)]
pub(super) struct PeakMemory {
    /// Of each rank, whether the kernel has forgotten what loading took: pages of the
    /// model's files are in that.
    forgot: OnceLock<Vec<bool>>,
}

impl PeakMemory {
    /// Counts from now on. Only the first call does.
    pub(super) fn begin(&self, pids: &[u32]) {
        self.forgot.get_or_init(|| {
            let forget = |pid| std::fs::write(format!("/proc/{pid}/clear_refs"), FORGET_PEAK);
            pids.iter().map(|&pid| forget(pid).is_ok()).collect()
        });
    }

    /// Bytes that the `local`-th of `pids` took at most, or takes now where the kernel does
    /// not tell. Pages of files are not in it, and of memory that the ranks of the pod
    /// share each has its part.
    pub(super) fn of(&self, pids: &[u32], local: usize) -> Option<u64> {
        let pid = pids.get(local)?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let forgot = self.forgot.get().and_then(|forgot| forgot.get(local));
        taken(&status, pids.len() as u64, forgot == Some(&true))
    }
}

/// The same from the text of a process's `status`, with `ranks` that share memory. Of the
/// peak, what is not memory of its own is taken to be as much as now: it does not shrink.
fn taken(status: &str, ranks: u64, has_peak: bool) -> Option<u64> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kib << 10)
    };
    let (now, shared) = (field("RssAnon:")?, field("RssShmem:")?);
    let peak = || Some(field("VmHWM:")?.saturating_sub(field("RssFile:")? + shared));
    let own = has_peak.then(peak).flatten().unwrap_or(0).max(now);
    Some(own + shared / ranks.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tllama-worker\nVmHWM:\t  9000 kB\nVmRSS:\t  8000 kB\n\
                          RssAnon:\t  5000 kB\nRssFile:\t  2400 kB\nRssShmem:\t   600 kB\n";

    #[test]
    fn the_peak_counts_and_shared_memory_is_shared_out() {
        let kib = |taken: Option<u64>| taken.map(|bytes| bytes >> 10);
        assert_eq!(kib(taken(STATUS, 3, true)), Some(6000 + 200));
        assert_eq!(kib(taken(STATUS, 1, true)), Some(6000 + 600));
        assert_eq!(kib(taken(STATUS, 3, false)), Some(5000 + 200));
        // Pages of files that came since do not make less of what there is.
        let paged = STATUS.replace("2400", "9000");
        assert_eq!(kib(taken(&paged, 3, true)), Some(5000 + 200));
        assert_eq!(taken("Name:\tgone\n", 3, true), None);
    }

    #[test]
    fn this_process_is_measured_since_it_began() {
        let pids = [std::process::id()];
        let memory = PeakMemory::default();
        let before = memory.of(&pids, 0);
        memory.begin(&pids);
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        drop(block);
        let after = memory.of(&pids, 0);
        assert!(
            before.is_some() && after >= before.map(|bytes| bytes + (60 << 20)),
            "{before:?} {after:?}"
        );
    }
}
