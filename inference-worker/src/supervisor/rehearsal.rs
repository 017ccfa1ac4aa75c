//! The pod's part in the golden answer: first before requests are taken, then again.

use std::sync::atomic::Ordering;
use std::time::Duration;

use llama_contract::FailureCategory;
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::retest::Retest;
use super::state::PodState;
use super::{Pod, self_test};
use crate::failure::Failure;

impl Pod<'_> {
    /// Has the ranks answer the golden question and load the adapters that the pod was
    /// started with; returns what came of it, once it is over.
    pub(super) fn rehearsed(&mut self, state: &PodState) -> Option<Result<(), Failure>> {
        let Some((engine, rack)) = state.engine.as_ref().zip(state.rack.as_ref()) else {
            // The first pod's to do.
            return Some(Ok(()));
        };
        if let (Some(question), None) = (self.question.clone(), &self.rehearsal) {
            let (sender, rehearsal) = oneshot::channel();
            let (engine, rack) = (engine.clone(), rack.clone());
            let modules = self.args.launch.lora_modules.clone();
            let expected = self.args.launch.self_test_answer.clone();
            tokio::spawn(async move {
                let report = self_test::run(&engine, question, expected.as_deref()).await;
                let rehearsed = match report {
                    Ok(report) => {
                        rack.load_modules(modules)
                            .await
                            .map(|()| report)
                            .map_err(|message| {
                                Failure::new(FailureCategory::InvalidConfiguration, message)
                            })
                    }
                    Err(failure) => Err(failure),
                };
                // The pod may have ended.
                let _ = sender.send(rehearsed);
            });
            self.rehearsal = Some(rehearsal);
        }
        match self.rehearsal.as_mut()?.try_recv() {
            Ok(Ok(report)) => {
                tracing::info!(
                    answer = report.answer,
                    millis = report.millis,
                    "the golden answer"
                );
                let interval = self.args.launch.self_test_interval;
                let interval = (interval > 0).then(|| Duration::from_secs(interval.into()));
                let question = self.question.take();
                let retest = |question| Retest::new(question, interval, engine.submitted());
                self.retest = question.map(retest);
                // The first answer is given once.
                let _ = state.self_test.set(report);
                Some(Ok(()))
            }
            Ok(Err(failure)) => Some(Err(failure)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Closed) => Some(Err(Failure::new(
                FailureCategory::Internal,
                "the self-test ended without a word",
            ))),
        }
    }

    /// Has the ranks answer again when there is time; `silence` is the longest for which one of
    /// them shows no sign of life. Returns what is wrong with an answer.
    pub(super) fn retested(&mut self, state: &PodState, silence: Duration) -> Option<Failure> {
        let (retest, engine) = self.retest.as_mut().zip(state.engine.as_ref())?;
        match retest.look(engine, state.self_test.get()?, silence)? {
            Ok(has_answered) => {
                let repeats = u32::from(has_answered);
                state.repeats.fetch_add(repeats, Ordering::Relaxed);
                None
            }
            Err(failure) => Some(failure),
        }
    }
}
