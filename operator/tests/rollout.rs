//! Changes of the spec: what moves first, what waits for room, what halts and goes back.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use k8s_openapi::api::core::v1::{PodCondition, PodStatus};
use llama_contract::FailureCategory;
use llama_crds::v1alpha1::{ConditionType, DrainReason, GroupPhase, RolloutStrategy};
use serde_json::{Value, json};
use support::{Cluster, deployment, report};

/// A spec of `replicas` groups with `memory` GiB and this rollout.
fn spec(replicas: u32, memory: u32, rollout: &Value) -> Value {
    json!({
        "replicas": replicas,
        "resources": {"memory": format!("{memory}Gi")},
        "rollout": rollout,
    })
}

fn up(changes: &Value, free: &[u64]) -> Cluster {
    let mut cluster = Cluster::new(deployment(changes));
    cluster.nodes(free);
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
    cluster
}

fn mode(cluster: &Cluster) -> RolloutStrategy {
    let rollout = cluster.status().rollout.expect("a rollout");
    rollout.mode.expect("a mode")
}

fn message(cluster: &Cluster) -> String {
    cluster.status().rollout.expect("a rollout").message
}

fn revisions(cluster: &Cluster) -> Vec<String> {
    let mut all: Vec<_> = cluster.table().into_iter().map(|group| group.1).collect();
    all.sort();
    all.dedup();
    all
}

/// Runs to the end, and gives the least number of groups that served at any time.
fn run(cluster: &mut Cluster) -> i32 {
    let mut least = i32::MAX;
    for _ in 0..60 {
        cluster.round();
        least = least.min(cluster.status().ready_replicas);
        for condition in &cluster.status().conditions {
            let said = condition.message.trim_end();
            let is_whole = !said.is_empty() && !said.ends_with(';');
            assert!(is_whole, "{}: {said:?}", condition.type_);
        }
        cluster.advance(1);
        cluster.finish_deletions();
        cluster.schedule();
        cluster.start();
        cluster.make_ready();
    }
    cluster.settle();
    least
}

#[test]
fn with_room_a_new_group_starts_before_an_old_one_ends() {
    let mut cluster = up(&spec(2, 1, &json!({})), &[8]);
    cluster.set(&spec(2, 2, &json!({})));
    cluster.round();
    assert_eq!(mode(&cluster), RolloutStrategy::Surge);
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-1-0", "m-2-0"]);
    assert_eq!(
        run(&mut cluster),
        2,
        "as many as wanted served all the time"
    );
    assert_eq!(revisions(&cluster).len(), 1);
    assert_eq!(cluster.status().rollout, None);
    let (ready, _) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "True/AllGroupsReady");
}

#[test]
fn room_for_one_more_group_is_used_one_group_at_a_time() {
    let mut cluster = up(&spec(2, 1, &json!({})), &[2]);
    cluster.set(&spec(2, 2, &json!({})));
    cluster.round();
    assert_eq!(mode(&cluster), RolloutStrategy::Surge);
    // Its pod has got a node, which is full now; the kubelet has yet to say a word.
    cluster.nodes(&[0]);
    cluster.settle();
    assert!(cluster.table().iter().all(|group| group.3.is_none()));
    cluster.schedule();
    cluster.start();
    cluster.make_ready();
    cluster.settle();
    cluster.advance(4);
    cluster.settle();
    let ending = |cluster: &Cluster| {
        let table = cluster.table();
        table.iter().filter(|group| group.3.is_some()).count()
    };
    assert_eq!(ending(&cluster), 1, "the room of the first is waited for");
    assert_eq!(mode(&cluster), RolloutStrategy::Surge);
    let said = message(&cluster);
    assert!(said.contains("waiting for group 1 to end"), "{said}");
    cluster.finish_deletions();
    cluster.nodes(&[2]);
    assert_eq!(run(&mut cluster), 2);
    assert_eq!(revisions(&cluster).len(), 1);
}

#[test]
fn a_new_group_whose_place_was_taken_gets_that_of_an_old_one() {
    let mut cluster = up(&spec(2, 1, &json!({})), &[2]);
    cluster.set(&spec(2, 2, &json!({})));
    cluster.round();
    cluster.nodes(&[0]);
    let refusal = PodCondition {
        type_: "PodScheduled".to_owned(),
        status: "False".to_owned(),
        reason: Some("Unschedulable".to_owned()),
        message: Some("0/1 nodes are available".to_owned()),
        ..PodCondition::default()
    };
    cluster.pod_mut("m-2-0").status = Some(PodStatus {
        phase: Some("Pending".to_owned()),
        conditions: Some(vec![refusal]),
        ..PodStatus::default()
    });
    cluster.round();
    assert_eq!(mode(&cluster), RolloutStrategy::DrainThenReplace);
    let said = message(&cluster);
    assert!(said.contains("its place was taken meanwhile"), "{said}");
    assert_eq!(cluster.table()[1].3, Some(DrainReason::Replaced));
}

