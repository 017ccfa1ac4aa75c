//! Preparing required forms while steps go on: a thread of its own makes the model's
//! vocabulary when it is first needed, and compiles the grammars of requests in order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use crate::engine::Submit;
use crate::structured::{Constraint, GrammarError, Vocabulary};

/// An answer that cannot begin.
#[derive(Debug, thiserror::Error)]
pub(super) enum FormError {
    #[error("the required form: {0}")]
    Grammar(#[from] GrammarError),
    #[error("the tokens for required forms: {0}")]
    Vocabulary(String),
    #[error("the thread that prepares required forms ended")]
    Thread,
}

/// Makes the model's tokens for required forms.
type Make = Box<dyn FnMut() -> Result<Vocabulary, String> + Send>;

/// A request, and its form where that could be prepared.
type Prepared = (Box<Submit>, Result<Constraint, FormError>);

/// A request that can begin, held to its form.
pub(super) type Ready = Result<(Submit, Constraint), FormError>;

struct Desk {
    requests: Sender<Box<Submit>>,
    prepared: Receiver<Prepared>,
}

/// Requests whose forms are being prepared. There are as many as the front lets in.
pub struct Forms {
    /// Until the first is asked for.
    make: Option<Make>,
    desk: Option<Desk>,
    /// Those that were not cancelled.
    waiting: BTreeSet<u64>,
}

impl std::fmt::Debug for Forms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forms")
            .field("waiting", &self.waiting)
            .finish_non_exhaustive()
    }
}

impl Forms {
    /// Forms over the vocabulary that `make` makes.
    pub fn new(make: impl FnMut() -> Result<Vocabulary, String> + Send + 'static) -> Self {
        Self {
            make: Some(Box::new(make)),
            desk: None,
            waiting: BTreeSet::new(),
        }
    }

    /// Begins to prepare the form of a request, which [`Forms::ready`] gives back.
    pub(super) fn prepare(&mut self, submit: Box<Submit>) -> Result<(), FormError> {
        if let Some(make) = self.make.take() {
            self.desk = start(make);
        }
        let (desk, id) = (self.desk.as_ref().ok_or(FormError::Thread)?, submit.id);
        desk.requests
            .send(submit)
            .map_err(|_ended| FormError::Thread)?;
        self.waiting.insert(id);
        Ok(())
    }

    /// Forgets a request, if it is here.
    pub(super) fn cancel(&mut self, id: u64) {
        self.waiting.remove(&id);
    }

    /// Whether nothing is being prepared.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The next request whose form is ready, or what became of it.
    pub(super) fn ready(&mut self) -> Option<(u64, Ready)> {
        loop {
            match self.desk.as_ref()?.prepared.try_recv() {
                Ok((submit, form)) => {
                    if self.waiting.remove(&submit.id) {
                        return Some((submit.id, form.map(|form| (*submit, form))));
                    }
                }
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => {
                    let id = self.waiting.pop_first()?;
                    return Some((id, Err(FormError::Thread)));
                }
            }
        }
    }
}

/// Starts the thread, which ends with its desk.
fn start(mut make: Make) -> Option<Desk> {
    let (requests, incoming) = channel::<Box<Submit>>();
    let (outgoing, prepared) = channel();
    let mut known: Option<Arc<Vocabulary>> = None;
    let mut prepare = move |submit: &Submit| {
        let Some(grammar) = &submit.form else {
            return Err(FormError::Vocabulary("no form is required".to_owned()));
        };
        let vocabulary = match &known {
            Some(vocabulary) => Arc::clone(vocabulary),
            None => Arc::clone(known.insert(Arc::new(make().map_err(FormError::Vocabulary)?))),
        };
        Ok(Constraint::new(&vocabulary, grammar)?)
    };
    let thread = std::thread::Builder::new()
        .name("forms".to_owned())
        .spawn(move || {
            while let Ok(submit) = incoming.recv() {
                let form = prepare(&submit);
                if outgoing.send((submit, form)).is_err() {
                    return;
                }
            }
        });
    match thread {
        Ok(_thread) => Some(Desk { requests, prepared }),
        Err(error) => {
            tracing::error!(%error, "start the thread that prepares required forms");
            None
        }
    }
}
