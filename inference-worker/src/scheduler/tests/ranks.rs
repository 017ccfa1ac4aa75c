//! A model that keeps tokens in blocks in place of keys and values, so that a wrong
//! block shows in the answer.

use std::collections::{BTreeMap, BTreeSet};

use llama_model::blocks::{BLOCK_TOKENS, BlockGeometry, KvGroup};
use llama_model::{Segment, Wanted};

use super::{Limits, Scheduler};

/// Tokens that the model knows. One of them ends answers.
pub(super) const VOCABULARY: u32 = 40;
pub(super) const STOP: u32 = 0;

/// What follows `tokens`: mostly what followed a few tokens ago, so that guesses are
/// often right, now and then something that depends on every token seen.
pub(super) fn next_token(all: &[u32], chunk: &[u32]) -> u32 {
    let hash = all.iter().chain(chunk).fold(17_u64, |hash, token| {
        hash.wrapping_mul(0x0100_0000_01B3)
            .wrapping_add(u64::from(*token) + 1)
    });
    let mixed = hash ^ (hash >> 29);
    if mixed % 7 == 0 || all.len() < 5 {
        u32::try_from((mixed >> 8) % u64::from(VOCABULARY)).unwrap_or(0)
    } else {
        all[all.len() - 5]
    }
}

/// The tokens behind `prompt`, computed alone.
pub(super) fn answer(prompt: &[u32], most: u32, chunk: Option<usize>) -> (Vec<u32>, bool) {
    let mut tokens = prompt.to_vec();
    for _ in 0..most {
        let start = chunk.map_or(tokens.len(), |chunk| (tokens.len() - 1) / chunk * chunk);
        let token = next_token(&tokens, &tokens[start..]);
        if token == STOP {
            return (tokens.split_off(prompt.len()), true);
        }
        tokens.push(token);
    }
    (tokens.split_off(prompt.len()), false)
}

/// The row before a token of a prompt: whose, what it says and what stands there.
pub(super) type PromptRow = (u64, u32, u32);

type Block = [Option<u32>; BLOCK_TOKENS];

/// The ranks of a group, as far as the scheduler can tell.
pub(super) struct Ranks {
    limits: Limits,
    geometry: BlockGeometry,
    blocks: [Vec<Block>; 2],
    /// Number of the first block, and the blocks, by slot and group.
    tables: BTreeMap<u32, [(usize, Vec<u32>); 2]>,
    /// What the last step brought of prompts, what was told before left out.
    pub(super) prompts: Vec<PromptRow>,
}

