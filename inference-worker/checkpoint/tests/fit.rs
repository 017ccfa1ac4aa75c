//! What is said to fit does, by the checks that a worker makes before it loads.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_in_result,
    reason = "tests may fail"
)]

mod synthetic;

use llama_checkpoint::adapter::AdapterRoom;
use llama_checkpoint::advice::Limit;
use llama_checkpoint::fit::{
    Alternative, GroupPlan, GroupRequest, MOST_ALTERNATIVES, alternatives,
};
use llama_checkpoint::memory::{KvFormat, Target};
use llama_checkpoint::{Checkpoint, Layout, MemoryPlan, MemoryRequest};
use proptest::prelude::*;
use synthetic::Model;

const GIB: u64 = 1 << 30;
/// An H100 as GPU feature discovery writes it, 92 % of it.
const H100: Limit = Limit::Each(81_559 * (1 << 20) / 100 * 92);

fn request(layout: Layout, pods: usize, target: Target, max_tokens: usize) -> GroupRequest {
    GroupRequest {
        memory: MemoryRequest {
            layout,
            ranks: 0..0,
            target,
            max_tokens,
            step_tokens: 256,
            kv: KvFormat::F16,
            adapters: AdapterRoom::NONE,
        },
        pods,
        sequences: 1,
        slots: 64,
    }
}

fn on_devices(tensor: usize, pipeline: usize, pods: usize, max_tokens: usize) -> GroupRequest {
    let layout = Layout { tensor, pipeline };
    request(
        layout,
        pods,
        Target::Device { runtime: 3 << 30 },
        max_tokens,
    )
}

/// The request that `alternative` makes of `request`, and its limit.
fn changed(
    request: &GroupRequest,
    limit: Limit,
    alternative: &Alternative,
) -> (GroupRequest, Limit) {
    let mut request = request.clone();
    if let Some((layout, pods)) = alternative.layout {
        (request.memory.layout, request.pods) = (layout, pods);
    }
    if let Some(tokens) = alternative.max_tokens {
        request.memory.max_tokens = tokens;
    }
    let limit = match (limit, alternative.memory) {
        (Limit::Together(_), Some(memory)) => Limit::Together(memory),
        (limit, _) => limit,
    };
    (request, limit)
}

/// What the worker of every pod checks before it loads.
fn workers_start(checkpoint: &Checkpoint, request: &GroupRequest, limit: Limit) -> bool {
    let each = request.memory.layout.world() / request.pods;
    (0..request.pods).all(|pod| {
        let memory = MemoryRequest {
            ranks: pod * each..(pod + 1) * each,
            ..request.memory.clone()
        };
        let plan = MemoryPlan::new(checkpoint, &memory).expect("plans");
        let checked = match limit {
            Limit::Together(limit) => plan.check(limit).is_ok(),
            Limit::Each(limit) => plan.sequences_within_each(limit, plan.max_tokens) > 0,
        };
        checked && plan.capacity(limit, request.slots).is_some()
    })
}

/// Plans, and checks every alternative of what does not fit.
fn judge(checkpoint: &Checkpoint, request: &GroupRequest, limit: Limit) -> Vec<Alternative> {
    let plan = GroupPlan::new(checkpoint, request).expect("plans");
    let fits = plan.fits(limit);
    if request.sequences == 1 {
        assert_eq!(
            fits,
            workers_start(checkpoint, request, limit),
            "as workers"
        );
    }
    if fits {
        return Vec::new();
    }
    let found = alternatives(checkpoint, request, &plan, limit).expect("plans");
    assert!(found.len() <= MOST_ALTERNATIVES, "{found:?}");
    for alternative in &found {
        let (request, limit) = changed(request, limit, alternative);
        let plan = GroupPlan::new(checkpoint, &request).expect("plans");
        assert!(plan.fits(limit), "{alternative:?}");
        assert_eq!(plan.sequences_within(limit), alternative.sequences);
        assert!(
            workers_start(checkpoint, &request, limit),
            "{alternative:?}"
        );
    }
    found
}

