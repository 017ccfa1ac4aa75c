//! A decision in one sentence, with the numbers that someone on call would ask for.

use crate::decision::{BoundBy, Decision, Freshness, Notice};
use crate::settings::Settings;

/// Says what is to be and why.
pub fn sentence(decision: &Decision, settings: &Settings) -> String {
    let step = format!("{} -> {}", decision.current, decision.desired);
    if decision.metrics.state == Freshness::Stale {
        return format!("{step}: {}", missing(decision));
    }
    let Some(want) = decision.want else {
        return format!("{step}: nothing is known of demand yet");
    };
    let ground = ground(decision, settings);
    let capacity = &decision.capacity;
    let mut parts = vec![
        format!("{step}: {ground} = {:.1}, so {want} wanted", decision.raw),
        format!("bound by {}{}", decision.bound_by.as_str(), limit(decision)),
    ];
    if decision.metrics.state == Freshness::Partial {
        parts.push(missing(decision));
    }
    parts.push(format!(
        "prompts {} tok/s, output {} tok/s, a group does {} and {} ({}, {:.0} % sure)",
        thousands(decision.prompt_tokens_per_s),
        thousands(decision.output_tokens_per_s),
        thousands(capacity.prefill_tokens_per_s),
        thousands(capacity.output_tokens_per_s),
        if capacity.learned {
            "learned"
        } else {
            "assumed"
        },
        100.0 * capacity.confidence,
    ));
    if decision.panic {
        parts.push("a burst is on, nothing goes down".into());
    }
    parts.join("; ")
}

/// What bound the number, in brackets, where its name does not say it all.
fn limit(decision: &Decision) -> String {
    match decision.bound_by {
        BoundBy::Work | BoundBy::Slots | BoundBy::Backlog | BoundBy::Idle => String::new(),
        BoundBy::Min => format!(" (at least {})", decision.min),
        BoundBy::Max => format!(" (at most {})", decision.max),
        BoundBy::Quota => " (no room for more)".into(),
        BoundBy::Surge => " (no more are added within a cold start)".into(),
        BoundBy::Unschedulable => " (groups asked for do not start)".into(),
        BoundBy::Stabilization | BoundBy::Partial | BoundBy::Stale => blocked(decision)
            .map(|rule| format!(" ({rule})"))
            .unwrap_or_default(),
    }
}

/// The formula whose result was the greatest.
fn ground(decision: &Decision, settings: &Settings) -> String {
    if decision.want == Some(0) {
        return "no request".into();
    }
    let Decision {
        work,
        slots,
        backlog,
        ..
    } = decision;
    if *work >= slots.max(*backlog) {
        let forecast = format!(
            "forecast {:.2} groups in {:.0} s",
            decision.forecast, decision.horizon_s
        );
        let margins = decision.margins.conformal + settings.burst * decision.margins.burst;
        if decision.forecast / decision.rho >= decision.forecast + margins {
            return format!("{forecast} / rho {:.2}", decision.rho);
        }
        return format!("{forecast} + margins {margins:.2}");
    }
    if slots >= backlog {
        let most = settings.slots * decision.capacity.sequences;
        return format!("{:.0} requests in flight / {most:.0} a group", slots * most);
    }
    format!(
        "demand {:.2} groups, and {:.0} s of work that will still queue in {:.0} s",
        decision.demand.d60, decision.queue_later_s, decision.horizon_s
    )
}

fn missing(decision: &Decision) -> String {
    let metrics = &decision.metrics;
    format!(
        "figures of {} of {} groups are there, the gateway {}",
        metrics.fresh,
        metrics.expected,
        if metrics.gateway {
            "answers"
        } else {
            "does not answer"
        }
    )
}

fn blocked(decision: &Decision) -> Option<&str> {
    decision.notices.iter().find_map(|notice| match notice {
        Notice::ScaleDownBlocked { rule, .. } => Some(rule.as_str()),
        _ => None,
    })
}

/// `24.1k` for 24100.
fn thousands(number: f64) -> String {
    if number >= 1000.0 {
        format!("{:.1}k", number / 1000.0)
    } else {
        format!("{number:.0}")
    }
}
