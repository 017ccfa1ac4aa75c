//! The engine against what can be calculated by hand.

use super::*;
use crate::model::{Mix, SloLevel};
use crate::policy::{Decision, Observation, Phase, Policy};
use crate::random;
use crate::trace::Request;

/// Wants what a function says, and keeps what it saw.
struct Script<F> {
    period_seconds: f64,
    wants: F,
    seen: Vec<Observation>,
}

impl<F: FnMut(f64) -> usize> Script<F> {
    fn new(period_seconds: f64, wants: F) -> Self {
        Self {
            period_seconds,
            wants,
            seen: Vec::new(),
        }
    }
}

impl<F: FnMut(f64) -> usize> Policy for Script<F> {
    fn period_seconds(&self) -> f64 {
        self.period_seconds
    }

    fn decide(&mut self, observation: &Observation) -> Decision {
        self.seen.push(observation.clone());
        Decision::replicas((self.wants)(observation.now_seconds))
    }
}

fn config() -> Config {
    let model = ServingModel::llama_405b_tp8();
    let slo = model.slo(SloLevel::Standard);
    Config::new(model, slo)
}

fn request(arrival_seconds: f64, input: u32, output: u32) -> Request {
    Request {
        arrival_seconds,
        input,
        cached: 0,
        output,
    }
}

fn run(requests: Vec<Request>, config: &Config) -> Outcome {
    simulate(
        &Trace { requests },
        config,
        &mut Script::new(60.0, |_| config.initial_groups),
    )
}

/// Poisson arrivals of chat-like requests.
fn poisson(seed: u64, rate: f64, seconds: f64) -> Vec<Request> {
    let mut rng = random::generator(seed, 99);
    let mut requests = Vec::new();
    let mut at = random::exponential(&mut rng) / rate;
    while at < seconds {
        let input = crate::count::tokens(random::lognormal(&mut rng, 800.0, 0.8));
        let output = crate::count::tokens(random::lognormal(&mut rng, 150.0, 0.8));
        requests.push(request(at, input, output));
        at += random::exponential(&mut rng) / rate;
    }
    requests
}

fn close(got: f64, expected: f64, share: f64) {
    assert!(
        (got - expected).abs() <= share * expected,
        "got {got}, expected {expected}"
    );
}

#[test]
fn one_request_takes_the_steps_that_it_needs() {
    let outcome = run(vec![request(10.0, 1000, 4)], &config());
    let [result] = outcome.requests[..] else {
        unreachable!()
    };
    // The prompt: 24 + 0.1163·1000. Three steps with 1001, 1002 and 1003
    // tokens of context: 24 + 0.1343 + 0.031·1.001 and so on.
    close(result.ttft_seconds.unwrap(), 0.1403, 1e-9);
    close(
        result.tpot_seconds.unwrap(),
        (24.0 + 0.1343 + 0.031 * 1.002) / 1000.0,
        1e-9,
    );
    assert!(result.within_slo && !result.lost);
    assert_eq!(outcome.steps, 4);
}

#[test]
fn long_prompts_are_cut_into_chunks() {
    let outcome = run(vec![request(0.0, 20_000, 1)], &config());
    // Steps with 8192, 8192 and 3616 tokens.
    close(
        outcome.requests[0].ttft_seconds.unwrap(),
        3.0 * 0.024 + 0.000_116_3 * 20_000.0,
        1e-9,
    );
    assert_eq!(outcome.steps, 3);
}

/// The first decodes when the second comes: its prompt is in the next step,
/// and the first waits for it.
#[test]
fn a_prompt_stretches_the_steps_of_those_that_decode() {
    let outcome = run(
        vec![request(0.0, 1000, 3), request(0.15, 2000, 1)],
        &config(),
    );
    // Step 1 ends at 0.1403, step 2 (decode at 1001) at 0.1403 + 0.0241653.
    let second = 0.1403 + 0.024_165_331;
    let third = second + (24.0 + 0.1163 * 2000.0 + 0.1343 + 0.031 * 1.002) / 1000.0;
    close(
        outcome.requests[1].ttft_seconds.unwrap(),
        third - 0.15,
        1e-9,
    );
    close(outcome.requests[0].finished_seconds.unwrap(), third, 1e-9);
}

