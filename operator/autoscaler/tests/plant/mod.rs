//! A fluid model of groups behind a gateway: enough to close the loop around `decide`.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "a part of tests, each of which uses some of it"
)]

use llama_autoscaler::decide::{State, decide};
use llama_autoscaler::decision::Decision;
use llama_autoscaler::model::{LLAMA_405B_TP8, Mix, Service};
use llama_autoscaler::settings::Settings;
use llama_autoscaler::snapshot::{Gateway, Group, Phase, Sample, Snapshot};
use llama_autoscaler::time::Time;

/// Means of a chat trace.
pub const MIX: Mix = Mix {
    prompt: 1155.0,
    output: 211.0,
    cache_hit: 0.0,
};
/// Seconds from tick to tick.
pub const TICK_S: f64 = 5.0;
/// Seconds that a draining group stays.
const DRAIN_S: f64 = 60.0;

/// Settings of the tests: up to 32 groups, and requests like those that come.
pub fn settings() -> Settings {
    Settings {
        max: 32,
        mix: MIX,
        ..Settings::default()
    }
}

#[derive(Clone)]
struct Unit {
    id: String,
    phase: Phase,
    until: f64,
    totals: Sample,
}

/// Groups, a gateway, and an autoscaler that is obeyed.
#[derive(Clone)]
pub struct Plant {
    pub settings: Settings,
    pub state: State,
    pub t: f64,
    pub cold_start_s: f64,
    /// Whether groups that are started ever serve.
    pub starts_work: bool,
    /// Whether their pods wait for nodes.
    pub pending: bool,
    pub free: Option<u32>,
    pub floor: u32,
    units: Vec<Unit>,
    made: u32,
    queue: f64,
    gateway: Gateway,
    pub log: Vec<(f64, Decision)>,
}

impl Plant {
    pub fn new(settings: Settings, ready: u32) -> Self {
        let mut plant = Self {
            settings,
            state: State::default(),
            t: 0.0,
            cold_start_s: 300.0,
            starts_work: true,
            pending: false,
            free: None,
            floor: 0,
            units: Vec::new(),
            made: 0,
            queue: 0.0,
            gateway: Gateway {
                age_s: 1.0,
                requests_total: Some(0.0),
                prompt_tokens_total: Some(0.0),
                held: Some(0.0),
                held_tokens: Some(0.0),
                oldest_held_s: None,
            },
            log: Vec::new(),
        };
        for _ in 0..ready {
            plant.start();
        }
        for unit in &mut plant.units {
            unit.phase = Phase::Ready {
                since: Time::from_secs(1_000_000.0 - 3600.0),
            };
        }
        plant
    }

    pub fn now(&self) -> Time {
        Time::from_secs(1_000_000.0 + self.t)
    }

    fn start(&mut self) {
        self.made += 1;
        self.units.push(Unit {
            id: format!("g{:04}", self.made),
            phase: Phase::Starting {
                since: self.now(),
                eta_s: None,
            },
            until: self.t + self.cold_start_s,
            totals: Sample {
                age_s: 2.0,
                steps_total: Some(0.0),
                prompt_tokens_total: Some(0.0),
                cached_tokens_total: Some(0.0),
                generation_tokens_total: Some(0.0),
                running: Some(0.0),
                waiting: Some(0.0),
                waiting_tokens: Some(0.0),
                kv_tokens_used: Some(0.0),
                preemptions_total: Some(0.0),
                finished_total: Some(0.0),
                finished_within_slo_total: Some(0.0),
            },
        });
    }

    pub fn service(&self) -> Service {
        let prior = LLAMA_405B_TP8;
        Service::new(&prior.coefficients, &prior.limits, &self.settings.slo, &MIX)
    }

    pub fn ready(&self) -> u32 {
        let ready = |unit: &&Unit| matches!(unit.phase, Phase::Ready { .. });
        u32::try_from(self.units.iter().filter(ready).count()).unwrap()
    }

    /// What is seen now.
    pub fn snapshot(&self) -> Snapshot {
        let groups = self.units.iter().map(|unit| {
            let starting = matches!(unit.phase, Phase::Starting { .. });
            Group {
                id: unit.id.clone(),
                phase: unit.phase,
                pending: starting && self.pending,
                sample: (!starting).then_some(unit.totals),
            }
        });
        Snapshot {
            groups: groups.collect(),
            gateway: Some(self.gateway),
            free_groups: self.free,
            floor: self.floor,
            engine: "one".into(),
        }
    }

