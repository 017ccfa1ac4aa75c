//! Puts it together: from what is remembered and seen to how many groups there are to be.

use serde::{Deserialize, Serialize};

use crate::actuate::{Actuation, Ask, Outcome, actions};
use crate::arrivals::{Arrivals, FLIGHT_S, queue};
use crate::decision::{BoundBy, Capacity, Decision, Demand, Freshness, Metrics, Notice};
use crate::fleet::{Fleet, Observed};
use crate::forecast::{Forecast, Forecaster, Method};
use crate::freshness::{STALE_LONG_S, Watch, live};
use crate::learn::Learner;
use crate::mix::MixEstimate;
use crate::model::{Mix, Service};
use crate::needs::{Inputs, Needs, want};
use crate::reason;
use crate::settings::Settings;
use crate::snapshot::{Gateway, Snapshot, reading};
use crate::supply::{Starts, Supply};
use crate::time::Time;
use crate::trim::Trim;

/// Seconds between ticks above which, and below 0 of which, the clock jumped or nobody ticked.
const JUMP_S: f64 = 60.0;
/// Seconds of a cold start's horizon besides the start itself: ticks, scrapes and routing.
const HORIZON_EXTRA_S: f64 = 15.0;
/// Demand over 15 s that is this many times what there is and what is usual is a panic.
const PANIC: f64 = 2.0;
/// Least and greatest stabilisation window in seconds, and cold starts that it spans.
const WINDOW: (f64, f64, f64) = (600.0, 1800.0, 2.0);
/// Seconds without a request for which the last group is kept at least.
const LEAST_IDLE_S: f64 = 600.0;
/// Seconds for which a request at zero keeps a group wanted, if it is not held any more.
const WAKE_S: f64 = 60.0;

/// What is remembered from tick to tick. Without it a new operator starts safely: it keeps what
/// it finds for a stabilisation window.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct State {
    last: Option<Time>,
    engine: String,
    starts: Starts,
    watch: Watch,
    fleet: Fleet,
    arrivals: Arrivals,
    mix: MixEstimate,
    learner: Learner,
    forecaster: Forecaster,
    trim: Trim,
    actuation: Actuation,
    /// When a request was last seen, or could not have been.
    active: Option<Time>,
    /// When a queue last stood while groups started.
    queued: Option<Time>,
}

/// What one tick saw, with what is known of the engine.
struct Tick<'a> {
    settings: &'a Settings,
    snapshot: &'a Snapshot,
    now: Time,
    gateway: Option<&'a Gateway>,
    /// Whether the operator just started or the clock jumped.
    jumped: bool,
    supply: Supply,
    metrics: Metrics,
    observed: Observed,
    mix: Mix,
    service: Service,
}

/// What demand is and asks for.
struct Judged {
    demand: Demand,
    forecast: Forecast,
    needs: Needs,
    inputs: Inputs,
    panic: bool,
    want: Option<u32>,
    min: u32,
    max: u32,
}

/// Decides how many groups there are to be at `now`. The same input gives the same output.
///
/// Settings should have passed [`Settings::check`]; others give a number within `min` and `max`
/// still, though not a sensible one.
pub fn decide(
    settings: &Settings,
    state: &State,
    snapshot: &Snapshot,
    now: Time,
) -> (State, Decision) {
    let mut state = state.clone();
    let tick = state.observe(settings, snapshot, now);
    let idle = state.idle(&tick);
    let judged = state.judge(&tick, idle);
    let outcome = state.actuate(&tick, &judged, idle);
    let decision = state.describe(&tick, &judged, outcome);
    (state, decision)
}

