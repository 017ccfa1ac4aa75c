//! Which part of a model a rank holds. Arithmetic only.
//!
//! Query, key, value, gate and up projections are split by rows, so that a rank
//! computes whole heads and a range of the feed-forward network; the attention
//! output and down projections are split by columns to match, and their partial
//! results are summed over the ranks of a stage. Token embedding and output head
//! are split by rows of the vocabulary. Where ranks outnumber KV heads, several
//! hold the same one.

use std::ops::Range;

use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::format::BLOCK;
use crate::layout::Layout;

/// The part of a model that one rank computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// How the ranks divide the model.
    pub layout: Layout,
    /// This rank, from 0.
    pub rank: usize,
    /// Layers of its stage.
    pub layers: Range<usize>,
    /// Query heads.
    pub heads: Range<usize>,
    /// Key and value heads.
    pub kv_heads: Range<usize>,
    /// Columns of the feed-forward network of layers without experts.
    pub ffn: Range<usize>,
    /// Columns of every expert.
    pub expert_ffn: Range<usize>,
    /// Columns of the network beside the experts.
    pub shared_ffn: Range<usize>,
    /// Rows of the token embedding and of the output head.
    pub vocab: Range<usize>,
}

impl Shard {
    /// The part of `rank`.
    ///
    /// # Errors
    /// `InvalidLayout` when the layout does not divide the model; the message
    /// names the sizes that would do.
    pub fn new(config: &LlamaConfig, layout: Layout, rank: usize) -> Result<Self, ModelError> {
        let Layout { tensor, pipeline } = layout;
        if !divides(config, tensor) {
            return Err(ModelError::Layout(refusal(config, tensor)));
        }
        let layers = config.layers.len();
        if pipeline == 0 || pipeline > layers {
            return Err(ModelError::Layout(format!(
                "pipeline parallel {pipeline} does not divide {layers} layers; 1 to {layers} would"
            )));
        }
        if rank >= layout.world() {
            return Err(ModelError::Layout(format!(
                "rank {rank} of a group of {}",
                layout.world()
            )));
        }
        let (place, stage) = (layout.tensor_rank(rank), layout.stage(rank));
        let heads = near_even(config.heads, place, tensor);
        let group = config.group();
        let blocks = |width: usize| {
            let blocks = near_even(width / BLOCK, place, tensor);
            blocks.start * BLOCK..blocks.end * BLOCK
        };
        Ok(Self {
            layout,
            rank,
            layers: near_even(layers, stage, pipeline),
            kv_heads: heads.start / group..heads.end.div_ceil(group),
            heads,
            ffn: blocks(config.ffn),
            expert_ffn: blocks(config.experts.map_or(0, |experts| experts.ffn)),
            shared_ffn: blocks(config.experts.map_or(0, |experts| experts.shared_ffn)),
            vocab: near_even(config.vocab, place, tensor),
        })
    }

    /// Whether this rank looks tokens up.
    pub fn is_first_stage(&self) -> bool {
        self.layout.stage(self.rank) == 0
    }

    /// Whether this rank computes logits.
    pub fn is_last_stage(&self) -> bool {
        self.layout.stage(self.rank) + 1 == self.layout.pipeline
    }

