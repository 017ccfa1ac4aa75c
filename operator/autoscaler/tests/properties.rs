//! What must hold whatever comes.

mod plant;

use llama_autoscaler::decide::State;
use llama_autoscaler::decision::{Decision, Freshness, Margins};
use llama_autoscaler::needs::{Inputs, Needs, want};
use llama_autoscaler::settings::Settings;
use llama_autoscaler::snapshot::{Gateway, Sample, Snapshot};
use plant::{Plant, settings};
use proptest::prelude::*;

/// A part of a story: how much comes for how long, and what is seen of it.
#[derive(Debug, Clone)]
struct Part {
    ticks: u32,
    demand: f64,
    gateway: bool,
    /// Leaders that answer: the first so many eighths of them.
    eighths: usize,
    restart: bool,
}

fn part() -> impl Strategy<Value = Part> {
    (
        1..150_u32,
        0.0..20.0_f64,
        prop::bool::weighted(0.9),
        0..=8_usize,
        prop::bool::weighted(0.1),
    )
        .prop_map(|(ticks, demand, gateway, eighths, restart)| Part {
            ticks,
            demand,
            gateway,
            // Mostly all of them.
            eighths: if eighths < 5 { 8 } else { eighths * 2 - 10 },
            restart,
        })
}

fn hide(snapshot: &mut Snapshot, part: &Part) {
    if !part.gateway {
        snapshot.gateway = None;
    }
    let visible = snapshot.groups.len() * part.eighths / 8;
    for group in snapshot.groups.iter_mut().skip(visible) {
        group.sample = None;
    }
}

/// `want` again, from nothing but the decision's own numbers.
fn recomputed(decision: &Decision, settings: &Settings) -> u32 {
    let margins = decision.margins.conformal + settings.burst * decision.margins.burst;
    let work = (decision.forecast / decision.rho).max(decision.forecast + margins);
    assert!((work - decision.work).abs() < 1e-9, "{decision:?}");
    let supply = f64::from(decision.ready + decision.starting);
    let idle = decision.want == Some(0);
    let demand = if idle { 0.0 } else { decision.demand.d60 };
    let spare = if decision.starting > 0 {
        (supply - demand).max(0.0)
    } else {
        0.0
    };
    let drain = (decision.queue_later_s / settings.drain_queue_s - spare).max(0.0);
    assert!(
        (demand + drain - decision.backlog).abs() < 1e-9,
        "{decision:?}"
    );
    let raw = work.max(decision.slots).max(decision.backlog);
    assert!((raw - decision.raw).abs() < 1e-9, "{decision:?}");
    let whole = (raw - 0.05)
        .ceil()
        .max(f64::from(decision.min))
        .min(f64::from(decision.max));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "in range"
    )]
    {
        whole as u32
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_story_keeps_the_rules(
        parts in prop::collection::vec(part(), 1..8),
        min in 0..3_u32,
        max in 3..24_u32,
        ready in 1..12_u32,
    ) {
        let settings = Settings { min, max, ..settings() };
        let mut plant = Plant::new(settings.clone(), ready.min(max));
        let (mut lowered, mut since_restart): (Option<f64>, f64) = (None, 0.0);
        let mut found = plant.ready();
        let mut before: Option<Decision> = None;
        for part in &parts {
            if part.restart {
                plant.state = State::default();
                (before, since_restart) = (None, plant.t);
            }
            for _ in 0..part.ticks {
                plant.work(part.demand);
                let mut snapshot = plant.snapshot();
                hide(&mut snapshot, part);
                let decision = plant.obey(&snapshot);
                let (desired, reason) = (decision.desired, &decision.reason);
                // Within the bounds; to zero only from one.
                prop_assert!(desired >= min && desired <= max, "{reason}");
                prop_assert!(desired >= decision.min && desired <= decision.max, "{reason}");
                // Missing figures lower nothing.
                let was = before.as_ref().map_or(decision.current, |before| before.desired);
                if decision.metrics.state != Freshness::Fresh {
                    prop_assert!(desired >= was, "{was}, then {reason}");
                }
                // A restart keeps what it found for a window.
                if before.is_none() {
                    found = decision.current;
                }
                if plant.t - since_restart < 600.0 {
                    prop_assert!(desired >= found.min(max), "{found} were found, {reason}");
                }
                // After a step down it goes up within a window only if more is wanted.
                if desired < was {
                    lowered = Some(plant.t);
                }
                if desired > was && lowered.is_some_and(|at| plant.t - at < 600.0) {
                    prop_assert!(decision.want.is_none_or(|want| want >= desired), "{reason}");
                }
                // Its numbers explain it.
                if let Some(want) = decision.want {
                    prop_assert_eq!(want, recomputed(&decision, &settings), "{}", reason);
                }
                let actions = decision.actions;
                let after = decision.current + actions.undrain + actions.start;
                prop_assert_eq!(after - actions.cancel - actions.drain, desired, "{}", reason);
                before = Some(decision);
            }
        }
    }

    #[test]
    fn wanted_groups_never_fall_when_demand_rises(
        of in (0.0..30.0_f64, 0.0..30.0_f64, 0.0..3.0_f64, 0.0..3.0_f64, 0.3..1.0_f64),
        rest in (0.0..30.0_f64, 0.0..9000.0_f64, 0..20_u32, 0..20_u32, 10.0..600.0_f64),
        more in (0.0..10.0_f64, 0.0..10.0_f64, 0.0..10.0_f64, 0.0..5000.0_f64),
    ) {
        let inputs = Inputs {
            demand: of.0,
            forecast: of.1,
            margins: Margins { conformal: of.2, burst: of.3 },
            burst: 1.0,
            rho: of.4,
            slots: rest.0,
            queue_s: rest.1,
            ready: f64::from(rest.2),
            starting: f64::from(rest.3),
            eta_s: rest.4,
            drain_queue_s: 120.0,
        };
        let risen = Inputs {
            demand: inputs.demand + more.0,
            forecast: inputs.forecast + more.1,
            slots: inputs.slots + more.2,
            queue_s: inputs.queue_s + more.3,
            ..inputs
        };
        let of = |inputs: &Inputs| want(Needs::new(inputs).raw(), 1, 64);
        prop_assert!(of(&risen) >= of(&inputs));
    }

    #[test]
    fn more_requests_never_want_fewer_groups(
        demands in prop::collection::vec(0.1..6.0_f64, 1..12),
        factor in 1.0..3.0_f64,
    ) {
        // Groups that stay, whatever is decided, so that only demand differs.
        let wants = |scale: f64| {
            let mut plant = Plant::new(settings(), 16);
            let mut wants = Vec::new();
            for demand in &demands {
                for _ in 0..40 {
                    plant.work(demand * scale);
                    let snapshot = plant.snapshot();
                    let (state, decision) = llama_autoscaler::decide::decide(
                        &plant.settings, &plant.state, &snapshot, plant.now(),
                    );
                    plant.state = state;
                    wants.push(decision.want);
                }
            }
            wants
        };
        let (less, more) = (wants(1.0), wants(factor));
        for (tick, (less, more)) in less.iter().zip(&more).enumerate() {
            prop_assert!(more >= less, "tick {}: {:?} for more, {:?} for less", tick, more, less);
        }
    }
}

