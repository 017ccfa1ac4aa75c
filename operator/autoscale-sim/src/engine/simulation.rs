//! The event loop.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use rand::rngs::SmallRng;

use super::group::Group;
use super::workload::Workload;
use super::{Config, GroupLife, Outcome, RequestOutcome, ScaleAction};
use crate::policy::{
    Decision, GatewayMetrics, GroupMetrics, GroupObservation, Observation, Phase, Policy,
};
use crate::random;
use crate::trace::Trace;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    SegmentEnd,
    Ready,
    DrainDeadline,
}

#[derive(Clone, Copy, Debug)]
struct Event {
    at: f64,
    kind: Kind,
    group: usize,
    /// The plan of the group that this event belongs to; for other kinds 0.
    plan: u64,
}

impl Ord for Event {
    /// The earliest is the greatest: what a heap gives first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at).then_with(|| {
            (other.kind, other.group, other.plan).cmp(&(self.kind, self.group, self.plan))
        })
    }
}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Event {}

struct Scrape {
    at: f64,
    groups: Vec<(usize, GroupMetrics)>,
    gateway: GatewayMetrics,
}

struct Simulation<'a> {
    config: &'a Config,
    workload: Workload<'a>,
    groups: Vec<Group>,
    /// Groups that exist, oldest first.
    live: Vec<usize>,
    lives: Vec<GroupLife>,
    wanted: usize,
    actions: Vec<ScaleAction>,
    events: BinaryHeap<Event>,
    scrapes: VecDeque<Scrape>,
    starts: SmallRng,
}

/// Replays a trace against a policy.
pub fn simulate(trace: &Trace, config: &Config, policy: &mut dyn Policy) -> Outcome {
    let mut simulation = Simulation::new(trace, config);
    let end = trace.duration_seconds() + config.tail_seconds;
    let mut next_arrival = 0;
    let mut next_tick = 0.0;
    let mut now = 0.0;
    while simulation.workload.unfinished > 0 {
        let arrival = trace
            .requests
            .get(next_arrival)
            .map_or(f64::INFINITY, |next| next.arrival_seconds);
        let event = simulation
            .events
            .peek()
            .map_or(f64::INFINITY, |event| event.at);
        now = event.min(arrival).min(next_tick);
        if now > end {
            now = end;
            break;
        }
        // Steps end before what comes at the same time.
        if event <= now {
            if let Some(event) = simulation.events.pop() {
                simulation.happen(event);
            }
        } else if arrival <= now {
            simulation.arrive(next_arrival, now);
            next_arrival += 1;
        } else {
            let observation = simulation.observe(now);
            let decision = policy.decide(&observation);
            simulation.scale(&decision, now);
            next_tick += policy.period_seconds();
        }
    }
    simulation.finish(now)
}

impl<'a> Simulation<'a> {
    fn new(trace: &'a Trace, config: &'a Config) -> Self {
        let mut simulation = Self {
            config,
            workload: Workload::new(trace, config),
            groups: Vec::new(),
            live: Vec::new(),
            lives: Vec::new(),
            wanted: config.initial_groups,
            actions: Vec::new(),
            events: BinaryHeap::new(),
            scrapes: VecDeque::new(),
            starts: random::generator(config.seed, 7),
        };
        for _ in 0..config.initial_groups {
            let group = simulation.create(0.0);
            simulation.groups[group].phase = Phase::Ready;
            simulation.groups[group].ready_seconds = Some(0.0);
        }
        simulation
    }

    fn create(&mut self, now: f64) -> usize {
        let group = self.groups.len();
        self.groups.push(Group::new(now));
        self.live.push(group);
        group
    }

    fn start(&mut self, now: f64) {
        let group = self.create(now);
        let seconds = random::lognormal(
            &mut self.starts,
            self.config.cold_start_seconds,
            self.config.cold_start_sigma,
        );
        self.events.push(Event {
            at: now + seconds,
            kind: Kind::Ready,
            group,
            plan: 0,
        });
    }