#[test]
fn without_room_an_old_group_ends_first() {
    let mut cluster = up(&spec(2, 1, &json!({})), &[1]);
    cluster.set(&spec(2, 2, &json!({})));
    cluster.round();
    assert_eq!(mode(&cluster), RolloutStrategy::DrainThenReplace);
    let said = message(&cluster);
    assert!(said.contains("node-0 has 1"), "{said}");
    let ends = cluster.table()[1].3;
    assert_eq!(ends, Some(DrainReason::Replaced));
    assert_eq!(run(&mut cluster), 1);
    assert_eq!(revisions(&cluster).len(), 1);
}

#[test]
fn a_second_group_does_not_end_before_the_first_is_replaced() {
    let rollout = json!({"minAvailable": 1});
    let mut cluster = up(&spec(3, 1, &rollout), &[0]);
    cluster.set(&spec(3, 2, &rollout));
    cluster.settle();
    assert_eq!(mode(&cluster), RolloutStrategy::DrainThenReplace);
    let said = message(&cluster);
    assert!(said.contains("once group 2 has ended"), "{said}");
    let table = cluster.table();
    let ending = table.iter().filter(|group| group.3.is_some()).count();
    assert_eq!(ending, 1);
}

#[test]
fn no_more_groups_end_than_may() {
    let rollout = json!({"minAvailable": 2});
    let mut cluster = up(&spec(2, 1, &rollout), &[0]);
    cluster.set(&spec(2, 2, &rollout));
    assert_eq!(run(&mut cluster), 2);
    let (ready, said) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/RollingUpdate");
    assert!(
        said.contains("waiting for room") && said.contains("minAvailable 2"),
        "{said}"
    );
    cluster.nodes(&[2]);
    assert_eq!(run(&mut cluster), 2);
    assert_eq!(revisions(&cluster).len(), 1);
}

#[test]
fn a_single_group_is_replaced_with_a_gap_only_where_there_is_no_room() {
    for (free, least) in [(0, 0), (2, 1)] {
        let mut cluster = up(&spec(1, 1, &json!({})), &[free]);
        cluster.set(&spec(1, 2, &json!({})));
        assert_eq!(run(&mut cluster), least, "{free} CPUs free");
        assert_eq!(revisions(&cluster).len(), 1);
    }
}

#[test]
fn a_partition_keeps_groups_on_the_old_revision() {
    let mut cluster = up(&spec(3, 1, &json!({"partition": 2})), &[8]);
    let old = revisions(&cluster);
    cluster.set(&spec(3, 2, &json!({"partition": 2})));
    run(&mut cluster);
    let on_old = |cluster: &Cluster| {
        let table = cluster.table();
        table.iter().filter(|group| old.contains(&group.1)).count()
    };
    assert_eq!(on_old(&cluster), 2);
    assert_eq!(cluster.status().updated_replicas, 1);
    let (ready, _) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "True/AllGroupsReady");
    assert!(message(&cluster).contains("partition is 2"));
    cluster.set(&spec(3, 2, &json!({"partition": 0})));
    run(&mut cluster);
    assert_eq!(on_old(&cluster), 0);
}

#[test]
fn a_paused_rollout_moves_nothing_and_still_mends() {
    let paused = json!({"paused": true});
    let mut cluster = up(&spec(2, 1, &json!({})), &[8]);
    let old = revisions(&cluster);
    cluster.set(&spec(2, 2, &paused));
    run(&mut cluster);
    assert_eq!(revisions(&cluster), old);
    let (ready, _) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/RolloutPaused");
    cluster.fail("m-0-0", &report(FailureCategory::RankDied, Some(0)));
    run(&mut cluster);
    assert_eq!(revisions(&cluster), old, "made again as it was");
    assert_eq!(cluster.status().ready_replicas, 2);
    let memory = cluster.pod_mut("m-0-0").spec.clone().expect("a spec");
    let limits = memory.containers[0].resources.clone().expect("set").limits;
    assert_eq!(limits.expect("limits")["memory"].0, "1Gi");
    cluster.set(&spec(2, 2, &json!({})));
    run(&mut cluster);
    assert_ne!(revisions(&cluster), old);
}

