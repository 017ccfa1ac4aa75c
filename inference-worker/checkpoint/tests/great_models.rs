//! Slices and memory of the models that this machine cannot hold, from headers
//! alone.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "tests may fail, and tables of cases are long"
)]

mod synthetic;

use std::collections::BTreeMap;

use llama_checkpoint::adapter::AdapterRoom;
use llama_checkpoint::memory::{KvFormat, Target};
use llama_checkpoint::slices::{ModelSlices, Place};
use llama_checkpoint::stored::{Region, StoredTensor};
use llama_checkpoint::{Checkpoint, Layout, MemoryPlan, MemoryRequest, Shard};
use synthetic::Model;

const GIB: f64 = (1_u64 << 30) as f64;

/// What is read of a tensor, by start, length and distance: with how many ranks say
/// that they share it, and how many read it.
type Parts = BTreeMap<(u64, u64, u64), (Region, usize, usize)>;

/// Everything that the ranks of `layout` read, with how many ranks say that they
/// share it.
fn places(checkpoint: &Checkpoint, layout: Layout) -> Vec<(Place, usize)> {
    (0..layout.world())
        .flat_map(|rank| {
            let shard = Shard::new(checkpoint.config(), layout, rank).expect("splits");
            let slices = ModelSlices::locate(checkpoint, &shard).expect("locates");
            let matrices: Vec<(Place, usize)> = slices
                .matrices()
                .into_iter()
                .flat_map(|matrix| {
                    let scales = matrix.scales.iter();
                    let scales = scales.map(|scales| (scales.place, scales.replicas));
                    let places = matrix.source.places().into_iter();
                    let places = places.map(|place| (place, matrix.replicas));
                    places.chain(scales).collect::<Vec<_>>()
                })
                .collect();
            let vectors = slices.vectors().into_iter();
            let vectors = vectors.filter_map(|v| Some((v.place?, v.replicas)));
            matrices.into_iter().chain(vectors).collect::<Vec<_>>()
        })
        .collect()
}

/// Whether `regions`, each read once, are exactly the bytes of `tensor`.
fn tiles(tensor: &StoredTensor, mut regions: Vec<Region>) -> bool {
    for region in &mut regions {
        *region = Region::new(region.start, region.len, region.stride, region.count);
    }
    regions.sort_by_key(|region| region.start);
    let mut next = tensor.start;
    let mut at = 0;
    while at < regions.len() {
        // Stretches that repeat alike fill each other's gaps.
        let Region { stride, count, .. } = regions[at];
        let first = next;
        while at < regions.len() && next < first + stride {
            let region = regions[at];
            if region.start != next || (region.stride, region.count) != (stride, count) {
                return false;
            }
            next += region.len;
            at += 1;
        }
        if next != first + stride {
            return false;
        }
        next = first + stride * count;
    }
    next == tensor.start + tensor.bytes
}

#[test]
fn ranks_together_read_every_byte_once() {
    for model in Model::ALL {
        let (_folder, checkpoint) = model.open();
        let mut layouts = vec![(1, 1), (2, 1), (8, 1), (8, 2)];
        if !matches!(model, Model::Scout | Model::Maverick) {
            // Two ranks each hold the same KV head.
            layouts.push((16, 1));
        }
        let by_start: BTreeMap<(usize, u64), &StoredTensor> = checkpoint
            .tensors()
            .values()
            .map(|tensor| ((tensor.file, tensor.start), tensor))
            .collect();
        for (tensor, pipeline) in layouts {
            let layout = Layout { tensor, pipeline };
            let mut by_tensor: BTreeMap<&str, Parts> = BTreeMap::new();
            for (place, replicas) in places(&checkpoint, layout) {
                let start = place.region.start;
                let (_, owner) = by_start
                    .range(..=(place.file, start))
                    .next_back()
                    .expect("lies in a tensor");
                let Region {
                    start, len, stride, ..
                } = place.region;
                let entry = by_tensor.entry(&owner.name).or_default();
                let entry =
                    entry
                        .entry((start, len, stride))
                        .or_insert((place.region, replicas, 0));
                entry.2 += 1;
            }
            for (name, stored) in checkpoint.tensors() {
                if name.starts_with("vision_model") {
                    assert!(!by_tensor.contains_key(name.as_str()), "{name} is read");
                    continue;
                }
                let parts = by_tensor
                    .remove(name.as_str())
                    .unwrap_or_else(|| panic!("{model:?} {layout:?}: nobody reads {name}"));
                for (region, replicas, readers) in parts.values() {
                    assert_eq!(readers, replicas, "{model:?} {layout:?}: {name} {region:?}");
                }
                let regions = parts.into_values().map(|(region, ..)| region).collect();
                assert!(tiles(stored, regions), "{model:?} {layout:?}: {name}");
            }
        }
    }
}

