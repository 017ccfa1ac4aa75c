//! Waiting for a device or for NCCL, with a deadline and an eye on the group.

use std::time::{Duration, Instant};

use super::communicator::{Fault, Progress};
use crate::comm::board::Board;

/// How long a waiting rank looks without a pause: most steps are done by then.
const EAGER: Duration = Duration::from_micros(100);
/// Pause between later looks.
const PAUSE: Duration = Duration::from_micros(50);

/// Why waiting ended without what was waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The group is over, and the board says why.
    GroupOver,
    /// The deadline has passed.
    Late(Duration),
    /// NCCL or the driver failed.
    Fault(Fault),
}

impl From<Fault> for Ended {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Asks `is_done` until it says so.
pub(super) fn wait(
    board: &Board,
    deadline: Duration,
    mut is_done: impl FnMut() -> Result<Progress, Fault>,
) -> Result<(), Ended> {
    let begun = Instant::now();
    loop {
        if is_done()? == Progress::Done {
            return Ok(());
        }
        if board.is_over() {
            return Err(Ended::GroupOver);
        }
        let waited = begun.elapsed();
        if waited >= deadline {
            return Err(Ended::Late(waited));
        }
        if waited < EAGER {
            std::thread::yield_now();
        } else {
            std::thread::sleep(PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use llama_contract::FailureCategory;

    use super::*;
    use crate::comm::region::Region;
    use crate::failure::Failure;

    fn board() -> Board {
        let region = Region::create(Board::bytes(1)).expect("a region");
        Board::new(Arc::new(region), 1).expect("a board")
    }

    #[test]
    fn waiting_ends_with_success_fault_deadline_or_group() {
        let board = board();
        let mut looks = 0;
        let third = || {
            looks += 1;
            Ok(if looks == 3 {
                Progress::Done
            } else {
                Progress::UnderWay
            })
        };
        assert_eq!(wait(&board, Duration::from_mins(1), third), Ok(()));
        let fault = Fault {
            concerns_peers: true,
            reason: "remote".to_owned(),
        };
        let failing = || Err(fault.clone());
        assert_eq!(
            wait(&board, Duration::from_mins(1), failing),
            Err(Ended::Fault(fault.clone()))
        );
        let limit = Duration::from_millis(5);
        let never = || Ok(Progress::UnderWay);
        let late = wait(&board, limit, never);
        assert!(
            matches!(late, Err(Ended::Late(waited)) if waited >= limit),
            "{late:?}"
        );
        board.fail(&Failure::new(FailureCategory::RankDied, "rank 1 died"));
        assert_eq!(
            wait(&board, Duration::from_mins(1), never),
            Err(Ended::GroupOver)
        );
    }
}
