//! Faults and stories of the closed loop, each with the number of groups that must come out.

mod plant;

use llama_autoscaler::decide::State;
use llama_autoscaler::decision::{BoundBy, Freshness, Notice};
use llama_autoscaler::settings::Settings;
use llama_autoscaler::snapshot::Snapshot;
use llama_autoscaler::time::Time;
use plant::{Plant, TICK_S, settings};

/// A plant that has had `demand` for an hour.
fn steady(demand: f64, ready: u32) -> Plant {
    let mut plant = Plant::new(settings(), ready);
    plant.run(3600.0, demand);
    plant
}

#[test]
fn steady_demand_gets_its_groups_and_keeps_them() {
    let mut plant = steady(4.0, 5);
    let settled = plant.log.last().unwrap().1.clone();
    // 4.0 / 0.8 = 5; the SLO is kept, so that rho rises to 0.9 in time: 4.44.
    assert_eq!(settled.desired, 5, "{}", settled.reason);
    let last = plant.run(7200.0, 4.0);
    assert_eq!(
        (last.desired, last.bound_by),
        (5, BoundBy::Work),
        "{}",
        last.reason
    );
    assert!((last.demand.d60 - 4.0).abs() < 0.02, "{last:?}");
    assert!(
        last.reason
            .contains("forecast 4.00 groups in 315 s / rho 0."),
        "{}",
        last.reason
    );
    assert!(last.reason.contains("(learned, "), "{}", last.reason);
    let moves = plant
        .log
        .windows(2)
        .filter(|two| two[0].1.desired != two[1].1.desired);
    assert!(moves.count() <= 4, "it wavers");
}

#[test]
fn everything_silent_at_the_peak_holds_and_then_waits_a_window() {
    let mut plant = steady(4.0, 5);
    let before = plant.log.last().unwrap().1.desired;
    for _ in 0..120 {
        plant.work(0.2);
        let snapshot = Snapshot {
            gateway: None,
            ..without_samples(&plant.snapshot())
        };
        let decision = plant.obey(&snapshot);
        assert_eq!(decision.desired, before, "{}", decision.reason);
    }
    let last = plant.log.last().unwrap().1.clone();
    assert_eq!(
        (last.metrics.state, last.bound_by),
        (Freshness::Stale, BoundBy::Stale)
    );
    assert!(last.notices.contains(&Notice::MetricsStale));
    let back = plant.t;
    while plant.tick(0.2).desired == before {}
    assert!(
        plant.t - back >= 600.0,
        "down {} s after figures were back",
        plant.t - back
    );
    assert!(plant.t - back <= 1200.0);
}

fn without_samples(snapshot: &Snapshot) -> Snapshot {
    let mut snapshot = snapshot.clone();
    for group in &mut snapshot.groups {
        group.sample = None;
    }
    snapshot
}

#[test]
fn yesterdays_number_counts_in_a_long_outage() {
    let mut plant = steady(8.0, 10);
    plant.run(3600.0, 8.0);
    let peak = plant.log.last().unwrap().1.desired;
    plant.run(86_400.0 - 7200.0, 1.0);
    let low = plant.log.last().unwrap().1.desired;
    assert!(low <= 3, "{low}");
    let mut most = 0;
    for _ in 0..600 {
        plant.work(1.0);
        let snapshot = Snapshot {
            gateway: None,
            ..without_samples(&plant.snapshot())
        };
        most = most.max(plant.obey(&snapshot).desired);
    }
    assert!(most >= peak - 1, "{most}, {peak} the day before");
}

#[test]
fn a_silent_leader_of_four_freezes_down_but_not_up() {
    let mut plant = steady(2.6, 4);
    assert_eq!(plant.log.last().unwrap().1.desired, 4);
    for tick in 0..200 {
        plant.work(if tick < 160 { 0.5 } else { 6.0 });
        let mut snapshot = plant.snapshot();
        snapshot.groups[0].sample = None;
        let decision = plant.obey(&snapshot);
        assert!(decision.desired >= 4, "{}", decision.reason);
        if decision.ready == 4 {
            assert_eq!(decision.metrics.state, Freshness::Partial);
        }
    }
    assert!(plant.log.last().unwrap().1.desired > 6);
}

#[test]
fn a_gateway_that_is_gone_is_made_up_for_by_the_engines() {
    let mut plant = steady(4.0, 5);
    for _ in 0..240 {
        plant.work(4.0);
        let decision = plant.obey(&Snapshot {
            gateway: None,
            ..plant.snapshot()
        });
        assert_eq!(decision.desired, 5, "{}", decision.reason);
        assert!(
            (decision.demand.d60 - 4.0).abs() < 0.1,
            "{:?}",
            decision.demand
        );
    }
    let without = Settings {
        gateway: false,
        ..settings()
    };
    let mut plant = Plant::new(without, 5);
    for _ in 0..720 {
        plant.work(4.0);
        plant.obey(&Snapshot {
            gateway: None,
            ..plant.snapshot()
        });
    }
    assert_eq!(plant.log.last().unwrap().1.desired, 5);
}

