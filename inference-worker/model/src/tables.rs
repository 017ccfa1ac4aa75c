//! Which blocks of the KV cache hold the tokens of which sequence.

use std::collections::{BTreeSet, VecDeque};

use llama_checkpoint::blocks::{BlockGeometry, KvBlocks, KvGroup};

use crate::step::{Segment, StepError, TableChange};

/// The block tables of the sequences in their slots.
#[derive(Debug)]
pub(crate) struct BlockTables {
    geometry: BlockGeometry,
    max_tokens: usize,
    slots: Vec<Slot>,
    blocks: KvBlocks,
    /// Blocks of no sequence, where this rank gives them out itself.
    free: Option<[Vec<u32>; 2]>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    tokens: usize,
    tables: [Table; 2],
}

/// Blocks `first..first + blocks.len()` of a sequence.
#[derive(Clone, Debug, Default)]
struct Table {
    first: usize,
    blocks: VecDeque<u32>,
}

impl Table {
    fn end(&self) -> usize {
        self.first + self.blocks.len()
    }

    /// Lets go of the blocks before `first` and from `keep` on; returns them.
    fn shrink(&mut self, first: usize, keep: usize) -> Vec<u32> {
        let mut gone = Vec::new();
        while self.end() > keep
            && let Some(block) = self.blocks.pop_back()
        {
            gone.push(block);
        }
        while self.first < first
            && let Some(block) = self.blocks.pop_front()
        {
            self.first += 1;
            gone.push(block);
        }
        if self.blocks.is_empty() {
            self.first = first;
        }
        gone
    }
}

impl BlockTables {
    /// Empty tables of `slots` sequences of up to `max_tokens`. With `blocks`, steps
    /// say which of so many a sequence gets; without, each slot has its own.
    pub(crate) fn new(
        geometry: BlockGeometry,
        (slots, max_tokens): (usize, usize),
        blocks: Option<KvBlocks>,
    ) -> Self {
        let own = geometry
            .needed(max_tokens, max_tokens)
            .map(|needed| needed * slots);
        Self {
            geometry,
            max_tokens,
            slots: vec![Slot::default(); slots],
            blocks: blocks.unwrap_or(own),
            free: blocks.is_none().then(|| {
                own.map(|count| {
                    (0..u32::try_from(count).unwrap_or(u32::MAX))
                        .rev()
                        .collect()
                })
            }),
        }
    }

    pub(crate) fn geometry(&self) -> BlockGeometry {
        self.geometry
    }

    /// Blocks that there are.
    pub(crate) fn blocks(&self) -> KvBlocks {
        self.blocks
    }

    /// Number `index` of the blocks of the sequence in `slot`.
    pub(crate) fn block(&self, group: KvGroup, slot: usize, index: usize) -> usize {
        let table = &self.slots[slot].tables[group as usize];
        table.blocks[index - table.first] as usize
    }

    /// Refuses what no rank may begin, before the first collective.
    pub(crate) fn check(&self, segments: &[Segment], vocab: usize) -> Result<(), StepError> {
        let mut slots = BTreeSet::new();
        for segment in segments {
            if !slots.insert(segment.slot) {
                return invalid(format!("slot {} occurs twice", segment.slot));
            }
            self.check_segment(segment, vocab)?;
        }
        Ok(())
    }

    fn check_segment(&self, segment: &Segment, vocab: usize) -> Result<(), StepError> {
        let (number, start) = (segment.slot as usize, segment.start as usize);
        let Some(slot) = self.slots.get(number) else {
            return invalid(format!("slot {number} of {}", self.slots.len()));
        };
        let tokens = &segment.tokens;
        if tokens.is_empty() {
            return invalid(format!("no tokens for slot {number}"));
        }
        let end = start + tokens.len();
        if end > self.max_tokens {
            return invalid(format!(
                "slot {number} would have {end} tokens, the limit is {}",
                self.max_tokens
            ));
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
            return invalid(format!("token {token} is not in the vocabulary of {vocab}"));
        }
        match (&segment.tables, &self.free) {
            (None, Some(_)) => self.check_own(number, slot, start),
            (Some(changes), None) => self.check_changes(number, slot, changes, (start, end)),
            (None, None) => invalid(format!("no blocks for slot {number}")),
            (Some(_), Some(_)) => invalid(format!("slot {number} has blocks of its own")),
        }
    }

    /// Where each slot has its own blocks: the sequence must go on where all that its
    /// next token attends to still is.
    fn check_own(&self, number: usize, slot: &Slot, start: usize) -> Result<(), StepError> {
        let known = slot.tokens;
        let is_there = self.geometry.groups().all(|group| {
            self.geometry.place(group, start) == 0
                || self.geometry.first_block(group, start) >= slot.tables[group as usize].first
        });
        if start <= known && is_there {
            return Ok(());
        }
        invalid(format!(
            "slot {number} goes on at position {start} but has {known} tokens{}",
            if is_there {
                ""
            } else {
                ", of which some layers keep the last chunk"
            }
        ))
    }

    fn check_changes(
        &self,
        number: usize,
        slot: &Slot,
        changes: &[TableChange; 2],
        (start, end): (usize, usize),
    ) -> Result<(), StepError> {
        for group in self.geometry.groups() {
            let (change, table) = (&changes[group as usize], &slot.tables[group as usize]);
            let (first, keep) = (change.first as usize, change.keep as usize);
            let kept = if keep > first { keep } else { first };
            let covers = kept + change.add.len() >= self.geometry.end(group, end)
                && first <= self.geometry.first_block(group, start);
            let has_kept = keep <= first || (keep <= table.end() && first >= table.first);
            if !covers || !has_kept {
                return invalid(format!(
                    "slot {number}: blocks {first} to {} do not hold positions {start} to {end}, \
                     {keep} of {} kept",
                    kept + change.add.len(),
                    table.end()
                ));
            }
            let count = self.blocks[group as usize];
            if let Some(block) = change.add.iter().find(|block| **block as usize >= count) {
                return invalid(format!("slot {number}: block {block} of {count}"));
            }
        }
        Ok(())
    }

