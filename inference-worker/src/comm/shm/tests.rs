use super::*;
use crate::comm::fixtures::{gathered, sum_in_rank_order, values};
use crate::failure::Failure;
use llama_contract::FailureCategory;
use proptest::prelude::*;

/// Runs `body` for every rank of a group of `world` threads, each with a
/// beating heart, and returns what they returned, in rank order.
fn group<T: Send>(world: usize, body: impl Fn(ShmLink) -> T + Sync) -> Vec<T> {
    let (region, board) = shared(world);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let link = ShmLink::new(Arc::clone(&region), board.clone(), rank, false).unwrap();
                let body = &body;
                scope.spawn(move || body(link))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn shared(world: usize) -> (Arc<Region>, Board) {
    let region = Arc::new(Region::create(ShmLink::bytes(world)).unwrap());
    let board = Board::new(Arc::clone(&region), world).unwrap();
    (region, board)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sums_are_bitwise_those_of_rank_order(
        world in 2_usize..=6,
        lens in proptest::collection::vec(1_usize..3000, 1..6),
    ) {
        let results = group(world, |mut link| {
            lens.iter().map(|len| {
                let mut data = values(link.rank(), *len);
                link.all_reduce_sum(&mut data).unwrap();
                data
            }).collect::<Vec<_>>()
        });
        for result in results {
            for (data, len) in result.iter().zip(&lens) {
                prop_assert_eq!(data, &sum_in_rank_order(world, *len));
            }
        }
    }

    #[test]
    fn uneven_parts_are_gathered_in_rank_order(
        lens in proptest::collection::vec(0_usize..700, 2..=6),
    ) {
        let world = lens.len();
        let expected = gathered(&lens);
        let results = group(world, |mut link| {
            let part = values(link.rank(), lens[link.rank()]);
            let mut out = vec![0.0; expected.len()];
            link.all_gather(&part, &lens, &mut out).unwrap();
            out
        });
        for out in results {
            prop_assert_eq!(&out, &expected);
        }
    }
}

#[test]
fn operations_larger_than_a_buffer_take_several_rounds() {
    let len = BUFFER_FLOATS * 2 + 5;
    let lens = [len, 3, BUFFER_FLOATS];
    let expected = gathered(&lens);
    let results = group(3, |mut link| {
        let mut data = values(link.rank(), len);
        link.all_reduce_sum(&mut data).unwrap();
        let part = values(link.rank(), lens[link.rank()]);
        let mut out = vec![0.0; expected.len()];
        link.all_gather(&part, &lens, &mut out).unwrap();
        (data, out)
    });
    for (sum, gathered) in results {
        assert!(sum == sum_in_rank_order(3, len));
        assert!(gathered == expected);
    }
}

#[test]
fn plans_and_words_reach_every_rank() {
    let results = group(4, |mut link| {
        let rank = link.rank() as u64;
        let mut payload = if rank == 0 {
            b"plan".to_vec()
        } else {
            vec![9; 100]
        };
        link.broadcast(&mut payload).unwrap();
        (
            payload,
            link.gather_words([rank, 7, u64::MAX - rank]).unwrap(),
        )
    });
    for (payload, words) in results {
        assert_eq!(payload, b"plan");
        let expected: Vec<_> = (0..4).map(|rank| [rank, 7, u64::MAX - rank]).collect();
        assert_eq!(words, expected);
    }
}

#[test]
fn different_lengths_are_out_of_step() {
    let results = group(2, |mut link| {
        let mut data = vec![0.0; 4 + link.rank()];
        link.all_reduce_sum(&mut data)
    });
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Err(CollectiveError::OutOfStep { rank: peer, .. }) => assert_eq!(peer, 1 - rank),
            other => panic!("rank {rank} got {other:?}"),
        }
    }
}

#[test]
fn a_silent_peer_is_named() {
    let (region, board) = shared(3);
    let beating = board.clone();
    let mut link = ShmLink::new(region, board, 0, false).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                beating.beat(1);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        // Rank 1 beats but has not come yet; rank 2 does neither.
        link.slot(1).unwrap().published.store(1, Ordering::SeqCst);
        link.slot(1).unwrap().operation[1].store(1, Ordering::SeqCst);
        link.slot(1).unwrap().len[1].store(4, Ordering::SeqCst);
        let result = link.all_reduce_sum(&mut [1.0]);
        stop.store(true, Ordering::Relaxed);
        result
    });
    assert!(
        matches!(result, Err(CollectiveError::Silent { rank: 2, .. })),
        "{result:?}"
    );
}

#[test]
fn a_peer_that_beats_but_never_comes_meets_the_deadline() {
    let (region, board) = shared(2);
    let beating = board.clone();
    let mut link = ShmLink::new(region, board, 0, false).unwrap();
    link.set_deadline(Duration::from_millis(300));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                beating.beat(1);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let result = link.all_reduce_sum(&mut [1.0]);
        stop.store(true, Ordering::Relaxed);
        result
    });
    assert!(
        matches!(result, Err(CollectiveError::Silent { rank: 1, .. })),
        "{result:?}"
    );
}

#[test]
fn an_ended_group_frees_its_waiters_with_the_cause() {
    let (region, board) = shared(2);
    let mut link = ShmLink::new(region, board.clone(), 0, false).unwrap();
    board.fail(&Failure::new(
        FailureCategory::RankDied,
        "rank 1 was killed",
    ));
    let result = link.all_reduce_sum(&mut [1.0]);
    assert_eq!(
        result,
        Err(CollectiveError::Aborted {
            reason: "rank 1 was killed".to_owned()
        })
    );
}

#[test]
fn round_numbers_wrap() {
    assert!(is_at_least(5, 5) && is_at_least(6, 5) && !is_at_least(4, 5));
    assert!(is_at_least(0, u32::MAX) && !is_at_least(u32::MAX, 0));
    let results = group(2, |mut link| {
        link.round = u32::MAX - 3;
        for rank in 0..2 {
            link.slot(rank)
                .unwrap()
                .published
                .fetch_max(u32::MAX - 3, Ordering::SeqCst);
        }
        (0..8)
            .map(|_| {
                let mut data = [1.0];
                link.all_reduce_sum(&mut data).unwrap();
                data[0]
            })
            .sum::<f32>()
    });
    assert_eq!(results, [16.0, 16.0]);
}