    /// Ranks of a stage that hold the same KV head.
    pub fn kv_replicas(&self, config: &LlamaConfig) -> usize {
        (self.layout.tensor / config.kv_heads).max(1)
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

    /// Where the partial sums over the columns of the attention output projection
    /// end, counted from this rank's first column.
    pub fn query_ends(&self, config: &LlamaConfig) -> Vec<usize> {
        ends(config, config.heads, &self.heads)
            .into_iter()
            .map(|end| end * config.head_dim)
            .collect()
    }

    /// Likewise over the columns `range` of a down projection `width` wide.
    pub fn ffn_ends(config: &LlamaConfig, width: usize, range: &Range<usize>) -> Vec<usize> {
        let blocks = range.start / BLOCK..range.end / BLOCK;
        ends(config, width / BLOCK, &blocks)
            .into_iter()
            .map(|end| end * BLOCK)
            .collect()
    }
}

/// Where the partial sums of `count` units end that lie in `range`, counted from
/// its start.
fn ends(config: &LlamaConfig, count: usize, range: &Range<usize>) -> Vec<usize> {
    let sums = config.partial_sums(count);
    (1..=sums)
        .map(|number| number * count / sums)
        .filter(|end| range.start < *end && *end < range.end)
        .chain([range.end])
        .map(|end| end - range.start)
        .collect()
}

/// Every number of ranks that can share a layer of `config`, ascending.
pub fn possible_tensor_sizes(config: &LlamaConfig) -> Vec<usize> {
    (1..=config.heads)
        .filter(|&tensor| divides(config, tensor))
        .collect()
}

fn divides(config: &LlamaConfig, tensor: usize) -> bool {
    let splits = |width: usize| width.is_multiple_of(BLOCK) && width / BLOCK >= tensor;
    let widths = config
        .experts
        .map_or([config.ffn; 2], |experts| [experts.ffn, experts.shared_ffn]);
    tensor > 0
        && config.heads.is_multiple_of(tensor)
        && (config.kv_heads.is_multiple_of(tensor) || tensor.is_multiple_of(config.kv_heads))
        && splits(config.ffn)
        && widths.into_iter().all(splits)
        && config.vocab >= tensor
}

fn refusal(config: &LlamaConfig, tensor: usize) -> String {
    let sizes: Vec<String> = possible_tensor_sizes(config)
        .iter()
        .map(ToString::to_string)
        .collect();
    let choice = match sizes.split_last() {
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
    let share = tensor > 0
        && heads.is_multiple_of(tensor)
        && (kv_heads.is_multiple_of(tensor) || tensor.is_multiple_of(*kv_heads));
    if share {
        return format!(
            "tensor parallel {tensor} does not split the model: {heads} heads of {}, feed-forward length {ffn}, vocabulary {vocab}, in blocks of {BLOCK}; {choice}",
            config.head_dim
        );
    }
    format!(
        "tensor parallel {tensor} does not divide {heads} attention heads ({kv_heads} KV heads); {choice}"
    )
}

/// Ranges whose lengths differ by at most one.
fn near_even(count: usize, part: usize, parts: usize) -> Range<usize> {
    part * count / parts..(part + 1) * count / parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::config;
    use proptest::prelude::*;

    fn shard(config: &LlamaConfig, tensor: usize, rank: usize) -> Result<Shard, ModelError> {
        Shard::new(config, Layout::tensor(tensor), rank)
    }

    #[test]
    fn a_refusal_names_the_sizes_that_would_do() {
        let smol = config(9, 3, 1536, 49152);
        let error = shard(&smol, 2, 0).expect_err("9 heads over 2");
        assert_eq!(
            error.to_string(),
            "tensor parallel 2 does not divide 9 attention heads (3 KV heads); 1, 3 or 9 would"
        );
        assert_eq!(error.category().as_str(), "InvalidLayout");
        assert!(shard(&smol, 0, 0).is_err());
        assert!(shard(&smol, 3, 3).is_err());
        let llama = config(32, 8, 14336, 128_256);
        assert_eq!(possible_tensor_sizes(&llama), [1, 2, 4, 8, 16, 32]);
        let stages = Layout {
            tensor: 1,
            pipeline: 3,
        };
        let error = Shard::new(&smol, stages, 0).expect_err("2 layers over 3 stages");
        assert!(error.to_string().contains("1 to 2 would"), "{error}");
    }

    #[test]
    fn ranks_beyond_the_kv_heads_share_them() {
        let config = config(16, 2, 1024, 100);
        let kv = |rank| shard(&config, 8, rank).expect("splits").kv_heads;
        assert_eq!([kv(0), kv(3), kv(4), kv(7)], [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(
            shard(&config, 8, 0).expect("splits").kv_replicas(&config),
            4
        );
        assert_eq!(
            shard(&config, 2, 0).expect("splits").kv_replicas(&config),
            1
        );
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

    /// The ends that all ranks have, counted from the first column.
    fn all_ends(shards: &[Shard], of: impl Fn(&Shard) -> (usize, Vec<usize>)) -> Vec<usize> {
        let ends = shards.iter().map(of);
        ends.flat_map(|(start, ends)| ends.into_iter().map(move |end| start + end))
            .collect()
    }

    proptest! {
        #[test]
        fn ranks_cover_everything_once(
            tensor in 1_usize..9,
            kv_heads in 1_usize..9,
            group in 1_usize..9,
            blocks in 1_usize..60,
            vocab in 1_usize..5000,
        ) {
            let config = config(kv_heads * group, kv_heads, blocks * 32, vocab);
            let shards: Result<Vec<_>, _> =
                (0..tensor).map(|rank| shard(&config, tensor, rank)).collect();
            let can = config.heads.is_multiple_of(tensor)
                && (kv_heads.is_multiple_of(tensor) || tensor.is_multiple_of(kv_heads))
                && blocks >= tensor
                && vocab >= tensor;
            prop_assert_eq!(shards.is_ok(), can);
            let Ok(shards) = shards else { return Ok(()) };
            prop_assert!(covers(shards.iter().map(|s| s.heads.clone()), config.heads));
            prop_assert!(covers(shards.iter().map(|s| s.ffn.clone()), config.ffn));
            prop_assert!(covers(shards.iter().map(|s| s.vocab.clone()), config.vocab));
            for shard in &shards {
                let group = config.group();
                for head in shard.heads.clone() {
                    prop_assert!(shard.kv_heads.contains(&(head / group)));
                }
                prop_assert_eq!(
                    shard.kv_heads.len(),
                    (kv_heads / tensor).max(1)
                );
            }
            // The same partial sums, however many ranks take them.
            if config.agrees(tensor) {
                let whole = shard(&config, 1, 0).expect("splits");
                let query = all_ends(&shards, |s| (s.query_range(&config).start, s.query_ends(&config)));
                prop_assert_eq!(query, whole.query_ends(&config));
                let ffn = all_ends(&shards, |s| {
                    (s.ffn.start, Shard::ffn_ends(&config, config.ffn, &s.ffn))
                });
                prop_assert_eq!(ffn, Shard::ffn_ends(&config, config.ffn, &whole.ffn));
            }
        }
    }
}