    fn happen(&mut self, event: Event) {
        let Event {
            at: now,
            kind,
            group,
            plan,
        } = event;
        match kind {
            Kind::SegmentEnd if self.groups[group].plan == plan => {
                self.groups[group].complete(now, &mut self.workload);
                self.begin(group, now);
            }
            Kind::Ready if self.groups[group].phase == Phase::Starting => {
                self.groups[group].phase = Phase::Ready;
                self.groups[group].ready_seconds = Some(now);
                self.begin(group, now);
            }
            Kind::DrainDeadline if self.groups[group].phase == Phase::Draining => {
                // A group that was taken back and drained anew has a later deadline.
                let since = self.groups[group].draining_since;
                if since.is_some_and(|since| since + self.config.drain_seconds <= now) {
                    self.delete(group, now);
                }
            }
            _ => {}
        }
    }

    /// Plans a group's next steps, or deletes it if it is drained.
    fn begin(&mut self, group: usize, now: f64) {
        let first = self.workload.gateway.first();
        self.groups[group].begin(now, &mut self.workload);
        if self.groups[group].phase == Phase::Draining && self.groups[group].is_empty() {
            self.delete(group, now);
        } else {
            self.expect_end(group);
        }
        // Another group may have room for what is first now.
        if self.workload.gateway.first() != first {
            self.dispatch_held(now);
        }
    }

    fn expect_end(&mut self, group: usize) {
        self.groups[group].plan += 1;
        if let Some(at) = self.groups[group].segment_end() {
            let plan = self.groups[group].plan;
            self.events.push(Event {
                at,
                kind: Kind::SegmentEnd,
                group,
                plan,
            });
        }
    }

    fn arrive(&mut self, request: usize, now: f64) {
        self.workload.arrive(request);
        if self.workload.is_too_large(request) {
            self.workload.lose(request);
            return;
        }
        let place = if self.workload.gateway.first().is_some() {
            None
        } else {
            self.place(request)
        };
        match place {
            Some(group) => self.dispatch(request, group, now),
            None => self.workload.hold(request),
        }
    }

    /// The group with the least work of those whose queue takes the request.
    fn place(&self, request: usize) -> Option<usize> {
        let tokens = self.workload.prefill_tokens(request);
        self.live
            .iter()
            .copied()
            .filter(|group| self.groups[*group].has_room(tokens, &self.workload))
            .min_by(|a, b| {
                let work = |group: usize| self.groups[group].work_ms(&self.workload);
                work(*a).total_cmp(&work(*b))
            })
    }

    fn dispatch(&mut self, request: usize, group: usize, now: f64) {
        if self.groups[group].enqueue(request, &self.workload) {
            self.begin(group, now);
        } else if self.groups[group].cut(now) {
            self.expect_end(group);
        }
    }

    /// Gives held requests to groups that have room.
    fn dispatch_held(&mut self, now: f64) {
        while let Some(request) = self.workload.gateway.first() {
            let Some(group) = self.place(request) else {
                return;
            };
            self.workload.release_held();
            self.dispatch(request, group, now);
        }
    }

    fn observe(&mut self, now: f64) -> Observation {
        if !self.config.outage.is_some_and(|outage| outage.covers(now)) {
            self.scrape(now);
        }
        let newest = now - self.config.scrape_lag_seconds;
        while self
            .scrapes
            .get(1)
            .is_some_and(|second| second.at <= newest)
        {
            self.scrapes.pop_front();
        }
        // In an outage there is nothing, not what was scraped before it.
        let scrape = self
            .scrapes
            .front()
            .filter(|scrape| scrape.at <= newest)
            .filter(|_| {
                !self
                    .config
                    .outage
                    .is_some_and(|outage| outage.covers(newest))
            });
        let groups = self
            .live
            .iter()
            .map(|id| {
                let group = &self.groups[*id];
                GroupObservation {
                    id: *id as u64,
                    phase: group.phase,
                    created_seconds: group.created_seconds,
                    ready_seconds: group.ready_seconds,
                    metrics: scrape.and_then(|scrape| {
                        let at = scrape.groups.binary_search_by_key(id, |(id, _)| *id).ok()?;
                        Some(scrape.groups[at].1)
                    }),
                }
            })
            .collect();
        Observation {
            now_seconds: now,
            scraped_seconds: scrape.map_or(0.0, |scrape| scrape.at),
            groups,
            gateway: scrape.map(|scrape| scrape.gateway),
            replicas: self.wanted,
        }
    }

