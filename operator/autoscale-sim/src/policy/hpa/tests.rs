use super::*;
use crate::policy::{GatewayMetrics, GroupMetrics, GroupObservation};

#[test]
fn average_value_is_stuck_at_ten_by_the_tolerance() {
    for (sum, replicas, expected) in [
        (11.0, 10, 10),
        (11.01, 10, 12),
        (12.0, 10, 12),
        (10.0, 9, 10),
        (9.0, 10, 10),
        (8.9, 10, 9),
        (1.0, 0, 1),
        (0.0, 3, 0),
    ] {
        assert_eq!(
            HpaCore::average_value(sum, 1.0, replicas),
            expected,
            "{sum} at {replicas}"
        );
    }
}

/// A queue of 30 at a target of 10 triples what is ready, again and again.
#[test]
fn value_compounds() {
    assert_eq!(HpaCore::value(30.0, 10.0, 2, 2), 6);
    assert_eq!(HpaCore::value(30.0, 10.0, 6, 6), 18);
    assert_eq!(HpaCore::value(30.0, 10.0, 18, 18), 54);
    // It counts what is ready, not what was asked for.
    assert_eq!(HpaCore::value(30.0, 10.0, 2, 6), 6);
    assert_eq!(HpaCore::value(10.9, 10.0, 2, 6), 6);
    assert_eq!(HpaCore::value(25.0, 10.0, 0, 0), 3);
}

#[test]
fn missing_pods_damp_and_never_turn_a_change() {
    for (values, missing, ignored, expected) in [
        // 0.9 of 0.5: 1.8 · 2.
        (vec![0.9, 0.9], 0, 0, Some(4)),
        // Two that load count as nothing: (1.8 / 4) / 0.5 = 0.9 turns the change.
        (vec![0.9, 0.9], 2, 0, Some(4)),
        // One that loads: (1.8 / 3) / 0.5 = 1.2 · 3.
        (vec![0.9, 0.9], 1, 0, Some(4)),
        // Pending pods count as nothing on the way up...
        (vec![0.9, 0.9], 0, 2, Some(4)),
        // ...and not at all on the way down: 0.4 · 2.
        (vec![0.2, 0.2], 0, 2, Some(1)),
        // Missing ones are on target: (0.4 + 1.0) / 4 / 0.5 = 0.7 · 4.
        (vec![0.2, 0.2], 2, 0, Some(3)),
        (vec![0.5, 0.52], 0, 0, Some(4)),
        (vec![], 3, 0, None),
    ] {
        let metric = PodsMetric {
            values,
            missing,
            ignored,
        };
        assert_eq!(HpaCore::pods(&metric, 0.5, 4), expected, "{metric:?}");
    }
}

#[test]
fn up_at_most_four_or_as_many_again_in_15_seconds() {
    let mut core = HpaCore::new(1, 100);
    assert_eq!(core.apply(0.0, 1, Some(50)), 5);
    // Five seconds later the four are still of this period.
    assert_eq!(core.apply(5.0, 5, Some(50)), 5);
    assert_eq!(core.apply(15.0, 5, Some(50)), 10);
    assert_eq!(core.apply(30.0, 10, Some(50)), 20);
    assert_eq!(core.apply(45.0, 20, Some(50)), 40);
    assert_eq!(core.apply(60.0, 40, Some(500)), 80);
    assert_eq!(core.apply(75.0, 80, Some(500)), 100);
}

#[test]
fn down_is_the_greatest_of_five_minutes() {
    let mut core = HpaCore::new(2, 100);
    // The first decision remembers what there is.
    assert_eq!(core.apply(0.0, 9, Some(1)), 9);
    assert_eq!(core.apply(150.0, 9, Some(6)), 9);
    assert_eq!(core.apply(300.0, 9, Some(1)), 9);
    assert_eq!(core.apply(315.0, 9, Some(1)), 6);
    // All at once, but never below the minimum.
    assert_eq!(core.apply(465.0, 6, Some(1)), 2);
}

#[test]
fn an_invalid_metric_changes_nothing() {
    let mut core = HpaCore::new(1, 100);
    assert_eq!(core.apply(0.0, 9, None), 9);
    assert_eq!(core.apply(3000.0, 9, None), 9);
}

fn observation(at: f64, prompts: u64, groups: &[(u64, u64)]) -> Observation {
    Observation {
        now_seconds: at + 15.0,
        scraped_seconds: at,
        groups: groups
            .iter()
            .map(|(id, answers)| GroupObservation {
                id: *id,
                phase: Phase::Ready,
                created_seconds: 0.0,
                ready_seconds: Some(0.0),
                metrics: Some(GroupMetrics {
                    generation_tokens_total: *answers,
                    ..GroupMetrics::default()
                }),
            })
            .collect(),
        gateway: Some(GatewayMetrics {
            prompt_tokens_total: prompts,
            ..Default::default()
        }),
        replicas: groups.len(),
    }
}

#[test]
fn token_rates_are_of_the_last_minute() {
    let mut history = VecDeque::new();
    assert_eq!(
        token_rate(&mut history, &observation(0.0, 0, &[(1, 0)])),
        None
    );
    let rate = token_rate(&mut history, &observation(30.0, 3000, &[(1, 600)])).unwrap();
    assert!((rate - 120.0).abs() < 1e-9);
    // A new group's counter began at nothing.
    let rate = token_rate(
        &mut history,
        &observation(60.0, 6000, &[(1, 1200), (2, 600)]),
    );
    assert!((rate.unwrap() - 130.0).abs() < 1e-9);
    // From 30 to 90: what went before is forgotten, and so is a group that went.
    let rate = token_rate(&mut history, &observation(90.0, 6000, &[(2, 660)])).unwrap();
    assert!((rate - (3000.0 + 660.0) / 60.0).abs() < 1e-9);
    let outage = Observation {
        gateway: None,
        ..observation(105.0, 0, &[])
    };
    assert_eq!(token_rate(&mut history, &outage), None);
}

#[test]
fn the_kv_share_counts_those_that_load_as_missing() {
    let mut seen = observation(0.0, 0, &[(1, 0), (2, 0), (3, 0), (4, 0)]);
    for (group, kv) in seen.groups.iter_mut().zip([500, 400, 0, 900]) {
        group.metrics = Some(GroupMetrics {
            kv_tokens_used: kv,
            ..GroupMetrics::default()
        });
    }
    seen.groups[2].metrics = None;
    seen.groups[2].phase = Phase::Starting;
    seen.groups[3].phase = Phase::Draining;
    assert_eq!(
        kv_shares(&seen, 1000),
        PodsMetric {
            values: vec![0.5, 0.4],
            missing: 1,
            ignored: 0
        }
    );
}