#[test]
fn skipping_ahead_changes_nothing() {
    let trace = Trace {
        requests: poisson(5, 9.0, 900.0),
    };
    let mut config = config();
    config.initial_groups = 2;
    config.cold_start_seconds = 60.0;
    // A small cache, so that there are preemptions too.
    config.model.kv_tokens = 40_000;
    let wants = |now: f64| {
        if now < 300.0 {
            2
        } else if now < 600.0 {
            3
        } else {
            1
        }
    };
    let fast = simulate(&trace, &config, &mut Script::new(15.0, wants));
    config.skip_ahead = false;
    let slow = simulate(&trace, &config, &mut Script::new(15.0, wants));
    assert!(fast.preemptions > 0, "no preemption to compare");
    assert_eq!(
        (fast.steps, fast.preemptions),
        (slow.steps, slow.preemptions)
    );
    for (fast, slow) in fast.requests.iter().zip(&slow.requests) {
        assert_eq!(fast.lost, slow.lost);
        let (fast, slow) = (
            fast.finished_seconds.unwrap(),
            slow.finished_seconds.unwrap(),
        );
        assert!((fast - slow).abs() < 1e-6, "{fast} {slow}");
    }
}

/// With as many sequences as the closed form allows, and always enough
/// waiting, a group serves what the closed form says.
#[test]
fn a_saturated_group_serves_its_capacity() {
    for (input, output) in [(1155.0, 211.0), (2048.0, 60.0), (400.0, 600.0)] {
        let mut config = config();
        let mix = Mix {
            input,
            cached: 0.0,
            output,
        };
        let capacity = config.model.capacity(&mix, config.slo.tpot_seconds);
        config.model.max_sequences = crate::count::floor(capacity.sequences);
        config.tail_seconds = 1e6;
        let mut rng = random::generator(2, 2);
        // Lengths spread, so that not all finish in the same step.
        let requests = (0..6000)
            .map(|_| {
                let output = output * (0.5 + rand::Rng::random::<f64>(&mut rng));
                request(
                    0.0,
                    crate::count::tokens(input),
                    crate::count::tokens(output),
                )
            })
            .collect();
        let outcome = run(requests, &config);
        close(
            6000.0 / outcome.end_seconds,
            capacity.requests_per_second,
            0.04,
        );
        let mut tpot: Vec<f64> = outcome
            .requests
            .iter()
            .filter_map(|request| request.tpot_seconds)
            .collect();
        tpot.sort_by(f64::total_cmp);
        close(tpot[3000], capacity.step_seconds, 0.05);
    }
}

/// Concurrency at half load: n*·ρ·a / (a + (1 − ρ)·k·n*), far below half of n*.
#[test]
fn concurrency_is_convex_in_load() {
    let config = config();
    for (load, share) in [(0.5, 0.137), (0.7, 0.243)] {
        let probe = Trace {
            requests: poisson(3, 1.0, 5000.0),
        };
        let capacity = config.capacity(&probe);
        let requests = poisson(3, load * capacity.requests_per_second, 5000.0);
        let mut policy = Script::new(5.0, |_| 1);
        simulate(&Trace { requests }, &config, &mut policy);
        let running: Vec<f64> = policy.seen[100..1000]
            .iter()
            .map(|seen| {
                seen.sum(|metrics| metrics.running + metrics.waiting)
                    .unwrap()
            })
            .collect();
        let mean = running.iter().sum::<f64>() / running.len() as f64;
        close(mean / capacity.sequences, share, 0.2);
    }
}

/// What policies see in flight is what the requests' own times say (Little).
#[test]
fn littles_law_holds_between_gauges_and_requests() {
    let requests = poisson(4, 4.0, 4000.0);
    let mut config = config();
    config.scrape_lag_seconds = 0.0;
    let mut policy = Script::new(1.0, |_| 1);
    let trace = Trace { requests };
    let outcome = simulate(&trace, &config, &mut policy);
    let seen: f64 = policy
        .seen
        .iter()
        .filter_map(|seen| {
            let groups = seen.sum(|metrics| metrics.running + metrics.waiting)?;
            Some(groups + seen.gateway?.held as f64)
        })
        .sum();
    let spent: f64 = trace
        .requests
        .iter()
        .zip(&outcome.requests)
        .map(|(request, outcome)| outcome.finished_seconds.unwrap() - request.arrival_seconds)
        .sum();
    close(seen, spent, 0.01);
}

