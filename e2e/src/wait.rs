//! Waiting for something with a deadline.

use std::fmt::Display;
use std::time::Duration;

use tokio::time::Instant;

const BETWEEN_LOOKS: Duration = Duration::from_millis(250);

/// What one look at the awaited thing found.
#[derive(Debug)]
pub enum Look<T> {
    /// It is there.
    Done(T),
    /// Not yet; the text says how far it is.
    NotYet(String),
    /// It will not come any more; the text says why.
    Never(String),
}

impl<T> Look<T> {
    /// `Done` for success; an error only means that the thing is not there yet.
    pub fn retrying<E: Display>(result: Result<T, E>) -> Self {
        result.map_or_else(|error| Self::NotYet(error.to_string()), Self::Done)
    }
}

/// The awaited thing did not come.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The deadline passed.
    #[error("{what} did not come within {} s; last seen: {last}", deadline.as_secs())]
    Deadline {
        /// What was awaited.
        what: String,
        /// How long.
        deadline: Duration,
        /// What the last look found.
        last: String,
    },
    /// A look found that it cannot come any more.
    #[error("{what} cannot come any more: {reason}")]
    Never {
        /// What was awaited.
        what: String,
        /// Why.
        reason: String,
    },
}

/// Looks again and again until `look` says that it is done, or that it never
/// will be, or `deadline` has passed.
pub async fn until<T>(
    what: &str,
    deadline: Duration,
    mut look: impl AsyncFnMut() -> Look<T>,
) -> Result<T, WaitError> {
    let end = Instant::now() + deadline;
    let mut last = "nothing yet".to_owned();
    loop {
        match tokio::time::timeout_at(end, look()).await {
            Ok(Look::Done(value)) => return Ok(value),
            Ok(Look::NotYet(seen)) => last = seen,
            Ok(Look::Never(reason)) => {
                let what = what.to_owned();
                return Err(WaitError::Never { what, reason });
            }
            Err(_) => {}
        }
        if Instant::now() + BETWEEN_LOOKS >= end {
            return Err(WaitError::Deadline {
                what: what.to_owned(),
                deadline,
                last,
            });
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn looks_until_done() {
        let mut looks = 0;
        let seen = until("three looks", Duration::from_secs(5), async || {
            looks += 1;
            if looks == 3 {
                Look::Done(looks)
            } else {
                Look::NotYet(looks.to_string())
            }
        })
        .await;
        assert_eq!(seen.unwrap(), 3);
    }

    #[tokio::test]
    async fn deadline_names_the_last_state() {
        let error = until("a pod", Duration::from_millis(300), async || {
            Look::<()>::NotYet("phase Pending".to_owned())
        })
        .await
        .unwrap_err();
        assert!(error.to_string().contains("phase Pending"), "{error}");
    }

    #[tokio::test]
    async fn a_look_that_hangs_ends_at_the_deadline() {
        let error = until("silence", Duration::from_millis(100), async || {
            std::future::pending::<Look<()>>().await
        })
        .await
        .unwrap_err();
        assert!(matches!(error, WaitError::Deadline { .. }));
    }

    #[tokio::test]
    async fn never_ends_the_wait_at_once() {
        let error = until("a pod", Duration::from_mins(1), async || {
            Look::<()>::Never("it was deleted".to_owned())
        })
        .await
        .unwrap_err();
        assert!(matches!(error, WaitError::Never { .. }));
    }
}
