//! Builds with faults.

use std::path::PathBuf;

use llama_model::device::TensorCollective;
use llama_model::{Collective, CollectiveError, Layout};
use rustix::process::{Signal, getpid, kill_process};

use crate::comm::{Link, Words};

/// `rank:operation:signal:after:path`: the rank gets the signal `KILL` or `STOP` before
/// that operation of a step, counted from 0, once the file at `path` is there and `after`
/// steps with tokens have gone by since.
const FAULT_ENV: &str = "LLAMA_TEST_FAULT";

/// A link that ends or stops its rank at one operation.
struct FaultyLink {
    inner: Box<dyn Link>,
    operation: u32,
    signal: Signal,
    after: u32,
    path: PathBuf,
    /// Steps with tokens since the file was there.
    steps: u32,
    /// The next operation of this step.
    next: u32,
}

/// `link`, with the fault that the environment asks of this rank.
pub(in crate::rank) fn wrap(link: Box<dyn Link>) -> Box<dyn Link> {
    let Ok(wanted) = std::env::var(FAULT_ENV) else {
        return link;
    };
    let parts: Vec<&str> = wanted.splitn(5, ':').collect();
    let [rank, operation, signal, after, path] = parts[..] else {
        return link;
    };
    let signal = match signal {
        "KILL" => Signal::KILL,
        _ => Signal::STOP,
    };
    match (operation.parse(), after.parse()) {
        (Ok(operation), Ok(after)) if rank == link.rank().to_string() => Box::new(FaultyLink {
            inner: link,
            operation,
            signal,
            after,
            path: path.into(),
            steps: 0,
            next: 0,
        }),
        _ => link,
    }
}

impl FaultyLink {
    /// Meets the fault if the next operation is the one.
    fn pass(&mut self) {
        // A step's first operation tells whether it has tokens.
        let reached = if self.next == 0 {
            self.after
        } else {
            self.after + 1
        };
        if self.next == self.operation && self.steps == reached && self.path.exists() {
            // Nothing follows a rank's end, and a rank that goes on goes on here.
            let _ = kill_process(getpid(), self.signal);
        }
        self.next += 1;
    }
}

impl Collective for FaultyLink {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn layout(&self) -> Layout {
        self.inner.layout()
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.pass();
        self.inner.all_reduce_sum(data)
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.pass();
        self.inner.all_gather(part, lens, out)
    }

    fn send_next(&mut self, data: &[f32]) -> Result<(), CollectiveError> {
        self.pass();
        self.inner.send_next(data)
    }

    fn receive_previous(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.pass();
        self.inner.receive_previous(data)
    }

    fn on_device(&mut self) -> Option<&mut dyn TensorCollective> {
        self.inner.on_device()
    }
}

impl Link for FaultyLink {
    fn broadcast(&mut self, payload: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.next = 0;
        self.pass();
        self.inner.broadcast(payload)?;
        let has_tokens = payload.windows(7).any(|part| part == b"\"tokens");
        if has_tokens && self.path.exists() {
            self.steps += 1;
        }
        Ok(())
    }

    fn gather_words(&mut self, mine: Words) -> Result<Vec<Words>, CollectiveError> {
        self.pass();
        self.inner.gather_words(mine)
    }

    fn set_deadline(&mut self, deadline: std::time::Duration) {
        self.inner.set_deadline(deadline);
    }

    fn expect_close(&mut self) {
        self.inner.expect_close();
    }
}
