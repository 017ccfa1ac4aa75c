use super::*;
use crate::comm::fixtures::{beating, expected, gathers, group, mesh, operate, pods};
use crate::comm::placement::Backend;
use crate::failure::Failure;
use llama_contract::FailureCategory;
use proptest::prelude::*;

fn placement(tensor: usize, pipeline: usize, pods: usize) -> Placement {
    Placement::new(Layout { tensor, pipeline }, pods).unwrap()
}

/// The ranks of each pod, and the pods' boards.
fn links(placement: Placement) -> (Vec<HierLink>, Vec<Board>) {
    assert_eq!(placement.backend(), Backend::Hierarchical);
    let pods = pods(placement);
    let links = mesh(placement)
        .into_iter()
        .enumerate()
        .map(|(rank, connections)| {
            let pod = pods[placement.pod(rank)].clone();
            let link = HierLink::new(placement, rank, pod, connections, false);
            link.unwrap().unwrap()
        })
        .collect();
    (links, pods.into_iter().map(|(_, board)| board).collect())
}

/// Runs `body` while the hearts of all ranks of all pods beat, save `dead`.
fn all_beating<T: Send>(
    placement: Placement,
    boards: &[Board],
    dead: Option<usize>,
    body: impl FnOnce() -> T,
) -> T {
    let hearts: Vec<_> = (0..placement.world())
        .filter(|rank| Some(*rank) != dead)
        .map(|rank| (boards[placement.pod(rank)].clone(), placement.local(rank)))
        .collect();
    beating(&hearts, body)
}

/// What all ranks get from every operation, `times` over.
fn run(placement: Placement, times: usize, len: usize, lens: &[usize]) -> Result<(), String> {
    let (links, boards) = links(placement);
    let outcomes = all_beating(placement, &boards, None, || {
        group(links, |mut link| {
            let outcomes: Vec<_> = (0..times).map(|_| operate(&mut link, len, lens)).collect();
            link.expect_close();
            link.gather_words([0; 3]).unwrap();
            outcomes
        })
    });
    for (rank, outcomes) in outcomes.into_iter().enumerate() {
        let expected = expected(placement.layout, rank, len, lens);
        if let Some(outcome) = outcomes.iter().find(|outcome| **outcome != expected) {
            return Err(format!(
                "{placement:?} rank {rank}: {outcome:?}, not {expected:?}"
            ));
        }
    }
    Ok(())
}

#[test]
fn every_placement_computes_what_one_rank_would() {
    for (tensor, pipeline, pods) in [
        (4, 1, 2),
        (6, 1, 2),
        (8, 1, 2),
        (8, 1, 4),
        (9, 1, 3),
        (2, 2, 2),
        (3, 2, 2),
        (4, 2, 2),
        (4, 2, 4),
        (1, 4, 2),
        (2, 4, 2),
        (1, 6, 3),
    ] {
        let placement = placement(tensor, pipeline, pods);
        for lens in gathers(placement.layout) {
            run(placement, 3, 700, &lens).unwrap();
        }
    }
}

