//! The front's end of the connection to rank 0.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use llama_contract::FailureReport;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use super::frames::{self, EngineStats, FromEngine, Submit, ToEngine, TokenLogprobs};
use crate::adapters::{AdapterOrder, AdapterOutcome};
use crate::scheduler::{Finish, Refusal};

/// Frames to rank 0 that may wait to be written.
const OUTBOX: usize = 1024;

/// What comes of a submitted sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationEvent {
    /// One more token.
    Token {
        /// The token.
        token: u32,
        /// Tokens of the prompt that were in the cache already.
        cached_tokens: u32,
        /// Its probability, where the sequence asked for it.
        logprobs: Option<TokenLogprobs>,
    },
    /// Probabilities of further tokens of the prompt; all come before the first token.
    Prompt(Vec<TokenLogprobs>),
    /// The answer is complete; nothing follows.
    Finished {
        /// Why it ended.
        reason: Finish,
        /// Tokens of the prompt that were in the cache already.
        cached_tokens: u32,
    },
    /// Rank 0 did not take the sequence; nothing follows.
    Refused(Refusal),
    /// This sequence failed; nothing follows.
    Failed(String),
    /// The group is over; nothing follows.
    GroupFailed(Arc<FailureReport>),
}

/// A sequence that could not be handed to rank 0.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The group is over.
    #[error("{}", .0.message)]
    GroupFailed(Arc<FailureReport>),
    /// Rank 0 does not read as fast as requests come.
    #[error("the engine is not taking requests")]
    Busy,
    /// The worker is about to end.
    #[error("this worker is shutting down")]
    Closed,
}

#[derive(Debug)]
struct Shared {
    open: HashMap<u64, mpsc::Sender<GenerationEvent>>,
    /// Who waits for news of the adapter at a place.
    adapters: HashMap<u32, oneshot::Sender<AdapterOutcome>>,
    failure: Option<Arc<FailureReport>>,
    /// Sequences that rank 0 could not compute.
    failed: u64,
    closed: bool,
}

impl Shared {
    /// Whether rank 0 takes anything.
    fn check(&self) -> Result<(), SubmitError> {
        if let Some(failure) = &self.failure {
            return Err(SubmitError::GroupFailed(Arc::clone(failure)));
        }
        if self.closed {
            return Err(SubmitError::Closed);
        }
        Ok(())
    }
}

/// Hands sequences to rank 0 and its tokens back; cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineClient {
    shared: Arc<Mutex<Shared>>,
    outbox: mpsc::Sender<ToEngine>,
    next_id: Arc<AtomicU64>,
    stats: watch::Receiver<EngineStats>,
}

impl EngineClient {
    /// A client over `stream`, and the task that carries its frames. The task
    /// ends when rank 0 closes its side or either side fails; the group's
    /// failure is then told by [`EngineClient::fail`].
    pub fn start(stream: UnixStream) -> (Self, impl Future<Output = io::Result<()>> + Send) {
        let (outbox, inbox) = mpsc::channel(OUTBOX);
        let (stats_sender, stats) = watch::channel(EngineStats::default());
        let client = Self {
            shared: Arc::new(Mutex::new(Shared {
                open: HashMap::new(),
                adapters: HashMap::new(),
                failure: None,
                failed: 0,
                closed: false,
            })),
            outbox,
            next_id: Arc::new(AtomicU64::new(0)),
            stats,
        };
        let shared = Arc::clone(&client.shared);
        let (reader, writer) = stream.into_split();
        let carry = async move {
            tokio::select! {
                ended = read_frames(reader, shared, stats_sender) => ended,
                ended = write_frames(writer, inbox) => ended,
            }
        };
        (client, carry)
    }

