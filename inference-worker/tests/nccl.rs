//! NCCL's collectives between rank processes: on CUDA devices where there are enough,
//! or on test doubles of the driver and of NCCL (`e2e/cuda/double`), which also let
//! peers die and connections break.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use llama_contract::FailureCategory;
use llama_model::device::{TensorCollective, cuda};
use llama_model::{CollectiveError, Layout, StepError};
use llama_worker::comm::Link;
use llama_worker::comm::board::Board;
use llama_worker::comm::nccl::{self, NcclError};
use llama_worker::comm::region::Region;
use llama_worker::comm::shm::ShmLink;
use llama_worker::failure::Failure;

/// Set where the test doubles are loaded.
const DOUBLE_ENV: &str = "LLAMA_TEST_CUDA_DOUBLE";
/// The operation of a process that the test double lets fail.
const FAULT_ENV: &str = "NCCL_DOUBLE_FAULT";
const RANK_ENV: &str = "LLAMA_TEST_NCCL_RANK";
const FD_ENV: &str = "LLAMA_TEST_NCCL_FD";
const STAGES_ENV: &str = "LLAMA_TEST_NCCL_STAGES";
const WORLD_ENV: &str = "LLAMA_TEST_NCCL_WORLD";
const PART_ENV: &str = "LLAMA_TEST_NCCL_PART";
/// What a rank ends with when it is told to die.
const KILLED: &str = "rank 1 died";
const ROUNDS: usize = 24;

/// One rank process.
struct Process {
    rank: usize,
    layout: Layout,
    board: Board,
    control: Option<Box<dyn Link>>,
    device: Device,
}

impl Process {
    fn connect(&mut self) -> Result<Box<dyn Link>, NcclError> {
        let control = self.control.take().expect("connects once");
        nccl::connect(control, self.board.clone(), &self.device)
    }

    fn connected(&mut self) -> Box<dyn Link> {
        self.connect().unwrap()
    }

    fn ones(&self, len: usize) -> Tensor {
        Tensor::from_vec(vec![1.0_f32; len], len, &self.device).unwrap()
    }
}

fn on_device(link: &mut dyn Link) -> &mut dyn TensorCollective {
    link.on_device().expect("the link connects devices")
}

/// Small whole numbers, of which every type of floats can hold the sum.
fn values(rank: usize, round: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|index| ((rank * 7 + round * 3 + index) % 31) as f32)
        .collect()
}

/// What the ranks of `stage` sum up to.
fn sum(layout: Layout, stage: usize, round: usize, len: usize) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    for rank in layout.ranks_of(stage) {
        for (sum, value) in sum.iter_mut().zip(values(rank, round, len)) {
            *sum += value;
        }
    }
    sum
}

