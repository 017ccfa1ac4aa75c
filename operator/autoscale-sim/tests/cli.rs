//! The program as it is run.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_autoscale-sim"))
        .args(arguments)
        .output()
        .expect("the program runs")
}

fn json_lines(output: &Output) -> Vec<Value> {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout.clone()).expect("text");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

/// Half an hour in which the rate doubles after ten minutes.
fn trace(folder: &Path) -> String {
    let path = folder.join("rate.csv");
    std::fs::write(&path, "t_s,rate_rps\n0,6\n600,12\n1200,12\n").expect("a file");
    path.display().to_string()
}

#[test]
fn a_sweep_is_a_frontier_of_json_lines() {
    let folder = tempfile::tempdir().unwrap();
    let trace = trace(folder.path());
    let arguments = [
        "--trace",
        &trace,
        "--format",
        "servegen",
        "--cold-start",
        "60",
        "--policy",
        "hpa-tokens",
    ];
    let sweep = [arguments.as_slice(), &["--targets", "0.4,0.9"]].concat();
    let first = run(&sweep);
    let reports = json_lines(&first);
    let number = |at: usize, name: &str| reports[at][name].as_f64().unwrap();
    assert_eq!(reports.len(), 2);
    assert!((number(0, "target") - 0.4).abs() < 1e-9);
    for name in [
        "p99_ttft_seconds",
        "p99_tpot_seconds",
        "scale_actions",
        "requests",
        "max_groups",
    ] {
        assert!(number(0, name) > 0.0, "{name}");
    }
    assert!(number(0, "requests_lost").abs() < 1e-9);
    // More room costs more and serves no worse.
    assert!(number(0, "gpu_hours") > number(1, "gpu_hours"));
    assert!(number(0, "slo_attainment") >= number(1, "slo_attainment"));
    assert_eq!(first.stdout, run(&sweep).stdout);
    let single = run(&[arguments.as_slice(), &["--target", "0.9", "--json"]].concat());
    assert_eq!(json_lines(&single)[0], reports[1]);
}

#[test]
fn every_policy_runs_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let trace = trace(folder.path());
    let page = folder.path().join("page.html");
    let picture = folder.path().join("picture.svg");
    for policy in [
        "token",
        "hpa-tokens",
        "hpa-kv",
        "hpa-queue",
        "hpa-queue-value",
        "hpa-concurrency",
        "keda",
        "kpa",
        "kpa-delay",
        "oracle",
        "static",
    ] {
        let output = run(&[
            "--trace",
            &trace,
            "--format",
            "servegen",
            "--policy",
            policy,
            "--model",
            "70b-tp2",
            "--svg",
            &picture.display().to_string(),
            "--html",
            &page.display().to_string(),
        ]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.starts_with(&format!("{policy} at ")),
            "{policy}: {text}"
        );
        assert!(
            std::fs::read_to_string(&picture)
                .unwrap()
                .contains(&format!("{policy} at "))
        );
        assert!(
            std::fs::read_to_string(&page)
                .unwrap()
                .contains("SLO attainment")
        );
    }
}

#[test]
fn a_day_without_requests_brings_keda_to_zero_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.csv");
    let mut text = "TIMESTAMP,ContextTokens,GeneratedTokens\n".to_owned();
    for (hour, minute) in [(0, 0), (0, 1), (6, 0), (6, 1)] {
        let _ = writeln!(text, "2026-01-01 {hour:02}:{minute:02}:00,1000,100");
    }
    std::fs::write(&path, text).unwrap();
    let path = path.display().to_string();
    let base = [
        "--trace", &path, "--format", "azure", "--json", "--min", "0", "--policy",
    ];
    let report = &json_lines(&run(&[base.as_slice(), &["keda"]].concat()))[0];
    // Two times of a few minutes, not six hours, of eight GPUs.
    assert!(report["gpu_hours"].as_f64().unwrap() < 6.0, "{report}");
    assert!(report["requests_lost"].as_u64() == Some(0), "{report}");
    assert!(
        report["p99_ttft_seconds"].as_f64().unwrap() > 60.0,
        "{report}"
    );
    let refused = run(&[base.as_slice(), &["hpa-kv"]].concat());
    assert!(!refused.status.success());
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        message.contains("min: hpa-kv cannot start from 0 groups"),
        "{message}"
    );
}

#[test]
fn bad_input_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad.jsonl");
    std::fs::write(
        &bad,
        "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}\nno\n",
    )
    .unwrap();
    let bad = bad.display().to_string();
    let good = trace(folder.path());
    for (arguments, expected) in [
        (
            vec!["--trace", &bad, "--format", "mooncake"],
            "bad.jsonl:2: expected an object",
        ),
        (
            vec!["--trace", "nowhere.csv", "--format", "azure"],
            "nowhere.csv: No such file",
        ),
        (
            vec!["--trace", &good, "--format", "servegen", "--target", "0"],
            "target: expected a number above 0, got 0",
        ),
        (
            vec![
                "--trace",
                &good,
                "--format",
                "servegen",
                "--rate-scale",
                "0",
            ],
            "--rate-scale: expected a number above 0, got 0",
        ),
        (
            vec!["--trace", &good, "--format", "servegen", "--start", "9000"],
            "no request is left to replay",
        ),
        (
            vec!["--trace", &good, "--format", "servegen", "--outage", "soon"],
            "expected START:SECONDS",
        ),
    ] {
        let output = run(&[arguments.as_slice(), &["--policy", "hpa-tokens"]].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && message.contains(expected),
            "{message}"
        );
    }
}
