use super::frame::{Frame, Kind};
use super::peers::{AHEAD, PIECE_BYTES};
use super::*;
use crate::comm::fixtures::{expected, gathers, group, layouts, mesh, operate, values};
use crate::comm::region::Region;
use crate::failure::Failure;
use llama_contract::FailureCategory;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const GRID: Layout = Layout {
    tensor: 2,
    pipeline: 2,
};

/// Each rank in a pod of its own.
fn alone(layout: Layout) -> Placement {
    Placement::new(layout, layout.world()).unwrap()
}

fn board() -> Board {
    let region = Arc::new(Region::create(Board::bytes(1)).unwrap());
    Board::new(region, 1).unwrap()
}

fn links(placement: Placement) -> Vec<(TcpLink, Board)> {
    mesh(placement)
        .into_iter()
        .enumerate()
        .map(|(rank, connections)| {
            let board = board();
            let link = TcpLink::new(placement, rank, connections, board.clone()).unwrap();
            (link, board)
        })
        .collect()
}

fn on_ranks<T: Send>(layout: Layout, body: impl Fn(TcpLink) -> T + Sync) -> Vec<T> {
    let links = links(alone(layout)).into_iter().map(|(link, _)| link);
    group(links.collect(), body)
}

/// Ends a link as the last step does.
fn close(link: &mut TcpLink) {
    link.expect_close();
    link.gather_words([0; 3]).unwrap();
}

