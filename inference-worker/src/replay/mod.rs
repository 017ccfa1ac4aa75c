//! `llama-worker replay`: recorded traffic against any OpenAI endpoint, and how it was
//! answered.

mod client;
pub mod events;
pub mod trace;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use hyper::Uri;
use llama_contract::FailureCategory;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use self::client::{Answer, Endpoint, RequestError, ask};
use self::trace::{Replayed, TraceFormat};
use crate::failure::Failure;

/// Environment variable with the key that the endpoint asks for.
const KEY_ENV: &str = "OPENAI_API_KEY";
/// Requests that may be open at once when they come by the clock.
const MOST_OPEN: usize = 10_000;

/// Flags of `llama-worker replay`.
#[derive(Args, Clone, Debug)]
pub struct ReplayArgs {
    /// Where the API is: `http://host:port`.
    #[arg(long)]
    pub endpoint: String,
    /// Name that is sent as `model`.
    #[arg(long)]
    pub model: String,
    /// The trace.
    #[arg(long)]
    pub trace: PathBuf,
    /// How it is written.
    #[arg(long, value_enum, default_value = "mooncake")]
    pub format: TraceFormat,
    /// Requests to send, the first of the trace.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// Tokens to which the lengths are scaled, so that nearly all fit.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(16..=10_000_000))]
    pub context: u32,
    /// Keeps so many requests open, in place of sending them by the clock.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub concurrency: Option<u16>,
    /// How many times as fast as recorded they come.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub rate_scale: f64,
    /// Seconds that an answer may take.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub timeout: u32,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err("expected a positive number".to_owned()),
    }
}

/// Replays and reports, as JSON.
///
/// # Errors
/// When the trace cannot be read or the endpoint is none. Requests that fail are counted.
pub fn run(args: &ReplayArgs) -> Result<Value, Failure> {
    let wrong = |message: String| Failure::new(FailureCategory::InvalidConfiguration, message);
    let endpoint = Arc::new(endpoint(args).map_err(wrong)?);
    let path = args.trace.display();
    let text = std::fs::read_to_string(&args.trace)
        .map_err(|error| wrong(format!("read {path}: {error}")))?;
    let (most, context) = (args.requests as usize, args.context as usize);
    let requests = trace::read(&text, args.format, most, context)
        .map_err(|error| wrong(format!("{path}: {error}")))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Failure::from_error(FailureCategory::Internal, &error))?;
    let begun = Instant::now();
    let outcomes = runtime.block_on(replay(args, &endpoint, requests));
    Ok(report(&outcomes, begun.elapsed()))
}

fn endpoint(args: &ReplayArgs) -> Result<Endpoint, String> {
    let expected = || format!("--endpoint={} is not http://host:port", args.endpoint);
    let uri: Uri = args.endpoint.parse().map_err(|_| expected())?;
    let host = uri.host().ok_or_else(expected)?;
    if uri.scheme_str() != Some("http") || uri.path() != "/" {
        return Err(expected());
    }
    Ok(Endpoint {
        host: host.trim_matches(['[', ']']).to_owned(),
        port: uri.port_u16().unwrap_or(80),
        uri: Uri::from_static("/v1/completions"),
        model: args.model.clone(),
        key: std::env::var(KEY_ENV).ok().filter(|key| !key.is_empty()),
        deadline: Duration::from_secs(args.timeout.into()),
    })
}

type Outcome = Result<Answer, RequestError>;

async fn replay(
    args: &ReplayArgs,
    endpoint: &Arc<Endpoint>,
    requests: Vec<Replayed>,
) -> Vec<Outcome> {
    let begun = Instant::now();
    let open = args.concurrency.map_or(MOST_OPEN, usize::from);
    let permits = Arc::new(Semaphore::new(open));
    let mut tasks = Vec::new();
    for request in requests {
        if args.concurrency.is_none() {
            let at = begun + request.at.div_f64(args.rate_scale);
            tokio::time::sleep_until(at.into()).await;
        }
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            break;
        };
        let endpoint = Arc::clone(endpoint);
        tasks.push(tokio::spawn(async move {
            let outcome = ask(&endpoint, &request).await;
            drop(permit);
            outcome
        }));
    }
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap_or(Err(RequestError::Broken)));
    }
    outcomes
}

