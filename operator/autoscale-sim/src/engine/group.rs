//! One group: continuous batching with chunked prefill, step by step.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::workload::Workload;
use crate::count;
use crate::policy::{GroupMetrics, Phase};

/// Steps that follow one another with nothing new in them. Only the first may
/// hold prompt tokens; the others differ by the context that grows.
#[derive(Debug)]
struct Segment {
    start_seconds: f64,
    steps: u64,
    first_ms: f64,
    growth_ms: f64,
    chunks: Vec<(usize, u64)>,
}

impl Segment {
    /// Seconds when this many of its steps are done.
    fn end_of(&self, steps: u64) -> f64 {
        let steps = steps as f64;
        let ms = steps * self.first_ms + self.growth_ms * steps * (steps - 1.0) / 2.0;
        self.start_seconds + ms / 1000.0
    }

    /// Steps that are done at a time: all but the last at most.
    fn done_at(&self, now: f64) -> u64 {
        let last = self.steps - 1;
        let elapsed_ms = (now - self.start_seconds).max(0.0) * 1000.0;
        let linear = self.first_ms - self.growth_ms / 2.0;
        // The positive root of growth/2·j² + linear·j = elapsed.
        let root = 2.0 * elapsed_ms
            / (linear + (linear * linear + 2.0 * self.growth_ms * elapsed_ms).sqrt());
        let mut done = count::floor(root).min(last);
        // The root is off by a rounding error at most.
        while done < last && self.end_of(done + 1) <= now {
            done += 1;
        }
        while done > 0 && self.end_of(done) > now {
            done -= 1;
        }
        done
    }
}

/// A group of pods that serves one copy of the model.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) phase: Phase,
    pub(super) created_seconds: f64,
    pub(super) ready_seconds: Option<f64>,
    pub(super) draining_since: Option<f64>,
    /// Rises whenever an event planned for the end of a segment is void.
    pub(super) plan: u64,
    segment: Option<Segment>,
    waiting: VecDeque<usize>,
    waiting_tokens: u64,
    prefilling: VecDeque<(usize, u64)>,
    prefilling_tokens: u64,
    /// By the step at which they finish; entries of another turn are void.
    decoding: BinaryHeap<Reverse<(u64, usize, u32)>>,
    sequences: u64,
    /// Tokens of context of the decoding sequences.
    context: u64,
    kv: u64,
    /// In the order of admission, with the turn; void ones stay until looked at.
    admitted: Vec<(usize, u32)>,
    step: u64,
    counters: GroupMetrics,
}

impl Group {
    pub(super) fn new(created_seconds: f64) -> Self {
        Self {
            phase: Phase::Starting,
            created_seconds,
            ready_seconds: None,
            draining_since: None,
            plan: 0,
            segment: None,
            waiting: VecDeque::new(),
            waiting_tokens: 0,
            prefilling: VecDeque::new(),
            prefilling_tokens: 0,
            decoding: BinaryHeap::new(),
            sequences: 0,
            context: 0,
            kv: 0,
            admitted: Vec::new(),
            step: 0,
            counters: GroupMetrics::default(),
        }
    }

    /// Whether it has nothing to do and nothing that waits.
    pub(super) fn is_empty(&self) -> bool {
        self.in_flight() == 0
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.sequences + self.prefilling.len() as u64 + self.waiting.len() as u64
    }

    /// Milliseconds of work that it has, as a router can estimate it.
    pub(super) fn work_ms(&self, workload: &Workload<'_>) -> f64 {
        let prompt = (self.waiting_tokens + self.prefilling_tokens) as f64;
        prompt * workload.model.prompt_token_ms + self.in_flight() as f64 * workload.answer_ms
    }

    /// Whether its bounded queue takes this request.
    pub(super) fn has_room(&self, tokens: u64, workload: &Workload<'_>) -> bool {
        self.phase == Phase::Ready
            && (self.waiting.is_empty()
                || (self.waiting.len() < workload.queue.requests
                    && self.waiting_tokens + tokens <= workload.queue.tokens))
    }

    /// Puts a request into its queue; true if it was idle and must begin.
    pub(super) fn enqueue(&mut self, request: usize, workload: &Workload<'_>) -> bool {
        self.waiting.push_back(request);
        self.waiting_tokens += workload.prefill_tokens(request);
        self.segment.is_none()
    }

    pub(super) fn metrics(&self) -> GroupMetrics {
        GroupMetrics {
            running: self.sequences + self.prefilling.len() as u64,
            waiting: self.waiting.len() as u64,
            waiting_tokens: self.waiting_tokens,
            kv_tokens_used: self.kv,
            ..self.counters
        }
    }

    /// When the segment that runs ends.
    pub(super) fn segment_end(&self) -> Option<f64> {
        self.segment
            .as_ref()
            .map(|segment| segment.end_of(segment.steps))
    }