/// Opened once: the files are sparse, but their headers are long.
fn small_model() -> &'static Checkpoint {
    static OPENED: std::sync::OnceLock<(tempfile::TempDir, Checkpoint)> =
        std::sync::OnceLock::new();
    &OPENED.get_or_init(|| Model::Llama8b.open()).1
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn alternatives_on_cpu_cores_fit(
        (tensor, pods) in prop::sample::select(vec![(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 4)]),
        mib in 1_u64..64 << 10,
        max_tokens in 2_usize..131_072,
        sequences in 1_usize..6,
        threads in 1_usize..17,
    ) {
        let mut request = request(Layout::tensor(tensor), pods, Target::Cpu { threads }, max_tokens);
        request.sequences = sequences;
        let limit = Limit::Together(mib << 20);
        let found = judge(small_model(), &request, limit);
        let plan = GroupPlan::new(small_model(), &request).expect("plans");
        prop_assert!(plan.fits(limit) || found.iter().any(|other| other.memory.is_some()));
    }

    #[test]
    fn alternatives_on_devices_fit(
        tensor in prop::sample::select(vec![1_usize, 2, 4]),
        gib in 4_u64..40,
        max_tokens in 2_usize..131_072,
        sequences in 1_usize..6,
    ) {
        let mut request = on_devices(tensor, 1, 1, max_tokens);
        request.sequences = sequences;
        judge(small_model(), &request, Limit::Each(gib * GIB));
    }
}

#[test]
fn the_405b_in_half_precision_needs_sixteen_h100s() {
    let (_folder, checkpoint) = Model::Llama405b.open();
    // 94.5 GiB of weights on each of eight.
    let found = judge(&checkpoint, &on_devices(8, 1, 1, 131_072), H100);
    let layouts: Vec<_> = found.iter().filter_map(|found| found.layout).collect();
    let (smallest, pods) = layouts[0];
    assert_eq!((smallest.world(), pods), (16, 2), "{found:?}");
    assert!(
        found.iter().all(|found| found.max_tokens.is_none()),
        "{found:?}"
    );
    // The design's example: 766 thousand tokens, five sequences.
    let plan = GroupPlan::new(&checkpoint, &on_devices(8, 2, 2, 131_072)).expect("plans");
    assert_eq!(plan.sequences_within(H100), 5);
    let per_token: u64 = plan
        .pods
        .iter()
        .flat_map(|pod| &pod.ranks)
        .map(|rank| rank.kv_bytes_per_token)
        .sum();
    assert_eq!(per_token, 516_096);
}

#[test]
fn a_pod_counts_its_own_ranks_only() {
    let (checkpoint, target) = (small_model(), Target::Cpu { threads: 1 });
    let one = GroupPlan::new(checkpoint, &request(Layout::tensor(4), 1, target, 8192));
    let two = GroupPlan::new(checkpoint, &request(Layout::tensor(4), 2, target, 8192));
    let (one, two) = (one.expect("plans"), two.expect("plans"));
    let needed = (one.needed(Limit::Together), two.needed(Limit::Together));
    assert!(needed.1 < needed.0 * 6 / 10, "{needed:?}");
    assert!(two.fits(Limit::Together(needed.1)) && !one.fits(Limit::Together(needed.1)));
    assert!(
        !two.fits(Limit::Together(needed.1 - (1 << 20))),
        "no more than needed"
    );
    let found = judge(
        checkpoint,
        &request(Layout::tensor(4), 1, target, 8192),
        Limit::Together(needed.1),
    );
    assert!(
        found
            .iter()
            .any(|found| found.layout == Some((Layout::tensor(4), 2))),
        "{found:?}"
    );
    let uneven = GroupPlan::new(checkpoint, &request(Layout::tensor(4), 3, target, 8192));
    let error = uneven.expect_err("is refused").to_string();
    assert_eq!(error, "4 ranks cannot be spread evenly over 3 pods");
}

#[test]
fn the_longest_sequence_that_is_told_is_the_longest() {
    let (checkpoint, target) = (small_model(), Target::Cpu { threads: 8 });
    let request = request(Layout::tensor(1), 1, target, 131_072);
    let limit = Limit::Together(20 * GIB);
    let found = judge(checkpoint, &request, limit);
    let tokens = found[0].max_tokens.expect("shorter ones fit");
    let mut longer = request;
    longer.memory.max_tokens = tokens + 32;
    let plan = GroupPlan::new(checkpoint, &longer).expect("plans");
    assert!(!plan.fits(limit), "{tokens} is not the longest");
}
