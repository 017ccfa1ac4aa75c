//! Shared-memory collectives between processes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use llama_model::{Collective, Layout, order};
use llama_worker::comm::Link;
use llama_worker::comm::board::Board;
use llama_worker::comm::region::Region;
use llama_worker::comm::shm::ShmLink;

const RANK_ENV: &str = "LLAMA_TEST_SHM_RANK";
const FD_ENV: &str = "LLAMA_TEST_SHM_FD";
/// Three stages of two ranks.
const LAYOUT: Layout = Layout {
    tensor: 2,
    pipeline: 3,
};
const ROUNDS: usize = 300;

fn value(rank: usize, round: usize, index: usize) -> f32 {
    ((rank * 131 + round * 17 + index) % 1000) as f32 / 7.0
}

fn values(rank: usize, round: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| value(rank, round, index)).collect()
}

/// What `stage` sums up to.
fn sum(stage: usize, round: usize, len: usize) -> Vec<f32> {
    let ranks = LAYOUT.ranks_of(stage);
    let mut rows: Vec<f32> = ranks.flat_map(|rank| values(rank, round, len)).collect();
    order::sum_rows(&mut rows, len);
    rows.truncate(len);
    rows
}

/// Lets the ranks drift apart in ever other ways.
fn dawdle(rank: usize, round: usize) {
    let chance = (rank * 7919 + round * 104_729) % 97;
    match chance {
        0..8 => std::thread::sleep(Duration::from_micros(chance as u64 * 300)),
        8..24 => std::thread::yield_now(),
        _ => {}
    }
}

fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    let equal = found.len() == expected.len()
        && (found.iter().zip(expected)).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(equal, "{what}");
}

/// What every rank does; ends with a panic when a value is wrong.
fn rank(region: Region, rank: usize) {
    let world = LAYOUT.world();
    let region = Arc::new(region);
    let board = Board::new(Arc::clone(&region), world).unwrap();
    let heart = board.clone();
    std::thread::spawn(move || {
        loop {
            heart.beat(rank);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let mut link = ShmLink::new(region, board, LAYOUT, rank, false).unwrap();
    let stage = LAYOUT.stage(rank);
    for round in 0..ROUNDS {
        let what = format!("rank {rank} round {round}");
        let len = 1 + round * 7 % 900;
        dawdle(rank, round);
        if stage > 0 {
            let mut received = vec![0.0; len];
            link.receive_previous(&mut received).unwrap();
            assert_bits(&received, &sum(stage - 1, round, len), &what);
        }
        // Every stage has as many sums as its number says, so that they drift apart.
        for _ in 0..=stage {
            let mut data = values(rank, round, len);
            link.all_reduce_sum(&mut data).unwrap();
            assert_bits(&data, &sum(stage, round, len), &what);
            dawdle(rank + 1, round);
        }
        if stage + 1 < LAYOUT.pipeline {
            link.send_next(&sum(stage, round, len)).unwrap();
        }
        if round % 5 == 0 {
            let lens: Vec<usize> = (0..world).map(|rank| (rank + round) % 4 * 5).collect();
            let mut out = vec![0.0; lens.iter().sum()];
            let part = values(rank, round, lens[rank]);
            link.all_gather(&part, &lens, &mut out).unwrap();
            let all: Vec<f32> = (0..world)
                .flat_map(|rank| values(rank, round, lens[rank]))
                .collect();
            assert_bits(&out, &all, &what);
        }
    }
    assert_eq!(
        link.gather_words([1, 2, 3]).unwrap(),
        vec![[1, 2, 3]; world]
    );
}

/// Not a test of its own: what the children of the test below run.
#[test]
fn child() {
    let Ok(number) = std::env::var(RANK_ENV) else {
        return;
    };
    let fd = std::env::var(FD_ENV).unwrap().parse().unwrap();
    let region = Region::from_inherited(fd, ShmLink::bytes(LAYOUT.world())).unwrap();
    rank(region, number.parse().unwrap());
}

#[test]
fn six_processes_in_three_stages_on_few_cores_keep_step() {
    let region = Region::create(ShmLink::bytes(LAYOUT.world())).unwrap();
    let children: Vec<_> = (1..LAYOUT.world())
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