#[test]
fn every_request_finishes_once_or_is_lost_once() {
    let trace = Trace {
        requests: poisson(6, 25.0, 1800.0),
    };
    let mut config = config();
    config.cold_start_seconds = 40.0;
    config.drain_seconds = 5.0;
    config.scrape_lag_seconds = 0.0;
    config.initial_groups = 6;
    // Up and down all the time, so that streams are cut.
    let mut policy = Script::new(1.0, |now| 3 + crate::count::index(now / 30.0) % 5);
    let outcome = simulate(&trace, &config, &mut policy);
    let lost = outcome
        .requests
        .iter()
        .filter(|request| request.lost)
        .count();
    let finished = outcome
        .requests
        .iter()
        .filter(|request| request.finished_seconds.is_some())
        .count();
    assert!(lost > 0 && finished > 0, "{lost} lost, {finished} finished");
    assert_eq!(lost + finished, trace.requests.len());
    assert!(
        outcome
            .requests
            .iter()
            .all(|request| request.lost != request.finished_seconds.is_some())
    );
    // Every group that was made has one life.
    let started: usize = outcome
        .actions
        .iter()
        .map(|action| action.to.saturating_sub(action.from))
        .sum();
    assert_eq!(outcome.groups.len(), config.initial_groups + started);
    // Counters agree with the requests, but for those of a group's last second.
    let mut counted = std::collections::BTreeMap::new();
    for group in policy.seen.iter().flat_map(|seen| &seen.groups) {
        if let Some(metrics) = group.metrics {
            counted.insert(group.id, metrics.finished_total);
        }
    }
    let counted = counted.values().sum::<u64>() as f64;
    close(counted, finished as f64, 0.03);
}

