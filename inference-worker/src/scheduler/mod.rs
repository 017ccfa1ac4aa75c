//! Which tokens of which sequences the next step computes.
//!
//! Continuous batching with a token budget a step: every sequence that is answering
//! gets its next token computed, and what is left of the budget goes to prompts, in
//! chunks where they are long; beside answers only so many that these do not wait long. Keys and values lie in blocks that sequences share where
//! they begin alike. When blocks run out, the sequence that is last in order gives its
//! blocks up and is computed again later. The order is by priority, then by arrival; a
//! request that has waited for long counts as of the first priority.
//!
//! This is a state machine without clock or I/O: requests go in with
//! [`Scheduler::submit`], [`Scheduler::plan`] says what to compute, and
//! [`Scheduler::record`] takes the sampled tokens.

mod cache;
mod request;
mod sequence;
#[cfg(test)]
mod tests;

use llama_model::Segment;
use llama_model::blocks::{BlockGeometry, KvBlocks};

use crate::adapters::PlaceSet;
use cache::BlockCache;
pub use request::{Awaited, CacheUse, Finish, Limits, Recorded, Refusal, Request};
use sequence::Sequence;

/// Steps after which a request that waits is of the first priority.
const PATIENCE_STEPS: u64 = 2000;

/// Tokens of prompts that a step takes at most beside answers. Kernels pass over the
/// weights once for as many rows: more would keep answers waiting and be no faster.
const BESIDE_ANSWERS: usize = 64;

/// The state machine.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    cache: BlockCache,
    /// In order of arrival.
    waiting: Vec<Sequence>,
    running: Vec<Sequence>,
    free_slots: Vec<u32>,
    arrivals: u64,
    step: u64,
    usage: CacheUse,
}

impl Scheduler {
    /// An empty scheduler. A step has room for at least one token of every slot
    /// and one of a prompt, whatever `limits.step_tokens` says.
    pub fn new(mut limits: Limits) -> Self {
        limits.step_tokens = limits.step_tokens.max(limits.slots.saturating_add(1));
        let geometry = BlockGeometry::new(limits.chunk);
        Self {
            cache: BlockCache::new(geometry, limits.blocks, limits.prefix_caching),
            waiting: Vec::new(),
            running: Vec::new(),
            free_slots: (0..limits.slots).rev().collect(),
            arrivals: 0,
            step: 0,
            usage: CacheUse::default(),
            limits,
        }
    }

    /// Takes a request, or says why not.
    ///
    /// # Errors
    /// When the queue is full or the request does not fit a sequence.
    pub fn submit(&mut self, request: Request) -> Result<(), Refusal> {
        let prompt = request.prompt.len();
        let fits = u32::try_from(prompt)
            .ok()
            .and_then(|prompt| prompt.checked_add(request.max_answer))
            .is_some_and(|total| total <= self.limits.max_tokens);
        if prompt == 0 || request.max_answer == 0 || !fits {
            return Err(Refusal::Length {
                prompt,
                answer: request.max_answer,
                max_tokens: self.limits.max_tokens,
            });
        }
        // Those for whom a slot is free do not really wait.
        if self.waiting.len() >= self.limits.queue + self.free_slots.len() {
            return Err(Refusal::QueueFull {
                waiting: self.waiting.len(),
            });
        }
        let tokens: usize = self.waiting.iter().map(Sequence::unknown).sum();
        if !self.waiting.is_empty() && tokens + prompt > self.limits.queue_tokens {
            return Err(Refusal::QueueTokens {
                waiting: tokens,
                limit: self.limits.queue_tokens,
            });
        }
        let mut sequence = Sequence::new(request, self.arrivals, self.step);
        if self.shares(&sequence) {
            sequence.hash_blocks();
        }
        self.arrivals += 1;
        self.waiting.push(sequence);
        Ok(())
    }

    /// Forgets a request, wherever it is; a token still awaited for it is
    /// dropped. Returns whether it was open.
    pub fn cancel(&mut self, id: u64) -> bool {
        if let Some(index) = self.waiting.iter().position(|seq| seq.id() == id) {
            self.waiting.remove(index);
            return true;
        }
        let Some(index) = self.running.iter().position(|seq| seq.id() == id) else {
            return false;
        };
        self.finish(index);
        true
    }

