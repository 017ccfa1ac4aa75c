//! Rank 0's loop: requests in, steps, tokens out.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use llama_model::{Segment, StepError, Wanted};

use super::drawing::Drawing;
use super::forms::Forms;
use super::plan::{NextStep, Stepper};
use super::throughput::Throughput;
use crate::adapters::{AdapterOrder, AdapterOutcome};
use crate::engine::{EngineStats, FromEngine, Submit, ToEngine, Work};
use crate::scheduler::{Awaited, Request, Scheduler};
use crate::structured::Constraint;

/// How often ranks pass an empty step when nothing is asked, so that a rank
/// that is stuck is found before a request meets it.
const IDLE_PERIOD: Duration = Duration::from_secs(1);
/// Likewise while an adapter is being read.
const READING_PERIOD: Duration = Duration::from_millis(20);
/// Likewise while a required form is being prepared.
const FORM_PERIOD: Duration = Duration::from_millis(2);

/// Rank 0 cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The front's end of the connection broke.
    #[error("talk to the front")]
    Front(#[source] std::io::Error),
}

/// Rank 0's state. `tell` takes what a step brought, in order.
pub struct Engine<'a, F> {
    stepper: Stepper<'a>,
    scheduler: Scheduler,
    drawings: HashMap<u64, Drawing>,
    forms: Forms,
    from_front: Receiver<ToEngine>,
    tell: F,
    told: Vec<FromEngine>,
    work: Work,
    throughput: Throughput,
    /// Adapters to be loaded or forgotten.
    orders: VecDeque<AdapterOrder>,
    /// Place of the adapter that the ranks are reading.
    reading: Option<u32>,
    stopping: bool,
}

impl<F> std::fmt::Debug for Engine<'_, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("stepper", &self.stepper)
            .finish_non_exhaustive()
    }
}

impl<'a, F: FnMut(&[FromEngine]) -> std::io::Result<()>> Engine<'a, F> {
    /// An engine that hears `from_front` and answers through `tell`.
    pub fn new(
        stepper: Stepper<'a>,
        scheduler: Scheduler,
        forms: Forms,
        from_front: Receiver<ToEngine>,
        tell: F,
    ) -> Self {
        Self {
            stepper,
            scheduler,
            drawings: HashMap::new(),
            forms,
            from_front,
            tell,
            told: Vec::new(),
            work: Work::default(),
            throughput: Throughput::default(),
            orders: VecDeque::new(),
            reading: None,
            stopping: false,
        }
    }

    /// Works until told to stop and nothing is open.
    ///
    /// # Errors
    /// When a peer fails, a step cannot be computed, or the front is gone.
    pub fn run(&mut self) -> Result<(), EngineError> {
        loop {
            let has_heard = self.hear()?;
            let begun = Instant::now();
            let segments = self.scheduler.plan();
            let last = self.stopping && segments.is_empty() && self.forms.is_idle();
            let mut is_news = has_heard || !segments.is_empty();
            let tokens = count_tokens(&segments, self.scheduler.awaited());
            let settles = self.reading.is_some();
            let next = NextStep {
                segments,
                adapters: self.next_orders(),
                settles,
                compares: self.drawings.values().any(|drawing| drawing.is_compared),
                last,
            };
            let computing = Instant::now();
            let rows = self.stepper.lead(next)?;
            let computed = computing.elapsed();
            is_news |= self.note_adapter();
            self.take(&rows);
            if tokens != (0, 0) {
                self.note(tokens, begun.elapsed(), computed);
            }
            if is_news {
                self.report()?;
            }
            if last {
                return Ok(());
            }
        }
    }

    /// The last finished step.
    pub fn step(&self) -> u64 {
        self.stepper.step
    }

