//! What happened when, as a picture that needs nothing else.

use std::fmt::Write as _;

use crate::report::{Moment, Report};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const GROUPS_TOP: f64 = 50.0;
const GROUPS_HEIGHT: f64 = 260.0;
const SHARE_TOP: f64 = 360.0;
const SHARE_HEIGHT: f64 = 120.0;
const HEIGHT: f64 = 520.0;

const READY: &str = "#5b8db8";
const STARTING: &str = "#e8b85b";
const DRAINING: &str = "#b8b8b8";
const DEMAND: &str = "#c0392b";
const ATTAINMENT: &str = "#2e7d4f";

/// Groups by phase and demand over time, and below them the share of requests
/// that got what the SLO asks for.
pub fn svg(moments: &[Moment], report: &Report) -> String {
    let top = moments
        .iter()
        .map(|moment| (moment.ready + moment.starting + moment.draining).max(moment.demand))
        .fold(1.0, f64::max);
    let x = |at: f64| LEFT + at / report.duration_seconds.max(1.0) * (WIDTH - LEFT - RIGHT);
    let y = |groups: f64| GROUPS_TOP + GROUPS_HEIGHT * (1.0 - groups / top);
    let mut out = String::new();
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">{}</text>\n",
        escape(&format!(
            "{} at {}, {}: {:.2} % within SLO, {:.0} GPU-hours, {} changes",
            report.policy,
            report.target,
            report.model,
            report.slo_attainment * 100.0,
            report.gpu_hours,
            report.scale_actions
        ))
    );
    legend(&mut out);
    grid(&mut out, top, report.duration_seconds, x, y);
    stacked(&mut out, moments, report.duration_seconds, x, y);
    let demand: Vec<(f64, f64)> = moments
        .iter()
        .map(|moment| (x(moment.at_seconds), y(moment.demand)))
        .collect();
    line(&mut out, &demand, DEMAND);
    shares(&mut out, moments, x);
    out.push_str("</svg>\n");
    out
}

/// The same picture on a page, with the figures.
pub fn html(moments: &[Moment], report: &Report) -> String {
    let title = escape(&format!("{} at {}", report.policy, report.target));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         </head>\n<body style=\"max-width: 960px; margin: 2em auto; font-family: sans-serif\">\n\
         <h1>{title}</h1>\n{}<pre>{}</pre>\n</body></html>\n",
        svg(moments, report),
        escape(&report.to_text())
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn legend(out: &mut String) {
    let mut at = LEFT;
    for (color, name) in [
        (READY, "ready"),
        (STARTING, "starting"),
        (DRAINING, "draining"),
        (DEMAND, "demand (groups at capacity)"),
        (ATTAINMENT, "share of requests within SLO"),
    ] {
        let _ = writeln!(
            out,
            "<rect x=\"{at}\" y=\"30\" width=\"10\" height=\"10\" fill=\"{color}\"/>\
             <text x=\"{}\" y=\"39\">{name}</text>",
            at + 14.0
        );
        at += 30.0 + 7.0 * name.len() as f64;
    }
}

/// A round distance between lines, so that there are seven at most.
fn distance(top: f64, of: &[f64]) -> f64 {
    of.iter()
        .copied()
        .find(|step| top / step <= 7.0)
        .unwrap_or(top)
}

fn grid(
    out: &mut String,
    top: f64,
    duration_seconds: f64,
    x: impl Fn(f64) -> f64,
    y: impl Fn(f64) -> f64,
) {
    let right = WIDTH - RIGHT;
    let mut rule = |at: f64, label: String| {
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    };
    let step = distance(top, &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    let mut groups = 0.0;
    while groups <= top {
        rule(y(groups), format!("{groups}"));
        groups += step;
    }
    for share in [0.0, 0.5, 1.0] {
        rule(
            SHARE_TOP + SHARE_HEIGHT * (1.0 - share),
            format!("{:.0} %", share * 100.0),
        );
    }
    let hours = distance(
        duration_seconds / 3600.0,
        &[0.25, 0.5, 1.0, 2.0, 4.0, 12.0, 24.0, 72.0],
    );
    let mut at = 0.0;
    while at * 3600.0 <= duration_seconds {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{at} h</text>",
            x(at * 3600.0),
            HEIGHT - 16.0
        );
        at += hours;
    }
}

/// Ready, starting and draining groups on top of one another.
fn stacked(
    out: &mut String,
    moments: &[Moment],
    duration_seconds: f64,
    x: impl Fn(f64) -> f64,
    y: impl Fn(f64) -> f64,
) {
    for color in [READY, STARTING, DRAINING] {
        let mut path = String::new();
        let ends = moments
            .iter()
            .skip(1)
            .map(|next| next.at_seconds)
            .chain([duration_seconds]);
        for (moment, end) in moments.iter().zip(ends) {
            let (from, height) = match color {
                READY => (0.0, moment.ready),
                STARTING => (moment.ready, moment.starting),
                _ => (moment.ready + moment.starting, moment.draining),
            };
            if height > 0.0 {
                let (left, right) = (x(moment.at_seconds), x(end));
                let _ = write!(
                    path,
                    "M{left:.1} {:.1}H{right:.1}V{:.1}H{left:.1}Z",
                    y(from),
                    y(from + height)
                );
            }
        }
        let _ = writeln!(out, "<path d=\"{path}\" fill=\"{color}\"/>");
    }
}

fn line(out: &mut String, points: &[(f64, f64)], color: &str) {
    let points: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/>",
        points.join(" ")
    );
}

fn shares(out: &mut String, moments: &[Moment], x: impl Fn(f64) -> f64) {
    // Where nothing arrived there is no share, and a gap in the line.
    for part in moments.split(|moment| moment.attainment.is_none()) {
        let points: Vec<(f64, f64)> = part
            .iter()
            .filter_map(|moment| {
                let y = SHARE_TOP + SHARE_HEIGHT * (1.0 - moment.attainment?);
                Some((x(moment.at_seconds), y))
            })
            .collect();
        if !points.is_empty() {
            line(out, &points, ATTAINMENT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            policy: "a<b".to_owned(),
            target: 0.5,
            model: "made-up".to_owned(),
            requests: 1,
            requests_lost: 0,
            slo_attainment: 1.0,
            gpu_hours: 8.0,
            scale_actions: 0,
            reversals: 0,
            max_groups: 2,
            p50_ttft_seconds: 0.1,
            p99_ttft_seconds: 0.1,
            p99_tpot_seconds: 0.1,
            preemptions: 0,
            duration_seconds: 3600.0,
        }
    }

    #[test]
    fn pictures_are_whole_and_name_nothing_outside() {
        let moment = |at_seconds, attainment| Moment {
            at_seconds,
            ready: 1.0,
            starting: 1.0,
            draining: 0.0,
            demand: 0.7,
            attainment,
        };
        let moments = [
            moment(0.0, Some(1.0)),
            moment(1200.0, None),
            moment(2400.0, Some(0.5)),
        ];
        let page = html(&moments, &report());
        assert!(page.contains("a&lt;b at 0.5"), "{page}");
        assert!(!page.contains("a<b"));
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        // Demand, and attainment in two parts.
        assert_eq!(page.matches("<polyline").count(), 3);
        assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="));
    }
}
