//! Which tokens of which sequences the next step computes.
//!
//! Continuous batching over a fixed number of KV slots: every step takes one
//! token of each sequence that is already answering, and fills the rest of its
//! token budget with prompts, oldest first, in chunks where they are long. A
//! slot has room for the longest sequence, so nothing is ever evicted.
//!
//! This is a state machine without clock or I/O: requests go in with
//! [`Scheduler::submit`], [`Scheduler::plan`] says what to compute, and
//! [`Scheduler::record`] takes the sampled tokens.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use llama_model::{Segment, Wanted};
use serde::{Deserialize, Serialize};

/// What bounds the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that have a place in the KV cache.
    pub slots: u32,
    /// Tokens that one step computes at most.
    pub step_tokens: u32,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Longest sequence, prompt and answer, in tokens.
    pub max_tokens: u32,
}

/// A request in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its name, unique among the requests that are open.
    pub id: u64,
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Tokens to answer with at most, at least one.
    pub max_answer: u32,
    /// Tokens that end the answer.
    pub stop_ids: Vec<u32>,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// As many requests wait as may.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// Prompt and answer are longer than a slot, or one of them is empty.
    #[error("a prompt of {prompt} tokens and an answer of {answer} do not fit {max_tokens} tokens")]
    Length {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        answer: u32,
        /// What a sequence may have.
        max_tokens: u32,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// It reached its limit.
    Length,
}

impl Finish {
    /// The word of the OpenAI API, which is also the metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a sampled token did to its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// The request.
    pub id: u64,
    /// The token, `None` when it only ended the answer.
    pub token: Option<u32>,
    /// Set when the answer is over.
    pub finish: Option<Finish>,
}

#[derive(Clone, Debug)]
struct Sequence {
    request: Request,
    slot: u32,
    /// Prompt tokens whose keys and values are in the cache.
    computed: usize,
    /// The last sampled token, which the next step takes in.
    last: Option<u32>,
    answered: u32,
}

impl Sequence {
    fn is_answering(&self) -> bool {
        self.computed == self.request.prompt.len()
    }
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Request>,
    /// In order of admission.
    running: Vec<Sequence>,
    free_slots: Vec<u32>,
    /// Requests whose logits the planned step brings, in order.
    awaited: Vec<u64>,
}

impl Scheduler {
    /// An empty scheduler. A step has room for at least one token of every slot
    /// and one of a prompt, whatever `limits.step_tokens` says.
    pub fn new(mut limits: Limits) -> Self {
        limits.step_tokens = limits.step_tokens.max(limits.slots.saturating_add(1));
        Self {
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_slots: (0..limits.slots).rev().collect(),
            awaited: Vec::new(),
        }
    }

    /// Takes a request, or says why not.
    ///
    /// # Errors
    /// When the queue is full or the request does not fit a slot.
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
        self.waiting.push_back(request);
        Ok(())
    }

    /// Forgets a request, wherever it is; a token still awaited for it is
    /// dropped. Returns whether it was open.
    pub fn cancel(&mut self, id: u64) -> bool {
        if let Some(index) = self.waiting.iter().position(|request| request.id == id) {
            self.waiting.remove(index);
            return true;
        }
        let Some(index) = self.running.iter().position(|seq| seq.request.id == id) else {
            return false;
        };
        let sequence = self.running.remove(index);
        self.free_slots.push(sequence.slot);
        true
    }

    /// What the next step computes; empty when there is nothing to do.
    pub fn plan(&mut self) -> Vec<Segment> {
        self.admit();
        self.awaited.clear();
        let mut segments = Vec::new();
        let mut budget = usize::try_from(self.limits.step_tokens).unwrap_or(usize::MAX);
        for sequence in &self.running {
            let Some(token) = sequence.last else {
                continue;
            };
            let start = sequence.computed + sequence.answered as usize - 1;
            segments.push(segment(sequence.slot, start, vec![token], Wanted::Last));
            self.awaited.push(sequence.request.id);
            budget = budget.saturating_sub(1);
        }
        for sequence in self.running.iter_mut().filter(|seq| !seq.is_answering()) {
            if budget == 0 {
                break;
            }
            let start = sequence.computed;
            let end = (start + budget).min(sequence.request.prompt.len());
            budget -= end - start;
            sequence.computed = end;
            let is_whole = sequence.is_answering();
            let tokens = sequence.request.prompt[start..end].to_vec();
            let logits = if is_whole { Wanted::Last } else { Wanted::None };
            segments.push(segment(sequence.slot, start, tokens, logits));
            if is_whole {
                self.awaited.push(sequence.request.id);
            }
        }
        segments
    }

    fn admit(&mut self) {
        while let Some(slot) = self.free_slots.pop() {
            let Some(request) = self.waiting.pop_front() else {
                self.free_slots.push(slot);
                return;
            };
            self.running.push(Sequence {
                request,
                slot,
                computed: 0,
                last: None,
                answered: 0,
            });
        }
    }

    /// The requests whose logits the planned step brings, in the order of the
    /// segments that want them.
    pub fn awaited(&self) -> &[u64] {
        &self.awaited
    }

    /// Takes the tokens sampled for [`Scheduler::awaited`], in its order.
    pub fn record(&mut self, sampled: &[u32]) -> Vec<Recorded> {
        let awaited = std::mem::take(&mut self.awaited);
        let mut recorded = Vec::with_capacity(awaited.len());
        for (id, token) in awaited.into_iter().zip(sampled) {
            let Some(index) = self.running.iter().position(|seq| seq.request.id == id) else {
                continue;
            };
            let sequence = &mut self.running[index];
            let stops = sequence.request.stop_ids.contains(token);
            if !stops {
                sequence.answered += 1;
                sequence.last = Some(*token);
            }
            let finish = if stops {
                Some(Finish::Stop)
            } else if sequence.answered >= sequence.request.max_answer {
                Some(Finish::Length)
            } else {
                None
            };
            recorded.push(Recorded {
                id,
                token: (!stops).then_some(*token),
                finish,
            });
            if finish.is_some() {
                let sequence = self.running.remove(index);
                self.free_slots.push(sequence.slot);
            }
        }
        recorded
    }

    /// Sequences that have a place in the KV cache.
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

    /// Tokens in the KV cache once the planned step is computed.
    pub fn cached_tokens(&self) -> u64 {
        let cached = |seq: &Sequence| seq.computed as u64 + u64::from(seq.answered.max(1) - 1);
        self.running.iter().map(cached).sum()
    }

    /// Whether no request is open.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }
}

fn segment(slot: u32, start: usize, tokens: Vec<u32>, logits: Wanted) -> Segment {
    Segment {
        slot,
        // `submit` bounds every position by `max_tokens`, a u32.
        start: u32::try_from(start).unwrap_or(u32::MAX),
        tokens,
        logits,
    }
}
