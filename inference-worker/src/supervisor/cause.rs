//! Which failure came first. Data in, data out.

use std::time::Duration;

use llama_contract::FailureCategory;

use crate::comm::SILENCE_LIMIT;
use crate::failure::Failure;

/// How a rank's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// What the supervisor sees of one rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sight {
    /// The rank, over all pods.
    pub(super) rank: u32,
    /// How it ended, if it did.
    pub(super) exit: Option<Exit>,
    /// How long its heartbeat has stood still.
    pub(super) silent: Duration,
    /// The last step it finished.
    pub(super) step: u64,
}

/// Why the group is over; `None` while it is not.
///
/// `told` is what the ranks wrote on the board. `may_end` says that ranks may
/// end by themselves. `memory_kills` counts processes that the kernel has
/// killed in this container for want of memory.
pub(super) fn first_cause(
    told: Option<&Failure>,
    sights: &[Sight],
    may_end: bool,
    memory_kills: u64,
) -> Option<Failure> {
    // A rank that a signal ended cannot have told; what others say of it is how
    // its end looks from outside.
    let killed = sights.iter().find_map(|sight| match sight.exit {
        Some(Exit::Signal(signal)) => Some((sight, signal)),
        _ => None,
    });
    if let Some((sight, signal)) = killed
        && told.is_none_or(|told| is_hearsay_of(told, sight.rank))
    {
        return Some(died_by_signal(sight, signal, memory_kills));
    }
    if let Some(told) = told {
        return Some(told.clone());
    }
    let ended = sights.iter().find_map(|sight| match sight.exit {
        Some(Exit::Code(0)) if may_end => None,
        Some(Exit::Code(code)) => Some(died_with_code(sight, code)),
        _ => None,
    });
    let silent = || {
        sights
            .iter()
            .filter(|sight| sight.exit.is_none())
            .find(|sight| sight.silent >= SILENCE_LIMIT)
            .map(fell_silent)
    };
    ended.or_else(silent)
}

/// Whether a cause is only a peer's view of `rank`, so that looking again may
/// tell more.
pub(super) fn is_hearsay_of(told: &Failure, rank: u32) -> bool {
    let seen_from_outside = matches!(
        told.category,
        FailureCategory::PeerLost | FailureCategory::RankSilent
    );
    seen_from_outside && told.rank == Some(rank)
}

fn died_by_signal(sight: &Sight, signal: i32, memory_kills: u64) -> Failure {
    let name = signal_name(signal);
    let why = match (signal, memory_kills) {
        (9, 1..) => "; the container has reached its memory limit",
        _ => "",
    };
    let message = format!("rank {} was killed by {name}{why}", sight.rank);
    died(sight, message)
}

fn died_with_code(sight: &Sight, code: i32) -> Failure {
    let message = if code == 0 {
        format!("rank {} ended without being asked to", sight.rank)
    } else {
        format!("rank {} ended with exit code {code}", sight.rank)
    };
    died(sight, message)
}

fn died(sight: &Sight, message: String) -> Failure {
    Failure::new(FailureCategory::RankDied, message)
        .at_rank(sight.rank)
        .at_step(sight.step + 1)
}

fn fell_silent(sight: &Sight) -> Failure {
    let message = format!(
        "rank {} has been silent for {} ms",
        sight.rank,
        sight.silent.as_millis()
    );
    Failure::new(FailureCategory::RankSilent, message)
        .at_rank(sight.rank)
        .at_step(sight.step + 1)
}

fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGBUS => "SIGBUS",
        libc::SIGILL => "SIGILL",
        libc::SIGABRT => "SIGABRT",
        libc::SIGTERM => "SIGTERM",
        _ => return format!("signal {signal}"),
    };
    format!("signal {signal} ({name})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sights(exits: [Option<Exit>; 3]) -> Vec<Sight> {
        (0..)
            .zip(exits)
            .map(|(rank, exit)| Sight {
                rank,
                exit,
                silent: Duration::ZERO,
                step: 11,
            })
            .collect()
    }

    fn told(category: FailureCategory, rank: u32) -> Failure {
        Failure::new(category, "told").at_rank(rank)
    }

    #[test]
    fn a_living_group_has_no_cause() {
        assert_eq!(first_cause(None, &sights([None; 3]), false, 0), None);
    }

    #[test]
    fn a_killed_rank_is_named_with_signal_and_step() {
        let sights = sights([None, Some(Exit::Signal(9)), None]);
        let failure = first_cause(None, &sights, false, 0).unwrap();
        assert_eq!(failure.category, FailureCategory::RankDied);
        assert_eq!((failure.rank, failure.step), (Some(1), Some(12)));
        assert!(failure.message.contains("SIGKILL"), "{failure}");
        let failure = first_cause(None, &sights, false, 1).unwrap();
        assert!(failure.message.contains("memory limit"), "{failure}");
    }

    #[test]
    fn what_peers_saw_of_a_killed_rank_gives_way_to_the_signal() {
        let sights = sights([None, Some(Exit::Signal(9)), None]);
        for category in [FailureCategory::PeerLost, FailureCategory::RankSilent] {
            let failure = first_cause(Some(&told(category, 1)), &sights, false, 0).unwrap();
            assert_eq!(failure.category, FailureCategory::RankDied);
        }
        // A cause about another rank came first.
        let other = told(FailureCategory::PeerLost, 2);
        assert_eq!(first_cause(Some(&other), &sights, false, 0), Some(other));
    }

    #[test]
    fn a_rank_that_tells_is_believed_before_its_exit_code() {
        let sights = sights([Some(Exit::Code(70)), Some(Exit::Code(64)), None]);
        let cause = told(FailureCategory::ModelInvalid, 1);
        assert_eq!(first_cause(Some(&cause), &sights, false, 0), Some(cause));
        let failure = first_cause(None, &sights, false, 0).unwrap();
        assert!(failure.message.contains("exit code 70"), "{failure}");
    }

    #[test]
    fn ranks_may_end_only_when_they_were_asked() {
        let sights = sights([Some(Exit::Code(0)), None, None]);
        assert_eq!(first_cause(None, &sights, true, 0), None);
        let failure = first_cause(None, &sights, false, 0).unwrap();
        assert!(failure.message.contains("without being asked"), "{failure}");
    }

    #[test]
    fn a_rank_that_stands_still_is_silent() {
        let mut sights = sights([None, None, Some(Exit::Code(0))]);
        sights[1].silent = SILENCE_LIMIT;
        sights[2].silent = SILENCE_LIMIT * 2;
        let failure = first_cause(None, &sights, true, 0).unwrap();
        assert_eq!(failure.category, FailureCategory::RankSilent);
        assert_eq!(failure.rank, Some(1));
    }
}