#[test]
fn counters_that_start_anew_change_nothing() {
    let mut plant = steady(4.0, 5);
    let base = plant.snapshot();
    for tick in 0..240 {
        plant.work(4.0);
        let mut snapshot = plant.snapshot();
        // The first leader and the gateway restarted: their counts begin at 0.
        if tick > 20 {
            let (was, is) = (
                base.groups[0].sample.unwrap(),
                &mut snapshot.groups[0].sample,
            );
            let is = is.as_mut().unwrap();
            let less =
                |is: &mut Option<f64>, was: Option<f64>| *is = Some(is.unwrap() - was.unwrap());
            less(&mut is.steps_total, was.steps_total);
            less(&mut is.prompt_tokens_total, was.prompt_tokens_total);
            less(&mut is.generation_tokens_total, was.generation_tokens_total);
            less(&mut is.finished_total, was.finished_total);
            let was = base.gateway.unwrap();
            let is = snapshot.gateway.as_mut().unwrap();
            less(&mut is.requests_total, was.requests_total);
            less(&mut is.prompt_tokens_total, was.prompt_tokens_total);
        }
        let decision = plant.obey(&snapshot);
        assert_eq!(decision.desired, 5, "{}", decision.reason);
        assert!(
            (decision.demand.d60 - 4.0).abs() < 0.3,
            "{:?}",
            decision.demand
        );
    }
}

#[test]
fn an_operator_that_restarts_all_ten_minutes_never_lowers() {
    let mut plant = steady(4.0, 5);
    for tick in 0..1200 {
        if tick % 120 == 0 {
            plant.state = State::default();
        }
        let decision = plant.tick(0.3);
        assert_eq!(decision.desired, 5, "{}", decision.reason);
    }
}

#[test]
fn a_clock_that_jumps_lowers_nothing_for_a_window() {
    for jump in [7200.0, -7200.0] {
        let mut plant = steady(4.0, 5);
        plant.t += jump;
        let jumped = plant.t;
        while plant.t < jumped + 600.0 {
            let decision = plant.tick(0.3);
            assert_eq!(decision.desired, 5, "{}", decision.reason);
        }
        assert!(plant.run(1800.0, 0.3).desired < 5);
    }
}

#[test]
fn groups_that_never_start_are_not_asked_for_again_and_again() {
    for pending in [true, false] {
        let mut plant = steady(1.5, 2);
        (plant.starts_work, plant.pending) = (false, pending);
        let mut wanted = Vec::new();
        while plant.t < 3600.0 + 5400.0 {
            let decision = plant.tick(15.0);
            if wanted.last() != Some(&decision.desired) {
                wanted.push(decision.desired);
            }
        }
        // At once to what the limit on additions allows, then no further.
        let last = plant.log.last().unwrap().1.clone();
        assert!(*wanted.last().unwrap() <= 12, "{wanted:?}");
        assert_eq!(last.bound_by, BoundBy::Unschedulable, "{}", last.reason);
        assert!(
            last.notices
                .iter()
                .any(|n| matches!(n, Notice::Unschedulable { .. }))
        );
    }
}

#[test]
fn a_burst_asks_for_what_it_needs_once() {
    // Tenfold for ten minutes; groups take five to start.
    let mut plant = Plant::new(
        Settings {
            max: 200,
            max_surge: Some(200),
            ..settings()
        },
        4,
    );
    plant.run(3600.0, 2.0);
    plant.run(600.0, 20.0);
    let most = plant.log.iter().map(|(_, d)| d.desired).max().unwrap();
    // 20 for the work and (20 - 3) * 315 / 120 for what queues in a cold start: 65.
    assert!((20..=80).contains(&most), "{most}");
    plant.run(600.0, 20.0);
    plant.run(1200.0, 2.0);
    let later = plant.log.iter().map(|(_, d)| d.desired).max().unwrap();
    assert!(later <= 80, "{later}");
    plant.run(7200.0, 2.0);
    assert!(plant.log.last().unwrap().1.desired <= 5);
}

#[test]
fn starts_that_take_three_times_as_long_are_learned_and_not_made_up_for() {
    let mut plant = steady(2.0, 3);
    plant.cold_start_s = 900.0;
    plant.run(1800.0, 4.0);
    let most = plant.log.iter().map(|(_, d)| d.desired).max().unwrap();
    // 4 for the work and (4 - 3) * 900 / 120 for what queues until groups serve: 11.5.
    assert!((6..=12).contains(&most), "{most}");
    let last = plant.run(3600.0, 4.0);
    assert!((last.horizon_s - 915.0).abs() < 10.0, "{}", last.horizon_s);
    assert!(plant.log.iter().all(|(_, d)| d.desired <= 12));
}

