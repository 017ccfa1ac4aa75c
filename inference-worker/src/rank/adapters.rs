//! Loading adapters while steps go on.
//!
//! Every rank reads its part on a thread of its own. While one is being read, rank 0 has
//! the ranks tell each other, behind a step, how far they are; when all of them have it,
//! all of them put it in place, and when one could not read it, none does.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use llama_model::lora::{AdapterLoader, LoadedAdapter};
use llama_model::{ModelError, StepError, StepModel};

use crate::adapters::{AdapterOrder, AdapterOutcome};
use crate::comm::Link;
use crate::failure::chain;

/// How far a rank is with an adapter, as ranks tell each other.
const READING: u64 = 0;
const READ: u64 = 1;
const FAILED: u64 = 2;

/// An adapter that is being read.
struct Pending {
    place: u32,
    reader: Receiver<Result<LoadedAdapter, ModelError>>,
    read: Option<Result<LoadedAdapter, String>>,
}

/// A rank's adapters that are on their way.
#[derive(Default)]
pub struct AdapterDesk {
    pending: Option<Pending>,
}

impl std::fmt::Debug for AdapterDesk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = self.pending.as_ref().map(|pending| pending.place);
        f.debug_tuple("AdapterDesk").field(&place).finish()
    }
}

impl AdapterDesk {
    /// Begins what rank 0 ordered. One adapter is read at a time.
    ///
    /// # Errors
    /// When another adapter is still being read, or no thread can be started.
    pub fn obey(
        &mut self,
        order: &AdapterOrder,
        model: &mut dyn StepModel,
    ) -> Result<(), StepError> {
        match order {
            AdapterOrder::Drop { place } => model.drop_adapter(*place),
            AdapterOrder::Load { place, folder } => {
                if let Some(pending) = &self.pending {
                    return Err(StepError::Invalid(format!(
                        "an adapter for place {place} while that for {} is being read",
                        pending.place
                    )));
                }
                let reader = read(model.adapter_loader(), folder.clone());
                self.pending = Some(Pending {
                    place: *place,
                    reader: reader.map_err(|error| {
                        StepError::Invalid(format!("start a thread that reads: {error}"))
                    })?,
                    read: None,
                });
            }
        }
        Ok(())
    }

    /// Tells the other ranks how far this one is. Once all are done, returns the place
    /// and what became of the adapter.
    ///
    /// # Errors
    /// When a peer failed.
    pub fn settle(
        &mut self,
        link: &mut dyn Link,
        model: &mut dyn StepModel,
    ) -> Result<Option<(u32, AdapterOutcome)>, StepError> {
        let words = link.gather_words(self.word(link.rank()))?;
        if words.iter().any(|[state, ..]| *state == READING) {
            return Ok(None);
        }
        let Some(Pending { place, read, .. }) = self.pending.take() else {
            return Ok(None);
        };
        let outcome = match (refusal(&words), read) {
            (None, Some(Ok(adapter))) => {
                let rank = adapter.rank;
                model.put_adapter(place, adapter)?;
                AdapterOutcome::Loaded { rank }
            }
            (_, Some(Err(message))) => AdapterOutcome::Refused { message },
            (refusal, _) => AdapterOutcome::Refused {
                message: refusal.unwrap_or_default(),
            },
        };
        Ok(Some((place, outcome)))
    }

    fn word(&mut self, rank: usize) -> [u64; 3] {
        let Some(pending) = &mut self.pending else {
            return [FAILED, 0, 0];
        };
        if pending.read.is_none() {
            pending.read = match pending.reader.try_recv() {
                Ok(read) => Some(read.map_err(|error| {
                    let message = chain(&error);
                    tracing::warn!(rank, message, "an adapter cannot be loaded");
                    message
                })),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => {
                    Some(Err("the thread that read it ended".to_owned()))
                }
            };
        }
        match &pending.read {
            None => [READING, 0, 0],
            Some(Ok(adapter)) => [READ, adapter.fingerprint, 0],
            Some(Err(_)) => [FAILED, 0, 0],
        }
    }
}

/// Why not all ranks can have an adapter, by what they told each other.
fn refusal(words: &[[u64; 3]]) -> Option<String> {
    let failed = words.iter().position(|[state, ..]| *state != READ);
    if let Some(rank) = failed {
        return Some(format!("rank {rank} cannot load it; its log tells why"));
    }
    let differs = |word: &[u64; 3]| Some(word) != words.first();
    words
        .iter()
        .position(differs)
        .map(|rank| format!("rank {rank} finds another adapter in that folder than rank 0"))
}

/// Reads an adapter on a thread of its own.
fn read(
    loader: AdapterLoader,
    folder: PathBuf,
) -> std::io::Result<Receiver<Result<LoadedAdapter, ModelError>>> {
    let (sender, reader) = sync_channel(1);
    std::thread::Builder::new()
        .name("adapter".to_owned())
        .spawn(move || {
            // Nobody may want it any more.
            let _ = sender.send(loader(&folder));
        })?;
    Ok(reader)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_that_stands_apart_is_named() {
        assert_eq!(refusal(&[[READ, 7, 0]; 3]), None);
        let failed = [[READ, 7, 0], [READ, 7, 0], [FAILED, 0, 0]];
        assert!(refusal(&failed).is_some_and(|why| why.starts_with("rank 2 cannot load it")));
        let other = [[READ, 7, 0], [READ, 8, 0]];
        assert!(refusal(&other).is_some_and(|why| why.starts_with("rank 1 finds another")));
    }
}