    /// Submits a sequence under an id that is chosen here. Dropping the
    /// [`Generation`] cancels it.
    ///
    /// # Errors
    /// When the group is over or rank 0 does not keep up.
    pub fn submit(&self, submit: Submit) -> Result<Generation, SubmitError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        // Room for every token and the end, so that a slow reader blocks nobody.
        let prompt = submit.prompt_logprobs.map_or(0, |_| submit.tokens.len());
        let (sender, events) = mpsc::channel(submit.max_new_tokens as usize + prompt + 1);
        {
            let mut shared = lock(&self.shared);
            shared.check()?;
            shared.open.insert(id, sender);
        }
        let generation = Generation {
            id,
            events,
            client: self.clone(),
        };
        self.outbox
            .try_send(ToEngine::Submit(Box::new(Submit { id, ..submit })))
            .map_err(|_full| SubmitError::Busy)?;
        Ok(generation)
    }

    /// Has the ranks load or forget an adapter. What became of it comes through the
    /// receiver, which ends without a word when the group is over.
    ///
    /// # Errors
    /// As [`EngineClient::submit`].
    pub fn adapt(
        &self,
        order: AdapterOrder,
    ) -> Result<oneshot::Receiver<AdapterOutcome>, SubmitError> {
        let (sender, outcome) = oneshot::channel();
        {
            let mut shared = lock(&self.shared);
            shared.check()?;
            shared.adapters.insert(order.place(), sender);
        }
        self.outbox
            .try_send(ToEngine::Adapter(order))
            .map_err(|_full| SubmitError::Busy)?;
        Ok(outcome)
    }

    /// Ends every open sequence with `failure`, and all that come later.
    pub fn fail(&self, failure: FailureReport) {
        let failure = Arc::new(failure);
        let mut shared = lock(&self.shared);
        for (_, events) in shared.open.drain() {
            // A reader that has gone needs no news.
            let _ = events.try_send(GenerationEvent::GroupFailed(Arc::clone(&failure)));
        }
        shared.adapters.clear();
        shared.failure = Some(failure);
    }

    /// Ends every open sequence without an answer, and refuses all that come later.
    pub fn close(&self) {
        let mut shared = lock(&self.shared);
        shared.closed = true;
        shared.adapters.clear();
        for (id, _) in shared.open.drain() {
            // A full outbox means that rank 0 is stuck; then it will be killed.
            let _ = self.outbox.try_send(ToEngine::Cancel { id });
        }
    }

    /// Asks the ranks to end once no sequence is left.
    ///
    /// # Errors
    /// When rank 0 does not read.
    pub fn stop(&self) -> Result<(), SubmitError> {
        self.outbox
            .try_send(ToEngine::Stop)
            .map_err(|_full| SubmitError::Busy)
    }

    /// Sequences that are not complete.
    pub fn open(&self) -> usize {
        lock(&self.shared).open.len()
    }

    /// Sequences that were submitted so far.
    pub fn submitted(&self) -> u64 {
        self.next_id.load(Ordering::Relaxed)
    }

    /// Those of them that rank 0 could not compute.
    pub fn failed(&self) -> u64 {
        lock(&self.shared).failed
    }

    /// How busy rank 0 last said it was.
    pub fn stats(&self) -> EngineStats {
        *self.stats.borrow()
    }
}

/// A sequence being computed. Dropping it before its end cancels it.
#[derive(Debug)]
pub struct Generation {
    id: u64,
    events: mpsc::Receiver<GenerationEvent>,
    client: EngineClient,
}

impl Generation {
    /// The next event; `None` after the last, and when the client was closed.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        self.events.recv().await
    }

    /// As [`Generation::next`], for those who wait for several.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<GenerationEvent>> {
        self.events.poll_recv(context)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if lock(&self.client.shared).open.remove(&self.id).is_some() {
            // A full outbox means that rank 0 is stuck, and then it is about to be ended.
            let _ = self
                .client
                .outbox
                .try_send(ToEngine::Cancel { id: self.id });
        }
    }
}

async fn read_frames(
    mut reader: OwnedReadHalf,
    shared: Arc<Mutex<Shared>>,
    stats: watch::Sender<EngineStats>,
) -> io::Result<()> {
    loop {
        let mut header = [0; 4];
        match reader.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        };
        let mut body = vec![0; frames::body_len(header)?];
        reader.read_exact(&mut body).await?;
        match serde_json::from_slice(&body)? {
            FromEngine::Stats(now) => {
                stats.send_replace(now);
            }
            FromEngine::Adapter { place, outcome } => {
                let waiting = lock(&shared).adapters.remove(&place);
                if let Some(waiting) = waiting {
                    // Who waited may have gone.
                    let _ = waiting.send(outcome);
                }
            }
            FromEngine::Token {
                id,
                token,
                cached_tokens,
                logprobs,
            } => {
                let event = GenerationEvent::Token {
                    token,
                    cached_tokens,
                    logprobs,
                };
                tell(&shared, id, event);
            }
            FromEngine::Prompt { id, logprobs } => {
                tell(&shared, id, GenerationEvent::Prompt(logprobs));
            }
            FromEngine::Finished {
                id,
                reason,
                cached_tokens,
            } => {
                let event = GenerationEvent::Finished {
                    reason,
                    cached_tokens,
                };
                tell(&shared, id, event);
            }
            FromEngine::Refused { id, refusal } => {
                tell(&shared, id, GenerationEvent::Refused(refusal));
            }
            FromEngine::Failed { id, message } => {
                tell(&shared, id, GenerationEvent::Failed(message));
            }
        }
    }
}

fn tell(shared: &Mutex<Shared>, id: u64, event: GenerationEvent) {
    let mut shared = lock(shared);
    if matches!(event, GenerationEvent::Failed(_)) {
        shared.failed += 1;
    }
    let sender = match event {
        GenerationEvent::Token { .. } | GenerationEvent::Prompt(_) => shared.open.get(&id).cloned(),
        _ => shared.open.remove(&id),
    };
    if let Some(sender) = sender {
        // The channel has room for every token, so only a reader that has gone is missed.
        let _ = sender.try_send(event);
    }
}