#[test]
fn a_wrong_answer_halts_the_rollout_and_the_old_revision_serves_on() {
    let mut cluster = up(&spec(2, 1, &json!({})), &[8]);
    let old = revisions(&cluster);
    cluster.set(&spec(2, 2, &json!({})));
    cluster.settle();
    cluster.schedule();
    cluster.start();
    cluster.fail("m-2-0", &report(FailureCategory::SelfTestMismatch, Some(1)));
    run(&mut cluster);
    assert_eq!(
        cluster.status().rollout,
        None,
        "made again, it answered well"
    );

    cluster.set(&spec(2, 3, &json!({})));
    for _ in 0..12 {
        cluster.settle();
        cluster.schedule();
        cluster.start();
        for name in cluster.pod_names() {
            let pod = cluster.pod_mut(&name);
            let limits = pod.spec.clone().expect("a spec").containers[0]
                .resources
                .clone()
                .expect("set")
                .limits;
            if limits.expect("limits")["memory"].0 == "3Gi" {
                cluster.fail(&name, &report(FailureCategory::SelfTestMismatch, Some(1)));
            }
        }
        cluster.settle();
        cluster.finish_deletions();
        cluster.advance(61);
    }
    let status = cluster.status();
    let failed = status
        .rollout
        .expect("a rollout")
        .failure
        .expect("a failure");
    assert_eq!(failed.reason, "SelfTestMismatch");
    assert_eq!(status.ready_replicas, 2, "the others serve on");
    let (ready, said) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/RolloutHalted");
    assert!(said.contains("correct the spec"), "{said}");
    let (stalled, _) = cluster.condition(ConditionType::Stalled);
    assert_eq!(stalled, "True/SelfTestMismatch");
    let (available, _) = cluster.condition(ConditionType::Available);
    assert_eq!(available, "True/AsExpected");
    let kept = cluster.status().groups;
    let kept = kept.iter().find(|group| group.phase == GroupPhase::Failed);
    assert!(kept.is_some(), "what failed is kept");
    assert_ne!(revisions(&cluster), old);
}

#[test]
fn a_rollback_goes_back_until_the_spec_changes() {
    let rollout = json!({"onFailure": "Rollback", "strategy": "DrainThenReplace"});
    let mut cluster = up(&spec(2, 1, &rollout), &[8]);
    let old = revisions(&cluster);
    cluster.set(&spec(2, 2, &rollout));
    cluster.settle();
    cluster.advance(4);
    cluster.settle();
    cluster.finish_deletions();
    cluster.settle();
    cluster.schedule();
    cluster.start();
    let fresh = cluster.table();
    let moved = fresh.iter().find(|group| !old.contains(&group.1));
    let name = format!("m-{}-0", moved.expect("one moved").0);
    cluster.fail(&name, &report(FailureCategory::ModelNotFound, None));
    run(&mut cluster);
    assert_eq!(revisions(&cluster), old);
    assert_eq!(cluster.status().ready_replicas, 2);
    let (ready, said) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/RolledBack");
    assert!(said.contains("ModelNotFound"), "{said}");
    cluster.set(&spec(2, 3, &rollout));
    run(&mut cluster);
    assert_eq!(cluster.status().rollout, None);
    let (ready, _) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "True/AllGroupsReady");
}

#[test]
fn a_group_that_does_not_serve_in_time_halts_the_rollout() {
    let rollout = json!({"progressDeadline": "5m"});
    let mut cluster = up(&spec(2, 1, &rollout), &[8]);
    cluster.set(&spec(2, 2, &rollout));
    cluster.settle();
    cluster.schedule();
    cluster.start();
    cluster.settle();
    cluster.advance(299);
    cluster.settle();
    assert!(cluster.status().rollout.expect("one").failure.is_none());
    cluster.advance(1);
    cluster.settle();
    let failure = cluster.status().rollout.expect("one").failure;
    assert_eq!(failure.expect("halted").reason, "ProgressDeadlineExceeded");
    cluster.make_ready();
    run(&mut cluster);
    assert_eq!(cluster.status().rollout, None, "late is better than never");
}

#[test]
fn a_restart_is_a_rollout_of_the_same_spec_with_the_worker_of_today() {
    let mut cluster = up(&json!({}), &[8]);
    let old = cluster.pod_mut("m-0-0").metadata.uid.clone();
    cluster.worker_image = "llama-operator/worker:next".to_owned();
    assert_eq!(cluster.round(), 0, "a new operator moves no group");
    let plan = cluster.plan();
    let template = plan.templates.of(&plan.course.wanted).expect("known");
    assert_eq!(template.worker.image, "llama-operator/worker:test");
    cluster.set(&json!({"restart": {"id": "monday"}}));
    run(&mut cluster);
    let name = cluster.pod_names()[0].clone();
    assert_ne!(cluster.pod_mut(&name).metadata.uid, old);
    let spec = cluster.pod_mut(&name).spec.clone().expect("a spec");
    let image = spec.containers[0].image.clone();
    assert_eq!(image.as_deref(), Some("llama-operator/worker:next"));
}

