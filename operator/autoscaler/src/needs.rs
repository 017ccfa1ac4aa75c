//! How many groups demand asks for: work, sequences and what queues.

use crate::decision::{BoundBy, Margins};

/// Part of a group that is not worth another one.
const SLACK: f64 = 0.05;

/// What demand is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Inputs {
    /// Demand over 60 s, in replica-equivalents (D60).
    pub demand: f64,
    /// Demand in a cold start (F).
    pub forecast: f64,
    /// What is added to it.
    pub margins: Margins,
    /// Standard deviations of bursts that are added (β).
    pub burst: f64,
    /// Share of a group's capacity that is filled (ρ).
    pub rho: f64,
    /// Sequences in flight, in groups.
    pub slots: f64,
    /// Work that queues now, in replica-seconds (Q).
    pub queue_s: f64,
    /// Ready groups.
    pub ready: f64,
    /// Starting groups.
    pub starting: f64,
    /// Seconds until groups serve.
    pub eta_s: f64,
    /// Seconds in which the queue is to be done then.
    pub drain_queue_s: f64,
}

/// What it asks for, in groups.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Needs {
    /// `max(F / ρ, F + q + β σ)`.
    pub work: f64,
    /// Sequences in flight.
    pub slots: f64,
    /// Demand, and what drains the queue.
    pub backlog: f64,
    /// `Q_L = max(0, Q + (D60 - ready) ETA)`: work that will queue when groups serve that are
    /// asked for now. A burst that is over by then asks for nothing.
    pub queue_later_s: f64,
}

impl Needs {
    /// What demand asks for. It never falls when demand, forecast, sequences or the queue rise.
    pub fn new(of: &Inputs) -> Self {
        let rho = of.rho.max(0.01);
        let with_margins = of.forecast + of.margins.conformal + of.burst * of.margins.burst;
        let queue_later_s = (of.queue_s + (of.demand - of.ready) * of.eta_s).max(0.0);
        // Groups that start drain with what demand leaves them.
        let spare = if of.starting > 0.0 {
            (of.ready + of.starting - of.demand).max(0.0)
        } else {
            0.0
        };
        let drain = (queue_later_s / of.drain_queue_s.max(1.0) - spare).max(0.0);
        Self {
            work: (of.forecast / rho).max(with_margins),
            slots: of.slots,
            backlog: of.demand + drain,
            queue_later_s,
        }
    }

    /// The greatest of the three.
    pub fn raw(&self) -> f64 {
        self.work.max(self.slots).max(self.backlog)
    }

    /// What makes the number wanted: a bound where it cuts, else the greatest of the three.
    pub fn cause(&self, min: u32, max: u32) -> BoundBy {
        if self.raw() - SLACK > f64::from(max) {
            BoundBy::Max
        } else if self.raw() - SLACK <= f64::from(min) - 1.0 {
            BoundBy::Min
        } else if self.work >= self.slots.max(self.backlog) {
            BoundBy::Work
        } else if self.slots >= self.backlog {
            BoundBy::Slots
        } else {
            BoundBy::Backlog
        }
    }
}

/// `clamp(ceil(raw - 0.05), min, max)`; `None` where `raw` is no number.
pub fn want(raw: f64, min: u32, max: u32) -> Option<u32> {
    raw.is_finite()
        .then(|| whole(raw - SLACK).max(min).min(max))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast of a float saturates: below 0 is 0, and max cuts the rest"
)]
fn whole(groups: f64) -> u32 {
    groups.ceil() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        Inputs {
            demand: 4.0,
            forecast: 5.0,
            margins: Margins {
                conformal: 0.3,
                burst: 0.2,
            },
            burst: 1.0,
            rho: 0.8,
            slots: 2.0,
            queue_s: 0.0,
            ready: 6.0,
            starting: 0.0,
            eta_s: 300.0,
            drain_queue_s: 120.0,
        }
    }

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-9, "{got}, expected {expected}");
    }

    #[test]
    fn work_is_filled_to_rho_or_has_its_margins() {
        let needs = Needs::new(&inputs());
        close(needs.work, 6.25);
        assert_eq!(
            (needs.cause(1, 64), want(needs.raw(), 1, 64)),
            (BoundBy::Work, Some(7))
        );
        let wide = Margins {
            conformal: 1.5,
            burst: 0.2,
        };
        close(
            Needs::new(&Inputs {
                margins: wide,
                ..inputs()
            })
            .work,
            6.7,
        );
    }

    #[test]
    fn a_queue_asks_for_groups_only_if_it_is_still_there_when_they_serve() {
        // 400 replica-seconds wait, and two spare groups do 600 of them in a cold start.
        let over = Needs::new(&Inputs {
            queue_s: 400.0,
            ..inputs()
        });
        close(over.queue_later_s, 0.0);
        close(over.backlog, 4.0);
        // With four groups ready nothing is spare: 400 / 120 more.
        let stays = Needs::new(&Inputs {
            queue_s: 400.0,
            ready: 4.0,
            ..inputs()
        });
        close(stays.backlog, 4.0 + 400.0 / 120.0);
        assert_eq!(stays.cause(1, 64), BoundBy::Backlog);
        // Three that start in 100 s have three to spare for it.
        let starts = Inputs {
            queue_s: 400.0,
            ready: 4.0,
            starting: 3.0,
            eta_s: 100.0,
            ..inputs()
        };
        close(Needs::new(&starts).backlog, 4.0 + 400.0 / 120.0 - 3.0);
    }

    #[test]
    fn a_bound_is_named_where_it_cuts() {
        // 6.25 groups, so seven are wanted.
        let needs = Needs::new(&inputs());
        for (min, max, cause) in [
            (1, 7, BoundBy::Work),
            (1, 6, BoundBy::Max),
            (7, 8, BoundBy::Work),
            (8, 9, BoundBy::Min),
        ] {
            assert_eq!(needs.cause(min, max), cause, "within {min} and {max}");
        }
    }

    #[test]
    fn wants_are_whole_and_bounded() {
        assert_eq!(want(3.04, 1, 8), Some(3));
        assert_eq!(want(3.06, 1, 8), Some(4));
        assert_eq!(want(0.0, 1, 8), Some(1));
        assert_eq!(want(1e300, 1, 8), Some(8));
        assert_eq!(want(-4.0, 0, 8), Some(0));
        assert_eq!(want(f64::NAN, 1, 8), None);
        assert_eq!(want(f64::INFINITY, 1, 8), None);
    }
}