/// A plan for H100s, of which 92 % of 79.65 GiB are used and 3 GiB are runtime.
fn plan(model: Model, tensor: usize, pipeline: usize) -> MemoryPlan {
    let (_folder, checkpoint) = model.open();
    let layout = Layout { tensor, pipeline };
    let request = MemoryRequest {
        layout,
        ranks: 0..layout.world(),
        target: Target::Device { runtime: 3 << 30 },
        max_tokens: 131_072,
        step_tokens: 2048,
        kv: KvFormat::F16,
        adapters: AdapterRoom::NONE,
    };
    MemoryPlan::new(&checkpoint, &request).expect("plans")
}

/// Bytes of an H100 that may be used: 81,559 MiB at 92 %.
const LIMIT: u64 = 81_559 * (1 << 20) / 100 * 92;

/// Weights of the fullest rank in GiB, KV bytes a token and rank, KV tokens in
/// thousands.
fn row(model: Model, tensor: usize, pipeline: usize) -> (f64, u64, u64) {
    let plan = plan(model, tensor, pipeline);
    let fullest = plan
        .ranks
        .iter()
        .map(|rank| rank.weights)
        .max()
        .expect("ranks");
    let kv = plan.ranks.iter().map(|rank| rank.kv_bytes_per_token).max();
    (
        fullest as f64 / GIB,
        kv.expect("ranks"),
        plan.tokens_within_each(LIMIT) / 1000,
    )
}

/// The table of the 405B on H100s with a half-precision KV cache. Sizes are the
/// fullest rank's; of two stages, the one with the output head or the embedding.
#[test]
fn the_405b_on_h100s_is_planned_as_derived_by_hand() {
    for (model, tensor, pipeline, weights, kv, tokens) in [
        (Model::Llama405b, 8, 1, 94.5, 64_512, 0),
        (Model::Llama405bFp8, 8, 1, 47.7, 64_512, 375),
        (Model::Llama405bMetaFp8, 8, 1, 56.7, 64_512, 226),
        (Model::Llama405b, 16, 1, 47.7, 64_512, 375),
        // A rule of thumb that counts embedding and head twice gives 47.7 and 750.
        (Model::Llama405b, 8, 2, 47.25, 32_256, 766),
        (Model::Llama405bFp8, 16, 1, 24.1, 64_512, 768),
    ] {
        let (found_weights, found_kv, found_tokens) = row(model, tensor, pipeline);
        let what = format!(
            "{model:?} over {tensor} × {pipeline}: {found_weights:.2} GiB, {found_kv} B, {found_tokens} k"
        );
        assert!((found_weights / weights - 1.0).abs() < 0.01, "{what}");
        assert_eq!(found_kv, kv, "{what}");
        assert!(
            (found_tokens as f64 - f64::from(tokens)).abs() <= 0.02 * f64::from(tokens),
            "{what}"
        );
    }
}

#[test]
fn a_long_sequence_of_scout_keeps_one_chunk_in_most_layers() {
    let plan = plan(Model::Scout, 8, 1);
    let gib = plan.kv_bytes(131_072) as f64 / GIB;
    assert!((gib - 7.125).abs() < 0.01, "{gib} GiB");
    let uniform: u64 = plan
        .ranks
        .iter()
        .map(|rank| 131_072 * (rank.kv_bytes_per_token + rank.chunked_kv_bytes_per_token))
        .sum();
    assert!((uniform as f64 / GIB - 24.0).abs() < 0.01);
    // Weights of all ranks together, less what they all keep.
    let weights = plan.weights() as f64 / GIB;
    assert!((weights - 200.7).abs() < 1.5, "{weights} GiB");
}

#[test]
fn layouts_of_the_great_models() {
    let sizes = |model: Model| {
        let (_folder, checkpoint) = model.open();
        llama_checkpoint::shard::possible_tensor_sizes(checkpoint.config())
    };
    assert_eq!(sizes(Model::Llama405b), [1, 2, 4, 8, 16, 32, 64, 128]);
    assert_eq!(sizes(Model::Scout), [1, 2, 4, 8, 40]);
    let (_folder, checkpoint) = Model::Scout.open();
    for tensor in [1, 2, 4, 8] {
        assert!(checkpoint.config().agrees(tensor), "{tensor}");
    }
}