fn report(outcomes: &[Outcome], took: Duration) -> Value {
    let seconds = took.as_secs_f64();
    let answers: Vec<&Answer> = outcomes.iter().flatten().collect();
    let mut failed = BTreeMap::<String, u64>::new();
    for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        *failed.entry(error.to_string()).or_default() += 1;
    }
    let sum = |of: fn(&Answer) -> u64| answers.iter().map(|answer| of(answer)).sum::<u64>();
    let (prompt, completion) = (
        sum(|answer| answer.prompt_tokens),
        sum(|answer| answer.completion_tokens),
    );
    let between = answers
        .iter()
        .flat_map(|answer| answer.between.iter().copied());
    json!({
        "requests": outcomes.len(),
        "answered": answers.len(),
        "failed": failed,
        "seconds": seconds,
        "prompt_tokens": prompt,
        "cached_tokens": sum(|answer| answer.cached_tokens),
        "completion_tokens": completion,
        "requests_per_second": answers.len() as f64 / seconds,
        "tokens_per_second": (prompt + completion) as f64 / seconds,
        "completion_tokens_per_second": completion as f64 / seconds,
        "time_to_first_token_seconds": quantiles(answers.iter().filter_map(|answer| answer.first)),
        "inter_token_latency_seconds": quantiles(between),
        "request_seconds": quantiles(answers.iter().map(|answer| answer.whole)),
    })
}

fn quantiles(numbers: impl Iterator<Item = f64>) -> Value {
    let mut sorted: Vec<f64> = numbers.collect();
    sorted.sort_by(f64::total_cmp);
    let at = |hundredth: usize| sorted.get(sorted.len().saturating_sub(1) * hundredth / 100);
    json!({"p50": at(50), "p90": at(90), "p99": at(99)})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_failures_are_counted() {
        let answer = |first: f64| Answer {
            first: Some(first),
            between: vec![0.1, 0.3],
            whole: first + 0.4,
            prompt_tokens: 10,
            cached_tokens: 4,
            completion_tokens: 3,
        };
        let outcomes = [
            Ok(answer(0.5)),
            Err(RequestError::Status(429)),
            Ok(answer(0.7)),
            Err(RequestError::Status(429)),
        ];
        let report = report(&outcomes, Duration::from_secs(2));
        assert_eq!(
            (&report["requests"], &report["answered"]),
            (&json!(4), &json!(2))
        );
        assert_eq!(report["failed"], json!({"status 429": 2}));
        assert_eq!(report["tokens_per_second"], json!(13.0));
        assert_eq!(report["cached_tokens"], json!(8));
        assert_eq!(report["time_to_first_token_seconds"]["p50"], json!(0.5));
        assert_eq!(report["inter_token_latency_seconds"]["p99"], json!(0.3));
    }

    #[test]
    fn only_plain_http_is_an_endpoint() {
        let args = |endpoint: &str| ReplayArgs {
            endpoint: endpoint.to_owned(),
            model: "m".to_owned(),
            trace: PathBuf::new(),
            format: TraceFormat::Mooncake,
            requests: 1,
            context: 100,
            concurrency: None,
            rate_scale: 1.0,
            timeout: 1,
        };
        let found = endpoint(&args("http://[::1]:8000")).expect("is one");
        assert_eq!((found.host.as_str(), found.port), ("::1", 8000));
        for wrong in ["localhost:8000", "https://a:1", "http://a:1/v1", ""] {
            assert!(endpoint(&args(wrong)).is_err(), "{wrong}");
        }
    }
}