/// Every series of one leader, of all, or of the gateway, for twelve minutes.
#[test]
fn nan_anywhere_moves_nothing() {
    for demand in [1.3, 5.5] {
        let mut settled = Plant::new(settings(), 8);
        // Long enough for the share that groups are filled to, to have settled.
        settled.run(12_000.0, demand);
        let steady = settled.log.pop().map(|(_, decision)| decision.desired);
        settled.log.clear();
        for series in 0..18 {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
                for everyone in [false, true] {
                    let mut plant = settled.clone();
                    for _ in 0..150 {
                        plant.work(demand);
                        let mut snapshot = plant.snapshot();
                        spoil(&mut snapshot, series, value, everyone);
                        let decision = plant.obey(&snapshot);
                        let reason = &decision.reason;
                        assert_eq!(Some(decision.desired), steady, "{series} {value}: {reason}");
                        assert!(decision.raw.is_finite() && decision.demand.d60.is_finite());
                    }
                }
            }
        }
    }
}

fn spoil(snapshot: &mut Snapshot, series: usize, value: f64, everyone: bool) {
    for (index, group) in snapshot.groups.iter_mut().enumerate() {
        if let Some(sample) = group.sample.as_mut().filter(|_| everyone || index == 0) {
            spoil_sample(sample, series, value);
        }
    }
    if let Some(gateway) = snapshot.gateway.as_mut() {
        spoil_gateway(gateway, series, value);
    }
}

fn spoil_sample(sample: &mut Sample, series: usize, value: f64) {
    match series {
        0 => sample.age_s = value,
        1 => sample.steps_total = Some(value),
        2 => sample.prompt_tokens_total = Some(value),
        3 => sample.cached_tokens_total = Some(value),
        4 => sample.generation_tokens_total = Some(value),
        5 => sample.running = Some(value),
        6 => sample.waiting = Some(value),
        7 => sample.waiting_tokens = Some(value),
        8 => sample.kv_tokens_used = Some(value),
        9 => sample.preemptions_total = Some(value),
        10 => sample.finished_total = Some(value),
        11 => sample.finished_within_slo_total = Some(value),
        _ => {}
    }
}

fn spoil_gateway(gateway: &mut Gateway, series: usize, value: f64) {
    match series {
        12 => gateway.age_s = value,
        13 => gateway.requests_total = Some(value),
        14 => gateway.prompt_tokens_total = Some(value),
        15 => gateway.held = Some(value),
        16 => gateway.held_tokens = Some(value),
        17 => gateway.oldest_held_s = Some(value),
        _ => {}
    }
}
