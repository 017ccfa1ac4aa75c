//! What the tests of this crate share: a group of threads in place of a group of
//! processes, and the real model's file.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    reason = "each test file uses a part, and tests may fail"
)]

use std::path::PathBuf;
use std::sync::{Arc, Barrier, Mutex};

use llama_model::{
    Collective, CollectiveError, Gguf, Layout, Llama, LoadOptions, Segment, StepModel, order,
};

/// Environment variable with the path of SmolLM2-135M-Instruct.Q4_1.gguf.
const MODEL_VARIABLE: &str = "LLAMA_TEST_MODEL";

/// The real model, or `None` with a notice where it is not to be had.
pub fn real_model() -> Option<Gguf> {
    let Some(path) = std::env::var_os(MODEL_VARIABLE).map(PathBuf::from) else {
        eprintln!("not run: {MODEL_VARIABLE} does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return None;
    };
    Some(Gguf::open(&path).expect("the test model opens"))
}

/// One rank of a group of threads.
struct ThreadRank {
    rank: usize,
    parts: Arc<Mutex<Vec<Vec<f32>>>>,
    barrier: Arc<Barrier>,
}

impl ThreadRank {
    /// Every rank's `part`, in rank order.
    fn exchange(&self, part: &[f32]) -> Vec<Vec<f32>> {
        self.parts.lock().expect("no rank panicked")[self.rank] = part.to_vec();
        self.barrier.wait();
        let parts = self.parts.lock().expect("no rank panicked").clone();
        self.barrier.wait();
        parts
    }
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn layout(&self) -> Layout {
        Layout::tensor(self.parts.lock().expect("no rank panicked").len())
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let mut parts = self.exchange(data).concat();
        order::sum_rows(&mut parts, data.len());
        data.copy_from_slice(&parts[..data.len()]);
        Ok(())
    }

    fn send_next(&mut self, _data: &[f32]) -> Result<(), CollectiveError> {
        unreachable!("one stage")
    }

    fn receive_previous(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        unreachable!("one stage")
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let parts = self.exchange(part);
        assert!(parts.iter().map(Vec::len).eq(lens.iter().copied()));
        out.copy_from_slice(&parts.concat());
        Ok(())
    }
}

/// What `work` makes on each of `world` ranks, each a thread with its shard of
/// the model.
pub fn on_ranks<R: Send>(
    gguf: &Gguf,
    world: usize,
    (slots, max_tokens): (usize, usize),
    work: impl Fn(&mut Llama, &mut dyn Collective) -> R + Sync,
) -> Vec<R> {
    let parts = Arc::new(Mutex::new(vec![Vec::new(); world]));
    let barrier = Arc::new(Barrier::new(world));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let mut collective = ThreadRank {
                    rank,
                    parts: Arc::clone(&parts),
                    barrier: Arc::clone(&barrier),
                };
                let work = &work;
                scope.spawn(move || {
                    let options = LoadOptions {
                        rank,
                        world,
                        threads: 1,
                        slots,
                        max_tokens,
                    };
                    let mut model = Llama::load(gguf, &options, &|_, _| {}).expect("loads");
                    work(&mut model, &mut collective)
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
        wants_logits: true,
    }
}

/// The logits after each of `tokens`, computed one by one behind `prompt`, and
/// before them those after the prompt.
pub fn teacher_forced(
    model: &mut Llama,
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
