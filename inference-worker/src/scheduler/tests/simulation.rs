//! A million generated events.

use std::collections::BTreeMap;

use llama_model::blocks::BlockGeometry;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::ranks::{Ranks, STOP, VOCABULARY, answer, next_token};
use super::{Finish, Limits, Request, Scheduler};

const RUNS: u64 = 200;
const EVENTS: usize = 5000;

/// A request that is open: what it will be answered, and what it was so far.
struct Open {
    request: Request,
    expected: (Vec<u32>, bool),
    answer: Vec<u32>,
    /// Tokens of the prompt before which logits came, the first counted.
    told: usize,
}

struct Simulation {
    rng: SmallRng,
    limits: Limits,
    scheduler: Scheduler,
    ranks: Ranks,
    open: BTreeMap<u64, Open>,
    ids: u64,
    ended: u64,
    speculated: u64,
    prompt_rows: u64,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let max_tokens = rng.random_range(40..300);
        let chunk = [None, Some(32), Some(96), Some(20)][rng.random_range(0..4)];
        let slots = rng.random_range(1..8);
        let step_tokens = rng.random_range(1..80);
        let step = step_tokens.max(slots + 1) as usize;
        let needed = BlockGeometry::new(chunk).needed(max_tokens as usize, step);
        let spare = rng.random_range(0..20);
        let limits = Limits {
            slots,
            step_tokens,
            queue: rng.random_range(0..10),
            queue_tokens: rng.random_range(1..1000),
            max_tokens,
            blocks: needed.map(|needed| needed + spare),
            chunk,
            prefix_caching: rng.random_bool(0.7),
            speculation: [0, 1, 4][rng.random_range(0..3)],
        };
        Self {
            rng,
            limits,
            scheduler: Scheduler::new(limits),
            ranks: Ranks::new(limits),
            open: BTreeMap::new(),
            ids: 0,
            ended: 0,
            speculated: 0,
            prompt_rows: 0,
        }
    }

    fn submit(&mut self) {
        self.ids += 1;
        let len = self.rng.random_range(1..self.limits.max_tokens as usize);
        let most = self.limits.max_tokens as usize - len;
        // Few beginnings, so that many requests share one.
        let family = self.rng.random_range(0..3);
        let own = self.rng.random_range(0..=len);
        let token = |i: usize| 1 + u32::try_from(i * 7 + family * 13).unwrap() % (VOCABULARY - 1);
        let mut prompt: Vec<u32> = (0..len).map(token).collect();
        for token in &mut prompt[own..] {
            *token = self.rng.random_range(1..VOCABULARY);
        }
        let max_answer = u32::try_from(self.rng.random_range(1..=most)).unwrap();
        let request = Request {
            id: self.ids,
            max_answer,
            stop_ids: vec![STOP],
            priority: self.rng.random_range(-1..2),
            prompt_logits: self.rng.random_bool(0.2),
            salt: ["", "a"][self.rng.random_range(0..2)].to_owned(),
            adapter: None,
            is_private: self.rng.random_bool(0.1),
            prompt,
        };
        if self.scheduler.submit(request.clone()).is_ok() {
            let expected = answer(&request.prompt, max_answer, self.limits.chunk);
            let open = Open {
                request,
                expected,
                answer: Vec::new(),
                told: 1,
            };
            self.open.insert(self.ids, open);
        } else {
            assert!(!self.open.is_empty(), "refused with nothing open");
        }
    }

    fn cancel(&mut self) {
        let nth = self.rng.random_range(0..20);
        if let Some(id) = self.open.keys().nth(nth).copied() {
            assert!(self.scheduler.cancel(id));
            self.open.remove(&id);
            self.check_blocks();
        }
    }

    fn step(&mut self) {
        let segments = self.scheduler.plan();
        assert_eq!(
            segments.is_empty(),
            self.open.is_empty(),
            "idle with work to do"
        );
        self.speculated += self
            .scheduler
            .awaited()
            .map(|a| a.guesses.len() as u64)
            .sum::<u64>();
        let sampled = self.ranks.step(&self.scheduler, &segments);
        self.read_prompts();
        for recorded in self.scheduler.record(&sampled) {
            let open = self.open.get_mut(&recorded.id).expect("is open");
            open.answer.extend(recorded.token);
            let so_far = &open.expected.0[..open.answer.len()];
            assert_eq!(open.answer, so_far, "{:?}", open.request);
            assert!((recorded.cached_tokens as usize) < open.request.prompt.len());
            let is_told = !open.request.prompt_logits || open.told == open.request.prompt.len();
            assert!(is_told, "an answer begins before its prompt was told");
            let Some(finish) = recorded.finish else {
                continue;
            };
            assert_eq!(open.answer, open.expected.0);
            assert_eq!(finish == Finish::Stop, open.expected.1);
            self.open.remove(&recorded.id);
            self.ended += 1;
        }
        self.check_blocks();
    }

    /// Every row of a prompt comes once, in order, and is that of the prompt before it.
    fn read_prompts(&mut self) {
        for (id, row, token) in std::mem::take(&mut self.ranks.prompts) {
            let open = self.open.get_mut(&id).expect("is open");
            let prompt = &open.request.prompt;
            assert!(open.request.prompt_logits);
            assert_eq!(prompt[open.told], token);
            let before = &prompt[..open.told];
            let chunk = self.limits.chunk;
            let start = chunk.map_or(before.len(), |chunk| (before.len() - 1) / chunk * chunk);
            assert_eq!(next_token(before, &before[start..]), row);
            open.told += 1;
            self.prompt_rows += 1;
        }
    }

    fn check_blocks(&self) {
        let (total, free) = self.scheduler.blocks();
        assert!(self.scheduler.running() <= self.limits.slots as usize);
        assert_eq!(
            self.scheduler.running() + self.scheduler.waiting(),
            self.open.len()
        );
        if self.scheduler.running() == 0 {
            assert_eq!(total, free, "blocks of nobody are held");
        }
    }

    /// Runs `events` and then until all is answered.
    fn run(&mut self, events: usize) {
        for _ in 0..events {
            match self.rng.random_range(0..20) {
                0..4 => self.submit(),
                4 => self.cancel(),
                _ => self.step(),
            }
        }
        let left = self.open.values();
        let tokens: usize = left.map(|open| open.request.prompt.len() + 300).sum();
        // Every step gets one token further at least, and blocks given up are computed
        // again; much more than that would be no progress.
        for _ in 0..=20 * tokens {
            if self.open.is_empty() {
                break;
            }
            self.step();
        }
        assert!(
            self.open.is_empty(),
            "never answered: {:?}",
            self.open.keys()
        );
        assert!(self.scheduler.is_idle());
    }
}

#[test]
fn a_million_events_leak_nothing_and_change_no_answer() {
    let (mut ended, mut preemptions, mut found, mut speculated) = (0, 0, 0, 0);
    let mut prompt_rows = 0;
    for seed in 0..RUNS {
        let mut simulation = Simulation::new(seed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            simulation.run(EVENTS);
        }));
        assert!(outcome.is_ok(), "seed {seed}: {:?}", simulation.limits);
        ended += simulation.ended;
        preemptions += simulation.scheduler.cache_use().preemptions;
        found += simulation.scheduler.cache_use().found_tokens;
        speculated += simulation.speculated;
        prompt_rows += simulation.prompt_rows;
    }
    // Otherwise this tested less than it says.
    let seen = format!("{ended} {preemptions} {found} {speculated} {prompt_rows}");
    assert!(prompt_rows > 100_000, "{seen}");
    assert!(ended > 10_000 && preemptions > 1000, "{seen}");
    assert!(found > 100_000 && speculated > 10_000, "{seen}");
}