    /// Lets `demand` groups' worth of requests come for a tick.
    pub fn work(&mut self, demand: f64) {
        self.t += TICK_S;
        let now = self.now();
        let service = self.service();
        for unit in &mut self.units {
            if matches!(unit.phase, Phase::Starting { .. })
                && self.starts_work
                && self.t >= unit.until
            {
                unit.phase = Phase::Ready { since: now };
            }
        }
        let t = self.t;
        self.units
            .retain(|unit| !matches!(unit.phase, Phase::Draining) || t < unit.until);
        let arrived = demand * service.requests_per_s * TICK_S;
        let ready = f64::from(self.ready());
        let most = ready * service.requests_per_s * TICK_S;
        let served = (self.queue + arrived).min(most);
        self.queue += arrived - served;
        let grow = |total: &mut Option<f64>, by: f64| *total = Some(total.unwrap() + by);
        grow(&mut self.gateway.requests_total, arrived);
        grow(&mut self.gateway.prompt_tokens_total, arrived * MIX.prompt);
        self.gateway.held = Some(self.queue);
        self.gateway.held_tokens = Some(self.queue * MIX.prompt);
        let wait_s = self.queue / (ready.max(1.0) * service.requests_per_s);
        self.gateway.oldest_held_s = (self.queue > 0.0).then_some(wait_s);
        let load = if most > 0.0 { served / most } else { 0.0 };
        let running = service.sequence_share(load) * service.sequences;
        let own_ms = LLAMA_405B_TP8.coefficients.step_ms;
        let steps = 1000.0 * TICK_S / (own_ms + service.per_sequence_ms * running);
        for unit in &mut self.units {
            if !matches!(unit.phase, Phase::Ready { .. }) {
                unit.totals.running = Some(0.0);
                continue;
            }
            let own = served / ready;
            let totals = &mut unit.totals;
            grow(&mut totals.steps_total, if own > 0.0 { steps } else { 0.0 });
            grow(&mut totals.prompt_tokens_total, own * MIX.prompt);
            grow(&mut totals.generation_tokens_total, own * MIX.output);
            grow(&mut totals.finished_total, own);
            let good = if self.queue > 0.0 { 0.5 } else { 1.0 };
            grow(&mut totals.finished_within_slo_total, own * good);
            totals.running = Some(running);
            totals.kv_tokens_used = Some(running * MIX.context());
        }
    }

    /// Decides on `snapshot` and does as it is told.
    pub fn obey(&mut self, snapshot: &Snapshot) -> Decision {
        let (state, decision) = decide(&self.settings, &self.state, snapshot, self.now());
        self.state = state;
        let actions = decision.actions;
        let until = self.t + DRAIN_S;
        for _ in 0..actions.undrain {
            let now = self.now();
            let draining = |unit: &&mut Unit| matches!(unit.phase, Phase::Draining);
            self.units.iter_mut().find(draining).unwrap().phase = Phase::Ready { since: now };
        }
        for _ in 0..actions.cancel {
            let starting = |unit: &Unit| matches!(unit.phase, Phase::Starting { .. });
            let last = self.units.iter().rposition(starting).unwrap();
            self.units.remove(last);
        }
        for _ in 0..actions.drain {
            let ready = |unit: &&mut Unit| matches!(unit.phase, Phase::Ready { .. });
            let unit = self.units.iter_mut().rfind(ready).unwrap();
            (unit.phase, unit.until) = (Phase::Draining, until);
        }
        for _ in 0..actions.start {
            self.free = self.free.map(|free| free.saturating_sub(1));
            self.start();
        }
        self.log.push((self.t, decision.clone()));
        decision
    }

    /// Work and a decision.
    pub fn tick(&mut self, demand: f64) -> Decision {
        self.work(demand);
        let snapshot = self.snapshot();
        self.obey(&snapshot)
    }

    /// Ticks for `seconds`.
    pub fn run(&mut self, seconds: f64, demand: f64) -> Decision {
        let end = self.t + seconds;
        let mut last = self.tick(demand);
        while self.t < end {
            last = self.tick(demand);
        }
        last
    }
}
