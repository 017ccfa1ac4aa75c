use std::fs;

use super::*;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn rate(requests: &[Request], from: f64, to: f64) -> f64 {
    let within = requests
        .iter()
        .filter(|request| (from..to).contains(&request.arrival_seconds))
        .count();
    within as f64 / (to - from)
}

#[test]
fn rates_are_replayed_and_arrivals_sampled() {
    let folder = folder(&[(
        "rate.csv",
        "t_s,rate_rps,active_clients\n0,5,2\n600,0,0\n1200,20,3\n",
    )]);
    let path = folder.path().join("rate.csv");
    let requests = sample(&path, &Selection::default()).unwrap();
    assert!((rate(&requests, 0.0, 600.0) - 5.0).abs() < 0.5);
    assert!(rate(&requests, 600.0, 1200.0) < 1e-9);
    assert!((rate(&requests, 1200.0, 1800.0) - 20.0).abs() < 1.0);
    let mix = super::super::Trace {
        requests: requests.clone(),
    }
    .mix();
    assert!((mix.input - 1155.0).abs() < 60.0, "{mix:?}");
    assert!((mix.output - 211.0).abs() < 10.0, "{mix:?}");
    assert_eq!(requests, sample(&path, &Selection::default()).unwrap());
    let other = sample(
        &path,
        &Selection {
            seed: 2,
            ..Selection::default()
        },
    )
    .unwrap();
    assert_ne!(requests, other);
}

/// A slow bursty client keeps its rate when it is scaled down, window by window.
#[test]
fn clients_keep_their_rate_and_their_bursts() {
    // The gaps' coefficient of variation at these shapes is 3.16 and 2.24.
    for (pattern, shape, variation) in [("Gamma", 0.1, 3.162), ("Weibull", 0.5, 2.236)] {
        let windows: Vec<String> = (0..4000)
            .map(|at| format!("{},0.5,{variation},{pattern},{shape},20", at * 600))
            .collect();
        let windows = parse_client(Path::new("made-up.csv"), &windows.join("\n")).unwrap();
        let selection = Selection {
            rate_scale: 0.1,
            ..Selection::default()
        };
        let arrivals = arrivals(&windows, &selection, &mut random::generator(3, 3));
        let expected = 4000.0 * 600.0 * 0.05;
        let count = arrivals.len() as f64;
        assert!(
            (count - expected).abs() < 0.05 * expected,
            "{pattern}: {count}"
        );
        let gaps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let square = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>();
        let got = (square / gaps.len() as f64).sqrt() / mean;
        assert!((got - variation).abs() < 0.15, "{pattern}: {got}");
    }
}

#[test]
fn folders_hold_clients_with_lengths_of_their_own() {
    let folder = folder(&[
        (
            "a-trace.csv",
            "0,1,1,Gamma,1,1\n600,,,,,\n1200,2,1,Weibull,1,0.5\n",
        ),
        (
            "a-dataset.json",
            r#"{"0": {"input_tokens": "{7: 0.5, 9: 0.5}", "output_tokens": "{3: 1.0}"}}"#,
        ),
        (
            "b-trace.csv",
            "0,1,1,Gamma,1,1\n600,0,0,,0,0\n1200,2,1,Gamma,1,0.5\n",
        ),
    ]);
    let requests = sample(folder.path(), &Selection::default()).unwrap();
    assert!((rate(&requests, 0.0, 600.0) - 2.0).abs() < 0.4);
    assert!(rate(&requests, 600.0, 1200.0) < 1e-9);
    assert!((rate(&requests, 1200.0, 1800.0) - 4.0).abs() < 0.5);
    // b has no lengths and gets the fleet's.
    assert!(
        requests
            .iter()
            .all(|request| [7, 9].contains(&request.input) && request.output == 3)
    );

    let lengths = folder.path().join("lengths.json");
    fs::write(
        &lengths,
        r#"{"quantiles": [0, 1], "window_seconds": 900, "clients": {"b": {
            "0": {"input": [100, 200], "output": [1, 1]},
            "900": {"input": [500, 500], "output": [1, 1]}}}}"#,
    )
    .unwrap();
    let selection = Selection {
        lengths: Some(lengths),
        ..Selection::default()
    };
    let requests = sample(folder.path(), &selection).unwrap();
    let of_b: Vec<&Request> = requests
        .iter()
        .filter(|request| request.output == 1)
        .collect();
    assert!(
        of_b.iter()
            .all(|request| if request.arrival_seconds < 900.0 {
                (100..=200).contains(&request.input)
            } else {
                request.input == 500
            })
    );
    assert!(of_b.len() > 1000);
}

#[test]
fn bad_files_are_named() {
    let path = Path::new("made-up");
    for (error, expected) in [
        (
            parse_rates(path, "x\n").unwrap_err(),
            "made-up:1: expected a header t_s,rate_rps, got \"x\"",
        ),
        (
            parse_rates(path, "t_s,rate_rps\n0,1\n0,2\n").unwrap_err(),
            "made-up:3: expected a time after 0, got 0",
        ),
        (
            parse_rates(path, "t_s,rate_rps\n0,-1\n").unwrap_err(),
            "made-up:2: rate: expected a number from 0, got -1",
        ),
        (
            parse_client(path, "0,1,1,Pareto,1,1\n").unwrap_err(),
            "made-up:1: pattern: expected Gamma or Weibull, got \"Pareto\"",
        ),
        (
            parse_client(path, "0,1,1,Gamma\n").unwrap_err(),
            "made-up:1: arg1 is missing",
        ),
        (
            parse_client(path, "0,1,1,Gamma,0,1\n").unwrap_err(),
            "made-up:1: arg1: expected a shape above 0, got 0",
        ),
        (
            parse_dataset(
                path,
                r#"{"0": {"input_tokens": "{5}", "output_tokens": ""}}"#,
            )
            .unwrap_err(),
            "made-up: expected \"tokens: share\", got \"5\"",
        ),
    ] {
        assert_eq!(error.to_string(), expected);
    }
    let empty = folder(&[]);
    let error = sample(empty.path(), &Selection::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("expected files NAME-trace.csv, found none"),
        "{error}"
    );
    let no_lengths = folder(&[("a-trace.csv", "0,1,1,Gamma,1,1\n600,1,1,Gamma,1,1\n")]);
    let error = sample(no_lengths.path(), &Selection::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no client with traffic has token lengths"),
        "{error}"
    );
}
