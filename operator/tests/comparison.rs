//! New revisions whose groups serve and answer worse than those of the old one.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use std::time::Duration;

use llama_contract::AnswersReport;
use llama_crds::v1alpha1::{ConditionType, LlamaDeploymentStatus};
use serde_json::{Value, json};
use support::{Cluster, deployment};

/// A spec of `replicas` groups with `memory` GiB, whose answers are compared.
fn spec(replicas: u32, memory: u32, on_failure: &str) -> Value {
    json!({
        "replicas": replicas,
        "resources": {"memory": format!("{memory}Gi")},
        "rollout": {
            "onFailure": on_failure,
            "rollbackOn": {
                "errorRatePercent": 1, "latencyRegressionPercent": 30, "window": "10m",
            },
        },
    })
}

fn up(spec: &Value) -> Cluster {
    let mut cluster = Cluster::new(deployment(spec));
    cluster.nodes(&[8]);
    cluster.bring_up();
    cluster
}

/// So many answers in the window, of which so many failed, with so many milliseconds to the
/// first token.
fn answers(all: u32, failed: u32, millis: u64) -> AnswersReport {
    let mut report = AnswersReport {
        finished: all - failed,
        failed,
        ..AnswersReport::default()
    };
    for number in 0..u64::from(all - failed) {
        let time = Duration::from_millis(millis + number % 20);
        report.first_token.observe(time);
        report.between_tokens.observe(time / 10);
    }
    report
}

/// Lets `seconds` go by in which first pods tell `old` and `new` by the revision of their
/// group.
fn pass(cluster: &mut Cluster, seconds: u32, was: &str, old: AnswersReport, new: AnswersReport) {
    for _ in 0..seconds.div_ceil(5) {
        cluster.schedule();
        cluster.start();
        cluster.make_ready();
        for (index, revision, serves, _) in cluster.table() {
            if serves {
                let told = if revision == was { old } else { new };
                cluster.tells(&format!("m-{index}-0"), told);
            }
        }
        cluster.settle();
        cluster.advance(5);
        cluster.finish_deletions();
    }
    cluster.settle();
}

fn revision(cluster: &Cluster) -> String {
    cluster.status().current_revision.expect("it serves")
}

fn failure(status: &LlamaDeploymentStatus) -> Option<(String, String)> {
    let rollout = status.rollout.clone()?;
    rollout
        .failure
        .map(|failure| (failure.reason, failure.message))
}

fn on_revision(cluster: &Cluster, revision: &str) -> usize {
    let table = cluster.table();
    table.iter().filter(|group| group.1 == revision).count()
}

#[test]
fn a_revision_that_fails_more_answers_goes_back() {
    let mut cluster = up(&spec(2, 1, "Rollback"));
    let old = revision(&cluster);
    cluster.set(&spec(2, 2, "Rollback"));
    let (good, bad) = (answers(233, 0, 100), answers(240, 12, 100));
    pass(&mut cluster, 120, &old, good, bad);
    let status = cluster.status();
    let new = status.updated_revision.clone().expect("it is known");
    let (reason, message) = failure(&status).expect("given up");
    assert_eq!(reason, "ErrorRateExceeded");
    assert!(
        message.starts_with(&format!("revision {new} failed 12 of 240 answers (5.0 %)")),
        "{message}"
    );
    assert!(message.contains("the limit is 1 %"), "{message}");
    assert_eq!(status.current_revision.as_ref(), Some(&old));
    assert_eq!((on_revision(&cluster, &old), status.ready_replicas), (2, 2));
    let (ready, said) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/RolledBack");
    assert!(said.contains("12 of 240"), "{said}");

    // It stays so when nobody asks the revision any more, until the spec changes.
    pass(&mut cluster, 1200, &old, good, AnswersReport::default());
    assert_eq!(failure(&cluster.status()), Some((reason, message)));
    cluster.set(&spec(2, 3, "Rollback"));
    pass(&mut cluster, 1200, &old, good, good);
    assert_eq!(cluster.status().rollout, None);
    assert_eq!(on_revision(&cluster, &old), 0);
}

#[test]
fn what_the_only_group_answered_before_it_ended_is_remembered() {
    let mut cluster = up(&spec(1, 1, "Pause"));
    let old = revision(&cluster);
    cluster.set(&spec(1, 2, "Pause"));
    let none = AnswersReport::default();
    pass(&mut cluster, 60, &old, answers(300, 0, 100), none);
    assert_eq!(on_revision(&cluster, &old), 0, "it has moved");
    let rollout = cluster.status().rollout.expect("it is watched");
    assert_eq!(rollout.comparison.expect("compared").old.answers, 300);
    let slow = answers(200, 0, 180);
    pass(&mut cluster, 20, &old, none, slow);
    let (reason, message) = failure(&cluster.status()).expect("given up");
    assert_eq!(reason, "LatencyRegression");
    assert!(message.contains("189.5 ms to the first token"), "{message}");
    assert!(message.contains("109.5 ms of 300: 73 % more"), "{message}");
    let (stalled, _) = cluster.condition(ConditionType::Stalled);
    assert_eq!(stalled, "True/LatencyRegression");
    // The group serves on, and the revision is still not what a rollback goes to.
    pass(&mut cluster, 1200, &old, none, slow);
    assert_eq!(revision(&cluster), old);
    assert_eq!(cluster.status().ready_replicas, 1);
    // Who takes the new times for good says so.
    let mut accepted = spec(1, 2, "Pause");
    accepted["rollout"] = json!({});
    cluster.set(&accepted);
    pass(&mut cluster, 10, &old, none, slow);
    assert_eq!(cluster.status().rollout, None);
    assert_ne!(revision(&cluster), old);
}

#[test]
fn a_revision_that_answers_as_well_counts_once_the_window_is_over() {
    let mut cluster = up(&spec(2, 1, "Rollback"));
    let old = revision(&cluster);
    cluster.set(&spec(2, 2, "Rollback"));
    let (good, few) = (answers(233, 1, 100), answers(20, 20, 100));
    // However bad, too few to tell.
    pass(&mut cluster, 300, &old, good, few);
    assert_eq!(on_revision(&cluster, &old), 0, "all have moved");
    let status = cluster.status();
    assert_eq!((failure(&status), revision(&cluster)), (None, old.clone()));
    let rollout = status.rollout.expect("it is watched");
    let said = rollout.message;
    assert!(said.contains("can still be given up"), "{said}");
    assert!(said.contains("failed 40 of 40 answers"), "{said}");
    pass(&mut cluster, 600, &old, good, good);
    assert_eq!(cluster.status().rollout, None);
    assert_ne!(revision(&cluster), old);
}

#[test]
fn nothing_is_compared_where_nobody_asks() {
    let mut cluster = up(&json!({"resources": {"memory": "1Gi"}}));
    let old = revision(&cluster);
    cluster.set(&json!({"resources": {"memory": "2Gi"}}));
    pass(
        &mut cluster,
        60,
        &old,
        answers(233, 0, 100),
        answers(240, 240, 100),
    );
    assert_eq!(cluster.status().rollout, None);
    assert_ne!(revision(&cluster), old);
}
