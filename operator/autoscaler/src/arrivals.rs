//! What arrives: from the gateway's counters, or estimated from the engines where it is silent.

use serde::{Deserialize, Serialize};

use crate::counters::{Counter, Increment, Window};
use crate::decision::Demand;
use crate::fleet::Observed;
use crate::mix::MixEstimate;
use crate::model::{Mix, Service, Slo};
use crate::snapshot::{Gateway, reading};
use crate::time::Time;

/// Share of an answer's time over which the work of decoding is spread.
const LIFE_SHARE: f64 = 0.6;
/// Seconds over which sequences in flight are averaged.
pub const FLIGHT_S: f64 = 30.0;

/// Windows of what arrives and of what is done.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Arrivals {
    gateway_requests: Counter,
    gateway_prompt: Counter,
    requests: Window,
    prompt: Window,
    output: Window,
    in_flight: Window,
}

impl Arrivals {
    /// Takes in a tick; `gateway` only where it can be counted with. `span_s` is the time since
    /// the last tick. Tells how many requests the gateway counted since its last answer.
    pub fn observe(
        &mut self,
        gateway: Option<&Gateway>,
        observed: &Observed,
        (now, span_s): (Time, f64),
        mix: &mut MixEstimate,
        prior: &Mix,
    ) -> f64 {
        if let Some(in_flight) = observed.in_flight {
            self.in_flight.push_value(now, span_s, in_flight);
        }
        if let Some(rates) = observed.rates {
            self.output.push_value(now, span_s, rates.generation);
        }
        for interval in &observed.intervals {
            mix.generated(interval);
        }
        if let Some(gateway) = gateway {
            return self.count(gateway, now, mix, prior);
        }
        if let Some(rates) = observed.rates {
            self.requests.push_value(now, span_s, rates.requests);
            self.prompt.push_value(now, span_s, rates.prompt);
            for interval in &observed.intervals {
                let begun = interval.running.1 - interval.running.0;
                let taken_up = interval.finished.unwrap_or(0.0) + begun;
                if taken_up > 0.0 {
                    mix.arrived(taken_up, interval.prompt);
                }
            }
        }
        0.0
    }

    fn count(&mut self, gateway: &Gateway, now: Time, mix: &mut MixEstimate, prior: &Mix) -> f64 {
        let at = now.before(gateway.age_s);
        let requests = self.gateway_requests.advance(at, gateway.requests_total);
        let prompt = self.gateway_prompt.advance(at, gateway.prompt_tokens_total);
        if let Some(requests) = requests {
            self.requests.push(requests);
            // A gateway that never told tokens: each request counts as the mean one.
            if prompt.is_none() && !self.gateway_prompt.known() {
                let amount = requests.amount * mix.mix(prior).prompt;
                self.prompt.push(Increment { amount, ..requests });
            }
        }
        if let Some(prompt) = prompt {
            self.prompt.push(prompt);
        }
        if let (Some(requests), Some(prompt)) = (requests, prompt)
            && (requests.span_s - prompt.span_s).abs() < 1e-9
        {
            mix.arrived(requests.amount, prompt.amount);
        }
        requests.map_or(0.0, |requests| requests.amount)
    }

    /// Demand over 10 s and over the usual windows, in replica-equivalents:
    /// `D_w = prefill rate(w) b + request rate(max(w, 0.6 O S_itl)) (w(mean) - b I')`. The work
    /// of decoding is spread over an answer's life, so its rate is taken over no less.
    /// `None` while nothing is known of 60 s.
    pub fn demand(
        &self,
        service: &Service,
        mix: &Mix,
        slo: &Slo,
        now: Time,
    ) -> Option<(f64, Demand)> {
        let life_s = LIFE_SHARE * mix.output * slo.itl_ms / 1000.0;
        let decode_s = mix.output * service.output_token_ms / 1000.0;
        let token_s = (1.0 - mix.cache_hit) * service.prompt_token_ms / 1000.0;
        let over = |window_s: f64| {
            let prefill = self.prompt.rate(now, window_s)? * token_s;
            let decode = self.requests.rate(now, window_s.max(life_s))? * decode_s;
            Some(prefill + decode)
        };
        let d60 = over(60.0)?;
        let demand = Demand {
            d15: over(15.0).unwrap_or(d60),
            d60,
            d300: over(300.0).unwrap_or(d60),
        };
        Some((over(10.0).unwrap_or(d60), demand))
    }