impl Ranks {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            geometry: BlockGeometry::new(limits.chunk),
            blocks: limits.blocks.map(|count| vec![[None; BLOCK_TOKENS]; count]),
            tables: BTreeMap::new(),
            prompts: Vec::new(),
        }
    }

    /// Computes a step; the tokens that each awaited request draws, guesses included.
    pub(super) fn step(&mut self, scheduler: &Scheduler, segments: &[Segment]) -> Vec<Vec<u32>> {
        self.check(segments);
        for segment in segments {
            self.change(segment);
        }
        self.check_writes(segments);
        let mut rows = Vec::new();
        for segment in segments {
            for (offset, token) in segment.tokens.iter().enumerate() {
                let position = segment.start as usize + offset;
                for group in self.geometry.groups() {
                    let (block, place) = self.place(segment.slot, group, position);
                    self.blocks[group as usize][block][place] = Some(*token);
                }
                let is_last = offset + 1 == segment.tokens.len();
                if segment.logits == Wanted::All || (segment.logits == Wanted::Last && is_last) {
                    let [all, chunk] = KvGroup::EACH.map(|group| {
                        if self.geometry.has(group) {
                            self.seen(segment.slot, group, position)
                        } else {
                            Vec::new()
                        }
                    });
                    rows.push(next_token(&all, &chunk));
                }
            }
        }
        let of_prompts: usize = scheduler.awaited().map(|a| a.prompt.len()).sum();
        let others = scheduler.awaited().filter(|a| a.prompt.is_empty()).count();
        assert!(of_prompts == 0 || of_prompts + others <= self.limits.slots as usize);
        let (drawn, prompts) = draw(scheduler, &rows);
        self.prompts = prompts;
        drawn
    }

    fn check(&self, segments: &[Segment]) {
        let tokens: usize = segments.iter().map(|segment| segment.tokens.len()).sum();
        let budget = self.limits.step_tokens.max(self.limits.slots + 1) as usize;
        assert!(tokens <= budget, "{tokens} tokens in a step of {budget}");
        let slots: BTreeSet<u32> = segments.iter().map(|segment| segment.slot).collect();
        assert_eq!(slots.len(), segments.len(), "a slot occurs twice");
        assert!(slots.iter().all(|slot| *slot < self.limits.slots));
        assert!(segments.iter().all(|segment| !segment.tokens.is_empty()));
    }

    fn change(&mut self, segment: &Segment) {
        let changes = segment.tables.as_ref().expect("blocks are planned");
        let end = segment.start as usize + segment.tokens.len();
        for group in self.geometry.groups() {
            let tables = self.tables.entry(segment.slot).or_default();
            let (first, blocks) = &mut tables[group as usize];
            let change = &changes[group as usize];
            let (new_first, keep) = (change.first as usize, change.keep as usize);
            blocks.truncate(keep.saturating_sub(*first));
            let gone = new_first.saturating_sub(*first).min(blocks.len());
            blocks.drain(..gone);
            if blocks.is_empty() {
                *first = new_first;
            } else {
                *first += gone;
            }
            assert_eq!(*first, new_first, "{change:?}");
            blocks.extend(&change.add);
            assert!(*first + blocks.len() >= self.geometry.end(group, end));
            assert!(*first <= self.geometry.first_block(group, segment.start as usize));
        }
    }

    /// No block that a step writes may be in the table of another sequence that the
    /// step computes.
    fn check_writes(&self, segments: &[Segment]) {
        for group in self.geometry.groups() {
            let mut tables: BTreeMap<u32, u32> = BTreeMap::new();
            for segment in segments {
                for block in &self.tables[&segment.slot][group as usize].1 {
                    *tables.entry(*block).or_default() += 1;
                }
            }
            for segment in segments {
                let start = segment.start as usize;
                for position in start..start + segment.tokens.len() {
                    let (block, _) = self.place(segment.slot, group, position);
                    let block = u32::try_from(block).expect("small");
                    assert_eq!(tables[&block], 1, "a shared block is written");
                }
            }
        }
    }

    fn place(&self, slot: u32, group: KvGroup, position: usize) -> (usize, usize) {
        let (first, blocks) = &self.tables[&slot][group as usize];
        let block = blocks[self.geometry.block(group, position) - first];
        let place = self.geometry.place(group, position) % BLOCK_TOKENS;
        (block as usize, place)
    }

    /// The tokens that the one at `position` attends to, itself included.
    fn seen(&self, slot: u32, group: KvGroup, position: usize) -> Vec<u32> {
        let first = position - self.geometry.place(group, position);
        (first..=position)
            .map(|position| {
                let (block, place) = self.place(slot, group, position);
                self.blocks[group as usize][block][place].expect("a block was written")
            })
            .collect()
    }
}

/// What each awaited request draws from its rows, as rank 0 does it, and the rows of
/// prompts.
fn draw(scheduler: &Scheduler, rows: &[u32]) -> (Vec<Vec<u32>>, Vec<PromptRow>) {
    let (mut rest, mut prompts) = (rows, Vec::new());
    let drawn = scheduler.awaited().map(|awaited| {
        let (rows, behind) = rest.split_at(awaited.rows());
        rest = behind;
        let (before, rows) = rows.split_at(awaited.prompt.len());
        let fresh = before.iter().zip(awaited.prompt).skip(awaited.told);
        prompts.extend(fresh.map(|(row, token)| (awaited.id, *row, *token)));
        if !awaited.draws {
            return None;
        }
        let right = rows.iter().zip(awaited.guesses);
        let right = right.take_while(|(row, guess)| row == guess).count();
        Some(rows[..=right].to_vec())
    });
    let drawn = drawn.flatten().collect();
    assert!(rest.is_empty(), "rows that nobody awaits");
    (drawn, prompts)
}
