//! Which part of each matrix a tensor-parallel rank holds. Arithmetic only.
//!
//! Query, key, value, gate and up projections are split by rows, so that a rank
//! computes whole heads and a range of the feed-forward network; the attention
//! output and down projections are split by columns to match, and their partial
//! results are summed over ranks. The output head is split by rows of the
//! vocabulary.

use std::ops::Range;

use crate::config::LlamaConfig;
use crate::error::ModelError;

/// The part of a model that one rank computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// This rank, from 0.
    pub rank: usize,
    /// Ranks of the group.
    pub world: usize,
    /// Query heads.
    pub heads: Range<usize>,
    /// Key and value heads.
    pub kv_heads: Range<usize>,
    /// Columns of the feed-forward network.
    pub ffn: Range<usize>,
    /// Rows of the output head.
    pub vocab: Range<usize>,
}

impl Shard {
    /// The part of `rank` among `world` ranks. Column ranges start and end at
    /// multiples of `block`, the number of values that one quantised block holds.
    ///
    /// # Errors
    /// `InvalidLayout` when `world` does not divide the heads, or when there are
    /// fewer blocks in the feed-forward network than ranks; the message names
    /// the sizes that would do.
    pub fn new(
        config: &LlamaConfig,
        rank: usize,
        world: usize,
        block: usize,
    ) -> Result<Self, ModelError> {
        if rank >= world {
            return Err(ModelError::Layout(format!(
                "rank {rank} of a group of {world}"
            )));
        }
        if !divides(config, world, block) {
            return Err(ModelError::Layout(refusal(config, world, block)));
        }
        let heads = even(config.heads, rank, world);
        let kv_heads = even(config.kv_heads, rank, world);
        let ffn = near_even(config.ffn / block, rank, world);
        Ok(Self {
            rank,
            world,
            heads,
            kv_heads,
            ffn: ffn.start * block..ffn.end * block,
            vocab: near_even(config.vocab, rank, world),
        })
    }

    /// Rows of the query projection, which are also the columns of the
    /// attention output projection.
    pub fn query_range(&self, config: &LlamaConfig) -> Range<usize> {
        self.heads.start * config.head_dim..self.heads.end * config.head_dim
    }

    /// Rows of the key and value projections.
    pub fn kv_range(&self, config: &LlamaConfig) -> Range<usize> {
        self.kv_heads.start * config.head_dim..self.kv_heads.end * config.head_dim
    }
}

/// Every number of ranks that can hold `config`, ascending.
pub fn possible_worlds(config: &LlamaConfig, block: usize) -> Vec<usize> {
    (1..=config.kv_heads)
        .filter(|&world| divides(config, world, block))
        .collect()
}

fn divides(config: &LlamaConfig, world: usize, block: usize) -> bool {
    world > 0
        && config.kv_heads.is_multiple_of(world)
        && config.heads.is_multiple_of(world)
        && config.ffn.is_multiple_of(block)
        && config.ffn / block >= world
        && config.vocab >= world
        && (world == 1 || (config.query_width() / world).is_multiple_of(block))
}

fn refusal(config: &LlamaConfig, world: usize, block: usize) -> String {
    let worlds: Vec<String> = possible_worlds(config, block)
        .iter()
        .map(ToString::to_string)
        .collect();
    let choice = match worlds.split_last() {
        None => "no size would".to_owned(),
        Some((last, [])) => format!("{last} would"),
        Some((last, rest)) => format!("{} or {last} would", rest.join(", ")),
    };
    let LlamaConfig {
        heads,
        kv_heads,
        ffn,
        vocab,
        ..
    } = config;
    if world > 0 && heads.is_multiple_of(world) && kv_heads.is_multiple_of(world) {
        return format!(
            "tensor parallel {world} does not split the model: {heads} heads of {}, feed-forward length {ffn}, vocabulary {vocab}, in blocks of {block}; {choice}",
            config.head_dim
        );
    }
    format!(
        "tensor parallel {world} does not divide {heads} attention heads ({kv_heads} KV heads); {choice}"
    )
}

fn even(count: usize, rank: usize, world: usize) -> Range<usize> {
    let each = count / world;
    rank * each..(rank + 1) * each
}

/// Ranges whose lengths differ by at most one.
fn near_even(count: usize, rank: usize, world: usize) -> Range<usize> {
    rank * count / world..(rank + 1) * count / world
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LlamaConfig;
    use proptest::prelude::*;

    fn config(heads: usize, kv_heads: usize, ffn: usize, vocab: usize) -> LlamaConfig {
        LlamaConfig {
            layers: 1,
            hidden: heads * 64,
            ffn,
            heads,
            kv_heads,
            head_dim: 64,
            rope_dim: 64,
            rope_base: 1e4,
            rope_scale: 1.0,
            rms_epsilon: 1e-5,
            context_length: 2048,
            vocab,
        }
    }

    #[test]
    fn a_refusal_names_the_sizes_that_would_do() {
        let error = Shard::new(&config(9, 3, 1536, 49152), 0, 2, 32).expect_err("9 heads over 2");
        assert_eq!(
            error.to_string(),
            "tensor parallel 2 does not divide 9 attention heads (3 KV heads); 1 or 3 would"
        );
        assert_eq!(error.category().as_str(), "InvalidLayout");
        assert_eq!(
            possible_worlds(&config(32, 8, 14336, 128_256), 32),
            [1, 2, 4, 8]
        );
        assert!(Shard::new(&config(32, 8, 14336, 128_256), 0, 16, 32).is_err());
        assert!(Shard::new(&config(9, 3, 1536, 49152), 0, 0, 32).is_err());
        assert!(Shard::new(&config(9, 3, 1536, 49152), 3, 3, 32).is_err());
    }

    /// `ranges` put one after another are exactly `0..total`.
    fn covers(ranges: impl Iterator<Item = Range<usize>>, total: usize) -> bool {
        let mut next = 0;
        for range in ranges {
            if range.start != next || range.is_empty() {
                return false;
            }
            next = range.end;
        }
        next == total
    }

    proptest! {
        #[test]
        fn ranks_cover_everything_once(
            world in 1_usize..9,
            kv_each in 1_usize..4,
            group in 1_usize..5,
            blocks in 1_usize..60,
            vocab in 1_usize..5000,
        ) {
            let kv_heads = world * kv_each;
            let config = config(kv_heads * group, kv_heads, blocks * 32, vocab);
            let shards: Result<Vec<_>, _> =
                (0..world).map(|rank| Shard::new(&config, rank, world, 32)).collect();
            if blocks < world || vocab < world {
                prop_assert!(shards.is_err());
                return Ok(());
            }
            let shards = shards.expect("splits");
            prop_assert!(covers(shards.iter().map(|s| s.heads.clone()), config.heads));
            prop_assert!(covers(shards.iter().map(|s| s.kv_heads.clone()), config.kv_heads));
            prop_assert!(covers(shards.iter().map(|s| s.ffn.clone()), config.ffn));
            prop_assert!(covers(shards.iter().map(|s| s.vocab.clone()), config.vocab));
            prop_assert!(covers(shards.iter().map(|s| s.query_range(&config)), config.query_width()));
            prop_assert!(covers(shards.iter().map(|s| s.kv_range(&config)), config.kv_width()));
            for shard in &shards {
                prop_assert_eq!(shard.ffn.start % 32, 0);
                prop_assert_eq!(shard.ffn.end % 32, 0);
                prop_assert_eq!(shard.heads.start, shard.kv_heads.start * group);
                prop_assert_eq!(shard.heads.end, shard.kv_heads.end * group);
            }
        }
    }
}