#[test]
fn a_panic_adds_no_more_than_may_be_added() {
    let mut plant = steady(4.0, 5);
    let burst = plant.run(15.0, 40.0);
    assert_eq!(
        (burst.panic, burst.desired, burst.bound_by),
        (true, 10, BoundBy::Surge)
    );
    assert!(burst.reason.contains("a burst is on"), "{}", burst.reason);
}

#[test]
fn no_room_and_few_gpus_bind() {
    let mut plant = steady(2.0, 3);
    plant.free = Some(1);
    let decision = plant.run(60.0, 8.0);
    assert_eq!(
        (decision.desired, decision.bound_by),
        (4, BoundBy::Quota),
        "{}",
        decision.reason
    );
    let limited = Settings {
        max_gpus: Some(32),
        ..settings()
    };
    let mut plant = Plant::new(limited, 2);
    let decision = plant.run(3600.0, 8.0);
    assert_eq!(
        (decision.desired, decision.bound_by),
        (4, BoundBy::Max),
        "{}",
        decision.reason
    );
}

#[test]
fn a_schedule_raises_the_least_number_at_once() {
    let mut plant = steady(1.0, 2);
    plant.floor = 6;
    let decision = plant.tick(1.0);
    assert_eq!(
        (decision.desired, decision.bound_by),
        (6, BoundBy::Min),
        "{}",
        decision.reason
    );
    plant.run(900.0, 1.0);
    plant.floor = 0;
    assert_eq!(plant.run(300.0, 1.0).desired, 6, "the window");
    assert!(plant.run(3600.0, 1.0).desired <= 2);
}

#[test]
fn an_idle_model_goes_to_zero_and_one_request_brings_it_back() {
    let zero = Settings {
        min: 0,
        ..settings()
    };
    let mut plant = Plant::new(zero, 1);
    plant.run(1200.0, 0.3);
    let quiet = plant.t;
    while plant.tick(0.0).desired == 1 {
        assert!(plant.t < quiet + 1800.0);
    }
    assert!(plant.t >= quiet + 600.0, "{} s of quiet", plant.t - quiet);
    let (_, last) = plant.log.last().unwrap();
    assert_eq!(
        (last.desired, last.bound_by, last.want),
        (0, BoundBy::Idle, Some(0))
    );
    assert_eq!(plant.run(3600.0, 0.0).desired, 0);
    // One request, held until the group serves.
    let one = 1.0 / (plant.service().requests_per_s * TICK_S);
    let decision = plant.tick(one);
    assert_eq!(decision.desired, 1, "{}", decision.reason);
    while plant.ready() == 0 {
        assert_eq!(plant.tick(0.0).desired, 1, "given up while it starts");
    }
    assert_eq!(plant.run(590.0, 0.0).desired, 1);
    assert_eq!(plant.run(1800.0, 0.0).desired, 0);
}

#[test]
fn without_a_live_gateway_nothing_goes_to_zero() {
    let zero = Settings {
        min: 0,
        stabilization_s: Some(60.0),
        ..settings()
    };
    let mut plant = Plant::new(zero, 1);
    plant.run(1200.0, 0.3);
    for _ in 0..1000 {
        plant.work(0.0);
        let decision = plant.obey(&Snapshot {
            gateway: None,
            ..plant.snapshot()
        });
        assert_eq!(decision.desired, 1, "{}", decision.reason);
    }
    // What it did not see may have been requests: idle time begins anew.
    assert_eq!(plant.run(590.0, 0.0).desired, 1);
    assert_eq!(plant.run(60.0, 0.0).desired, 0);
}

#[test]
fn a_recorded_run_gives_the_same_decisions_again() {
    let mut plant = Plant::new(settings(), 2);
    let mut recorded = Vec::new();
    for tick in 0..400 {
        plant.work(if tick < 100 { 1.0 } else { 5.0 });
        let snapshot = plant.snapshot();
        recorded.push((plant.now(), serde_json::to_string(&snapshot).unwrap()));
        plant.obey(&snapshot);
    }
    let mut state = State::default();
    for ((now, text), (_, decision)) in recorded.iter().zip(&plant.log) {
        // The state goes through its text, too, as it would over a restart.
        let kept = serde_json::to_string(&state).unwrap();
        let read: State = serde_json::from_str(&kept).unwrap();
        let snapshot: Snapshot = serde_json::from_str(text).unwrap();
        let (next, again) =
            llama_autoscaler::decide::decide(&plant.settings, &read, &snapshot, *now);
        assert_eq!(again.desired, decision.desired);
        assert_eq!(
            (again.bound_by, again.actions),
            (decision.bound_by, decision.actions)
        );
        // Text keeps all but the last digit of a float.
        assert!((again.raw - decision.raw).abs() < 1e-9);
        state = next;
    }
    let first: Time = recorded[0].0;
    assert!(recorded[399].0.since(first) > 1900.0);
}