#[test]
fn operations_larger_than_buffers_and_pieces_come_through() {
    let len = 300_000;
    for placement in [placement(4, 2, 4), placement(2, 2, 2)] {
        let mut lens = vec![0; placement.world()];
        lens[0] = len;
        *lens.last_mut().unwrap() = 7;
        run(placement, 2, len, &lens).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn sums_and_gathers_have_the_bits_of_the_common_order(
        shape in prop_oneof![Just((4, 1, 2)), Just((4, 2, 4)), Just((2, 3, 3)), Just((8, 1, 4))],
        len in 0_usize..2000,
        lens in proptest::collection::vec(0_usize..900, 8),
    ) {
        let (tensor, pipeline, pods) = shape;
        let placement = placement(tensor, pipeline, pods);
        let result = run(placement, 1, len, &lens[..placement.world()]);
        prop_assert_eq!(result, Ok(()));
    }
}

#[test]
fn only_pods_first_ranks_send_sums_between_pods() {
    let placement = placement(4, 1, 2);
    let connections = mesh(placement);
    let ends: Vec<usize> = connections
        .iter()
        .map(|row| row.iter().flatten().count())
        .collect();
    assert_eq!(ends, [1, 0, 1, 0]);
}

type Body = fn(&mut HierLink) -> Result<(), CollectiveError>;

const OPERATIONS: [Body; 4] = [
    |link| link.all_reduce_sum(&mut [1.0; 3]),
    |link| link.all_gather(&[1.0], &[1; 4], &mut [0.0; 4]),
    |link| link.broadcast(&mut vec![1; 9]),
    |link| link.gather_words([1; 3]).map(drop),
];

/// The causes on the pods' boards after all ranks have done `body` until an error,
/// but for `dead`, which does `fault`. Who meets a peer's failure tells its board, as
/// a rank's process does.
fn meet(
    placement: Placement,
    (dead, beats): (usize, bool),
    deadline: Duration,
    body: Body,
    fault: impl Fn(HierLink, &Board) + Sync,
) -> Vec<Failure> {
    let (links, boards) = links(placement);
    let silent = (!beats).then_some(dead);
    all_beating(placement, &boards, silent, || {
        group(links, |mut link| {
            let board = &boards[placement.pod(link.rank)];
            if link.rank == dead {
                fault(link, board);
                return;
            }
            link.set_deadline(deadline);
            let error = loop {
                if let Err(error) = body(&mut link) {
                    break error;
                }
            };
            if let Some(failure) = Failure::of_collective(&error) {
                board.fail(&failure);
            }
        })
    });
    boards.iter().map(|board| board.cause().unwrap()).collect()
}

fn until_over(link: HierLink, board: &Board) {
    while !board.is_over() {
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(link);
}

const LONG: Duration = Duration::from_mins(1);

#[test]
fn a_rank_that_dies_is_named_in_every_pod() {
    for body in OPERATIONS {
        // A rank that speaks for its pod, and one that does not.
        for dead in [2, 3] {
            let fault = |link: HierLink, board: &Board| {
                let message = format!("rank {dead} was killed");
                let failure = Failure::new(FailureCategory::RankDied, message);
                board.fail(&failure.at_rank(u32::try_from(dead).unwrap()));
                drop(link);
            };
            let causes = meet(placement(4, 1, 2), (dead, true), LONG, body, fault);
            for cause in causes {
                assert_eq!(cause.category, FailureCategory::RankDied, "{cause:?}");
                assert_eq!(cause.rank, u32::try_from(dead).ok(), "{cause:?}");
            }
        }
    }
}

#[test]
fn a_rank_that_stands_still_is_named_in_every_pod() {
    std::thread::scope(|scope| {
        for body in OPERATIONS {
            // One without a heartbeat, and one with, which is held to the deadline.
            for (beats, deadline) in [(false, LONG), (true, Duration::from_millis(900))] {
                scope.spawn(move || {
                    let placement = placement(4, 1, 2);
                    let causes = meet(placement, (3, beats), deadline, body, until_over);
                    for cause in causes {
                        assert_eq!(cause.category, FailureCategory::RankSilent, "{cause:?}");
                        assert_eq!(cause.rank, Some(3), "{cause:?}");
                    }
                });
            }
        }
    });
}

#[test]
fn a_pod_whose_connection_breaks_is_lost_to_the_others() {
    let operations: [Body; 2] = [
        |link| match link.rank {
            0 | 1 => link.send_next(&[1.0; 5]),
            _ => link.receive_previous(&mut [0.0; 5]),
        },
        |link| link.gather_words([1; 3]).map(drop),
    ];
    for body in operations {
        let fault = |link, board: &Board| {
            // Only the connection tells the other pod.
            drop(link);
            board.fail(&Failure::new(FailureCategory::RankDied, "x").at_rank(2));
        };
        let causes = meet(placement(2, 2, 2), (2, true), LONG, body, fault);
        assert_eq!(causes[0].rank, Some(2), "{causes:?}");
    }
}

#[test]
fn lengths_that_differ_between_pods_are_out_of_step() {
    let placement = placement(4, 1, 2);
    let (links, boards) = links(placement);
    all_beating(placement, &boards, None, || {
        group(links, |mut link| {
            let board = &boards[placement.pod(link.rank)];
            let len = 3 + placement.pod(link.rank);
            let error = link.all_reduce_sum(&mut vec![1.0; len]).unwrap_err();
            if let Some(failure) = Failure::of_collective(&error) {
                board.fail(&failure);
            }
        })
    });
    for board in &boards {
        let cause = board.cause().unwrap();
        assert_eq!(cause.category, FailureCategory::PlanMismatch, "{cause:?}");
    }
}