    /// What the next step computes; empty when there is nothing to do.
    pub fn plan(&mut self) -> Vec<Segment> {
        self.step += 1;
        let (step, patience) = (self.step, PATIENCE_STEPS);
        self.running.sort_by_key(|seq| seq.order(step, patience));
        let mut budget = usize::try_from(self.limits.step_tokens).unwrap_or(usize::MAX);
        self.plan_answers(&mut budget);
        if self.running.iter().any(|seq| seq.planned() > 0) {
            budget = budget.min(BESIDE_ANSWERS);
        }
        let mut rows = self.spare_rows();
        self.plan_prompts(&mut budget, &mut rows);
        self.admit(&mut budget, &mut rows);
        let running = self.running.iter_mut();
        running.filter_map(Sequence::segment).collect()
    }

    /// One token of each sequence that is answering, and what is guessed to follow.
    fn plan_answers(&mut self, budget: &mut usize) {
        let answering = self.running.iter().filter(|seq| seq.unknown() == 1).count();
        let mut guesses = budget.saturating_sub(answering + self.prompts_left());
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            if sequence.unknown() == 1 {
                let most = (self.limits.speculation as usize).min(guesses);
                sequence.guess(most);
                let wanted = 1 + sequence.guesses();
                if self.make_room(index, wanted, true) {
                    *budget = budget.saturating_sub(wanted);
                    guesses -= wanted - 1;
                } else {
                    // Only itself was left to make room for.
                    self.preempt(index);
                    continue;
                }
            }
            index += 1;
        }
    }

    /// Rows of logits that a step may bring besides one of each that runs: a row a slot
    /// is what memory was planned for.
    fn spare_rows(&self) -> usize {
        let others = self.running.iter().filter(|seq| !seq.wants_prompt());
        (self.limits.slots as usize).saturating_sub(others.count())
    }

    /// Tokens that prompts would like of this step: guesses are not worth their delay.
    fn prompts_left(&self) -> usize {
        let running = self.running.iter().filter(|seq| seq.unknown() > 1);
        let admissible = self.waiting.iter().take(self.free_slots.len());
        running.chain(admissible).map(Sequence::unknown).sum()
    }

    /// Further parts of prompts that have begun.
    fn plan_prompts(&mut self, budget: &mut usize, rows: &mut usize) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let sequence = &self.running[index];
            let part = part_of(sequence, sequence.unknown(), *budget, *rows);
            if sequence.unknown() > 1 && sequence.planned() == 0 && part > 0 {
                let taken = if sequence.wants_prompt() { part } else { 0 };
                if self.make_room(index, part, false) {
                    *budget -= part;
                    *rows -= taken;
                }
            }
            index += 1;
        }
    }

    /// Takes the blocks for `count` more tokens of a running sequence, if need be from
    /// those behind it in order: from any of them if it `insists`, else from those that
    /// this step computes nothing of. Plans the tokens if that worked.
    fn make_room(&mut self, index: usize, count: usize, insists: bool) -> bool {
        loop {
            let sequence = &mut self.running[index];
            let tokens = sequence.computed() + count;
            if self.cache.extend(&mut sequence.held, tokens) {
                sequence.plan(count);
                return true;
            }
            let behind = index + 1..self.running.len();
            let victim = behind
                .rev()
                .find(|victim| insists || self.running[*victim].planned() == 0);
            match victim {
                Some(victim) => self.preempt(victim),
                None => return false,
            }
        }
    }

    /// Takes a running sequence's blocks; it is computed again later.
    fn preempt(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        self.usage.preemptions += 1;
        self.cache.release(&mut sequence.held);
        self.free_slots.extend(sequence.leave());
        let at = self
            .waiting
            .partition_point(|other| other.arrival() < sequence.arrival());
        self.waiting.insert(at, sequence);
    }

    /// Lets waiting requests begin, first in order first, as long as there is room for
    /// what the step computes of them and a block more for each that runs.
    fn admit(&mut self, budget: &mut usize, rows: &mut usize) {
        while *budget > 0 && *rows > 0 && !self.free_slots.is_empty() {
            let (step, patience) = (self.step, PATIENCE_STEPS);
            let first = (0..self.waiting.len())
                .min_by_key(|index| self.waiting[*index].order(step, patience));
            let Some(first) = first else { return };
            let sequence = &mut self.waiting[first];
            let prefix = self.cache.longest_prefix(sequence.prompt_hashes());
            sequence.held = self.cache.hold_prefix(sequence.prompt_hashes(), prefix);
            let part = part_of(sequence, sequence.unknown() - prefix, *budget, *rows);
            let spare = if self.running.is_empty() {
                0
            } else {
                self.running.len() + 1
            };
            let missing = self.cache.missing(&sequence.held, prefix + part);
            let has_room =
                |(missing, free): (&usize, usize)| *missing == 0 || missing + spare <= free;
            if !missing.iter().zip(self.cache.free()).all(has_room)
                || !self.cache.extend(&mut sequence.held, prefix + part)
            {
                self.cache.release(&mut sequence.held);
                return;
            }
            let mut sequence = self.waiting.remove(first);
            self.count_prefix(&mut sequence, prefix);
            if let Some(slot) = self.free_slots.pop() {
                sequence.begin(slot, prefix);
            }
            sequence.plan(part);
            *budget -= part;
            *rows -= if sequence.wants_prompt() { part } else { 1 };
            self.running.push(sequence);
        }
    }

    /// Whether blocks of `sequence` may be those of others.
    fn shares(&self, sequence: &Sequence) -> bool {
        self.cache.shares() && !sequence.is_private()
    }

    fn count_prefix(&mut self, sequence: &mut Sequence, prefix: usize) {
        if self.shares(sequence) {
            self.usage.queried_tokens += sequence.unknown() as u64;
            self.usage.found_tokens += prefix as u64;
        }
        sequence.note_prefix(prefix);
    }

    /// What the planned step is computed for: the requests of which it brings logits, in
    /// the order of the segments that want them.
    pub fn awaited(&self) -> impl Iterator<Item = Awaited<'_>> {
        self.running.iter().filter_map(Sequence::awaited)
    }

    /// Takes the tokens sampled for those of [`Scheduler::awaited`] that draw, in its
    /// order; of each the one behind its last and as many more as its guesses were right,
    /// at least one.
    pub fn record(&mut self, sampled: &[Vec<u32>]) -> Vec<Recorded> {
        let mut recorded = Vec::new();
        let mut sampled = sampled.iter();
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            let is_awaited = sequence.awaited().is_some_and(|awaited| awaited.draws);
            let mut finish = None;
            if sequence.planned() > 0 {
                let tokens = if is_awaited {
                    sampled.next().map_or(&[][..], Vec::as_slice)
                } else {
                    &[]
                };
                finish = sequence.advance(tokens, &mut recorded);
                self.keep_complete(index);
            }
            if finish.is_some() {
                self.finish(index);
            } else {
                index += 1;
            }
        }
        recorded
    }

    /// Lets the blocks that a sequence completed be found, and lets go of those that it
    /// needs no more.
    fn keep_complete(&mut self, index: usize) {
        let sequence = &mut self.running[index];
        if self.cache.shares() && !sequence.is_private() {
            let complete = sequence.complete_blocks();
            self.cache
                .publish(&sequence.held, sequence.hashes(), complete);
        }
        let computed = sequence.computed();
        self.cache.let_go_before(&mut sequence.held, computed);
    }

    fn finish(&mut self, index: usize) {
        let mut sequence = self.running.remove(index);
        self.cache.release(&mut sequence.held);
        self.free_slots.extend(sequence.leave());
    }

    /// Tokens that one step computes at most.
    pub fn step_tokens(&self) -> u32 {
        self.limits.step_tokens
    }

    /// Slots for sequences.
    pub fn slots(&self) -> u32 {
        self.limits.slots
    }

    /// Requests in a slot.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait for a slot.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Blocks of the KV cache in all, and those that no open request holds.
    pub fn blocks(&self) -> (KvBlocks, KvBlocks) {
        (self.cache.total(), self.cache.free())
    }

    /// Adapters of running and of waiting requests.
    pub fn adapters(&self) -> [PlaceSet; 2] {
        let places =
            |sequences: &[Sequence]| sequences.iter().filter_map(Sequence::adapter).collect();
        [places(&self.running), places(&self.waiting)]
    }

    /// What the cache did so far.
    pub fn cache_use(&self) -> CacheUse {
        self.usage
    }

    /// Tokens in the blocks of running requests.
    pub fn cached_tokens(&self) -> u64 {
        let tokens = |seq: &Sequence| (seq.computed() + seq.planned()) as u64;
        self.running.iter().map(tokens).sum()
    }

    /// Whether no request is open.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }
}

/// Tokens of the `unknown` ones of a prompt that fit a step. One whose logits are wanted
/// leaves rows for others.
fn part_of(sequence: &Sequence, unknown: usize, budget: usize, rows: usize) -> usize {
    let part = unknown.min(budget);
    if sequence.wants_prompt() {
        part.min(rows.div_ceil(2))
    } else {
        part
    }
}
