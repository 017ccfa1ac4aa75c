//! Shared-memory collectives between processes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

use std::process::{Command, Stdio};
use std::sync::Arc;

use llama_model::Collective;
use llama_worker::comm::Link;
use llama_worker::comm::board::Board;
use llama_worker::comm::region::Region;
use llama_worker::comm::shm::ShmLink;

const RANK_ENV: &str = "LLAMA_TEST_SHM_RANK";
const FD_ENV: &str = "LLAMA_TEST_SHM_FD";
const WORLD: usize = 5;
const ROUNDS: usize = 300;

fn value(rank: usize, round: usize, index: usize) -> f32 {
    ((rank * 131 + round * 17 + index) % 1000) as f32 / 7.0
}

/// What every rank does; ends with a panic when a sum is wrong.
fn rank(region: Region, rank: usize) {
    let region = Arc::new(region);
    let board = Board::new(Arc::clone(&region), WORLD).unwrap();
    let heart = board.clone();
    std::thread::spawn(move || {
        loop {
            heart.beat(rank);
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    });
    let mut link = ShmLink::new(region, board, rank, false).unwrap();
    for round in 0..ROUNDS {
        let len = 1 + round * 7 % 900;
        let mut data: Vec<f32> = (0..len).map(|index| value(rank, round, index)).collect();
        link.all_reduce_sum(&mut data).unwrap();
        for (index, sum) in data.into_iter().enumerate() {
            let expected = (1..WORLD).fold(value(0, round, index), |sum, peer| {
                sum + value(peer, round, index)
            });
            assert!(
                sum.to_bits() == expected.to_bits(),
                "rank {rank} round {round}"
            );
        }
    }
    assert_eq!(
        link.gather_words([1, 2, 3]).unwrap(),
        vec![[1, 2, 3]; WORLD]
    );
}

/// Not a test of its own: what the children of the test below run.
#[test]
fn child() {
    let Ok(number) = std::env::var(RANK_ENV) else {
        return;
    };
    let fd = std::env::var(FD_ENV).unwrap().parse().unwrap();
    let region = Region::from_inherited(fd, ShmLink::bytes(WORLD)).unwrap();
    rank(region, number.parse().unwrap());
}

#[test]
fn five_processes_on_few_cores_sum_in_rank_order() {
    let region = Region::create(ShmLink::bytes(WORLD)).unwrap();
    let children: Vec<_> = (1..WORLD)
        .map(|rank| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--nocapture"])
                .env(RANK_ENV, rank.to_string())
                .env(FD_ENV, region.raw_fd().to_string())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    rank(region, 0);
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
}
