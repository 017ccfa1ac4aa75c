//! What the machine gives and what processes take of it.

use std::fs;

use anyhow::Context as _;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

const KILOBYTE: u64 = 1024;

/// What a process has taken so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Usage {
    /// User and system time, with that of threads that have ended.
    pub(crate) cpu_seconds: f64,
    /// Resident memory now.
    pub(crate) rss_bytes: u64,
    /// The most it ever was.
    pub(crate) peak_bytes: u64,
}

/// What the process `pid` has taken.
pub(crate) fn usage(pid: u32) -> anyhow::Result<Usage> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    };
    let (stat, status) = (read("stat")?, read("status")?);
    let ticks = cpu_ticks(&stat).with_context(|| format!("/proc/{pid}/stat is {stat:?}"))?;
    let bytes = |key| kilobytes(&status, key).unwrap_or_default() * KILOBYTE;
    Ok(Usage {
        cpu_seconds: ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
        rss_bytes: bytes("VmRSS"),
        peak_bytes: bytes("VmHWM"),
    })
}

/// User and system time in a line of `/proc/PID/stat`: the 14th and 15th field, counted
/// behind the name, which may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn kilobytes(status: &str, key: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Lets this thread, and all that it starts, run on `count` of its cores only. Says how
/// many that are.
pub(crate) fn restrict(count: usize) -> anyhow::Result<usize> {
    let allowed = sched_getaffinity(None).context("ask which cores may be used")?;
    let mut chosen = CpuSet::new();
    (0..CpuSet::MAX_CPU)
        .filter(|core| allowed.is_set(*core))
        .take(count)
        .for_each(|core| chosen.set(core));
    sched_setaffinity(None, &chosen).context("choose cores")?;
    Ok(usize::try_from(chosen.count())?)
}

/// Seconds that the cores of this program have worked, for whatever program.
pub(crate) fn busy_seconds() -> anyhow::Result<f64> {
    let allowed = sched_getaffinity(None).context("ask which cores may be used")?;
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let ticks: u64 = stat
        .lines()
        .filter_map(busy_ticks)
        .filter(|(core, _)| *core < CpuSet::MAX_CPU && allowed.is_set(*core))
        .map(|(_, ticks)| ticks)
        .sum();
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The core of a line of `/proc/stat`, and how long it has worked: in user, nice and system
/// mode, on interrupts, and for other machines where it is virtual.
fn busy_ticks(line: &str) -> Option<(usize, u64)> {
    let (name, times) = line.split_once(' ')?;
    let core = name.strip_prefix("cpu")?.parse().ok()?;
    let times: Vec<u64> = times
        .split(' ')
        .filter_map(|time| time.parse().ok())
        .collect();
    let work = [0, 1, 2, 5, 6, 7].map(|field| times.get(field).copied().unwrap_or_default());
    Some((core, work.iter().sum()))
}

/// Processes that wanted to run, on average over the last minute.
pub(crate) fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// What the processor is called.
pub(crate) fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_read_behind_a_name_with_parentheses() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4194304 80 0 0 0 250 50 7 7 20 0 5 0";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("garbage"), None);
    }

    #[test]
    fn memory_is_read_by_its_key() {
        let status = "Name:\tx\nVmHWM:\t   20480 kB\nVmRSS:\t   10240 kB\n";
        assert_eq!(kilobytes(status, "VmRSS"), Some(10_240));
        assert_eq!(kilobytes(status, "VmHWM"), Some(20_480));
        assert_eq!(kilobytes(status, "VmSwap"), None);
    }

    #[test]
    fn idle_time_is_no_work() {
        let line = "cpu1 100 20 30 9000 500 4 5 6 0 0";
        assert_eq!(busy_ticks(line), Some((1, 165)));
        assert_eq!(busy_ticks("cpu  1 1 1 1 1 1 1 1 0 0"), None);
        assert_eq!(busy_ticks("intr 5"), None);
        assert!(busy_seconds().unwrap() > 0.0);
    }

    #[test]
    fn own_usage_is_known() {
        let usage = usage(std::process::id()).unwrap();
        assert!(usage.rss_bytes > KILOBYTE);
        assert!(usage.peak_bytes >= usage.rss_bytes);
    }
}
