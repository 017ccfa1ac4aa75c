//! What the tests of this crate share: a group of threads in place of a group of
//! processes, and the real model's file.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    clippy::unwrap_in_result,
    reason = "each test file uses a part, and tests may fail"
)]

pub mod reference;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Barrier, Mutex, mpsc};

use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::KvFormat;
use llama_model::{
    Checkpoint, Collective, CollectiveError, Layout, Llama, LoadOptions, Segment, StepModel,
    Wanted, order,
};

/// Environment variable with the path of SmolLM2-135M-Instruct.Q4_1.gguf.
const MODEL_VARIABLE: &str = "LLAMA_TEST_MODEL";

/// The real model, or `None` with a notice where it is not to be had.
pub fn real_model() -> Option<Checkpoint> {
    let Some(path) = std::env::var_os(MODEL_VARIABLE).map(PathBuf::from) else {
        eprintln!("not run: {MODEL_VARIABLE} does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return None;
    };
    Some(Checkpoint::open(&path, LoadFormat::Auto).expect("the test model opens"))
}

/// What the ranks of some part of the group exchange.
struct Room {
    parts: Mutex<Vec<Vec<f32>>>,
    barrier: Barrier,
}

impl Room {
    fn new(ranks: usize) -> Self {
        Self {
            parts: Mutex::new(vec![Vec::new(); ranks]),
            barrier: Barrier::new(ranks),
        }
    }

    /// Every rank's `part`, in rank order.
    fn exchange(&self, place: usize, part: &[f32]) -> Vec<Vec<f32>> {
        self.parts.lock().expect("no rank panicked")[place] = part.to_vec();
        self.barrier.wait();
        let parts = self.parts.lock().expect("no rank panicked").clone();
        self.barrier.wait();
        parts
    }
}

/// One rank of a group of threads.
struct ThreadRank {
    layout: Layout,
    rank: usize,
    stage: Arc<Room>,
    group: Arc<Room>,
    next: Option<mpsc::Sender<Vec<f32>>>,
    previous: Option<mpsc::Receiver<Vec<f32>>>,
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn layout(&self) -> Layout {
        self.layout
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let place = self.layout.tensor_rank(self.rank);
        let mut parts = self.stage.exchange(place, data).concat();
        order::sum_rows(&mut parts, data.len());
        data.copy_from_slice(&parts[..data.len()]);
        Ok(())
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let parts = self.group.exchange(self.rank, part);
        assert!(parts.iter().map(Vec::len).eq(lens.iter().copied()));
        out.copy_from_slice(&parts.concat());
        Ok(())
    }

    fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        let next = self.next.as_ref().expect("not the last stage");
        next.send(data.to_vec()).expect("no rank panicked");
        Ok(())
    }

    fn receive_previous(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let previous = self.previous.as_ref().expect("not the first stage");
        data.copy_from_slice(&previous.recv().expect("no rank panicked"));
        Ok(())
    }
}

/// The ranks of a group of threads.
fn thread_ranks(layout: Layout) -> Vec<ThreadRank> {
    let group = Arc::new(Room::new(layout.world()));
    let stages: Vec<_> = (0..layout.pipeline)
        .map(|_| Arc::new(Room::new(layout.tensor)))
        .collect();
    let mut ranks: Vec<ThreadRank> = (0..layout.world())
        .map(|rank| ThreadRank {
            layout,
            rank,
            stage: Arc::clone(&stages[layout.stage(rank)]),
            group: Arc::clone(&group),
            next: None,
            previous: None,
        })
        .collect();
    for rank in layout.tensor..layout.world() {
        let (sender, receiver) = mpsc::channel();
        ranks[rank - layout.tensor].next = Some(sender);
        ranks[rank].previous = Some(receiver);
    }
    ranks
}

/// What a test's ranks load.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub layout: Layout,
    pub slots: usize,
    pub max_tokens: usize,
    pub kv: KvFormat,
}

impl Setup {
    pub fn tensor(tensor: usize, slots: usize, max_tokens: usize) -> Self {
        Self {
            layout: Layout::tensor(tensor),
            slots,
            max_tokens,
            kv: KvFormat::F16,
        }
    }
}

