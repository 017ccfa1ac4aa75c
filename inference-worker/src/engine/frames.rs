//! Messages between the front and rank 0, and their framing: four bytes of
//! length (little endian), then JSON.

use std::io::{self, Read, Write};

use llama_model::sample::SamplingParams;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::adapters::{AdapterOrder, AdapterOutcome, AdapterUse, PlaceSet};
use crate::rank::throughput::Saturated;
use crate::scheduler::{CacheUse, Finish, Refusal};
use crate::structured::Grammar;

/// Longest frame: a prompt of a million tokens with room to spare.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

/// One sequence to compute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    /// Name of the sequence, never used twice by one front.
    pub id: u64,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Most tokens to generate, at least one.
    pub max_new_tokens: u32,
    /// Tokens that end the answer; they are not reported.
    pub stop_ids: Vec<u32>,
    /// Sequences with a lower number are computed first.
    pub priority: i32,
    /// Whether the logarithms of the prompt's probabilities are told, and of how many
    /// likely tokens at each place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<u32>,
    /// What the sequence may share cached tokens with: others of the same salt.
    pub cache_salt: Option<String>,
    /// The adapter that changes the model for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterUse>,
    /// Whether ranks compute all of it anew, and compare their logits in every step of it.
    #[serde(default)]
    pub is_compared: bool,
    /// What the answer as a whole must be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Grammar>,
}

/// From the front to rank 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToEngine {
    /// Computes a sequence.
    Submit(Box<Submit>),
    /// Forgets a sequence; nothing more is said of it.
    Cancel {
        /// The sequence.
        id: u64,
    },
    /// Loads an adapter, or forgets one once no sequence uses it.
    Adapter(AdapterOrder),
    /// Ends all ranks once no sequence is left.
    Stop,
}

/// What steps with tokens computed, and how long they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Steps.
    pub steps: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub answer_tokens: u64,
    /// Microseconds from plan to plan.
    pub micros: u64,
    /// Those of them in which the ranks computed.
    pub model_micros: u64,
}

/// How busy the scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineStats {
    /// Sequences that hold a slot.
    pub running: u32,
    /// Sequences that wait for one.
    pub waiting: u32,
    /// Slots for sequences.
    pub slots: u32,
    /// Tokens of running sequences in the KV cache.
    pub cached_tokens: u64,
    /// Blocks of the KV cache in all, of layers that attend to all tokens.
    pub blocks: u32,
    /// Those of them that running sequences hold.
    pub held_blocks: u32,
    /// What the KV cache did so far.
    pub cache: CacheUse,
    /// What was computed so far.
    pub work: Work,
    /// What the group can do at most.
    pub saturated: Saturated,
    /// Adapters of running sequences.
    pub running_adapters: PlaceSet,
    /// Adapters of waiting sequences.
    pub waiting_adapters: PlaceSet,
    /// Last finished step.
    pub step: u64,
}

/// Logarithms of probabilities at one place of an answer or a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// That of the token which was drawn, or stands there.
    pub logprob: f32,
    /// The most likely tokens with theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// From rank 0 to the front.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromEngine {
    /// One more token of an answer.
    Token {
        /// The sequence.
        id: u64,
        /// The token.
        token: u32,
        /// Tokens of the prompt that were in the cache already: not every answer is
        /// waited for to its end.
        #[serde(default)]
        cached_tokens: u32,
        /// Its probability, where the sequence asked for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        logprobs: Option<TokenLogprobs>,
    },
    /// Probabilities of further tokens of a prompt, the first of which has none.
    Prompt {
        /// The sequence.
        id: u64,
        /// One for each token.
        logprobs: Vec<TokenLogprobs>,
    },
    /// An answer is complete.
    Finished {
        /// The sequence.
        id: u64,
        /// Why it ended.
        reason: Finish,
        /// Tokens of the prompt that were in the cache already.
        cached_tokens: u32,
    },
    /// A sequence was not taken.
    Refused {
        /// The sequence.
        id: u64,
        /// Why.
        refusal: Refusal,
    },
    /// A sequence failed by itself; the others go on.
    Failed {
        /// The sequence.
        id: u64,
        /// Why.
        message: String,
    },
    /// What became of an adapter.
    Adapter {
        /// Its place.
        place: u32,
        /// What.
        outcome: AdapterOutcome,
    },
    /// After every step, and when a sequence comes or goes.
    Stats(EngineStats),
}

/// The bytes of one frame.
///
/// # Errors
/// When the message is longer than [`MAX_FRAME_BYTES`].
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let len = frame.len() - 4;
    let header = u32::try_from(len)
        .ok()
        .filter(|_| len <= MAX_FRAME_BYTES)
        .ok_or_else(|| oversized(len))?;
    frame[..4].copy_from_slice(&header.to_le_bytes());
    Ok(frame)
}

/// Reads one message from a blocking stream; `None` when it ended between frames.
///
/// # Errors
/// When the stream fails, ends inside a frame, or holds no such message.
pub fn read<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<Option<T>> {
    let mut header = [0; 4];
    match stream.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let mut body = vec![0; body_len(header)?];
    stream.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

/// Writes one message to a blocking stream.
///
/// # Errors
/// When the stream fails or the message is too long.
pub fn write<T: Serialize>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    stream.write_all(&encode(message)?)
}

/// Length of the body that a frame's header announces.
///
/// # Errors
/// When it is longer than [`MAX_FRAME_BYTES`].
pub fn body_len(header: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_le_bytes(header) as usize;
    if len <= MAX_FRAME_BYTES {
        Ok(len)
    } else {
        Err(oversized(len))
    }
}

fn oversized(len: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a frame of {len} bytes; at most {MAX_FRAME_BYTES} are allowed"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submit() -> ToEngine {
        ToEngine::Submit(Box::new(Submit {
            id: 7,
            tokens: vec![1, 2, 3],
            sampling: SamplingParams::GREEDY,
            max_new_tokens: 5,
            stop_ids: vec![0],
            priority: -1,
            prompt_logprobs: None,
            cache_salt: Some("salt".to_owned()),
            adapter: None,
            form: None,
            is_compared: false,
        }))
    }

    #[test]
    fn frames_read_back_in_order() {
        let mut stream = Vec::new();
        write(&mut stream, &submit()).expect("writes");
        write(&mut stream, &ToEngine::Cancel { id: 7 }).expect("writes");
        let mut input = stream.as_slice();
        assert_eq!(read(&mut input).expect("reads"), Some(submit()));
        assert_eq!(
            read(&mut input).expect("reads"),
            Some(ToEngine::Cancel { id: 7 })
        );
        assert_eq!(read::<ToEngine>(&mut input).expect("reads"), None);
    }

    #[test]
    fn a_cut_or_oversized_frame_is_an_error() {
        let frame = encode(&submit()).expect("encodes");
        assert!(read::<ToEngine>(&mut &frame[..frame.len() - 1]).is_err());
        assert!(read::<ToEngine>(&mut &[0xFF; 8][..]).is_err());
    }
}