    /// Prompt tokens, requests that arrive and output tokens per second, over 60 s.
    pub fn per_second(&self, now: Time) -> (f64, f64, f64) {
        let rate = |window: &Window| window.rate(now, 60.0).unwrap_or(0.0);
        (rate(&self.prompt), rate(&self.requests), rate(&self.output))
    }

    /// Mean of sequences in flight over 30 s.
    pub fn in_flight(&self, now: Time) -> f64 {
        self.in_flight.rate(now, FLIGHT_S).unwrap_or(0.0)
    }
}

/// Requests that wait in engines and in the gateway, and their work in replica-seconds.
pub fn queue(
    gateway: Option<&Gateway>,
    observed: &Observed,
    service: &Service,
    mix: &Mix,
) -> (f64, f64) {
    let held = gateway
        .and_then(|gateway| reading(gateway.held))
        .unwrap_or(0.0);
    let told = gateway.and_then(|gateway| reading(gateway.held_tokens));
    let held_tokens = told.unwrap_or(held * mix.prompt);
    let waiting_tokens = observed.waiting_tokens.0 + observed.waiting_tokens.1 * mix.prompt;
    let tokens = (held_tokens + waiting_tokens) * (1.0 - mix.cache_hit);
    let requests = held + observed.waiting;
    let work_ms =
        tokens * service.prompt_token_ms + requests * mix.output * service.output_token_ms;
    (requests, work_ms / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LLAMA_405B_TP8;

    const MIX: Mix = Mix {
        prompt: 1155.0,
        output: 211.0,
        cache_hit: 0.0,
    };
    const SLO: Slo = Slo {
        ttft_s: 6.0,
        itl_ms: 175.0,
    };

    fn at(seconds: f64) -> Time {
        Time::from_secs(1_000_000.0 + seconds)
    }

    fn service() -> Service {
        Service::new(
            &LLAMA_405B_TP8.coefficients,
            &LLAMA_405B_TP8.limits,
            &SLO,
            &MIX,
        )
    }

    /// Demand of `groups` times what one group can do, for five minutes.
    fn demand(groups: f64, tokens_told: bool) -> Demand {
        let service = service();
        let (mut arrivals, mut mix) = (Arrivals::default(), MixEstimate::default());
        mix.fade(0.0, &MIX);
        for tick in 0..=60 {
            let t = f64::from(tick) * 5.0;
            let requests = groups * service.requests_per_s * t;
            let gateway = Gateway {
                requests_total: Some(requests),
                prompt_tokens_total: tokens_told.then_some(requests * MIX.prompt),
                ..Gateway::default()
            };
            let when = (at(t), 5.0);
            arrivals.observe(Some(&gateway), &Observed::default(), when, &mut mix, &MIX);
        }
        arrivals.demand(&service, &MIX, &SLO, at(300.0)).unwrap().1
    }

    #[test]
    fn demand_is_one_where_one_group_would_be_just_busy() {
        for (groups, told) in [(1.0, true), (3.5, true), (2.0, false)] {
            let demand = demand(groups, told);
            for got in [demand.d15, demand.d60, demand.d300] {
                assert!((got - groups).abs() < 1e-6, "{got}, expected {groups}");
            }
        }
    }

    #[test]
    fn work_that_waits_is_what_its_tokens_cost() {
        let gateway = Gateway {
            held: Some(10.0),
            held_tokens: Some(20_000.0),
            ..Gateway::default()
        };
        let observed = Observed {
            waiting: 2.0,
            waiting_tokens: (0.0, 2.0),
            ..Observed::default()
        };
        let (requests, work_s) = queue(Some(&gateway), &observed, &service(), &MIX);
        assert!((requests - 12.0).abs() < 1e-9);
        // (20000 + 2310) * 0.1163 ms + 12 * 211 * 0.3021 ms
        assert!((work_s - (2.5947 + 0.7650)).abs() < 2e-3, "{work_s}");
    }
}
