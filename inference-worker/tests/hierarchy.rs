//! Rank processes of pods in two network namespaces: shared memory inside a pod, TCP
//! between them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use harness::{Net, namespaces};
use llama_model::Layout;
use llama_model::blocks::KvCapacity;
use llama_worker::comm::Link;
use llama_worker::comm::board::Board;
use llama_worker::comm::placement::{Backend, Placement};
use llama_worker::comm::region::Region;
use llama_worker::comm::rendezvous::{Identity, Party};
use llama_worker::comm::seat::Seat;
use llama_worker::comm::shm::ShmLink;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

const ORDERS_ENV: &str = "LLAMA_TEST_RANK_ORDERS";
const LENGTHS: [usize; 4] = [1, 576, 7_001, 300_000];

/// What a rank's process is told.
#[derive(Clone, Serialize, Deserialize)]
struct Orders {
    placement: Placement,
    rank: usize,
    shared_memory: i32,
    rendezvous: SocketAddr,
    ip: IpAddr,
    /// Where to leave the bits that it got.
    answer: std::path::PathBuf,
    /// Whether to go on until the group is over.
    endless: bool,
}

fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 31 + rank * 17) % 97) as f32 * [1e-3, 1.0, 1e3, 0.1][(i + rank) % 4])
        .collect()
}

/// Every operation with every length; the bits of all results.
fn operate(link: &mut dyn Link) -> Vec<u8> {
    let (rank, layout) = (link.rank(), link.layout());
    let mut bytes = Vec::new();
    for len in LENGTHS {
        let mut keep = |values: &[f32]| {
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        };
        let mut data = values(rank, len);
        if layout.stage(rank) > 0 {
            let mut received = vec![0.0; len];
            link.receive_previous(&mut received).unwrap();
            keep(&received);
            data.iter_mut().zip(received).for_each(|(a, b)| *a += b);
        }
        link.all_reduce_sum(&mut data).unwrap();
        keep(&data);
        if layout.stage(rank) + 1 < layout.pipeline {
            link.send_next(&data).unwrap();
        }
        let lens: Vec<usize> = (0..layout.world()).map(|r| r * len % 1009).collect();
        let mut out = vec![0.0; lens.iter().sum()];
        let part: Vec<f32> = data.iter().cycle().take(lens[rank]).copied().collect();
        link.all_gather(&part, &lens, &mut out).unwrap();
        keep(&out);
        let mut plan = if rank == 0 {
            bytes[..bytes.len().min(40)].to_vec()
        } else {
            Vec::new()
        };
        link.broadcast(&mut plan).unwrap();
        bytes.extend(&plan);
    }
    let words = link.gather_words([rank as u64, 5, 6]).unwrap();
    bytes.extend(words.iter().flatten().flat_map(|word| word.to_le_bytes()));
    bytes
}