impl State {
    fn observe<'a>(
        &mut self,
        settings: &'a Settings,
        snapshot: &'a Snapshot,
        now: Time,
    ) -> Tick<'a> {
        let (span_s, jumped) = self.resume(now);
        if self.engine != snapshot.engine {
            self.learner = Learner::default();
            self.trim = Trim::default();
            self.engine.clone_from(&snapshot.engine);
        }
        let supply = self.starts.observe(snapshot, settings.cold_start_s, now);
        let metrics = self.watch.assess(snapshot, settings.gateway, now);
        let gateway = live(snapshot.gateway.as_ref());
        let observed = self.fleet.observe(snapshot, now);
        self.mix.fade(span_s, &settings.mix);
        let counted = self.arrivals.observe(
            gateway,
            &observed,
            (now, span_s),
            &mut self.mix,
            &settings.mix,
        );
        let exists = |id: &str| snapshot.groups.iter().any(|group| group.id == id);
        self.learner
            .observe(&settings.prior, &observed.intervals, exists, now);
        self.trim.observe(&observed.intervals, now, span_s);
        let held = gateway
            .and_then(|gateway| reading(gateway.held))
            .unwrap_or(0.0);
        // What cannot be seen may be a request, where a group is there to have it.
        let unseen = gateway.is_none() && supply.current() > 0;
        if counted > 0.0 || held > 0.0 || observed.busy || unseen {
            self.active = Some(now);
        }
        let mix = self.mix.mix(&settings.mix);
        let engine = self.learner.coefficients(&settings.prior);
        let service = Service::new(&engine, &settings.limits, &settings.slo, &mix);
        Tick {
            settings,
            snapshot,
            now,
            gateway,
            jumped,
            supply,
            metrics,
            observed,
            mix,
            service,
        }
    }

    /// Seconds since the last tick, and whether the past cannot be relied on.
    fn resume(&mut self, now: Time) -> (f64, bool) {
        let Some(last) = self.last.replace(now) else {
            return (0.0, true);
        };
        let span_s = now.since(last);
        if last.since(now) > 1.0 {
            *self = Self {
                last: Some(now),
                engine: std::mem::take(&mut self.engine),
                starts: self.starts.without_times(),
                mix: self.mix.clone(),
                learner: self.learner.without_times(),
                trim: self.trim.without_times(),
                actuation: self.actuation.without_times(),
                active: Some(now),
                ..Self::default()
            };
            return (0.0, true);
        }
        (span_s, span_s > JUMP_S)
    }

    /// Whether no group is wanted: at zero as long as no request comes, and with one group when
    /// it had none for long enough. Never while figures are missing.
    fn idle(&self, tick: &Tick<'_>) -> bool {
        let Tick {
            settings,
            supply,
            now,
            ..
        } = tick;
        if settings.min > 0 || tick.snapshot.floor > 0 {
            return false;
        }
        let quiet_s = |since: Option<Time>| since.map_or(f64::INFINITY, |at| now.since(at));
        if supply.current() == 0 && self.actuation.desired().unwrap_or(0) == 0 {
            return quiet_s(self.active) >= WAKE_S;
        }
        let idle_s = settings
            .retention_s
            .max(supply.cold_start_s)
            .max(LEAST_IDLE_S);
        supply.current() <= 1
            && supply.starting == 0
            && tick.gateway.is_some()
            && tick.metrics.state == Freshness::Fresh
            && !tick.jumped
            && self.actuation.settled(window_s(settings, supply), *now)
            && quiet_s(self.active.max(supply.ready_since)) >= idle_s
    }

    fn judge(&mut self, tick: &Tick<'_>, idle: bool) -> Judged {
        let Tick {
            settings,
            supply,
            now,
            service,
            mix,
            ..
        } = tick;
        let max = settings.most();
        let min = if idle { 0 } else { settings.min.max(1) };
        let min = min.max(tick.snapshot.floor).min(max);
        let (waiting, queue_s) = queue(tick.gateway, &tick.observed, service, mix);
        let measured = self.arrivals.demand(service, mix, &settings.slo, *now);
        let measured = measured.filter(|(_, demand)| demand.d60.is_finite());
        let known = measured.is_some() && tick.metrics.state != Freshness::Stale;
        let (d10, demand) = measured.unwrap_or_default();
        let ready = f64::from(supply.ready);
        let waits = tick
            .gateway
            .and_then(|gateway| reading(gateway.oldest_held_s));
        let panic = known
            && (demand.d15 > PANIC * demand.d60.max(ready)
                || waits.is_some_and(|waits| waits > settings.slo.ttft_s));
        let frozen = supply.current() >= max
            || supply.starting > 0
            || tick.metrics.state != Freshness::Fresh;
        let rho = self
            .trim
            .rho(settings.rho, settings.slo_target, frozen, *now);
        let mut forecast = Forecast::default();
        if known {
            let method = Method {
                horizon_s: supply.cold_start_s + HORIZON_EXTRA_S,
                trend: settings.trend,
                quantile: settings.margin_quantile,
                panic,
            };
            forecast = self.forecaster.forecast(&demand, d10, &method, *now);
        }
        let slots = self.slots(tick, waiting);
        let mut inputs = Inputs {
            demand: demand.d60,
            forecast: forecast.expected,
            margins: forecast.margins,
            burst: settings.burst,
            rho,
            slots,
            queue_s,
            ready,
            starting: f64::from(supply.starting),
            eta_s: supply.eta_s,
            drain_queue_s: settings.drain_queue_s,
        };
        if idle {
            // Margins are for demand, and there is none.
            forecast = Forecast::default();
            inputs = Inputs {
                rho,
                ..Inputs::default()
            };
        }
        let needs = Needs::new(&inputs);
        // A request at zero is known of at once, before there are rates.
        let woken = supply.current() == 0 && waiting > 0.0;
        let decidable = (known || woken || idle) && tick.metrics.state != Freshness::Stale;
        let want = want(needs.raw(), min, max).filter(|_| decidable);
        Judged {
            demand,
            forecast,
            needs,
            inputs,
            panic,
            want,
            min,
            max,
        }
    }

    /// Sequences in flight over `κ n*`, in groups. Groups that start for a queue are full until it
    /// is drained, as planned: their sequences then say nothing of demand, and would have as many
    /// groups started again. So they are left out for that long.
    fn slots(&mut self, tick: &Tick<'_>, waiting: f64) -> f64 {
        let Tick {
            settings,
            supply,
            now,
            service,
            ..
        } = tick;
        if supply.starting > 0 && waiting > 0.0 {
            self.queued = Some(*now);
        }
        let drained_s = settings.drain_queue_s + FLIGHT_S;
        let draining = self
            .queued
            .is_some_and(|queued| now.since(queued) < drained_s);
        let slots = self.arrivals.in_flight(*now) / (settings.slots * service.sequences);
        if draining || !slots.is_finite() {
            0.0
        } else {
            slots
        }
    }

    fn actuate(&mut self, tick: &Tick<'_>, judged: &Judged, idle: bool) -> Outcome {
        let Tick {
            settings,
            supply,
            now,
            metrics,
            ..
        } = tick;
        let mut want = judged.want;
        if let Some(want) = want.filter(|_| metrics.state == Freshness::Fresh) {
            self.watch.record(want, *now);
        }
        if metrics.state == Freshness::Stale && now.since(metrics.since) >= STALE_LONG_S {
            let yesterday = self.watch.yesterday(*now);
            want = yesterday.map(|want| want.max(judged.min).min(judged.max));
        }
        let cause = match judged.want {
            None => BoundBy::Stale,
            Some(0) => BoundBy::Idle,
            Some(_) => judged.needs.cause(judged.min, judged.max),
        };
        let ask = Ask {
            want,
            cause,
            min: judged.min,
            max: judged.max,
            free: tick.snapshot.free_groups,
            max_surge: settings.max_surge,
            drain_slots: settings.drain_slots,
            window_s: window_s(settings, supply),
            freshness: metrics.state,
            guard: tick.jumped || judged.panic,
            demand: judged.demand.d60,
            rho: judged.inputs.rho,
            slots: judged.inputs.slots,
            to_zero: idle,
        };
        self.actuation.step(&ask, supply, *now)
    }

    fn describe(&self, tick: &Tick<'_>, judged: &Judged, outcome: Outcome) -> Decision {
        let Tick {
            settings,
            supply,
            now,
            metrics,
            service,
            ..
        } = tick;
        let (prompt, requests, output) = self.arrivals.per_second(*now);
        let mut notices = Vec::new();
        let slow = self.learner.slow(*now);
        if !slow.is_empty() {
            notices.push(Notice::SlowGroups { ids: slow });
        }
        if !supply.stuck.is_empty() {
            notices.push(Notice::Unschedulable {
                ids: supply.stuck.clone(),
            });
        }
        if metrics.state == Freshness::Stale && now.since(metrics.since) >= STALE_LONG_S {
            notices.push(Notice::MetricsStale);
        }
        if let Some((wanted, rule)) = outcome.held {
            notices.push(Notice::ScaleDownBlocked { wanted, rule });
        }
        let mut decision = Decision {
            desired: outcome.desired,
            current: supply.current(),
            ready: supply.ready,
            starting: supply.starting,
            draining: supply.draining,
            bound_by: outcome.bound_by,
            want: judged.want,
            raw: judged.needs.raw(),
            work: judged.needs.work,
            slots: judged.needs.slots,
            backlog: judged.needs.backlog,
            min: judged.min,
            max: judged.max,
            demand: judged.demand,
            forecast: judged.forecast.expected,
            horizon_s: supply.cold_start_s + HORIZON_EXTRA_S,
            trend_per_s: judged.forecast.trend_per_s,
            margins: judged.forecast.margins,
            rho: judged.inputs.rho,
            queue_s: judged.inputs.queue_s,
            queue_later_s: judged.needs.queue_later_s,
            stabilization_s: window_s(settings, supply),
            panic: judged.panic,
            mix: tick.mix,
            prompt_tokens_per_s: prompt,
            output_tokens_per_s: output,
            requests_per_s: requests,
            capacity: Capacity {
                prefill_tokens_per_s: service.prefill_tokens_per_s,
                output_tokens_per_s: service.output_tokens_per_s,
                requests_per_s: service.requests_per_s,
                sequences: service.sequences,
                learned: self.learner.learned(),
                confidence: self.learner.confidence(&settings.prior, service, &tick.mix),
            },
            metrics: *metrics,
            actions: actions(outcome.desired, supply),
            notices,
            reason: String::new(),
        };
        decision.reason = reason::sentence(&decision, settings);
        decision
    }
}

/// `max(600 s, 2 L)`, at most 1800 s, unless it is set.
fn window_s(settings: &Settings, supply: &Supply) -> f64 {
    let (least, most, starts) = WINDOW;
    settings
        .stabilization_s
        .unwrap_or_else(|| (starts * supply.cold_start_s).max(least).min(most))
}
