use super::*;
use proptest::prelude::*;

fn params(temperature: f32, top_p: f32, seed: u64) -> SamplingParams {
    SamplingParams {
        temperature,
        top_p,
        seed,
        ..SamplingParams::GREEDY
    }
}

fn first(params: SamplingParams, logits: &[f32]) -> u32 {
    Sampler::new(params, &[])
        .sample(logits, 0, None)
        .expect("draws")
        .token
}

/// The tokens that are drawn at all in many draws.
fn drawn(params: &SamplingParams, logits: &[f32], mask: Option<&[u32]>) -> Vec<u32> {
    let mut sampler = Sampler::new(params.clone(), &[]);
    let draws = (0..500).map(|index| sampler.sample(logits, index, mask).expect("draws").token);
    let mut tokens: Vec<u32> = draws.collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Probabilities by the book.
fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let scaled = logits
        .iter()
        .map(|logit| f64::from(*logit) / f64::from(temperature));
    let most = scaled.clone().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scaled.map(|logit| (logit - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

#[test]
fn greedy_takes_the_best_and_the_lowest_of_equals() {
    assert_eq!(first(SamplingParams::GREEDY, &[0.0, 3.0, 3.0, -1.0]), 1);
    assert_eq!(first(SamplingParams::GREEDY, &[f32::NEG_INFINITY; 2]), 0);
    assert_eq!(first(SamplingParams::GREEDY, &[-0.0, 0.0]), 0);
}

#[test]
fn bad_rows_are_named() {
    let mut sampler = Sampler::new(SamplingParams::GREEDY, &[]);
    assert_eq!(sampler.sample(&[], 0, None), Err(SampleError::Empty));
    let mut row = vec![0.0; 700];
    row[613] = f32::NAN;
    let error = SampleError::NotANumber { token: 613 };
    assert_eq!(sampler.sample(&row, 0, None), Err(error));
    let nothing = sampler.sample(&[0.0, 1.0], 0, Some(&[0b100]));
    assert_eq!(nothing, Err(SampleError::NothingAllowed));
}

#[test]
fn draws_follow_the_probabilities() {
    // softmax(ln 1, ln 2, ln 5) = 1/8, 2/8, 5/8
    let logits = [1_f32.ln(), 2_f32.ln(), 5_f32.ln()];
    for top_p in [1.0, 0.999_999] {
        let mut sampler = Sampler::new(params(1.0, top_p, 7), &[]);
        let mut counts = [0_u32; 3];
        for index in 0..80_000 {
            let drawn = sampler.sample(&logits, index, None).expect("draws");
            counts[drawn.token as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([10_000.0, 20_000.0, 50_000.0]) {
            assert!((f64::from(count) - expected).abs() < 600.0, "{counts:?}");
        }
    }
}

#[test]
fn top_k_and_min_p_keep_the_likeliest() {
    let logits = [0.0, 2.0, 1.0, 2.0, -1.0];
    let hot = params(2.0, 1.0, 1);
    let top_k = |top_k| SamplingParams {
        top_k,
        ..hot.clone()
    };
    assert_eq!(drawn(&top_k(1), &logits, None), [1]);
    assert_eq!(drawn(&top_k(3), &logits, None), [1, 2, 3]);
    assert_eq!(drawn(&top_k(0), &logits, None), [0, 1, 2, 3, 4]);
    assert_eq!(drawn(&top_k(9), &logits, None), [0, 1, 2, 3, 4]);
    // At temperature 2 the weights are e^-1, 1, e^-0.5, 1, e^-1.5.
    let min_p = |min_p, top_p| SamplingParams {
        top_p,
        min_p,
        ..hot.clone()
    };
    assert_eq!(drawn(&min_p(0.5, 1.0), &logits, None), [1, 2, 3]);
    assert_eq!(drawn(&min_p(0.3, 1.0), &logits, None), [0, 1, 2, 3]);
    assert_eq!(drawn(&min_p(1.0, 1.0), &logits, None), [1, 3]);
    // The nucleus is one of what min_p leaves: two of the three have 2 / 2.6.
    assert_eq!(drawn(&min_p(0.5, 0.7), &logits, None), [1, 3]);
}

#[test]
fn penalties_count_the_answer_and_repetition_the_prompt_too() {
    let sampled = |change: &dyn Fn(&mut SamplingParams), logits: &[f32]| {
        let mut params = SamplingParams::GREEDY;
        change(&mut params);
        let mut sampler = Sampler::new(params, &[0, 900]);
        for token in [1, 1, 2] {
            sampler.accept(token);
        }
        sampler
            .sample(logits, sampler.accepted(), None)
            .expect("draws")
            .token
    };
    let presence = |params: &mut SamplingParams| params.presence_penalty = 1.0;
    assert_eq!(sampled(&presence, &[2.0, 3.5, 3.2, 2.4]), 1);
    assert_eq!(sampled(&presence, &[2.0, 3.1, 3.3, 2.4]), 3);
    let frequency = |params: &mut SamplingParams| params.frequency_penalty = 1.0;
    assert_eq!(sampled(&frequency, &[2.0, 3.9, 3.2, 2.0]), 2);
    assert_eq!(sampled(&frequency, &[2.5, 3.9, 3.2, 2.0]), 0);
    let repetition = |params: &mut SamplingParams| params.repetition_penalty = 2.0;
    assert_eq!(sampled(&repetition, &[4.0, 4.1, 4.2, 2.2]), 3);
    assert_eq!(sampled(&repetition, &[-1.0, -1.0, -0.8, -1.7]), 2);
    assert_eq!(sampled(&repetition, &[-1.0, -1.0, -0.9, -1.7]), 3);
}

#[test]
fn bias_moves_and_ends_wait_for_their_turn() {
    let biased = SamplingParams {
        logit_bias: vec![(2, 5.0), (7, 100.0)],
        ..SamplingParams::GREEDY
    };
    assert_eq!(first(biased, &[3.0, 1.0, 0.0]), 2);
    let patient = SamplingParams {
        min_tokens: 2,
        end_ids: vec![0, 7],
        ..SamplingParams::GREEDY
    };
    let mut sampler = Sampler::new(patient, &[]);
    let mut at = |index, mask| {
        sampler
            .sample(&[3.0, 1.0, 0.0], index, mask)
            .expect("draws")
            .token
    };
    assert_eq!([at(0, None), at(1, None), at(2, None)], [1, 1, 0]);
    assert_eq!(at(0, Some(&[0b001])), 0, "nothing else is allowed");
}

#[test]
fn logprobs_are_those_of_the_model_whatever_is_drawn() {
    let logits = [0.5, 2.0, -1.0, f32::NEG_INFINITY];
    let expected: Vec<f64> = softmax(&logits, 1.0).into_iter().map(f64::ln).collect();
    let asking = SamplingParams {
        temperature: 0.3,
        logit_bias: vec![(2, 100.0)],
        logprobs: Some(4),
        ..SamplingParams::GREEDY
    };
    let drawn = Sampler::new(asking, &[])
        .sample(&logits, 0, None)
        .expect("draws");
    assert_eq!(drawn.token, 2);
    let close = |logprob: f32, token: usize| (f64::from(logprob) - expected[token]).abs() < 1e-5;
    assert!(close(drawn.logprob.expect("asked"), 2));
    let order: Vec<u32> = drawn.top.iter().map(|(token, _)| *token).collect();
    assert_eq!(order, [1, 0, 2, 3]);
    assert!(
        drawn.top[..3]
            .iter()
            .all(|(token, logprob)| close(*logprob, *token as usize))
    );
    assert_eq!(drawn.top[3].1.to_bits(), NO_CHANCE.to_bits());
}

proptest! {
    #[test]
    fn a_nucleus_holds_only_the_likeliest(
        logits in proptest::collection::vec(-8.0_f32..8.0, 1..900),
        top_p in 0.0_f32..1.0,
        temperature in 0.1_f32..2.0,
        seed in any::<u64>(),
    ) {
        let token = first(params(temperature, top_p, seed), &logits);
        let all = softmax(&logits, temperature);
        let mine = all[token as usize];
        let likelier: f64 = all.iter().filter(|other| **other > mine * (1.0 + 1e-5)).sum();
        prop_assert!(likelier <= f64::from(top_p) + 1e-5);
    }

    #[test]
    fn heads_are_the_beginning_of_the_sorted_row(
        logits in proptest::collection::vec(-3_i8..3, 1..3000),
        count in 0_usize..70,
    ) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        sorted.truncate(count);
        let row = Row::new(&logits).expect("a row");
        prop_assert_eq!(row.head(count), sorted);
    }

    /// No call changes what a later one draws, in whatever order they come.
    #[test]
    fn a_draw_depends_on_its_index_alone(
        logits in proptest::collection::vec(-4.0_f32..4.0, 2..600),
        seed in any::<u64>(),
        top_p in prop_oneof![Just(1.0_f32), Just(0.9)],
        order in Just((0_u32..8).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut forward = Sampler::new(params(1.0, top_p, seed), &[]);
        let expected: Vec<_> = (0..8).map(|index| forward.sample(&logits, index, None)).collect();
        let mut shuffled = Sampler::new(params(1.0, top_p, seed), &[]);
        for index in order {
            let again = shuffled.sample(&logits, index, None);
            prop_assert_eq!(&again, &expected[index as usize]);
        }
    }

    /// What a mask forbids is as if the row did not hold it.
    #[test]
    fn only_allowed_tokens_are_drawn(
        rows in proptest::collection::vec((-4.0_f32..4.0, any::<bool>()), 1..200),
        temperature in prop_oneof![Just(0.0_f32), Just(1.5)],
        top_k in 0_u32..4,
        seed in any::<u64>(),
    ) {
        let logits: Vec<f32> = rows.iter().map(|(logit, _)| *logit).collect();
        let mut mask = vec![0_u32; logits.len().div_ceil(32)];
        let mut forbidden = logits.clone();
        for (token, (_, allowed)) in rows.iter().enumerate() {
            if *allowed {
                mask[token / 32] |= 1 << (token % 32);
            } else {
                forbidden[token] = f32::NEG_INFINITY;
            }
        }
        let params = SamplingParams { top_k, logprobs: Some(2), ..params(temperature, 1.0, seed) };
        let mut sampler = Sampler::new(params, &[]);
        let result = sampler.sample(&logits, 3, Some(&mask));
        if rows.iter().any(|(_, allowed)| *allowed) {
            prop_assert!(rows[result.clone().expect("draws").token as usize].1);
            prop_assert_eq!(result, sampler.sample(&forbidden, 3, None));
        } else {
            prop_assert_eq!(result, Err(SampleError::NothingAllowed));
        }
    }

    #[test]
    fn infinities_do_no_harm(at in 0_usize..5, seed in any::<u64>(), top_p in 0.1_f32..=1.0) {
        let mut logits = [0.0_f32, 1.0, f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY];
        let token = first(params(1.0, top_p, seed), &logits);
        prop_assert!(logits[token as usize].is_finite());
        logits[at] = f32::INFINITY;
        prop_assert_eq!(first(params(1.0, top_p, seed), &logits) as usize, at);
    }
}