fn start_heart(board: &Board, local: usize) {
    let board = board.clone();
    std::thread::spawn(move || {
        loop {
            board.beat(local);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

fn party(orders: &Orders) -> Party {
    Party {
        token: "secret".to_owned(),
        identity: Identity {
            adapters: llama_worker::adapters::AdapterArgs::default(),
            group: "g".to_owned(),
            revision: "r".to_owned(),
            epoch: 1,
            placement: orders.placement,
            digest: "d".to_owned(),
            max_tokens: 1,
            compute: "f32".to_owned(),
            kv: "f16".to_owned(),
            build: "b".to_owned(),
        },
        rank: u32::try_from(orders.rank).unwrap(),
        node: format!("node-{}", orders.placement.pod(orders.rank)),
        capacity: KvCapacity {
            slots: 1,
            blocks: 1,
            chunk_blocks: 1,
        },
        ip: orders.ip,
        deadline: Duration::from_mins(1),
    }
}

/// Not a test of its own: what the processes of the tests below run.
#[test]
fn child() {
    let Ok(orders) = std::env::var(ORDERS_ENV) else {
        return;
    };
    let orders: Orders = serde_json::from_str(&orders).unwrap();
    let Orders {
        placement, rank, ..
    } = orders;
    let ranks = placement.ranks_per_pod;
    let region = Region::from_inherited(orders.shared_memory, ShmLink::bytes(ranks)).unwrap();
    let region = Arc::new(region);
    let board = Board::new(Arc::clone(&region), ranks).unwrap();
    start_heart(&board, placement.local(rank));
    let party = party(&orders);
    let mesh = match rank {
        0 => party.host(orders.rendezvous.port()).unwrap(),
        _ => party.join(&orders.rendezvous.to_string()).unwrap(),
    };
    let seat = Seat {
        placement,
        rank,
        region,
        board: board.clone(),
        own_cores: false,
    };
    let mut link = seat.link(mesh.connections).unwrap();
    if orders.endless {
        // Says that it works, and then until the end who ended the group.
        std::fs::write(&orders.answer, "").unwrap();
        let error = loop {
            if let Err(error) = link.all_reduce_sum(&mut values(rank, 100)) {
                break error;
            }
        };
        if let Some(failure) = llama_worker::failure::Failure::of_collective(&error) {
            board.fail(&failure);
        }
        let cause = board.cause().unwrap();
        std::fs::write(&orders.answer, format!("{:?}", cause.rank)).unwrap();
        return;
    }
    let bytes = operate(link.as_mut());
    std::fs::write(&orders.answer, bytes).unwrap();
    link.expect_close();
    link.gather_words([0; 3]).unwrap();
}

/// A group of processes, each pod in a namespace of its own.
struct Group {
    ranks: Vec<(Child, Orders)>,
    boards: Vec<Board>,
    _folder: tempfile::TempDir,
}

impl Group {
    fn start(placement: Placement, nets: &[Net], endless: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rendezvous = nets[0].free_address();
        let mut boards = Vec::new();
        let mut ranks = Vec::new();
        for (pod, net) in (0..placement.pods()).zip(nets) {
            let count = placement.ranks_per_pod;
            let region = Arc::new(Region::create(ShmLink::bytes(count)).unwrap());
            for rank in placement.ranks_of(pod) {
                let orders = Orders {
                    placement,
                    rank,
                    shared_memory: region.raw_fd(),
                    rendezvous,
                    ip: net.ip().into(),
                    answer: folder.path().join(rank.to_string()),
                    endless,
                };
                let program = std::env::current_exe().unwrap();
                let child = net
                    .command(program.to_str().unwrap())
                    .args(["--exact", "child", "--nocapture"])
                    .env(ORDERS_ENV, serde_json::to_string(&orders).unwrap())
                    .stdout(Stdio::null())
                    .spawn()
                    .unwrap();
                ranks.push((child, orders));
            }
            boards.push(Board::new(region, count).unwrap());
        }
        Self {
            ranks,
            boards,
            _folder: folder,
        }
    }

    /// What each rank left, once all have ended well.
    fn answers(mut self) -> Vec<Vec<u8>> {
        let mut answers = Vec::new();
        for (child, orders) in &mut self.ranks {
            assert!(child.wait().unwrap().success(), "rank {}", orders.rank);
            answers.push(std::fs::read(&orders.answer).unwrap());
        }
        answers
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for (child, _) in &mut self.ranks {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What the ranks of one pod get through shared memory alone.
fn in_one_pod(layout: Layout) -> Vec<Vec<u8>> {
    let world = layout.world();
    let region = Arc::new(Region::create(ShmLink::bytes(world)).unwrap());
    let board = Board::new(Arc::clone(&region), world).unwrap();
    (0..world).for_each(|rank| start_heart(&board, rank));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (region, board) = (Arc::clone(&region), board.clone());
                scope.spawn(move || {
                    let link = ShmLink::new(region, board, layout, rank, false);
                    operate(&mut link.unwrap())
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn processes_in_two_network_namespaces_get_the_bits_of_one_pod() {
    let Some(pair) = namespaces::pair() else {
        return;
    };
    let nets = pair.each_ref().map(|namespace| Net::inside(namespace, 0));
    for (tensor, pipeline, backend) in [
        (2, 1, Backend::Tcp),
        (4, 1, Backend::Hierarchical),
        (8, 1, Backend::Hierarchical),
        (2, 2, Backend::Hierarchical),
        (4, 2, Backend::Hierarchical),
    ] {
        let layout = Layout { tensor, pipeline };
        let placement = Placement::new(layout, 2).unwrap();
        assert_eq!(placement.backend(), backend);
        let answers = Group::start(placement, &nets, false).answers();
        for (rank, (found, expected)) in answers.iter().zip(in_one_pod(layout)).enumerate() {
            assert!(*found == expected, "{placement:?} rank {rank}");
        }
    }
}

#[test]
fn a_rank_that_is_stopped_or_killed_is_named_in_both_namespaces() {
    let Some(pair) = namespaces::pair() else {
        return;
    };
    let nets = pair.each_ref().map(|namespace| Net::inside(namespace, 0));
    let placement = Placement::new(Layout::tensor(4), 2).unwrap();
    // Rank 2 speaks for its pod, rank 3 does not.
    for (dead, signal) in [(2, Signal::KILL), (2, Signal::STOP), (3, Signal::STOP)] {
        let mut group = Group::start(placement, &nets, true);
        let is_ready = |(_, orders): &(Child, Orders)| orders.answer.exists();
        while !group.ranks.iter().all(is_ready) {
            for (child, orders) in &mut group.ranks {
                let exit = child.try_wait().unwrap();
                assert!(exit.is_none(), "rank {} ended: {exit:?}", orders.rank);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let (child, _) = &group.ranks[dead];
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        for (rank, (child, orders)) in group.ranks.iter_mut().enumerate() {
            if rank != dead {
                assert!(child.wait().unwrap().success(), "rank {rank}");
                let named = std::fs::read_to_string(&orders.answer).unwrap();
                assert_eq!(named, format!("Some({dead})"), "{signal:?}: told by {rank}");
            }
        }
        for board in &group.boards {
            assert_eq!(board.cause().unwrap().rank, u32::try_from(dead).ok());
        }
    }
}