    /// Plans the next steps; none when there is nothing to do.
    pub(super) fn begin(&mut self, now: f64, workload: &mut Workload<'_>) {
        let preempted = self.preempt(workload);
        let chunks = self.take_chunks(!preempted, workload);
        self.segment = None;
        if chunks.is_empty() && self.sequences == 0 {
            return;
        }
        let prompt: u64 = chunks.iter().map(|(_, tokens)| tokens).sum();
        // After a preemption the next step may admit again.
        let steps = if chunks.is_empty() && workload.skip_ahead && !preempted {
            let room = workload.model.kv_tokens.saturating_sub(self.kv) / self.sequences;
            self.steps_to_finish(workload).min(room).max(1)
        } else {
            1
        };
        self.segment = Some(Segment {
            start_seconds: now,
            steps,
            first_ms: workload
                .model
                .step_time_ms(prompt, self.sequences, self.context),
            growth_ms: workload.model.kilotoken_ms * self.sequences as f64 / 1000.0,
            chunks,
        });
    }

    fn steps_to_finish(&mut self, workload: &Workload<'_>) -> u64 {
        while let Some(Reverse((step, request, turn))) = self.decoding.peek() {
            if workload.progress[*request].turn == *turn {
                return step - self.step;
            }
            self.decoding.pop();
        }
        1
    }

    /// Throws out what was admitted last until a step's tokens fit.
    fn preempt(&mut self, workload: &mut Workload<'_>) -> bool {
        let mut any = false;
        while self.sequences > 0 && self.kv + self.sequences > workload.model.kv_tokens {
            let Some((request, turn)) = self.admitted.pop() else {
                break;
            };
            if workload.progress[request].turn != turn {
                continue;
            }
            any = true;
            self.counters.preemptions_total += 1;
            let held = self.release(request, workload);
            self.kv -= held;
            self.waiting.push_front(request);
            self.waiting_tokens += workload.prefill_tokens(request);
        }
        any
    }

    /// Takes a running request out of its phase; the KV tokens that it held.
    fn release(&mut self, request: usize, workload: &mut Workload<'_>) -> u64 {
        let step = self.step;
        let progress = &mut workload.progress[request];
        progress.turn += 1;
        let input = u64::from(workload.requests[request].input);
        if let Some(entered) = progress.decoding_since.take() {
            progress.generated += u32::try_from(step - entered).unwrap_or(u32::MAX);
            let held = input + u64::from(progress.generated);
            self.sequences -= 1;
            self.context -= held;
            held
        } else {
            let generated = u64::from(progress.generated);
            if let Some(at) = self.prefilling.iter().position(|(id, _)| *id == request)
                && let Some((_, left)) = self.prefilling.remove(at)
            {
                self.prefilling_tokens -= left;
            }
            input + generated
        }
    }

    /// Prompt tokens of the next step: first of what was admitted before.
    fn take_chunks(&mut self, admit: bool, workload: &mut Workload<'_>) -> Vec<(usize, u64)> {
        let mut budget = workload.model.chunk_tokens.saturating_sub(self.sequences);
        let mut chunks = Vec::new();
        for (request, left) in &self.prefilling {
            if budget == 0 {
                break;
            }
            let tokens = budget.min(*left);
            budget -= tokens;
            chunks.push((*request, tokens));
        }
        loop {
            self.pull(workload);
            let running = self.sequences + self.prefilling.len() as u64;
            if !admit || budget == 0 || running >= workload.model.max_sequences {
                return chunks;
            }
            let Some(request) = self.waiting.front().copied() else {
                return chunks;
            };
            let held = workload.held_when_prefilled(request);
            // All that runs gets a token in this step, too.
            if self.kv + self.sequences + held > workload.admission_tokens {
                return chunks;
            }
            self.waiting.pop_front();
            let left = workload.prefill_tokens(request);
            self.counters.cached_tokens_total += held.saturating_sub(left);
            self.waiting_tokens -= left;
            self.kv += held;
            self.prefilling.push_back((request, left));
            self.prefilling_tokens += left;
            self.admitted
                .push((request, workload.progress[request].turn));
            let tokens = budget.min(left);
            budget -= tokens;
            chunks.push((request, tokens));
        }
    }

    /// Fills its queue from what the gateway holds.
    fn pull(&mut self, workload: &mut Workload<'_>) {
        while let Some(request) = workload.gateway.first() {
            if !self.has_room(workload.prefill_tokens(request), workload) {
                return;
            }
            workload.release_held();
            self.waiting.push_back(request);
            self.waiting_tokens += workload.prefill_tokens(request);
        }
    }

    /// Does the steps that are done by now, but for the last of the segment.
    pub(super) fn catch_up(&mut self, now: f64) {
        let Some(segment) = &mut self.segment else {
            return;
        };
        if segment.steps <= 1 {
            return;
        }
        let done = segment.done_at(now);
        if done == 0 {
            return;
        }
        segment.start_seconds = segment.end_of(done);
        segment.first_ms += segment.growth_ms * done as f64;
        segment.steps -= done;
        self.advance(done);
    }