#[test]
fn the_same_seed_gives_the_same_outcome() {
    let trace = Trace {
        requests: poisson(7, 20.0, 1200.0),
    };
    let run = |seed| {
        let config = Config {
            seed,
            initial_groups: 2,
            cold_start_seconds: 100.0,
            ..config()
        };
        simulate(
            &trace,
            &config,
            &mut Script::new(30.0, |now| if now < 100.0 { 2 } else { 6 }),
        )
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

/// Eight wait in the group and the rest at the gateway, where a new group
/// finds them.
#[test]
fn queues_are_bounded_and_new_groups_take_backlog() {
    let mut config = config();
    config.model.max_sequences = 10;
    config.scrape_lag_seconds = 0.0;
    config.cold_start_seconds = 30.0;
    config.cold_start_sigma = 0.0;
    let requests: Vec<Request> = (0..500).map(|_| request(0.0, 100, 500)).collect();
    let mut policy = Script::new(10.0, |now| if now < 20.0 { 1 } else { 2 });
    simulate(&Trace { requests }, &config, &mut policy);
    let metrics = policy.seen[1].groups[0].metrics.unwrap();
    assert_eq!((metrics.running, metrics.waiting), (10, 8));
    let gateway = policy.seen[1].gateway.unwrap();
    assert_eq!((gateway.requests_total, gateway.held), (500, 482));
    assert_eq!(gateway.prompt_tokens_total, 50_000);
    close(gateway.oldest_held_seconds.unwrap(), 10.0, 1e-9);
    // Asked for at 20, ready at 50.
    let second = |at: usize| policy.seen[at].groups[1];
    assert_eq!(
        (second(4).phase, second(4).metrics),
        (Phase::Starting, None)
    );
    assert_eq!(second(6).phase, Phase::Ready);
    assert_eq!(second(6).metrics.unwrap().running, 10);
}

#[test]
fn draining_groups_give_back_what_waits_and_finish_the_rest() {
    let mut config = config();
    config.model.max_sequences = 10;
    config.initial_groups = 2;
    let requests: Vec<Request> = (0..40).map(|_| request(0.0, 100, 100)).collect();
    let trace = Trace { requests };
    let outcome = simulate(
        &trace,
        &config,
        &mut Script::new(1.0, |now| if now < 1.0 { 2 } else { 1 }),
    );
    assert!(outcome.requests.iter().all(|request| !request.lost));
    let drained: Vec<&GroupLife> = outcome
        .groups
        .iter()
        .filter(|life| life.draining_seconds.is_some())
        .collect();
    assert_eq!(drained.len(), 1);
    close(drained[0].draining_seconds.unwrap(), 1.0, 1e-9);
    // Only its ten running ones were left to finish, in some three seconds.
    assert!(drained[0].deleted_seconds < 5.0, "{drained:?}");
    assert!(outcome.end_seconds > 7.0);
}

#[test]
fn what_outlasts_the_drain_is_lost() {
    let mut config = config();
    config.initial_groups = 2;
    config.drain_seconds = 2.0;
    let requests: Vec<Request> = (0..40).map(|_| request(0.0, 100, 400)).collect();
    let wants = |now: f64| if now < 1.0 { 2 } else { 1 };
    let outcome = simulate(&Trace { requests }, &config, &mut Script::new(1.0, wants));
    // What the other group had goes on.
    let lost = outcome
        .requests
        .iter()
        .filter(|request| request.lost)
        .count();
    assert!((1..40).contains(&lost), "{lost}");
    let deleted = outcome
        .groups
        .iter()
        .find(|life| life.draining_seconds.is_some())
        .unwrap();
    close(deleted.deleted_seconds, 3.0, 1e-9);
}

#[test]
fn groups_taken_back_cost_no_cold_start() {
    struct TakesBack;
    impl Policy for TakesBack {
        fn period_seconds(&self) -> f64 {
            1.0
        }
        fn decide(&mut self, observation: &Observation) -> Decision {
            let replicas = if observation.now_seconds.to_bits() == 1.0_f64.to_bits() {
                1
            } else {
                2
            };
            Decision {
                replicas,
                take_back_draining: true,
                cancel_at_most: None,
            }
        }
    }
    let mut config = config();
    config.initial_groups = 2;
    let requests: Vec<Request> = (0..40).map(|_| request(0.0, 100, 400)).collect();
    let outcome = simulate(&Trace { requests }, &config, &mut TakesBack);
    assert_eq!(outcome.groups.len(), 2);
    assert_eq!(outcome.actions.len(), 2);
    assert!(outcome.requests.iter().all(|request| !request.lost));
}

/// Down from two ready and two starting groups to three.
#[test]
fn starting_groups_go_first_unless_they_are_to_stay() {
    struct Down(Option<usize>);
    impl Policy for Down {
        fn period_seconds(&self) -> f64 {
            10.0
        }
        fn decide(&mut self, observation: &Observation) -> Decision {
            let replicas = if observation.now_seconds < 15.0 { 4 } else { 3 };
            Decision {
                cancel_at_most: self.0,
                ..Decision::replicas(replicas)
            }
        }
    }
    for (cancel_at_most, cancelled) in [(None, 1), (Some(1), 1), (Some(0), 0)] {
        let mut config = config();
        config.initial_groups = 2;
        config.cold_start_seconds = 100.0;
        config.cold_start_sigma = 0.0;
        let requests = (0..60).map(|at| request(f64::from(at), 10, 2)).collect();
        let outcome = simulate(&Trace { requests }, &config, &mut Down(cancel_at_most));
        let gone: Vec<&GroupLife> = outcome
            .groups
            .iter()
            .filter(|life| life.deleted_seconds < 30.0)
            .collect();
        assert_eq!(gone.len(), 1);
        let starting = gone
            .iter()
            .filter(|life| life.ready_seconds.is_none())
            .count();
        assert_eq!(starting, cancelled, "{cancel_at_most:?}");
    }
}

#[test]
fn metrics_are_as_old_as_the_lag_and_gone_in_an_outage() {
    let mut config = config();
    config.outage = Some(Outage {
        start_seconds: 60.0,
        duration_seconds: 30.0,
    });
    let requests = (0..120).map(|at| request(f64::from(at), 10, 2)).collect();
    let mut policy = Script::new(5.0, |_| 1);
    simulate(&Trace { requests }, &config, &mut policy);
    let arrived = |at: usize| {
        policy.seen[at]
            .gateway
            .map(|gateway| gateway.requests_total)
    };
    // Before 15 s there is nothing yet; at 40 s what was at 25.
    assert_eq!(
        (arrived(2), arrived(3), arrived(8)),
        (None, Some(1), Some(26))
    );
    assert_eq!(
        (arrived(14), arrived(15), arrived(20), arrived(21)),
        (Some(56), None, None, Some(91))
    );
    assert_eq!(policy.seen[15].groups[0].phase, Phase::Ready);
    assert_eq!(policy.seen[15].groups[0].metrics, None);
}

#[test]
fn what_no_cache_holds_is_lost_at_once() {
    let outcome = run(
        vec![request(0.0, 590_000, 1), request(1.0, 10, 10)],
        &config(),
    );
    assert!(outcome.requests[0].lost && !outcome.requests[1].lost);
}

#[test]
fn cached_prompts_take_no_time() {
    let cached = Request {
        cached: 900,
        ..request(0.0, 1000, 1)
    };
    let requests = vec![cached, request(60.0, 10, 1)];
    let mut policy = Script::new(20.0, |_| 1);
    let outcome = simulate(&Trace { requests }, &config(), &mut policy);
    let metrics = policy.seen[2].groups[0].metrics.unwrap();
    assert_eq!(
        (metrics.prompt_tokens_total, metrics.cached_tokens_total),
        (100, 900)
    );
    close(
        outcome.requests[0].ttft_seconds.unwrap(),
        0.024 + 0.000_116_3 * 100.0,
        1e-9,
    );
}