    /// Takes the messages that have come; waits for one when there is nothing
    /// else to do. Returns whether one came.
    fn hear(&mut self) -> Result<bool, EngineError> {
        let gone = || EngineError::Front(std::io::ErrorKind::BrokenPipe.into());
        let mut has_heard = false;
        let may_wait = self.orders.is_empty() || self.reading.is_some();
        if self.scheduler.is_idle() && !self.stopping && may_wait {
            let period = match self.reading {
                _ if !self.forms.is_idle() => FORM_PERIOD,
                Some(_) => READING_PERIOD,
                None => IDLE_PERIOD,
            };
            match self.from_front.recv_timeout(period) {
                Ok(message) => {
                    self.obey(message);
                    has_heard = true;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
        }
        loop {
            match self.from_front.try_recv() {
                Ok(message) => {
                    self.obey(message);
                    has_heard = true;
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(gone()),
            }
        }
        let has_taken = self.take_forms();
        Ok(has_heard || has_taken)
    }

    fn obey(&mut self, message: ToEngine) {
        match message {
            ToEngine::Submit(submit) if submit.form.is_some() => {
                let id = submit.id;
                if let Err(error) = self.forms.prepare(submit) {
                    let message = error.to_string();
                    self.told.push(FromEngine::Failed { id, message });
                }
            }
            ToEngine::Submit(submit) => self.submit(*submit, None),
            ToEngine::Cancel { id } => {
                self.forms.cancel(id);
                self.scheduler.cancel(id);
                self.drawings.remove(&id);
            }
            ToEngine::Adapter(order) => self.orders.push_back(order),
            ToEngine::Stop => self.stopping = true,
        }
    }

    /// What the ranks do about adapters before the next step: they forget those that no
    /// sequence uses any more, and begin to read one if they are not reading.
    fn next_orders(&mut self) -> Vec<AdapterOrder> {
        if self.orders.is_empty() {
            return Vec::new();
        }
        let in_use = self.scheduler.adapters();
        let (mut next, mut later) = (Vec::new(), VecDeque::new());
        for order in self.orders.drain(..) {
            let place = order.place();
            let may_begin = match order {
                AdapterOrder::Load { .. } => self.reading.is_none(),
                AdapterOrder::Drop { .. } => !in_use.iter().any(|used| used.contains(place)),
            };
            if !may_begin {
                later.push_back(order);
                continue;
            }
            match order {
                AdapterOrder::Load { .. } => self.reading = Some(place),
                AdapterOrder::Drop { .. } => self.told.push(FromEngine::Adapter {
                    place,
                    outcome: AdapterOutcome::Dropped,
                }),
            }
            next.push(order);
        }
        self.orders = later;
        next
    }

    /// Tells the front of an adapter that all ranks are done with; returns whether there
    /// is anything to tell of adapters.
    fn note_adapter(&mut self) -> bool {
        if let Some((place, outcome)) = self.stepper.settled.take() {
            self.reading = None;
            self.told.push(FromEngine::Adapter { place, outcome });
        }
        !self.told.is_empty()
    }

    /// Takes requests whose required forms are ready; returns whether there were any.
    fn take_forms(&mut self) -> bool {
        let mut has_taken = false;
        while let Some((id, prepared)) = self.forms.ready() {
            has_taken = true;
            match prepared {
                Ok((submit, form)) => self.submit(submit, Some(form)),
                Err(error) => {
                    let message = error.to_string();
                    self.told.push(FromEngine::Failed { id, message });
                }
            }
        }
        has_taken
    }

    fn submit(&mut self, submit: Submit, form: Option<Constraint>) {
        let (id, drawing) = (submit.id, Drawing::new(&submit, form));
        let request = Request {
            id,
            prompt: submit.tokens,
            max_answer: submit.max_new_tokens,
            stop_ids: submit.stop_ids,
            priority: submit.priority,
            salt: submit.cache_salt.unwrap_or_default(),
            adapter: submit.adapter,
            prompt_logits: submit.prompt_logprobs.is_some(),
            // What was computed before would say nothing.
            is_private: submit.is_compared,
        };
        match self.scheduler.submit(request) {
            Ok(()) => {
                self.drawings.insert(id, drawing);
            }
            Err(refusal) => self.told.push(FromEngine::Refused { id, refusal }),
        }
    }

    /// Draws tokens from the rows and notes what became of their requests.
    fn take(&mut self, rows: &[Vec<f32>]) {
        let (mut sampled, mut unusable, mut rest) = (Vec::new(), Vec::new(), rows);
        let mut asked = HashMap::new();
        for awaited in self.scheduler.awaited() {
            let (rows, behind) = rest.split_at(rest.len().min(awaited.rows()));
            rest = behind;
            let (before, rows) = rows.split_at(rows.len().min(awaited.prompt.len()));
            let (id, drawing) = (awaited.id, self.drawings.get_mut(&awaited.id));
            let read = drawing
                .as_ref()
                .map(|drawing| drawing.prompt(before, &awaited));
            match read.unwrap_or(Ok(Vec::new())) {
                Ok(logprobs) if logprobs.is_empty() => {}
                Ok(logprobs) => self.told.push(FromEngine::Prompt { id, logprobs }),
                Err(error) => unusable.push((id, error.to_string())),
            }
            if !awaited.draws {
                continue;
            }
            let drawn = drawing.map(|drawing| drawing.draw(rows, &awaited));
            sampled.push(match drawn {
                Some(Ok((tokens, logprobs))) => {
                    asked.insert(awaited.id, logprobs.into_iter());
                    tokens
                }
                Some(Err(error)) => {
                    unusable.push((awaited.id, error.to_string()));
                    Vec::new()
                }
                None => Vec::new(),
            });
        }
        let recorded = self.scheduler.record(&sampled);
        for (id, message) in unusable {
            self.scheduler.cancel(id);
            self.drawings.remove(&id);
            self.told.push(FromEngine::Failed { id, message });
        }
        for recorded in recorded {
            let id = recorded.id;
            if let Some(token) = recorded.token {
                let logprobs = asked.get_mut(&id).and_then(Iterator::next);
                self.told.push(FromEngine::Token {
                    id,
                    token,
                    cached_tokens: recorded.cached_tokens,
                    logprobs,
                });
            }
            if let Some(reason) = recorded.finish {
                self.drawings.remove(&id);
                self.told.push(FromEngine::Finished {
                    id,
                    reason,
                    cached_tokens: recorded.cached_tokens,
                });
            }
        }
    }

    /// Notes a step of so many tokens of prompts and answers.
    fn note(&mut self, (prompt, answer): (usize, usize), whole: Duration, computed: Duration) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.work.steps += 1;
        self.work.prompt_tokens += prompt as u64;
        self.work.answer_tokens += answer as u64;
        self.work.micros += micros(whole);
        self.work.model_micros += micros(computed);
        self.throughput.observe(prompt, answer, whole.as_secs_f64());
    }

    fn report(&mut self) -> Result<(), EngineError> {
        let count = |requests: usize| u32::try_from(requests).unwrap_or(u32::MAX);
        let ([total, _], [free, _]) = self.scheduler.blocks();
        let [running_adapters, waiting_adapters] = self.scheduler.adapters();
        self.told.push(FromEngine::Stats(EngineStats {
            running: count(self.scheduler.running()),
            waiting: count(self.scheduler.waiting()),
            slots: self.scheduler.slots(),
            cached_tokens: self.scheduler.cached_tokens(),
            blocks: count(total),
            held_blocks: count(total - free),
            cache: self.scheduler.cache_use(),
            work: self.work,
            saturated: self
                .throughput
                .saturated(self.scheduler.step_tokens(), self.scheduler.slots()),
            running_adapters,
            waiting_adapters,
            step: self.stepper.step,
        }));
        (self.tell)(&self.told).map_err(EngineError::Front)?;
        self.told.clear();
        Ok(())
    }
}

/// Tokens of prompts and of answers. A prompt's last token, if it is alone in its step,
/// counts among the answers: it costs as much.
fn count_tokens<'a>(
    segments: &[Segment],
    awaited: impl Iterator<Item = Awaited<'a>>,
) -> (usize, usize) {
    let lens = segments.iter().map(|segment| match segment.logits {
        Wanted::None => (segment.tokens.len(), 0),
        Wanted::Last if segment.tokens.len() > 1 => (segment.tokens.len(), 0),
        Wanted::Last | Wanted::All => (0, segment.tokens.len()),
    });
    let (prompt, answer) = lens.fold((0, 0), |sum, len| (sum.0 + len.0, sum.1 + len.1));
    // All logits are wanted of answers with guesses, and of prompts by those who ask.
    let read = awaited.filter(|awaited| !awaited.prompt.is_empty());
    let read: usize = read.map(|awaited| awaited.rows()).sum();
    (prompt + read, answer.saturating_sub(read))
}
