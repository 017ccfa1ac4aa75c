//! The golden answer again, while the group serves: memory, a link or a processor may have
//! gone wrong since.

use std::time::{Duration, Instant};

use llama_contract::{FailureCategory, SelfTestReport};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio_util::task::AbortOnDropHandle;

use super::idle::{IdleWatch, Sight};
use super::self_test::{self, Question};
use crate::comm::SILENCE_LIMIT;
use crate::engine::EngineClient;
use crate::failure::Failure;

/// Whether the ranks have answered as the first time.
type Answer = Result<bool, Failure>;

/// Asks the golden question again when there is time.
#[derive(Debug)]
pub(super) struct Retest {
    question: Question,
    watch: IdleWatch,
    /// The answer that is waited for. Dropping the task takes the question back.
    asked: Option<(AbortOnDropHandle<()>, oneshot::Receiver<Answer>)>,
}

impl Retest {
    /// Of a group that serves from now on. It asks after each `interval` of rest, or never.
    pub(super) fn new(question: Question, interval: Option<Duration>, submitted: u64) -> Self {
        let now = Instant::now();
        let mut watch = IdleWatch::new(interval, SILENCE_LIMIT / 2, now);
        watch.note_asked(submitted, now);
        Self {
            question,
            watch,
            asked: None,
        }
    }

    /// Looks whether it is time, or what came of it: whether the ranks have answered as the
    /// `first` time, or `SelfTestMismatch`.
    pub(super) fn look(
        &mut self,
        engine: &EngineClient,
        first: &SelfTestReport,
        silence: Duration,
    ) -> Option<Answer> {
        if let Some((_, answer)) = &mut self.asked {
            let answer = match answer.try_recv() {
                Ok(answer) => answer,
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Closed) => Err(Failure::new(
                    FailureCategory::Internal,
                    "the self-test ended without a word",
                )),
            };
            self.asked = None;
            return Some(answer);
        }
        let sight = Sight {
            open: engine.open(),
            submitted: engine.submitted(),
            failed: engine.failed(),
            silence,
        };
        let now = Instant::now();
        if self.watch.is_due(sight, now) {
            self.watch.note_asked(sight.submitted + 1, now);
            self.ask(engine.clone(), first.answer.clone());
        }
        None
    }

    fn ask(&mut self, engine: EngineClient, first: String) {
        let (sender, answer) = oneshot::channel();
        let question = self.question.clone();
        let task = tokio::spawn(async move {
            let answer = self_test::again(&engine, question, &first).await;
            // The pod may have ended.
            let _ = sender.send(answer);
        });
        self.asked = Some((AbortOnDropHandle::new(task), answer));
    }
}
