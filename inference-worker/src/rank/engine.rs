//! Rank 0's loop: requests in, steps, tokens out.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use llama_model::StepError;
use llama_model::sample::Sampler;

use super::plan::Stepper;
use crate::engine::{EngineStats, FromEngine, Submit, ToEngine, TokenLogprobs};
use crate::scheduler::{Request, Scheduler};

/// How often ranks pass an empty step when nothing is asked, so that a rank
/// that is stuck is found before a request meets it.
const IDLE_PERIOD: Duration = Duration::from_secs(1);

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
    samplers: HashMap<u64, Sampler>,
    from_front: Receiver<ToEngine>,
    tell: F,
    told: Vec<FromEngine>,
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
        from_front: Receiver<ToEngine>,
        tell: F,
    ) -> Self {
        Self {
            stepper,
            scheduler,
            samplers: HashMap::new(),
            from_front,
            tell,
            told: Vec::new(),
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
            let segments = self.scheduler.plan();
            let is_last = self.stopping && segments.is_empty();
            let is_news = has_heard || !segments.is_empty();
            let rows = self.stepper.lead(segments, is_last)?;
            self.take(&rows);
            if is_news {
                self.report()?;
            }
            if is_last {
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
        if self.scheduler.is_idle() && !self.stopping {
            match self.from_front.recv_timeout(IDLE_PERIOD) {
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
                Err(TryRecvError::Empty) => return Ok(has_heard),
                Err(TryRecvError::Disconnected) => return Err(gone()),
            }
        }
    }

    fn obey(&mut self, message: ToEngine) {
        match message {
            ToEngine::Submit(submit) => self.submit(submit),
            ToEngine::Cancel { id } => {
                self.scheduler.cancel(id);
                self.samplers.remove(&id);
            }
            ToEngine::Stop => self.stopping = true,
        }
    }

    fn submit(&mut self, submit: Submit) {
        let id = submit.id;
        let sampler = Sampler::new(submit.sampling, &submit.tokens);
        let request = Request {
            id,
            prompt: submit.tokens,
            max_answer: submit.max_new_tokens,
            stop_ids: submit.stop_ids,
        };
        match self.scheduler.submit(request) {
            Ok(()) => {
                self.samplers.insert(id, sampler);
            }
            Err(refusal) => self.told.push(FromEngine::Refused { id, refusal }),
        }
    }

    /// Draws a token from each row and notes what became of its request.
    fn take(&mut self, rows: &[Vec<f32>]) {
        let mut sampled = Vec::with_capacity(rows.len());
        let mut unusable = Vec::new();
        let mut asked = HashMap::new();
        for (id, row) in self.scheduler.awaited().iter().zip(rows) {
            let drawn = self
                .samplers
                .get_mut(id)
                .map(|sampler| sampler.sample(row, sampler.accepted(), None));
            match drawn {
                Some(Ok(drawn)) => {
                    sampled.push(drawn.token);
                    if let Some(logprob) = drawn.logprob {
                        let top = drawn.top;
                        asked.insert(*id, TokenLogprobs { logprob, top });
                    }
                }
                Some(Err(error)) => {
                    unusable.push((*id, error.to_string()));
                    sampled.push(0);
                }
                None => sampled.push(0),
            }
        }
        for (id, message) in unusable {
            self.scheduler.cancel(id);
            self.samplers.remove(&id);
            self.told.push(FromEngine::Failed { id, message });
        }
        for recorded in self.scheduler.record(&sampled) {
            let id = recorded.id;
            if let Some(token) = recorded.token {
                if let Some(sampler) = self.samplers.get_mut(&id) {
                    sampler.accept(token);
                }
                self.told.push(FromEngine::Token {
                    id,
                    token,
                    logprobs: asked.remove(&id),
                });
            }
            if let Some(reason) = recorded.finish {
                self.samplers.remove(&id);
                self.told.push(FromEngine::Finished {
                    id,
                    reason,
                    cached_tokens: 0,
                });
            }
        }
    }

    fn report(&mut self) -> Result<(), EngineError> {
        let count = |requests: usize| u32::try_from(requests).unwrap_or(u32::MAX);
        self.told.push(FromEngine::Stats(EngineStats {
            running: count(self.scheduler.running()),
            waiting: count(self.scheduler.waiting()),
            slots: self.scheduler.slots(),
            cached_tokens: self.scheduler.cached_tokens(),
            step: self.stepper.step,
        }));
        (self.tell)(&self.told).map_err(EngineError::Front)?;
        self.told.clear();
        Ok(())
    }
}