async fn write_frames(
    mut writer: OwnedWriteHalf,
    mut inbox: mpsc::Receiver<ToEngine>,
) -> io::Result<()> {
    while let Some(message) = inbox.recv().await {
        writer.write_all(&frames::encode(&message)?).await?;
    }
    Ok(())
}

/// The state behind the lock; it stays consistent even if a holder panicked.
fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use llama_contract::FailureCategory;
    use llama_model::sample::SamplingParams;

    use super::*;

    fn sequence(first: u32) -> Submit {
        Submit {
            id: 0,
            tokens: vec![first],
            sampling: SamplingParams::GREEDY,
            max_new_tokens: 4,
            stop_ids: Vec::new(),
            priority: 0,
            prompt_logprobs: None,
            cache_salt: None,
            adapter: None,
            form: None,
            is_compared: false,
        }
    }

    async fn expect(stream: &mut UnixStream) -> ToEngine {
        let mut header = [0; 4];
        stream.read_exact(&mut header).await.expect("header");
        let mut body = vec![0; frames::body_len(header).expect("fits")];
        stream.read_exact(&mut body).await.expect("body");
        serde_json::from_slice(&body).expect("a message")
    }

    async fn say(stream: &mut UnixStream, message: FromEngine) {
        let frame = frames::encode(&message).expect("encodes");
        stream.write_all(&frame).await.expect("writes");
    }

    #[tokio::test]
    async fn tokens_reach_their_own_sequence_and_dropping_cancels() {
        let (front, mut rank) = UnixStream::pair().expect("pair");
        let (client, carry) = EngineClient::start(front);
        let carry = tokio::spawn(carry);
        let submit = |first: u32| client.submit(sequence(first)).expect("submits");
        let (mut first, second) = (submit(10), submit(20));
        let ToEngine::Submit(one) = expect(&mut rank).await else {
            panic!("a submit comes first")
        };
        assert_eq!(one.tokens, [10]);
        expect(&mut rank).await;

        let token = 7;
        let logprobs = Some(TokenLogprobs {
            logprob: -0.5,
            top: vec![(7, -0.5), (1, -2.0)],
        });
        let told = FromEngine::Token {
            id: one.id,
            token,
            cached_tokens: 1,
            logprobs: logprobs.clone(),
        };
        say(&mut rank, told).await;
        assert_eq!(
            first.next().await,
            Some(GenerationEvent::Token {
                token,
                cached_tokens: 1,
                logprobs
            })
        );
        drop(second);
        assert_eq!(expect(&mut rank).await, ToEngine::Cancel { id: one.id + 1 });
        assert_eq!(client.open(), 1);

        let (reason, cached_tokens) = (Finish::Length, 1);
        let told = FromEngine::Finished {
            id: one.id,
            reason,
            cached_tokens,
        };
        say(&mut rank, told).await;
        let finished = GenerationEvent::Finished {
            reason,
            cached_tokens,
        };
        assert_eq!(first.next().await, Some(finished));
        assert_eq!(first.next().await, None);
        drop(rank);
        carry.await.expect("joins").expect("ends with its stream");
    }

    #[tokio::test]
    async fn closing_ends_open_and_later_sequences() {
        let (front, mut rank) = UnixStream::pair().expect("pair");
        let (client, carry) = EngineClient::start(front);
        tokio::spawn(carry);
        let submit = || client.submit(sequence(1));
        let mut open = submit().expect("submits");
        expect(&mut rank).await;
        client.close();
        assert!(matches!(expect(&mut rank).await, ToEngine::Cancel { .. }));
        assert_eq!(open.next().await, None);
        assert_eq!(submit().err(), Some(SubmitError::Closed));
        assert_eq!(client.open(), 0);
    }

    #[tokio::test]
    async fn a_failure_reaches_open_and_later_sequences() {
        let (front, _rank) = UnixStream::pair().expect("pair");
        let (client, carry) = EngineClient::start(front);
        tokio::spawn(carry);
        let submit = || client.submit(sequence(1));
        let mut open = submit().expect("submits");
        let report = FailureReport {
            category: FailureCategory::RankDied,
            message: "rank 1 died".to_owned(),
            rank: Some(1),
            node: None,
            step: None,
            epoch: 0,
        };
        client.fail(report.clone());
        assert_eq!(
            open.next().await,
            Some(GenerationEvent::GroupFailed(Arc::new(report)))
        );
        assert_eq!(open.next().await, None);
        assert!(matches!(submit(), Err(SubmitError::GroupFailed(_))));
    }
}
