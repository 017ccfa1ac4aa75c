//! The arithmetic of KEDA with a Prometheus trigger.

use super::hpa::SYNC_SECONDS;
use super::{Decision, HpaCore, Observation, Policy, hpa};

/// One trigger on running and waiting requests, with KEDA's defaults: an HPA
/// from 1 up, KEDA itself between 0 and 1, and no answer taken for 0
/// (`ignoreNullValues`).
#[derive(Clone, Debug)]
pub struct Keda {
    core: HpaCore,
    threshold: f64,
    min: usize,
    last_active: Option<f64>,
    next_poll: f64,
}

impl Keda {
    const POLLING_SECONDS: f64 = 30.0;
    const COOLDOWN_SECONDS: f64 = 300.0;

    /// So many requests a group; from `min` groups.
    pub fn new(core: HpaCore, threshold: f64, min: usize) -> Self {
        Self {
            core,
            threshold,
            min,
            last_active: None,
            next_poll: 0.0,
        }
    }

    /// Between 0 and 1, at each poll.
    fn poll(&mut self, now: f64, replicas: usize, value: f64) -> usize {
        // What there is at the start was active before it.
        let last_active = *self.last_active.get_or_insert(now);
        if value > 0.0 {
            self.last_active = Some(now);
            return replicas.max(1);
        }
        let cooled = now - last_active >= Self::COOLDOWN_SECONDS;
        if self.min == 0 && cooled { 0 } else { replicas }
    }
}

impl Policy for Keda {
    fn period_seconds(&self) -> f64 {
        SYNC_SECONDS
    }

    fn decide(&mut self, observation: &Observation) -> Decision {
        let now = observation.now_seconds;
        let value = hpa::in_flight(observation).unwrap_or(0.0);
        let mut replicas = observation.replicas;
        if now >= self.next_poll {
            self.next_poll = now + Self::POLLING_SECONDS;
            replicas = self.poll(now, replicas, value);
        }
        // At 0 the HPA is off.
        if replicas > 0 && observation.replicas > 0 {
            let desired = HpaCore::average_value(value, self.threshold, replicas);
            replicas = self.core.apply(now, replicas, Some(desired));
        }
        Decision::replicas(replicas)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::GatewayMetrics;

    /// Decisions every 15 s from `from` to `to`, with a value or without answer.
    fn run(keda: &mut Keda, from: u32, to: u32, start: usize, held: Option<u64>) -> Vec<usize> {
        let mut replicas = start;
        (from..to)
            .step_by(15)
            .map(|at| {
                let observation = Observation {
                    now_seconds: f64::from(at),
                    gateway: held.map(|held| GatewayMetrics {
                        held,
                        ..GatewayMetrics::default()
                    }),
                    replicas,
                    ..Observation::default()
                };
                replicas = keda.decide(&observation).replicas;
                replicas
            })
            .collect()
    }

    #[test]
    fn no_answer_is_zero() {
        let mut keda = Keda::new(HpaCore::new(1, 100), 10.0, 0);
        assert_eq!(run(&mut keda, 0, 60, 8, Some(80)), [8, 8, 8, 8]);
        // Five minutes of stabilisation and of cooldown later all is gone.
        let outage = run(&mut keda, 60, 405, 8, None);
        assert_eq!(outage[..18], [8; 18]);
        assert_eq!(outage.last(), Some(&0));
        // With groups kept, the HPA still goes to its minimum.
        let mut keda = Keda::new(HpaCore::new(1, 100), 10.0, 1);
        run(&mut keda, 0, 60, 8, Some(80));
        assert_eq!(run(&mut keda, 60, 405, 8, None).last(), Some(&1));
    }

    #[test]
    fn activation_waits_for_a_poll_and_gives_one() {
        let mut keda = Keda::new(HpaCore::new(1, 100), 10.0, 0);
        assert_eq!(run(&mut keda, 0, 15, 0, Some(0)), [0]);
        // Polls are at 30 and 60; the HPA takes over once there is one.
        assert_eq!(run(&mut keda, 15, 75, 0, Some(80)), [0, 1, 5, 8]);
    }

    #[test]
    fn what_there_is_at_the_start_stays_for_a_cooldown() {
        let mut keda = Keda::new(HpaCore::new(1, 100), 10.0, 0);
        let wanted = run(&mut keda, 0, 330, 3, Some(0));
        assert_eq!((wanted[19], wanted.last()), (3, Some(&0)));
    }
}
