//! The requests, how far each is, and the gateway that holds some of them.

use std::collections::VecDeque;

use super::{Config, QueueBound};
use crate::model::{ADMISSION_SHARE, ServingModel, Slo};
use crate::policy::GatewayMetrics;
use crate::trace::{Request, Trace};

/// How far one request is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Progress {
    /// Answer tokens, but for those since `decoding_since`.
    pub(super) generated: u32,
    /// Rises when the request leaves a group's running ones.
    pub(super) turn: u32,
    /// Step of its group at which it began to decode.
    pub(super) decoding_since: Option<u64>,
    pub(super) first_token_seconds: Option<f64>,
    pub(super) finished_seconds: Option<f64>,
    pub(super) lost: bool,
}

/// Holds requests that no group's queue has room for, first come first served.
#[derive(Debug, Default)]
pub(super) struct Gateway {
    held: VecDeque<usize>,
    held_tokens: u64,
    requests_total: u64,
    prompt_tokens_total: u64,
}

impl Gateway {
    pub(super) fn first(&self) -> Option<usize> {
        self.held.front().copied()
    }
}

#[derive(Debug)]
pub(super) struct Workload<'a> {
    pub(super) requests: &'a [Request],
    pub(super) progress: Vec<Progress>,
    pub(super) gateway: Gateway,
    pub(super) model: &'a ServingModel,
    pub(super) queue: QueueBound,
    pub(super) admission_tokens: u64,
    /// What a router takes an answer to cost, in milliseconds.
    pub(super) answer_ms: f64,
    pub(super) skip_ahead: bool,
    pub(super) unfinished: usize,
    slo: Slo,
}

impl<'a> Workload<'a> {
    pub(super) fn new(trace: &'a Trace, config: &'a Config) -> Self {
        let mix = trace.mix();
        let capacity = config.model.capacity(&mix, config.slo.tpot_seconds);
        let prompt_ms = config.model.prompt_token_ms * (mix.input - mix.cached);
        let work_ms = config.model.work_seconds(&mix, &capacity) * 1000.0;
        Self {
            requests: &trace.requests,
            progress: vec![Progress::default(); trace.requests.len()],
            gateway: Gateway::default(),
            model: &config.model,
            queue: config.queue,
            admission_tokens: crate::count::floor(config.model.kv_tokens as f64 * ADMISSION_SHARE),
            answer_ms: work_ms - prompt_ms,
            skip_ahead: config.skip_ahead,
            unfinished: trace.requests.len(),
            slo: config.slo,
        }
    }

    /// Prompt tokens to calculate before the next answer token comes.
    pub(super) fn prefill_tokens(&self, request: usize) -> u64 {
        let Request { input, cached, .. } = self.requests[request];
        u64::from(input.saturating_sub(cached).max(1)) + u64::from(self.progress[request].generated)
    }

    /// KV tokens that its prompt and what it has of its answer take.
    pub(super) fn held_when_prefilled(&self, request: usize) -> u64 {
        u64::from(self.requests[request].input) + u64::from(self.progress[request].generated)
    }

    /// Whether no group could ever hold it.
    pub(super) fn is_too_large(&self, request: usize) -> bool {
        let Request { input, output, .. } = self.requests[request];
        u64::from(input) + u64::from(output) > self.admission_tokens
    }

    pub(super) fn arrive(&mut self, request: usize) {
        self.gateway.requests_total += 1;
        self.gateway.prompt_tokens_total += u64::from(self.requests[request].input);
    }

    pub(super) fn hold(&mut self, request: usize) {
        self.gateway.held.push_back(request);
        self.gateway.held_tokens += u64::from(self.requests[request].input);
    }

    /// Takes back what a draining group had not begun: it waits first.
    pub(super) fn hold_again(&mut self, requests: Vec<usize>) {
        for request in requests.into_iter().rev() {
            self.gateway.held.push_front(request);
            self.gateway.held_tokens += u64::from(self.requests[request].input);
        }
    }

    /// Takes the first held request out.
    pub(super) fn release_held(&mut self) -> Option<usize> {
        let request = self.gateway.held.pop_front()?;
        self.gateway.held_tokens -= u64::from(self.requests[request].input);
        Some(request)
    }

    /// Notes that it is complete; true if it got what the SLO asks for.
    pub(super) fn finish(&mut self, request: usize, now: f64) -> bool {
        self.progress[request].finished_seconds = Some(now);
        self.unfinished -= 1;
        within_slo(&self.requests[request], &self.progress[request], &self.slo)
    }

    pub(super) fn lose(&mut self, request: usize) {
        self.progress[request].lost = true;
        self.unfinished -= 1;
    }

    pub(super) fn gateway_metrics(&self, now: f64) -> GatewayMetrics {
        GatewayMetrics {
            requests_total: self.gateway.requests_total,
            prompt_tokens_total: self.gateway.prompt_tokens_total,
            held: self.gateway.held.len() as u64,
            held_tokens: self.gateway.held_tokens,
            oldest_held_seconds: self
                .gateway
                .first()
                .map(|request| now - self.requests[request].arrival_seconds),
        }
    }
}

/// Seconds to the first token.
fn ttft(request: &Request, progress: &Progress) -> Option<f64> {
    Some(progress.first_token_seconds? - request.arrival_seconds)
}

/// Mean seconds between answer tokens; 0 where there is one token.
fn tpot(request: &Request, progress: &Progress) -> Option<f64> {
    let seconds = progress.finished_seconds? - progress.first_token_seconds?;
    Some(seconds / f64::from(request.output.saturating_sub(1).max(1)))
}

fn within_slo(request: &Request, progress: &Progress, slo: &Slo) -> bool {
    ttft(request, progress).is_some_and(|ttft| ttft <= slo.ttft_limit_seconds(request.input))
        && tpot(request, progress).is_some_and(|tpot| tpot <= slo.tpot_seconds)
}

/// What became of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RequestOutcome {
    /// Seconds to its first token, if it got one.
    pub ttft_seconds: Option<f64>,
    /// Seconds between its tokens, if it got all.
    pub tpot_seconds: Option<f64>,
    /// When it was complete.
    pub finished_seconds: Option<f64>,
    /// It was given up: its group went away, or none could hold it.
    pub lost: bool,
    /// It got what the SLO asks for.
    pub within_slo: bool,
}

impl RequestOutcome {
    pub(super) fn new(request: &Request, progress: &Progress, slo: &Slo) -> Self {
        Self {
            ttft_seconds: ttft(request, progress),
            tpot_seconds: tpot(request, progress),
            finished_seconds: progress.finished_seconds,
            lost: progress.lost,
            within_slo: !progress.lost && within_slo(request, progress, slo),
        }
    }
}