    /// Changes the tables of a checked segment's slot; tells `take` each block that
    /// the sequence gets.
    pub(crate) fn apply(&mut self, segment: &Segment, mut take: impl FnMut(KvGroup, usize)) {
        let (number, start) = (segment.slot as usize, segment.start as usize);
        let end = start + segment.tokens.len();
        let slot = &mut self.slots[number];
        slot.tokens = end;
        for group in self.geometry.groups() {
            let table = &mut slot.tables[group as usize];
            match (&segment.tables, &mut self.free) {
                (Some(changes), _) => {
                    let change = &changes[group as usize];
                    table.shrink(change.first as usize, change.keep as usize);
                    for block in &change.add {
                        table.blocks.push_back(*block);
                        take(group, *block as usize);
                    }
                }
                (None, Some(free)) => {
                    let free = &mut free[group as usize];
                    let first = self.geometry.first_block(group, start);
                    free.extend(table.shrink(first, self.geometry.end(group, start).max(first)));
                    while table.end() < self.geometry.end(group, end)
                        && let Some(block) = free.pop()
                    {
                        table.blocks.push_back(block);
                        take(group, block as usize);
                    }
                }
                (None, None) => {}
            }
        }
    }
}

fn invalid(text: String) -> Result<(), StepError> {
    Err(StepError::Invalid(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::Wanted;
    use llama_checkpoint::blocks::BLOCK_TOKENS;

    fn segment(start: usize, len: usize, tables: Option<[TableChange; 2]>) -> Segment {
        Segment {
            slot: 0,
            start: u32::try_from(start).expect("small"),
            tokens: vec![1; len],
            logits: Wanted::Last,
            adapter: None,
            tables,
        }
    }

    fn change(first: u32, keep: u32, add: &[u32]) -> TableChange {
        TableChange {
            first,
            keep,
            add: add.to_vec(),
        }
    }

    fn steps(tables: &mut BlockTables, segment: &Segment) -> Result<Vec<(KvGroup, usize)>, String> {
        tables
            .check(std::slice::from_ref(segment), 2)
            .map_err(|error| error.to_string())?;
        let mut taken = Vec::new();
        tables.apply(segment, |group, block| taken.push((group, block)));
        Ok(taken)
    }

    #[test]
    fn a_sequence_goes_on_where_its_keys_still_are() {
        let geometry = BlockGeometry::new(Some(16));
        for (tokens, keep, goes_on) in [
            (40, 0, true),
            (40, 16, true),
            (40, 20, false),
            (40, 31, false),
            (40, 32, true),
            (40, 40, true),
            (40, 41, false),
            (32, 32, true),
            (32, 20, true),
            (32, 10, false),
            (0, 0, true),
        ] {
            let mut tables = BlockTables::new(geometry, (1, 64), None);
            // One by one, as the chunks before the last are let go of with each step.
            for position in 0..tokens {
                steps(&mut tables, &segment(position, 1, None)).expect("goes on");
            }
            let went = steps(&mut tables, &segment(keep, 1, None));
            assert_eq!(went.is_ok(), goes_on, "{keep} of {tokens}: {went:?}");
        }
    }

    #[test]
    fn blocks_of_a_chunk_are_given_back() {
        let mut tables = BlockTables::new(BlockGeometry::new(Some(64)), (1, 1000), None);
        let mut most = 0;
        for position in 0..1000 {
            let taken = steps(&mut tables, &segment(position, 1, None)).expect("goes on");
            let chunk = taken.iter().filter(|(group, _)| *group == KvGroup::Chunk);
            most = chunk
                .map(|(_, block)| block + 1)
                .max()
                .unwrap_or(0)
                .max(most);
        }
        assert!(most <= 64 / BLOCK_TOKENS + 1, "{most}");
    }

    #[test]
    fn tables_follow_the_plan_or_refuse_it() {
        let mut tables = BlockTables::new(BlockGeometry::new(None), (2, 200), Some([8, 0]));
        let none = TableChange::default;
        // A prefix of two blocks that another sequence left, and one of its own.
        let begins = segment(64, 10, Some([change(0, 0, &[5, 1, 7]), none()]));
        let taken = steps(&mut tables, &begins).expect("begins");
        assert_eq!(taken, [5, 1, 7].map(|block| (KvGroup::All, block)));
        assert_eq!(tables.block(KvGroup::All, 0, 2), 7);
        let goes_on = segment(74, 30, Some([change(0, 3, &[2]), none()]));
        steps(&mut tables, &goes_on).expect("goes on");
        assert_eq!(tables.block(KvGroup::All, 0, 3), 2);
        // Back to where speculation was right.
        steps(
            &mut tables,
            &segment(80, 1, Some([change(0, 3, &[]), none()])),
        )
        .expect("back");
        for (wrong, says) in [
            (
                segment(96, 1, Some([change(0, 3, &[]), none()])),
                "do not hold",
            ),
            (
                segment(90, 1, Some([change(0, 4, &[]), none()])),
                "4 of 3 kept",
            ),
            (
                segment(96, 1, Some([change(0, 3, &[8]), none()])),
                "block 8 of 8",
            ),
            (segment(81, 1, None), "no blocks for slot 0"),
            (segment(0, 0, Some([none(), none()])), "no tokens"),
        ] {
            let error = steps(&mut tables, &wrong).expect_err("refused");
            assert!(error.contains(says), "{error}");
        }
    }
}