/// What `work` makes on each rank of a group, each a thread with its part of the
/// model.
pub fn on_ranks<R: Send>(
    checkpoint: &Checkpoint,
    setup: Setup,
    work: impl Fn(&mut Llama, &mut dyn Collective) -> R + Sync,
) -> Vec<R> {
    let load = |options: &LoadOptions| {
        let options = LoadOptions {
            verify: checkpoint.cut_for().is_some(),
            adapters: AdapterRoom::NONE,
            ..*options
        };
        Llama::load(checkpoint, &options, &|_, _| {})
    };
    on_threads(setup, |options, collective| {
        work(&mut load(options).expect("loads"), collective)
    })
}

/// What `work` makes on each rank of a group of threads.
pub fn on_threads<R: Send>(
    setup: Setup,
    work: impl Fn(&LoadOptions, &mut dyn Collective) -> R + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = thread_ranks(setup.layout)
            .into_iter()
            .map(|mut collective| {
                let work = &work;
                scope.spawn(move || {
                    let options = LoadOptions {
                        layout: setup.layout,
                        rank: collective.rank,
                        threads: 1,
                        slots: setup.slots,
                        blocks: None,
                        max_tokens: setup.max_tokens,
                        kv: setup.kv,
                        verify: false,
                        adapters: AdapterRoom::NONE,
                    };
                    work(&options, &mut collective)
                })
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().expect("no rank panicked"))
            .collect()
    })
}

/// Tokens of one sequence, all at once or going on.
pub fn segment(slot: u32, start: usize, tokens: &[u32]) -> Segment {
    Segment {
        slot,
        start: u32::try_from(start).expect("small"),
        tokens: tokens.to_vec(),
        logits: Wanted::Last,
        adapter: None,
        tables: None,
    }
}

/// The logits after each of `tokens`, computed `step` at a time.
pub fn all_logits(
    model: &mut dyn StepModel,
    collective: &mut dyn Collective,
    tokens: &[u32],
    step: usize,
) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for (number, tokens) in tokens.chunks(step).enumerate() {
        let all = Segment {
            logits: Wanted::All,
            ..segment(0, number * step, tokens)
        };
        rows.extend(model.step(&[all], collective).expect("steps"));
    }
    rows
}

/// The most likely tokens behind `prompt`, one after another.
pub fn greedy(
    model: &mut dyn StepModel,
    collective: &mut dyn Collective,
    prompt: &[u32],
    count: usize,
) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    let mut cached = 0;
    while tokens.len() < prompt.len() + count {
        let rows = model
            .step(&[segment(0, cached, &tokens[cached..])], collective)
            .expect("steps");
        cached = tokens.len();
        tokens.push(argmax(&rows[0]));
    }
    tokens.split_off(prompt.len())
}

/// The logits after each of `tokens`, computed one by one behind `prompt`, and
/// before them those after the prompt.
pub fn teacher_forced(
    model: &mut dyn StepModel,
    collective: &mut dyn Collective,
    prompt: &[u32],
    tokens: &[u32],
) -> Vec<Vec<f32>> {
    let mut rows = model
        .step(&[segment(0, 0, prompt)], collective)
        .expect("prefill");
    for (at, token) in tokens.iter().enumerate() {
        let next = [segment(0, prompt.len() + at, &[*token])];
        rows.extend(model.step(&next, collective).expect("decode"));
    }
    rows
}

/// The largest difference between two sets of rows.
pub fn max_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .flatten()
        .zip(b.iter().flatten())
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Index of the largest value, the first of equals.
pub fn argmax(row: &[f32]) -> u32 {
    let best = (0_u32..)
        .zip(row)
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.expect("not empty").0
}

/// Every range of `count` things in `parts` of nearly one length.
pub fn cuts(count: usize, parts: usize) -> Vec<Range<usize>> {
    (0..parts)
        .map(|part| part * count / parts..(part + 1) * count / parts)
        .collect()
}