#[test]
fn only_so_many_old_revisions_are_kept() {
    let mut cluster = up(&json!({"revisionHistoryLimit": 2}), &[8]);
    for memory in 2..8 {
        cluster.set(&json!({
            "revisionHistoryLimit": 2,
            "resources": {"memory": format!("{memory}Gi")},
        }));
        run(&mut cluster);
    }
    let numbers: Vec<_> = cluster
        .observed
        .revisions
        .iter()
        .map(|stored| stored.revision)
        .collect();
    assert_eq!(numbers, [5, 6, 7]);
}

#[test]
fn kept_revisions_are_read_only_where_pods_may_have_to_be_made_from_them() {
    let mut cluster = up(&json!({}), &[8]);
    let first = cluster.plan().course.wanted;
    cluster.set(&json!({"resources": {"memory": "3Gi"}}));
    let moving = cluster.plan();
    assert!(moving.templates.of(&first).is_some(), "a group has it");
    run(&mut cluster);
    let moved = cluster.plan();
    assert!(moved.templates.of(&moved.course.wanted).is_some());
    assert_eq!(cluster.observed.revisions.len(), 2);
    assert!(moved.templates.of(&first).is_none(), "no group has it");
}

#[test]
fn a_group_moves_off_a_node_that_is_closed_once_another_has_room() {
    let mut cluster = up(&json!({}), &[0]);
    cluster.observed.closed_nodes.insert("node-1".to_owned());
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0"], "it stays where it is");
    let said = message(&cluster);
    assert!(
        said.contains("node-1 takes no new pods") && said.contains("node-0 has 0"),
        "{said}"
    );
    let (ready, _) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "True/AllGroupsReady");
    let wakes = cluster.plan().wake_after();
    assert!(wakes.is_some(), "no event tells that another node has room");
    cluster.nodes(&[0, 8]);
    cluster.round();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-1-0"]);
    cluster.place_on("m-1-0", "node-2");
    assert_eq!(run(&mut cluster), 1);
    assert_eq!(cluster.pod_names(), ["m-1-0"]);
}

#[test]
fn what_the_first_group_answered_every_other_must_answer() {
    let mut cluster = up(&spec(1, 1, &json!({})), &[8]);
    let expected = |cluster: &mut Cluster, pod: &str| {
        let spec = cluster.pod_mut(pod).spec.clone().expect("a spec");
        let args = spec.containers[0].args.clone().unwrap_or_default();
        let flag = args
            .iter()
            .find_map(|arg| arg.strip_prefix("--self-test-answer="));
        flag.map(str::to_owned)
    };
    assert_eq!(expected(&mut cluster, "m-0-0"), None);
    cluster.answer = Some("abc".to_owned());
    cluster.says("m-0-0", 0, 0);
    cluster.settle();
    assert_eq!(cluster.status().self_tests[0].answer, "abc");

    cluster.set(&spec(2, 1, &json!({})));
    cluster.settle();
    assert_eq!(expected(&mut cluster, "m-1-0").as_deref(), Some("abc"));
    cluster.bring_up();
    // Another amount of memory is another revision, and the same answer.
    cluster.set(&spec(2, 2, &json!({})));
    cluster.settle();
    assert_eq!(expected(&mut cluster, "m-2-0").as_deref(), Some("abc"));
    // Another model, another answer.
    cluster.set(&json!({"replicas": 2, "model": {"source": {"pvc": {"path": "n.gguf"}}}}));
    run(&mut cluster);
    let names = cluster.pod_names();
    assert_eq!(expected(&mut cluster, &names[0]), None);
}

#[test]
fn the_service_finds_no_group_that_ends() {
    let mut cluster = up(&spec(2, 1, &json!({})), &[8]);
    let found = |cluster: &Cluster| {
        let service = cluster.plan().client_service.spec.clone().expect("a spec");
        let selector = service.selector.expect("a selector");
        let named = cluster.pods.iter().filter(|pod| {
            let labels = pod.metadata.labels.clone().unwrap_or_default();
            selector
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
        });
        named.filter_map(|pod| pod.metadata.name.clone()).collect()
    };
    let both: Vec<String> = found(&cluster);
    assert_eq!(both, ["m-0-0", "m-1-0"]);
    cluster.set(&spec(1, 1, &json!({})));
    cluster.settle();
    let one: Vec<String> = found(&cluster);
    assert_eq!(one, ["m-0-0"], "m-1-0 is to end and still has pods");
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-1-0"]);
}
