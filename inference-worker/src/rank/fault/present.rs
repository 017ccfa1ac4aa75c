//! Builds with faults.

use std::path::PathBuf;

use llama_model::device::TensorCollective;
use llama_model::{Collective, CollectiveError, Layout};
use rustix::process::{Signal, getpid, kill_process};

use crate::comm::{Link, Words};

/// `rank:operation:kind:after:path`: what goes wrong with the rank at that operation of a
/// step, counted from 0, once the file at `path` is there and `after` steps with tokens have
/// gone by since. By `KILL` or `STOP` it gets that signal before it, and by `HANG` it does nothing
/// more but show signs of life; from then on `FLIP` changes a bit of what it adds to a sum, and
/// `GARBLE` one of what it gets.
const FAULT_ENV: &str = "LLAMA_TEST_FAULT";

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Signal(Signal),
    Hang,
    Flip,
    Garble,
}

/// A link that is faulty at one operation.
struct FaultyLink {
    inner: Box<dyn Link>,
    operation: u32,
    kind: Kind,
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
    let [rank, operation, kind, after, path] = parts[..] else {
        return link;
    };
    let kind = match kind {
        "KILL" => Kind::Signal(Signal::KILL),
        "FLIP" => Kind::Flip,
        "GARBLE" => Kind::Garble,
        "HANG" => Kind::Hang,
        _ => Kind::Signal(Signal::STOP),
    };
    match (operation.parse(), after.parse()) {
        (Ok(operation), Ok(after)) if rank == link.rank().to_string() => Box::new(FaultyLink {
            inner: link,
            operation,
            kind,
            after,
            path: path.into(),
            steps: 0,
            next: 0,
        }),
        _ => link,
    }
}

impl FaultyLink {
    /// Whether the next operation is the one. Meets the fault there if that is a signal.
    fn pass(&mut self) -> bool {
        // A step's first operation tells whether it has tokens.
        let reached = if self.next == 0 {
            self.after
        } else {
            self.after + 1
        };
        let is_here = self.next == self.operation && self.path.exists();
        self.next += 1;
        let is_reached = is_here && self.steps == reached;
        match self.kind {
            Kind::Flip | Kind::Garble => return is_here && self.steps >= reached,
            Kind::Signal(signal) if is_reached => {
                // Nothing follows a rank's end, and a rank that goes on goes on here.
                let _ = kill_process(getpid(), signal);
            }
            Kind::Hang if is_reached => loop {
                std::thread::park();
            },
            Kind::Signal(_) | Kind::Hang => {}
        }
        false
    }
}

/// Changes a bit that matters of the first value.
fn flip(data: &mut [f32]) {
    if let Some(value) = data.first_mut() {
        *value = f32::from_bits(value.to_bits() ^ (1 << 22));
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
        let is_here = self.pass();
        if is_here && self.kind == Kind::Flip {
            flip(data);
        }
        self.inner.all_reduce_sum(data)?;
        if is_here && self.kind == Kind::Garble {
            flip(data);
        }
        Ok(())
    }

    fn all_gather(
        &mut self,
        part: &[f32],
        lens: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let is_here = self.pass();
        self.inner.all_gather(part, lens, out)?;
        if is_here && self.kind == Kind::Garble {
            flip(out);
        }
        Ok(())
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
