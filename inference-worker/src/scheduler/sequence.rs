//! One request on its way through the scheduler.

use std::ops::Range;

use llama_model::blocks::{BLOCK_TOKENS, KvGroup};
use llama_model::{Segment, TableChange, Wanted};

use super::cache::{BlockHash, Held, chain, root};
use super::request::{Awaited, Finish, Recorded, Request};

/// Tokens that must have occurred before in the same order for what followed them to
/// be guessed again (prompt lookup, Saxena 2023); longer matches are tried first.
const LOOKUP: std::ops::RangeInclusive<usize> = 2..=4;

/// A request and what was computed of it.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    request: Request,
    arrival: u64,
    /// When it came, in steps.
    since: u64,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// Tokens that the planned step computes: known ones, then guesses.
    planned: usize,
    guesses: Vec<u32>,
    slot: Option<u32>,
    /// Blocks of each group that the ranks were told of.
    told: [usize; 2],
    pub(super) held: Held,
    /// Of the complete blocks of `tokens`, as far as they were needed.
    hashes: Vec<BlockHash>,
    /// Complete blocks that can be found.
    published: usize,
    cached_tokens: Option<u32>,
    /// Tokens of the prompt before which the logits were computed, the first among them.
    prompt_told: usize,
}

impl Sequence {
    pub(super) fn new(mut request: Request, arrival: u64, since: u64) -> Self {
        let tokens = std::mem::take(&mut request.prompt);
        Self {
            prompt_len: tokens.len(),
            tokens,
            request,
            arrival,
            since,
            computed: 0,
            planned: 0,
            guesses: Vec::new(),
            slot: None,
            told: [0; 2],
            held: Held::default(),
            hashes: Vec::new(),
            published: 0,
            cached_tokens: None,
            prompt_told: 1,
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.request.id
    }

    pub(super) fn is_private(&self) -> bool {
        self.request.is_private
    }

    /// Place of its adapter.
    pub(super) fn adapter(&self) -> Option<u32> {
        self.request.adapter.map(|adapter| adapter.place)
    }

    pub(super) fn arrival(&self) -> u64 {
        self.arrival
    }

    /// Who goes first in step `step`: the least.
    pub(super) fn order(&self, step: u64, patience: u64) -> (i32, u64) {
        let is_patient = step - self.since < patience;
        let priority = if is_patient {
            self.request.priority
        } else {
            i32::MIN
        };
        (priority, self.arrival)
    }

    /// Tokens of which keys and values are not in the cache yet.
    pub(super) fn unknown(&self) -> usize {
        self.tokens.len() - self.computed
    }

    pub(super) fn computed(&self) -> usize {
        self.computed
    }

    /// Tokens that the planned step computes.
    pub(super) fn planned(&self) -> usize {
        self.planned
    }

    pub(super) fn guesses(&self) -> usize {
        self.guesses.len()
    }

    /// Whether logits before tokens of the prompt are still to be computed.
    pub(super) fn wants_prompt(&self) -> bool {
        self.request.prompt_logits && self.prompt_told < self.prompt_len
    }

    fn answered(&self) -> u32 {
        u32::try_from(self.tokens.len() - self.prompt_len).unwrap_or(u32::MAX)
    }

    /// Hashes the complete blocks that have no hash yet.
    pub(super) fn hash_blocks(&mut self) {
        let complete = self.tokens.len() / BLOCK_TOKENS;
        for block in self.hashes.len()..complete {
            let parent = match block.checked_sub(1) {
                Some(before) => self.hashes[before],
                None => root(&self.request.salt, self.request.adapter),
            };
            let tokens = &self.tokens[block * BLOCK_TOKENS..(block + 1) * BLOCK_TOKENS];
            self.hashes.push(chain(&parent, tokens));
        }
    }

    /// Hashes of the complete blocks in front of the last token, which has to be
    /// computed in any case. What others computed of a prompt brings no logits.
    pub(super) fn prompt_hashes(&self) -> &[BlockHash] {
        let known = if self.wants_prompt() {
            self.prompt_told
        } else {
            self.tokens.len()
        };
        let count = known.saturating_sub(1) / BLOCK_TOKENS;
        &self.hashes[..count.min(self.hashes.len())]
    }

    pub(super) fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// The complete blocks that cannot be found yet; from now on they can.
    pub(super) fn complete_blocks(&mut self) -> Range<usize> {
        self.hash_blocks();
        let complete = self.computed / BLOCK_TOKENS;
        std::mem::replace(&mut self.published, complete)..complete
    }

    /// Notes what was found of the prompt when the request first began.
    pub(super) fn note_prefix(&mut self, tokens: usize) {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        self.cached_tokens.get_or_insert(tokens);
    }

    /// Enters `slot` with `prefix` tokens in the blocks that it holds.
    pub(super) fn begin(&mut self, slot: u32, prefix: usize) {
        self.slot = Some(slot);
        self.computed = prefix;
        self.published = prefix / BLOCK_TOKENS;
        self.told = [0; 2];
    }

    /// Leaves its slot, with nothing in the cache.
    pub(super) fn leave(&mut self) -> Option<u32> {
        self.computed = 0;
        self.planned = 0;
        self.guesses.clear();
        self.slot.take()
    }

    /// Lets the next step compute `count` tokens.
    pub(super) fn plan(&mut self, count: usize) {
        self.planned = count;
    }

    /// Guesses at most `most` tokens behind the last: what followed when the last few
    /// tokens stood in the sequence before.
    pub(super) fn guess(&mut self, most: usize) {
        self.guesses.clear();
        let left = (self.request.max_answer - self.answered()) as usize;
        let most = most.min(left.saturating_sub(1));
        let len = self.tokens.len();
        if most == 0 {
            return;
        }
        for size in LOOKUP.rev().filter(|size| *size < len) {
            let last = &self.tokens[len - size..];
            let earlier = self.tokens[..len - 1]
                .windows(size)
                .rposition(|window| window == last);
            if let Some(at) = earlier {
                let follows = &self.tokens[at + size..];
                self.guesses.extend(follows.iter().take(most));
                return;
            }
        }
    }

    /// What the ranks compute of it in the planned step.
    pub(super) fn segment(&mut self) -> Option<Segment> {
        let slot = self.slot.filter(|_| self.planned > 0)?;
        let end = self.computed + self.planned;
        let known = end.min(self.tokens.len());
        let mut tokens = self.tokens[self.computed..known].to_vec();
        tokens.extend_from_slice(&self.guesses);
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let tables = KvGroup::EACH.map(|group| {
            let held = &self.held[group as usize];
            let told = self.told[group as usize].clamp(held.first, held.end());
            self.told[group as usize] = held.end();
            TableChange {
                first: number(held.first),
                keep: number(told),
                add: held.blocks[told - held.first..].to_vec(),
            }
        });
        Some(Segment {
            slot,
            // `submit` bounds every position by `max_tokens`, a u32.
            start: number(self.computed),
            tokens,
            logits: match self.awaited() {
                None => Wanted::None,
                Some(awaited) if awaited.rows() == 1 && awaited.draws => Wanted::Last,
                Some(_) => Wanted::All,
            },
            adapter: self.adapter(),
            tables: Some(tables),
        })
    }

    /// What the planned step is for, unless it computes only part of a prompt of which
    /// nobody wants the logits.
    pub(super) fn awaited(&self) -> Option<Awaited<'_>> {
        let end = self.computed + self.planned;
        let draws = end >= self.tokens.len();
        // While logits of the prompt are wanted there is no answer yet.
        let prompt = if self.wants_prompt() {
            &self.tokens[self.computed + 1..self.tokens.len().min(end + 1)]
        } else {
            &[]
        };
        let is_awaited = self.planned > 0 && (draws || !prompt.is_empty());
        is_awaited.then(|| Awaited {
            id: self.request.id,
            answered: self.answered(),
            prompt,
            told: self.prompt_told.saturating_sub(self.computed + 1),
            draws,
            guesses: &self.guesses,
        })
    }

    /// The planned tokens were computed, and `sampled` are those that follow: the next
    /// one, then those after guesses that were right.
    pub(super) fn advance(
        &mut self,
        sampled: &[u32],
        recorded: &mut Vec<Recorded>,
    ) -> Option<Finish> {
        let known = self.planned - self.guesses.len();
        // What was guessed wrong is computed again in its place.
        self.computed += known + sampled.len().saturating_sub(1);
        if self.wants_prompt() {
            self.prompt_told = self.prompt_told.max(self.computed + 1);
        }
        self.planned = 0;
        self.guesses.clear();
        for token in sampled {
            let stops = self.request.stop_ids.contains(token);
            if !stops {
                self.tokens.push(*token);
            }
            let finish = if stops {
                Some(Finish::Stop)
            } else if self.answered() >= self.request.max_answer {
                Some(Finish::Length)
            } else {
                None
            };
            recorded.push(Recorded {
                id: self.request.id,
                token: (!stops).then_some(*token),
                finish,
                cached_tokens: self.cached_tokens.unwrap_or(0),
            });
            if finish.is_some() {
                // Guesses behind the end have no token in the sequence.
                self.computed = self.computed.min(self.tokens.len());
                return finish;
            }
        }
        None
    }
}