fn read(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(&Device::Cpu).unwrap();
    tensor.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// A tensor on the device that begins within its memory.
fn upload(values: &[f32], dtype: DType, device: &Device) -> Tensor {
    let mut all = vec![9.0; 8];
    all.extend_from_slice(values);
    let all = Tensor::from_vec(all, values.len() + 8, &Device::Cpu).unwrap();
    let all = all.to_dtype(dtype).unwrap().to_device(device).unwrap();
    all.narrow(0, 8, values.len()).unwrap()
}

/// Sums, stages and gathers, again and again.
fn exchange(mut rank: Process) {
    let mut link = rank.connected();
    let (layout, number) = (rank.layout, rank.rank);
    let stage = layout.stage(number);
    for round in 0..ROUNDS {
        let len = 1 + round * 9973 % 150_000;
        let dtype = [DType::F32, DType::F16, DType::BF16][round % 3];
        if stage > 0 {
            let received = upload(&vec![0.0; len], dtype, &rank.device);
            on_device(link.as_mut())
                .receive_previous(&received)
                .unwrap();
            on_device(link.as_mut()).settle().unwrap();
            let expected = sum(layout, stage - 1, round, len);
            assert_eq!(read(&received), expected, "rank {number} round {round}");
        }
        let tensor = upload(&values(number, round, len), dtype, &rank.device);
        on_device(link.as_mut()).all_reduce_sum(&tensor).unwrap();
        if stage + 1 < layout.pipeline {
            // The sum may still be under way; the send comes after it.
            on_device(link.as_mut()).send_next(&tensor).unwrap();
        }
        on_device(link.as_mut()).settle().unwrap();
        let expected = sum(layout, stage, round, len);
        assert_eq!(read(&tensor), expected, "rank {number} round {round}");
        if round % 4 == 0 {
            gather(&rank, link.as_mut(), round);
        }
    }
    assert_eq!(
        link.gather_words([1, 2, 3]).unwrap(),
        vec![[1, 2, 3]; layout.world()]
    );
}

fn gather(rank: &Process, link: &mut dyn Link, round: usize) {
    let world = rank.layout.world();
    let lens: Vec<usize> = (0..world)
        .map(|rank| (rank + round / 4) % 3 * 701)
        .collect();
    let part = values(rank.rank, round, lens[rank.rank]);
    let part = (!part.is_empty()).then(|| upload(&part, DType::F32, &rank.device));
    let all = on_device(link).all_gather(part.as_ref(), &lens).unwrap();
    let expected: Vec<f32> = (0..world)
        .flat_map(|rank| values(rank, round, lens[rank]))
        .collect();
    assert_eq!(all, expected, "rank {} round {round}", rank.rank);
}

fn collective(error: StepError) -> CollectiveError {
    match error {
        StepError::Collective(error) => error,
        other => panic!("{other:?}"),
    }
}

/// Sums until it fails; returns how, and how long the last sum took.
fn sum_until_it_fails(rank: &Process, link: &mut dyn Link) -> (CollectiveError, Duration) {
    for _ in 0..100 {
        let begun = Instant::now();
        let tensor = rank.ones(1000);
        let mut done = on_device(link)
            .all_reduce_sum(&tensor)
            .and_then(|()| on_device(link).settle());
        if done.is_ok() && rank.layout.pipeline > 1 {
            let lens = vec![1000; rank.layout.world()];
            done = on_device(link).all_gather(Some(&tensor), &lens).map(drop);
        }
        if let Err(error) = done {
            return (collective(error), begun.elapsed());
        }
    }
    panic!("nothing failed");
}

/// Rank 1 dies in the middle; the parent, like a supervisor, tells.
fn peer_dies(mut rank: Process) {
    let mut link = rank.connected();
    if rank.rank == 1 {
        let tensor = rank.ones(1000);
        on_device(link.as_mut()).all_reduce_sum(&tensor).unwrap();
        on_device(link.as_mut()).settle().unwrap();
        let own = rustix::process::getpid();
        rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
    }
    let (error, took) = sum_until_it_fails(&rank, link.as_mut());
    let aborted = CollectiveError::Aborted {
        reason: KILLED.to_owned(),
    };
    assert_eq!(error, aborted);
    assert!(took < Duration::from_secs(3), "{took:?}");
    // The device itself still works: nothing is left on its stream.
    assert_eq!(read(&rank.ones(3)), [1.0; 3]);
}

/// Rank 1 lives, but does not come.
fn peer_does_not_come(mut rank: Process) {
    let mut link = rank.connected();
    if rank.rank == 1 {
        std::thread::sleep(Duration::from_secs(3));
        return;
    }
    link.set_deadline(Duration::from_millis(300));
    let (error, took) = sum_until_it_fails(&rank, link.as_mut());
    let text = error.to_string();
    assert!(
        text.starts_with("NCCL: wait for the step failed: it is not done after 3"),
        "{text}"
    );
    assert!(took < Duration::from_secs(2), "{took:?}");
}

/// A connection of rank 0 breaks.
fn connection_breaks(mut rank: Process) {
    let mut link = rank.connected();
    let (error, _) = sum_until_it_fails(&rank, link.as_mut());
    match (rank.rank, &error) {
        (0, CollectiveError::Transport { operation, reason }) => {
            assert_eq!(operation, "NCCL: wait for the step");
            assert_eq!(
                reason,
                "remote process exited or there was a network error (the connection to a peer broke)"
            );
            let failure = Failure::of_collective(&error).unwrap();
            assert_eq!(failure.category, FailureCategory::PeerLost);
            rank.board.fail(&failure);
        }
        (1, CollectiveError::Aborted { reason }) => {
            assert!(
                reason.contains("the connection to a peer broke"),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
}

/// Rank 1 goes after it has learned the identifier.
fn peer_goes_before_it_connects(mut rank: Process) {
    if rank.rank == 1 {
        let mut id = Vec::new();
        rank.control.as_mut().unwrap().broadcast(&mut id).unwrap();
        assert_eq!(id.len(), 128);
        return;
    }
    match rank.connect() {
        Err(NcclError::Collective(CollectiveError::Aborted { reason })) => {
            assert_eq!(reason, KILLED);
        }
        other => panic!("{:?}", other.err()),
    }
}

/// The ranks sum tensors of different lengths.
fn ranks_differ(mut rank: Process) {
    let mut link = rank.connected();
    let tensor = rank.ones(10 + rank.rank);
    let done = on_device(link.as_mut())
        .all_reduce_sum(&tensor)
        .and_then(|()| on_device(link.as_mut()).settle());
    let text = collective(done.expect_err("differ")).to_string();
    assert!(text.contains("ranks disagree on an operation"), "{text}");
}

/// What NCCL cannot send is refused before any rank waits for it.
fn refusals(mut rank: Process) {
    let mut link = rank.connected();
    let whole = Tensor::zeros((4, 6), DType::F32, &rank.device).unwrap();
    let apart = whole.narrow(1, 0, 3).unwrap();
    let error = on_device(link.as_mut()).all_reduce_sum(&apart);
    let text = format!("{:?}", error.expect_err("not contiguous"));
    assert!(text.contains("not contiguous"), "{text}");
    let numbers = Tensor::zeros(4, DType::U32, &rank.device).unwrap();
    let error = on_device(link.as_mut()).all_reduce_sum(&numbers);
    let text = format!("{:?}", error.expect_err("no floats"));
    assert!(text.contains("ranks exchange floats, not U32"), "{text}");
    let here = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
    let error = on_device(link.as_mut()).all_reduce_sum(&here);
    assert!(error.is_err(), "main memory");
    let error = on_device(link.as_mut()).send_next(&whole);
    let text = collective(error.expect_err("one stage")).to_string();
    assert!(text.contains("stage 0 of 1"), "{text}");
    let error = on_device(link.as_mut()).all_gather(Some(&whole), &[24, 23, 1]);
    let text = collective(error.expect_err("three lengths")).to_string();
    assert!(text.contains("over 2 ranks"), "{text}");
    // And what comes next still works.
    let tensor = rank.ones(5);
    on_device(link.as_mut()).all_reduce_sum(&tensor).unwrap();
    on_device(link.as_mut()).settle().unwrap();
    assert_eq!(read(&tensor), [2.0; 5]);
}

/// What a rank does.
type Part = fn(Process);

const PARTS: [(&str, Part); 7] = [
    ("exchange", exchange),
    ("peer-dies", peer_dies),
    ("peer-does-not-come", peer_does_not_come),
    ("connection-breaks", connection_breaks),
    ("peer-goes-before-it-connects", peer_goes_before_it_connects),
    ("ranks-differ", ranks_differ),
    ("refusals", refusals),
];

/// Not a test of its own: what the children of the tests below run.
#[test]
fn child() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let Ok(rank) = std::env::var(RANK_ENV) else {
        return;
    };
    let rank: usize = rank.parse().unwrap();
    let world: usize = variable(WORLD_ENV).parse().unwrap();
    let pipeline: usize = variable(STAGES_ENV).parse().unwrap();
    let layout = Layout {
        tensor: world / pipeline,
        pipeline,
    };
    let fd = variable(FD_ENV).parse().unwrap();
    let region = Arc::new(Region::from_inherited(fd, ShmLink::bytes(world)).unwrap());
    let board = Board::new(Arc::clone(&region), world).unwrap();
    let heart = board.clone();
    std::thread::spawn(move || {
        loop {
            heart.beat(rank);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let control = ShmLink::new(region, board.clone(), layout, rank, false).unwrap();
    let part = variable(PART_ENV);
    let (_, run) = PARTS.iter().find(|(name, _)| *name == part).unwrap();
    run(Process {
        rank,
        layout,
        board,
        control: Some(Box::new(control)),
        device: cuda::open(rank).unwrap(),
    });
}

/// Whether `world` ranks can have a device each; says so where they cannot.
fn has_devices(world: usize, needs_double: bool) -> bool {
    let has_double = std::env::var_os(DOUBLE_ENV).is_some();
    if needs_double && !has_double {
        eprintln!("not run: needs the test doubles of e2e/cuda/double");
        return false;
    }
    match cuda::survey() {
        Ok(survey) if survey.memory.len() >= world => true,
        found => {
            assert!(!has_double, "the test doubles do not work: {found:?}");
            eprintln!("not run: needs {world} CUDA devices, has {found:?}");
            false
        }
    }
}

/// Runs `part` on every rank, one process each. `told` is called while they run.
fn ranks(
    part: &str,
    layout: Layout,
    fault: Option<&str>,
    mut told: impl FnMut(&Board, &mut [Child]),
) {
    let world = layout.world();
    let folder = tempfile::tempdir().unwrap();
    let region = Arc::new(Region::create(ShmLink::bytes(world)).unwrap());
    let board = Board::new(Arc::clone(&region), world).unwrap();
    let mut children: Vec<Child> = (0..world)
        .map(|rank| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", "child", "--nocapture"])
                .env(RANK_ENV, rank.to_string())
                .env(FD_ENV, region.raw_fd().to_string())
                .env(WORLD_ENV, world.to_string())
                .env(STAGES_ENV, layout.pipeline.to_string())
                .env(PART_ENV, part)
                .env("TMPDIR", folder.path())
                .stdout(Stdio::null());
            if let Some(fault) = fault.filter(|_| rank == 0) {
                command.env(FAULT_ENV, fault);
            }
            command.spawn().unwrap()
        })
        .collect();
    told(&board, &mut children);
    for (rank, child) in children.iter_mut().enumerate() {
        let status = child.wait().unwrap();
        let was_killed = part == "peer-dies" && rank == 1;
        assert!(
            status.success() || was_killed,
            "{part}: rank {rank} {status}"
        );
    }
}

/// As a supervisor does: tells the others when rank 1 has ended.
fn tell_of_rank_1(board: &Board, children: &mut [Child]) {
    children[1].wait().unwrap();
    board.fail(&Failure::new(FailureCategory::RankDied, KILLED).at_rank(1));
}

#[test]
fn ranks_sum_gather_and_hand_on() {
    for (tensor, pipeline) in [(2, 1), (4, 1), (2, 2), (1, 3)] {
        let layout = Layout { tensor, pipeline };
        if has_devices(layout.world(), false) {
            ranks("exchange", layout, None, |_, _| {});
        }
    }
}

#[test]
fn wrong_tensors_are_refused() {
    if has_devices(2, false) {
        ranks("refusals", Layout::tensor(2), None, |_, _| {});
    }
}

#[test]
fn a_dead_peer_ends_the_step() {
    if has_devices(2, false) {
        ranks("peer-dies", Layout::tensor(2), None, tell_of_rank_1);
        // With stages, operations of two communicators stand on one stream.
        let layout = Layout {
            tensor: 2,
            pipeline: 2,
        };
        if has_devices(layout.world(), true) {
            ranks("peer-dies", layout, None, tell_of_rank_1);
        }
    }
}

#[test]
fn a_peer_that_does_not_come_is_not_waited_for_for_ever() {
    if has_devices(2, false) {
        ranks("peer-does-not-come", Layout::tensor(2), None, |_, _| {});
    }
}

#[test]
fn a_broken_connection_is_told_with_the_words_of_nccl() {
    if has_devices(2, true) {
        ranks("connection-breaks", Layout::tensor(2), Some("5"), |_, _| {});
    }
}

#[test]
fn a_peer_that_goes_before_it_connects_ends_the_start() {
    if has_devices(2, false) {
        let layout = Layout::tensor(2);
        ranks("peer-goes-before-it-connects", layout, None, tell_of_rank_1);
    }
}

#[test]
fn ranks_that_differ_are_told_apart() {
    if has_devices(2, true) {
        ranks("ranks-differ", Layout::tensor(2), None, |_, _| {});
    }
}