#[test]
fn every_layout_computes_what_one_rank_would() {
    for layout in layouts() {
        for lens in gathers(layout) {
            let outcomes = on_ranks(layout, |mut link| {
                let outcome = operate(&mut link, 700, &lens);
                close(&mut link);
                outcome
            });
            for (rank, outcome) in outcomes.into_iter().enumerate() {
                assert_eq!(outcome, expected(layout, rank, 700, &lens), "{layout:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn sums_and_gathers_have_the_bits_of_the_common_order(
        (tensor, pipeline) in (1_usize..=5, 1_usize..=2),
        len in 0_usize..2000,
        lens in proptest::collection::vec(0_usize..900, 10),
    ) {
        let layout = Layout { tensor, pipeline };
        let lens = &lens[..layout.world()];
        let outcomes = on_ranks(layout, |mut link| {
            let outcome = operate(&mut link, len, lens);
            close(&mut link);
            outcome
        });
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            prop_assert_eq!(outcome, expected(layout, rank, len, lens));
        }
    }
}

#[test]
fn operations_larger_than_socket_buffers_take_several_pieces() {
    let piece = PIECE_BYTES / size_of::<f32>();
    // The payload is three times as long: its last piece is full.
    for len in [2 * piece + 5, 4 * piece] {
        let lens = [len, 3, piece, 0];
        let outcomes = on_ranks(GRID, |mut link| {
            let outcome = operate(&mut link, len, &lens);
            close(&mut link);
            outcome
        });
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            assert!(outcome == expected(GRID, rank, len, &lens), "rank {rank}");
        }
    }
}

#[test]
fn a_stage_runs_ahead_of_a_slow_one_only_so_far() {
    let layout = Layout {
        tensor: 1,
        pipeline: 2,
    };
    let (pieces, sent) = (20, AtomicUsize::new(0));
    on_ranks(layout, |mut link| {
        let data = values(7, PIECE_BYTES / size_of::<f32>());
        if link.rank() == 0 {
            for _ in 0..pieces {
                link.send_next(&data).unwrap();
                sent.fetch_add(1, Ordering::SeqCst);
            }
        } else {
            while sent.load(Ordering::SeqCst) < AHEAD {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(300));
            let mut received = vec![0.0; data.len()];
            for taken in 0..pieces {
                assert!(sent.load(Ordering::SeqCst) <= taken + AHEAD);
                received.fill(0.0);
                link.receive_previous(&mut received).unwrap();
                assert!(received == data);
            }
        }
        close(&mut link);
    });
}

/// Each operation on a rank of a grid of two by two in which nobody else comes, and
/// the rank that it waits for first.
fn lonely(operation: usize) -> (usize, usize) {
    [(0, 1), (2, 0), (0, 1), (1, 0), (0, 2), (3, 1)][operation]
}

fn call(operation: usize, link: &mut TcpLink) -> Result<(), CollectiveError> {
    match operation {
        0 => link.all_reduce_sum(&mut [1.0]),
        1 => link.all_gather(&[1.0], &[1; 4], &mut [0.0; 4]),
        2 => link.broadcast(&mut vec![1]),
        3 => link.gather_words([1; 3]).map(drop),
        4 => (0..9).try_for_each(|_| link.send_next(&[1.0])),
        _ => link.receive_previous(&mut [1.0]),
    }
}

#[test]
fn closed_connections_name_the_peer_in_every_operation() {
    for operation in 0..6 {
        let (rank, peer) = lonely(operation);
        let mut mesh = mesh(alone(GRID));
        let board = board();
        let connections = std::mem::take(&mut mesh[rank]);
        let mut link = TcpLink::new(alone(GRID), rank, connections, board.clone()).unwrap();
        mesh[peer].clear();
        let error = call(operation, &mut link).unwrap_err();
        let is_named = match &error {
            CollectiveError::PeerLost { rank, .. } => *rank == peer,
            CollectiveError::Aborted { reason } => reason.contains(&format!("rank {peer}")),
            _ => false,
        };
        assert!(is_named, "operation {operation}: {error:?}");
        let cause = board.cause().unwrap();
        assert_eq!(cause.category, FailureCategory::PeerLost);
        assert_eq!(cause.rank, u32::try_from(peer).ok());
    }
}

#[test]
fn peers_without_heartbeats_are_silent_in_every_operation() {
    std::thread::scope(|scope| {
        for operation in 0..6 {
            scope.spawn(move || {
                let (rank, peer) = lonely(operation);
                let mut mesh = mesh(alone(GRID));
                // Of four ranks only these two have a connection, so that the reader
                // which ends the group is that of the peer.
                let mut connections = std::mem::take(&mut mesh[rank]);
                let board = board();
                for (other, connection) in connections.iter_mut().enumerate() {
                    if other != peer {
                        *connection = None;
                    }
                }
                let placement = alone(GRID);
                let mut link = TcpLink::new(placement, rank, connections, board.clone()).unwrap();
                link.all = vec![rank.min(peer), rank.max(peer)];
                let result = match operation {
                    1 => link.peers.gather(&link.all, &[1, 1], &mut [0.0; 2]),
                    _ => call(operation, &mut link),
                };
                drop(mesh);
                assert!(result.is_err(), "operation {operation}");
                let cause = board.cause().unwrap();
                assert_eq!(cause.category, FailureCategory::RankSilent);
                assert_eq!(
                    cause.rank,
                    u32::try_from(peer).ok(),
                    "operation {operation}"
                );
            });
        }
    });
}

#[test]
fn peers_that_beat_but_never_come_meet_the_deadline_in_every_operation() {
    for operation in 0..6 {
        let (rank, peer) = lonely(operation);
        let mut links = links(alone(GRID));
        let link = &mut links[rank].0;
        link.set_deadline(Duration::from_millis(200));
        match call(operation, link) {
            Err(CollectiveError::Silent { rank, .. }) => assert_eq!(rank, peer),
            other => panic!("operation {operation}: {other:?}"),
        }
    }
}

#[test]
fn the_rank_that_holds_all_up_is_named_and_not_those_that_wait_for_it() {
    let layout = Layout {
        tensor: 1,
        pipeline: 3,
    };
    let mut links = links(alone(layout));
    let (_first, _) = links.remove(0);
    let boards: Vec<Board> = links.iter().map(|(_, board)| board.clone()).collect();
    let links = links.into_iter().map(|(link, _)| link).collect();
    let results = group(links, |mut link: TcpLink| {
        // The last rank has waited for some time when its neighbour begins to.
        if link.rank() == 1 {
            std::thread::sleep(Duration::from_millis(300));
        }
        link.set_deadline(Duration::from_millis(900));
        let result = link.receive_previous(&mut [0.0]);
        if let Some(failure) = result.as_ref().err().and_then(Failure::of_collective) {
            boards[link.rank() - 1].fail(&failure);
        }
        result
    });
    assert!(
        matches!(results[0], Err(CollectiveError::Silent { rank: 0, .. })),
        "{results:?}"
    );
    assert!(
        matches!(results[1], Err(CollectiveError::Aborted { .. })),
        "{results:?}"
    );
    for board in &boards {
        assert_eq!(board.cause().unwrap().rank, Some(0));
    }
}

#[test]
fn a_piece_out_of_sequence_is_not_summed() {
    let placement = alone(Layout::tensor(2));
    let mut mesh = mesh(placement);
    let connections = std::mem::take(&mut mesh[0]);
    let mut link = TcpLink::new(placement, 0, connections, board()).unwrap();
    let frame = Frame {
        kind: Kind::Reduce,
        sequence: 1,
        payload: vec![0; 4],
    };
    let peer = mesh[1][0].as_mut().unwrap();
    frame.write(peer).unwrap();
    match link.all_reduce_sum(&mut [1.0]) {
        Err(CollectiveError::OutOfStep { rank: 1, reason }) => {
            assert!(reason.contains("sent piece 1"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn frames_that_nobody_takes_hold_up_no_end() {
    let placement = alone(Layout::tensor(2));
    let mut mesh = mesh(placement);
    let connections = std::mem::take(&mut mesh[0]);
    let board = board();
    let link = TcpLink::new(placement, 0, connections, board.clone()).unwrap();
    let mut peer = mesh[1][0].take().unwrap();
    // More than the reader takes while nobody sums.
    for sequence in 0..20 {
        let frame = Frame {
            kind: Kind::Reduce,
            sequence,
            payload: vec![0; 4],
        };
        frame.write(&mut peer).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    board.fail(&Failure::new(
        FailureCategory::RankDied,
        "rank 1 was killed",
    ));
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(link);
        ended.send(()).unwrap();
    });
    end.recv_timeout(Duration::from_secs(10)).unwrap();
}

#[test]
fn the_first_cause_travels_to_every_rank() {
    let mut links = links(alone(Layout::tensor(3)));
    let mut cause = Failure::new(FailureCategory::RankDied, "rank 5 was killed").at_rank(5);
    cause.node = Some("gpu-07".to_owned());
    links[1].1.fail(&cause);
    for (link, _) in &mut links {
        let error = link.all_reduce_sum(&mut [1.0]).unwrap_err();
        assert!(
            matches!(error, CollectiveError::Aborted { .. }),
            "{error:?}"
        );
    }
    for (_, board) in &links {
        assert_eq!(board.cause().as_ref(), Some(&cause));
    }
}

#[test]
fn other_operations_and_lengths_are_out_of_step() {
    type Body = fn(&mut TcpLink) -> Result<(), CollectiveError>;
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
            |link| match link.rank() {
                0 => link.all_reduce_sum(&mut [1.0]),
                _ => link.gather_words([0; 3]).map(drop),
            },
            2,
        ),
        (
            |link| link.all_reduce_sum(&mut vec![0.0; 4 + link.rank()]),
            2,
        ),
        (
            |link| match link.rank() {
                0 => link.all_gather(&[1.0], &[1, 1], &mut [0.0; 2]),
                _ => link.broadcast(&mut Vec::new()),
            },
            2,
        ),
        (
            |link| match link.rank() {
                // The receiver takes none of these, so that the sender stays.
                0 => (0..9).try_for_each(|_| link.send_next(&[1.0])),
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
        assert!(out.count() >= 1, "{index}: {results:?}");
    }
}
