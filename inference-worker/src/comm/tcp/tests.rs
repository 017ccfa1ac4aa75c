use super::*;
use crate::comm::fixtures::{gathered, sum_in_rank_order, values};
use crate::comm::region::Region;
use proptest::prelude::*;
use std::net::TcpListener;

fn board() -> Board {
    let region = Arc::new(Region::create(Board::bytes(1)).unwrap());
    Board::new(region, 1).unwrap()
}

/// Connections of a full mesh on loopback: `mesh[a][b]` is a's end to b.
fn mesh(world: usize) -> Vec<Vec<Option<TcpStream>>> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut mesh: Vec<Vec<Option<TcpStream>>> = Vec::new();
    for rank in 0..world {
        let mut own = Vec::new();
        for lower in &mut mesh {
            own.push(Some(
                TcpStream::connect(listener.local_addr().unwrap()).unwrap(),
            ));
            lower[rank] = Some(listener.accept().unwrap().0);
        }
        own.resize_with(world, || None);
        mesh.push(own);
    }
    mesh
}

fn links(world: usize) -> Vec<TcpLink> {
    mesh(world)
        .into_iter()
        .enumerate()
        .map(|(rank, connections)| TcpLink::new(rank, connections, board()).unwrap())
        .collect()
}

fn group<T: Send>(world: usize, body: impl Fn(TcpLink) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = links(world)
            .into_iter()
            .map(|link| {
                let body = &body;
                scope.spawn(move || body(link))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn sums_and_gathers_are_those_of_rank_order(
        lens in proptest::collection::vec(0_usize..900, 2..=5),
        len in 1_usize..2000,
    ) {
        let world = lens.len();
        let sum = sum_in_rank_order(world, len);
        let gathered = gathered(&lens);
        let results = group(world, |mut link| {
            let mut data = values(link.rank(), len);
            link.all_reduce_sum(&mut data).unwrap();
            let part = values(link.rank(), lens[link.rank()]);
            let mut out = vec![0.0; gathered.len()];
            link.all_gather(&part, &lens, &mut out).unwrap();
            link.expect_close();
            (data, out, link.gather_words([0; 3]).is_ok())
        });
        for (data, out, closed) in results {
            prop_assert_eq!(&data, &sum);
            prop_assert_eq!(&out, &gathered);
            prop_assert!(closed);
        }
    }
}

#[test]
fn plans_larger_than_socket_buffers_reach_every_rank() {
    let plan = vec![7_u8; 12 << 20];
    let results = group(3, |mut link| {
        let mut payload = if link.rank() == 0 {
            plan.clone()
        } else {
            Vec::new()
        };
        link.broadcast(&mut payload).unwrap();
        let mut data = vec![1.0; 3 << 20];
        link.all_reduce_sum(&mut data).unwrap();
        link.expect_close();
        link.gather_words([0; 3]).unwrap();
        (payload == plan, data == vec![3.0; 3 << 20])
    });
    assert_eq!(results, [(true, true); 3]);
}

#[test]
fn a_closed_connection_names_the_peer_and_reaches_the_board() {
    let mut mesh = mesh(2);
    let connections = mesh.remove(0);
    let board = board();
    let mut link = TcpLink::new(0, connections, board.clone()).unwrap();
    drop(mesh);
    let error = link.all_reduce_sum(&mut [1.0]).unwrap_err();
    let named = matches!(
        error,
        CollectiveError::PeerLost { rank: 1, .. } | CollectiveError::Aborted { .. }
    );
    assert!(named, "{error:?}");
    let cause = board.cause().unwrap();
    assert_eq!(cause.category, FailureCategory::PeerLost);
    assert_eq!(cause.rank, Some(1));
}

#[test]
fn a_peer_without_heartbeats_is_silent() {
    let mut mesh = mesh(2);
    let connections = mesh.remove(0);
    let board = board();
    let mut link = TcpLink::new(0, connections, board.clone()).unwrap();
    link.all_reduce_sum(&mut [1.0]).unwrap_err();
    drop(mesh);
    let cause = board.cause().unwrap();
    assert_eq!(cause.category, FailureCategory::RankSilent);
    assert_eq!(cause.rank, Some(1));
}

#[test]
fn the_first_cause_travels_to_every_rank() {
    let boards: Vec<Board> = (0..3).map(|_| board()).collect();
    let mut links: Vec<TcpLink> = mesh(3)
        .into_iter()
        .zip(&boards)
        .enumerate()
        .map(|(rank, (connections, board))| TcpLink::new(rank, connections, board.clone()).unwrap())
        .collect();
    let mut cause = Failure::new(FailureCategory::RankDied, "rank 5 was killed").at_rank(5);
    cause.node = Some("gpu-07".to_owned());
    boards[1].fail(&cause);
    for link in &mut links {
        let error = link.all_reduce_sum(&mut [1.0]).unwrap_err();
        assert!(
            matches!(error, CollectiveError::Aborted { .. }),
            "{error:?}"
        );
    }
    for board in &boards {
        assert_eq!(board.cause().as_ref(), Some(&cause));
    }
}

#[test]
fn another_operation_is_out_of_step() {
    let results = group(2, |mut link| {
        if link.rank() == 0 {
            link.all_reduce_sum(&mut [1.0])
        } else {
            link.gather_words([0; 3]).map(|_| ())
        }
    });
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Err(CollectiveError::OutOfStep { rank: peer, .. }) => assert_eq!(peer, 1 - rank),
            other => panic!("rank {rank} got {other:?}"),
        }
    }
}
