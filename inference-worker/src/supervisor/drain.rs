//! How long answers under way get once the pod is asked to end.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The time: what the pod was started with, or less where its grace will be shorter.
#[derive(Debug)]
pub(super) struct DrainTime(Mutex<Duration>);

impl DrainTime {
    /// What the pod was started with.
    pub(super) fn new(seconds: u32) -> Self {
        Self(Mutex::new(Duration::from_secs(seconds.into())))
    }

    /// It is no more than `most`.
    pub(super) fn limit(&self, most: Duration) {
        let mut time = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *time = most.min(*time);
    }

    pub(super) fn get(&self) -> Duration {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