    fn scrape(&mut self, now: f64) {
        let mut groups = Vec::with_capacity(self.live.len());
        for id in &self.live {
            if self.groups[*id].phase != Phase::Starting {
                self.groups[*id].catch_up(now);
                groups.push((*id, self.groups[*id].metrics()));
            }
        }
        let gateway = self.workload.gateway_metrics(now);
        self.scrapes.push_back(Scrape {
            at: now,
            groups,
            gateway,
        });
    }

    fn scale(&mut self, decision: &Decision, now: f64) {
        let wanted = decision
            .replicas
            .clamp(self.config.min_groups, self.config.max_groups);
        if wanted == self.wanted {
            return;
        }
        self.actions.push(ScaleAction {
            at_seconds: now,
            from: self.wanted,
            to: wanted,
        });
        for _ in self.wanted..wanted {
            let draining = self
                .live
                .iter()
                .rev()
                .copied()
                .find(|group| self.groups[*group].phase == Phase::Draining);
            match draining {
                Some(group) if decision.take_back_draining => {
                    self.groups[group].phase = Phase::Ready;
                    self.groups[group].draining_since = None;
                }
                _ => self.start(now),
            }
        }
        let cancel = decision.cancel_at_most.unwrap_or(usize::MAX);
        for removed in 0..self.wanted.saturating_sub(wanted) {
            self.remove_one(now, removed < cancel);
        }
        self.wanted = wanted;
        self.dispatch_held(now);
    }

    /// Removes the newest starting group if that may be, or drains the ready
    /// one with the least work.
    fn remove_one(&mut self, now: f64, cancel: bool) {
        let (live, groups) = (&self.live, &self.groups);
        let of = |phase| {
            live.iter()
                .copied()
                .filter(move |group| groups[*group].phase == phase)
        };
        let starting = of(Phase::Starting).next_back();
        let victim = of(Phase::Ready).min_by(|a, b| {
            let work = |group: usize| self.groups[group].work_ms(&self.workload);
            work(*a).total_cmp(&work(*b))
        });
        if let Some(group) = starting.filter(|_| cancel || victim.is_none()) {
            self.delete(group, now);
            return;
        }
        let Some(group) = victim else { return };
        self.groups[group].catch_up(now);
        let returned = self.groups[group].drain(now, &self.workload);
        self.workload.hold_again(returned);
        if self.groups[group].is_empty() {
            self.delete(group, now);
        } else {
            let at = now + self.config.drain_seconds;
            self.events.push(Event {
                at,
                kind: Kind::DrainDeadline,
                group,
                plan: 0,
            });
        }
    }

    /// Deletes a group's pods; what it still has is lost.
    fn delete(&mut self, group: usize, now: f64) {
        let deleted = &mut self.groups[group];
        self.lives.push(GroupLife {
            created_seconds: deleted.created_seconds,
            ready_seconds: deleted.ready_seconds,
            draining_seconds: deleted.draining_since,
            deleted_seconds: now,
        });
        for request in deleted.abandon(&self.workload) {
            self.workload.lose(request);
        }
        // It takes nothing more, and its events are void.
        let deleted = &mut self.groups[group];
        deleted.phase = Phase::Draining;
        deleted.plan = u64::MAX;
        self.live.retain(|live| *live != group);
    }

    fn finish(mut self, now: f64) -> Outcome {
        for request in 0..self.workload.progress.len() {
            let progress = &self.workload.progress[request];
            if progress.finished_seconds.is_none() && !progress.lost {
                self.workload.lose(request);
            }
        }
        for group in self.live.clone() {
            let draining_seconds = self.groups[group].draining_since;
            self.lives.push(GroupLife {
                created_seconds: self.groups[group].created_seconds,
                ready_seconds: self.groups[group].ready_seconds,
                draining_seconds,
                deleted_seconds: now,
            });
        }
        let total = |of: fn(&GroupMetrics) -> u64| {
            self.groups.iter().map(|group| of(&group.metrics())).sum()
        };
        Outcome {
            requests: self
                .workload
                .requests
                .iter()
                .zip(&self.workload.progress)
                .map(|(request, progress)| RequestOutcome::new(request, progress, &self.config.slo))
                .collect(),
            preemptions: total(|metrics| metrics.preemptions_total),
            steps: total(|metrics| metrics.steps_total),
            groups: self.lives,
            actions: self.actions,
            end_seconds: now,
        }
    }
}