    /// Lets the step that runs at this time be the last of its segment, so
    /// that the next can take what has come. True if the end has changed.
    pub(super) fn cut(&mut self, now: f64) -> bool {
        self.catch_up(now);
        match &mut self.segment {
            Some(segment) if segment.steps > 1 => {
                segment.steps = 1;
                true
            }
            _ => false,
        }
    }

    fn advance(&mut self, steps: u64) {
        let tokens = steps * self.sequences;
        self.step += steps;
        self.context += tokens;
        self.kv += tokens;
        self.counters.steps_total += steps;
        self.counters.generation_tokens_total += tokens;
    }

    /// Ends the segment: answers grow, prompts get their first token, and
    /// what is complete leaves.
    pub(super) fn complete(&mut self, now: f64, workload: &mut Workload<'_>) {
        let Some(segment) = self.segment.take() else {
            return;
        };
        self.advance(segment.steps);
        self.finish_decoding(now, workload);
        for (request, tokens) in segment.chunks {
            self.prefilled(request, tokens, now, workload);
        }
        if self.admitted.len() as u64 > 64 + 2 * self.in_flight() {
            self.admitted
                .retain(|(request, turn)| workload.progress[*request].turn == *turn);
        }
    }

    fn finish_decoding(&mut self, now: f64, workload: &mut Workload<'_>) {
        while let Some(Reverse((step, request, turn))) = self.decoding.peek().copied() {
            if step > self.step && workload.progress[request].turn == turn {
                return;
            }
            self.decoding.pop();
            if workload.progress[request].turn == turn {
                self.finish(request, now, workload);
            }
        }
    }

    fn finish(&mut self, request: usize, now: f64, workload: &mut Workload<'_>) {
        let held = self.release(request, workload);
        self.kv -= held;
        self.counters.finished_total += 1;
        if workload.finish(request, now) {
            self.counters.finished_within_slo_total += 1;
        }
    }

    /// A chunk of a prompt is done; with the last one comes an answer token.
    fn prefilled(&mut self, request: usize, tokens: u64, now: f64, workload: &mut Workload<'_>) {
        self.counters.prompt_tokens_total += tokens;
        self.prefilling_tokens -= tokens;
        // Chunks are of the first ones in the queue, in their order.
        let Some((_, left)) = self.prefilling.front_mut() else {
            return;
        };
        *left -= tokens;
        if *left > 0 {
            return;
        }
        self.prefilling.pop_front();
        self.counters.generation_tokens_total += 1;
        let step = self.step;
        let progress = &mut workload.progress[request];
        progress.generated += 1;
        progress.first_token_seconds.get_or_insert(now);
        progress.decoding_since = Some(step);
        let held = u64::from(workload.requests[request].input) + u64::from(progress.generated);
        self.sequences += 1;
        self.context += held;
        self.kv += 1;
        let left = workload.requests[request].output - progress.generated;
        if left == 0 {
            self.finish(request, now, workload);
        } else {
            self.decoding
                .push(Reverse((step + u64::from(left), request, progress.turn)));
        }
    }

    /// Stops taking requests, and gives back those of which nothing is done.
    pub(super) fn drain(&mut self, now: f64, workload: &Workload<'_>) -> Vec<usize> {
        self.phase = Phase::Draining;
        self.draining_since = Some(now);
        let (begun, returned): (Vec<usize>, Vec<usize>) = self
            .waiting
            .drain(..)
            .partition(|id| workload.progress[*id].generated > 0);
        self.waiting.extend(begun);
        self.waiting_tokens = self
            .waiting
            .iter()
            .map(|id| workload.prefill_tokens(*id))
            .sum();
        returned
    }

    /// All that it has: what is lost when it goes now. It is empty after.
    pub(super) fn abandon(&mut self, workload: &Workload<'_>) -> Vec<usize> {
        let mut lost: Vec<usize> = self.waiting.drain(..).collect();
        lost.extend(self.prefilling.drain(..).map(|(request, _)| request));
        let running = self
            .decoding
            .drain()
            .map(|Reverse((_, request, turn))| (request, turn));
        lost.extend(
            running
                .filter(|(request, turn)| workload.progress[*request].turn == *turn)
                .map(|(request, _)| request),
        );
        *self = Self {
            counters: self.counters,
            ..Self::new(self.created_seconds)
        };
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_grow_with_the_context() {
        let segment = Segment {
            start_seconds: 10.0,
            steps: 4,
            first_ms: 100.0,
            growth_ms: 10.0,
            chunks: Vec::new(),
        };
        // 100, 110, 120 and 130 ms.
        for (steps, seconds) in [(0, 10.0), (1, 10.1), (2, 10.21), (3, 10.33), (4, 10.46)] {
            assert!((segment.end_of(steps) - seconds).abs() < 1e-12);
        }
        for (now, steps) in [
            (9.0, 0),
            (10.05, 0),
            (10.11, 1),
            (10.32, 2),
            (10.331, 3),
            (99.0, 3),
        ] {
            assert_eq!(segment.done_at(now), steps, "at {now}");
        }
    }
}
