use super::lanes::{BUFFER_FLOATS, is_at_least};
use super::*;
use crate::comm::fixtures::{beating, expected, gathers, group, layouts, operate, pods, values};
use crate::failure::Failure;
use llama_contract::FailureCategory;
use proptest::prelude::*;

fn links(layout: Layout) -> (Vec<ShmLink>, Board) {
    let placement = Placement::new(layout, 1).unwrap();
    let (region, board) = pods(placement).remove(0);
    let links = (0..layout.world())
        .map(|rank| ShmLink::new(Arc::clone(&region), board.clone(), layout, rank, false).unwrap())
        .collect();
    (links, board)
}

fn hearts(board: &Board) -> Vec<(Board, usize)> {
    (0..board.ranks())
        .map(|rank| (board.clone(), rank))
        .collect()
}

/// Runs `body` for every rank of a group, each with a beating heart.
fn on_ranks<T: Send>(layout: Layout, body: impl Fn(ShmLink) -> T + Sync) -> Vec<T> {
    let (links, board) = links(layout);
    beating(&hearts(&board), || group(links, body))
}

const GRID: Layout = Layout {
    tensor: 2,
    pipeline: 2,
};

#[test]
fn every_layout_computes_what_one_rank_would() {
    for layout in layouts() {
        for lens in gathers(layout) {
            let outcomes = on_ranks(layout, |mut link| operate(&mut link, 700, &lens));
            for (rank, outcome) in outcomes.into_iter().enumerate() {
                assert_eq!(outcome, expected(layout, rank, 700, &lens), "{layout:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sums_and_gathers_have_the_bits_of_the_common_order(
        (tensor, pipeline) in (1_usize..=5, 1_usize..=2),
        len in 0_usize..3000,
        lens in proptest::collection::vec(0_usize..700, 10),
    ) {
        let layout = Layout { tensor, pipeline };
        let lens = &lens[..layout.world()];
        let outcomes = on_ranks(layout, |mut link| operate(&mut link, len, lens));
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            prop_assert_eq!(outcome, expected(layout, rank, len, lens));
        }
    }
}

#[test]
fn operations_larger_than_a_buffer_take_several_rounds() {
    let len = BUFFER_FLOATS * 2 + 5;
    // The payload is three times as long: its last piece is full.
    for len in [len, BUFFER_FLOATS * 4] {
        let lens = [len, 3, BUFFER_FLOATS, 0];
        let outcomes = on_ranks(GRID, |mut link| operate(&mut link, len, &lens));
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            assert!(outcome == expected(GRID, rank, len, &lens), "rank {rank}");
        }
    }
}

#[test]
fn a_stage_does_not_wait_for_the_next() {
    let (mut links, board) = links(GRID);
    links.truncate(2);
    let sums = beating(&hearts(&board), || {
        group(links, |mut link| {
            let mut data = values(link.rank(), 9);
            link.all_reduce_sum(&mut data).unwrap();
            // Both buffers of the way to the next stage are free.
            link.send_next(&data).unwrap();
            link.send_next(&data).unwrap();
            data
        })
    });
    assert_eq!(sums[0], sums[1]);
}

#[test]
fn the_ends_of_the_pipeline_have_no_neighbours() {
    let (mut links, _board) = links(GRID);
    let first = links[0].receive_previous(&mut [0.0]).unwrap_err();
    let last = links[3].send_next(&[0.0]).unwrap_err();
    for (error, rank) in [(first, 0), (last, 3)] {
        assert!(
            matches!(error, CollectiveError::OutOfStep { rank: named, .. } if named == rank),
            "{error}"
        );
    }
}

/// Each operation on rank `rank` of a grid of two by two in which nobody else comes,
/// and the rank that it waits for first.
fn lonely(operation: usize, links: &mut [ShmLink]) -> (usize, Result<(), CollectiveError>) {
    let out = &mut [0.0; 4];
    match operation {
        0 => (1, links[0].all_reduce_sum(&mut [1.0])),
        1 => (0, links[2].all_gather(&[1.0], &[1; 4], out)),
        2 => (1, links[0].broadcast(&mut vec![1])),
        3 => (0, links[1].gather_words([1; 3]).map(drop)),
        4 => (2, (0..3).try_for_each(|_| links[0].send_next(&[1.0]))),
        _ => (1, links[3].receive_previous(&mut [1.0])),
    }
}

#[test]
fn silent_peers_are_named_in_every_operation() {
    std::thread::scope(|scope| {
        for operation in 0..6 {
            scope.spawn(move || {
                let (mut links, _board) = links(GRID);
                let (peer, result) = lonely(operation, &mut links);
                match result {
                    Err(CollectiveError::Silent { rank, silent_ms }) => {
                        assert_eq!(rank, peer, "operation {operation}");
                        assert!(silent_ms >= 2000);
                    }
                    other => panic!("operation {operation}: {other:?}"),
                }
            });
        }
    });
}

#[test]
fn peers_that_beat_but_never_come_meet_the_deadline_in_every_operation() {
    for operation in 0..6 {
        let (mut links, board) = links(GRID);
        let result = beating(&hearts(&board), || {
            for link in &mut links {
                link.set_deadline(Duration::from_millis(100));
            }
            lonely(operation, &mut links)
        });
        assert!(
            matches!(result, (peer, Err(CollectiveError::Silent { rank, .. })) if rank == peer),
            "operation {operation}: {result:?}"
        );
    }
}

#[test]
fn an_ended_group_frees_its_waiters_with_the_cause() {
    for operation in 0..6 {
        let (mut links, board) = links(GRID);
        board.fail(&Failure::new(
            FailureCategory::RankDied,
            "rank 1 was killed",
        ));
        let (_, result) = lonely(operation, &mut links);
        assert_eq!(
            result,
            Err(CollectiveError::Aborted {
                reason: "rank 1 was killed".to_owned()
            })
        );
    }
}

#[test]
fn the_rank_that_holds_all_up_is_named_and_not_those_that_wait_for_it() {
    let layout = Layout {
        tensor: 1,
        pipeline: 3,
    };
    let (mut links, board) = links(layout);
    links.remove(0);
    let results = beating(&hearts(&board), || {
        group(links, |mut link| {
            // The last rank has waited for some time when its neighbour begins to.
            if link.rank() == 1 {
                std::thread::sleep(Duration::from_millis(200));
            }
            link.set_deadline(Duration::from_millis(500));
            let result = link.receive_previous(&mut [0.0]);
            if let Some(failure) = result.as_ref().err().and_then(Failure::of_collective) {
                board.fail(&failure);
            }
            result
        })
    });
    assert!(
        matches!(results[0], Err(CollectiveError::Silent { rank: 0, .. })),
        "{results:?}"
    );
    assert!(
        matches!(results[1], Err(CollectiveError::Aborted { .. })),
        "{results:?}"
    );
}

#[test]
fn ranks_that_wait_for_each_other_do_not_wait_for_ever() {
    let results = on_ranks(Layout::tensor(2), |mut link| {
        link.set_deadline(Duration::from_millis(200));
        if link.rank() == 0 {
            link.all_reduce_sum(&mut [1.0])
        } else {
            link.gather_words([1; 3]).map(drop)
        }
    });
    assert!(results.iter().all(Result::is_err), "{results:?}");
}

#[test]
fn other_operations_and_lengths_are_out_of_step() {
    type Body = fn(&mut ShmLink) -> Result<(), CollectiveError>;
    let bodies: [(Body, usize); 5] = [
        // Both bring 24 bytes.
        (
            |link| match link.rank() {
                0 => link.gather_words([0; 3]).map(drop),
                _ => link.all_gather(&[0.0; 6], &[6, 6], &mut [0.0; 12]),
            },
            2,
        ),
        (
            |link| link.all_reduce_sum(&mut vec![0.0; 4 + link.rank()]),
            2,
        ),
        (
            |link| match link.rank() {
                0 => link.gather_words([0; 3]).map(drop),
                _ => link.broadcast(&mut Vec::new()),
            },
            2,
        ),
        (
            |link| {
                let lens = [1, link.rank()];
                let part = vec![0.0; lens[link.rank()]];
                link.all_gather(&part, &lens, &mut vec![0.0; lens.iter().sum()])
            },
            2,
        ),
        (
            |link| match link.rank() {
                0 => link.send_next(&[1.0]),
                _ => link.receive_previous(&mut [0.0; 2]),
            },
            1,
        ),
    ];
    for (index, (body, tensor)) in bodies.into_iter().enumerate() {
        let layout = Layout {
            tensor,
            pipeline: 2 / tensor,
        };
        let results = on_ranks(layout, |mut link| body(&mut link));
        let is_out = |(rank, result): (usize, &Result<(), CollectiveError>)| matches!(result, Err(CollectiveError::OutOfStep { rank: peer, .. }) if *peer == 1 - rank);
        let out = results.iter().enumerate().filter(|result| is_out(*result));
        // A sender goes on without a look at the receiver, and a rank that expects
        // any length may find nothing wrong.
        assert!(out.count() >= 1, "{index}: {results:?}");
    }
}

#[test]
fn round_numbers_wrap() {
    assert!(is_at_least(5, 5) && is_at_least(6, 5) && !is_at_least(4, 5));
    assert!(is_at_least(0, u32::MAX) && !is_at_least(u32::MAX, 0));
    let (mut links, board) = links(GRID);
    for link in &mut links {
        link.pod.start_at(u32::MAX - 3).unwrap();
    }
    let outcomes = beating(&hearts(&board), || {
        group(links, |mut link| {
            for len in 0..8 {
                let outcome = operate(&mut link, len, &[len; 4]);
                assert_eq!(outcome, expected(GRID, link.rank(), len, &[len; 4]));
            }
        })
    });
    assert_eq!(outcomes.len(), 4);
}

#[test]
fn memory_of_another_number_of_ranks_is_refused() {
    let (region, board) = pods(Placement::new(Layout::tensor(2), 1).unwrap()).remove(0);
    assert!(ShmLink::new(region, board, GRID, 0, false).is_none());
}
