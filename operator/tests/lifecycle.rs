//! Groups through failures, changes and crashes of the operator, in a cluster in memory.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use k8s_openapi::api::core::v1::ContainerStateTerminated;
use llama_contract::FailureCategory;
use llama_crds::v1alpha1::{ConditionType, GroupPhase};
use llama_operator::reconcile::groups::HURRIED_SECONDS;
use proptest::prelude::*;
use serde_json::json;
use support::{Cluster, deployment, report};

fn up(changes: &serde_json::Value) -> Cluster {
    let mut cluster = Cluster::new(deployment(changes));
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
    cluster
}

fn set(cluster: &mut Cluster, changes: &serde_json::Value) {
    cluster.set(changes);
}

#[test]
fn pods_of_a_group_are_made_together() {
    let mut cluster = Cluster::new(deployment(
        &json!({"parallelism": {"tensor": 4, "nodes": 2}, "replicas": 2}),
    ));
    cluster.round();
    assert_eq!(cluster.pod_names(), ["m-0-0", "m-0-1", "m-1-0", "m-1-1"]);
    assert_eq!(cluster.status().replicas, 2);
}

#[test]
fn a_steady_state_writes_nothing() {
    let mut cluster = up(&json!({"replicas": 3}));
    cluster.advance(3600);
    assert_eq!(cluster.round(), 0);
}

#[test]
fn a_rank_that_dies_takes_its_group_and_nothing_else() {
    let mut cluster = up(&json!({"parallelism": {"tensor": 4, "nodes": 2}, "replicas": 2}));
    // The peer loses its connection first, but the rank that died is the cause.
    cluster.fail("m-0-0", &report(FailureCategory::PeerLost, None));
    cluster.advance(1);
    cluster.fail("m-0-1", &report(FailureCategory::RankDied, Some(3)));
    assert_eq!(
        cluster.round(),
        1,
        "the failure is put on record and nothing is deleted yet"
    );
    let group = &cluster.status().groups[0];
    assert_eq!(
        (group.phase, group.epoch, group.restarts),
        (GroupPhase::Restarting, 1, 1)
    );
    let failure = group.last_failure.clone().expect("a failure");
    assert_eq!(
        (failure.rank, failure.reason.as_str()),
        (Some(3), "RankDied")
    );
    assert_eq!(failure.node.as_deref(), Some("node-1"));
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "False/GroupRestarting"
    );

    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-1-0", "m-1-1"], "torn down whole");
    cluster.advance(1);
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
    let groups = cluster.status().groups;
    assert_eq!((groups[0].epoch, groups[1].epoch), (1, 0));
    assert!(
        groups[0].last_failure.is_some(),
        "the last failure stays on record"
    );
}

#[test]
fn failures_in_a_row_wait_longer() {
    let mut cluster = up(&json!({}));
    let restarts = cluster.valid().change.restarts;
    let pause = |count| restarts.pause(count);
    let seconds: Vec<_> = (1..=11).map(|count| pause(count).as_secs()).collect();
    assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    assert_eq!(pause(i32::MAX).as_secs(), 300);

    for expected in 1..=4 {
        cluster.fail("m-0-0", &report(FailureCategory::RankDied, Some(0)));
        cluster.settle();
        let wait = i64::try_from(pause(expected).as_secs()).expect("small");
        cluster.advance(wait - 1);
        cluster.settle();
        assert!(
            cluster.pod_names().is_empty(),
            "too early after {expected} failures"
        );
        cluster.advance(1);
        cluster.bring_up();
        assert_eq!(cluster.status().groups[0].restarts, expected);
    }
    cluster.advance(600);
    cluster.settle();
    assert_eq!(
        cluster.status().groups[0].restarts,
        0,
        "ten good minutes clear the record"
    );
}

/// The kubelet reports the container a moment before the pod's phase changes.
#[test]
fn a_permanent_failure_is_known_before_the_pod_is_over() {
    for phase in ["Pending", "Running"] {
        let mut cluster = up(&json!({}));
        cluster.fail("m-0-0", &report(FailureCategory::InvalidLayout, None));
        let status = cluster.pod_mut("m-0-0").status.as_mut().expect("a status");
        status.phase = Some(phase.to_owned());
        cluster.settle();
        assert_eq!(cluster.pod_names(), ["m-0-0"], "{phase}");
        let (stalled, _) = cluster.condition(ConditionType::Stalled);
        assert_eq!(stalled, "True/InvalidLayout", "{phase}");

        let status = cluster.pod_mut("m-0-0").status.as_mut().expect("a status");
        status.phase = Some("Failed".to_owned());
        cluster.settle();
        assert_eq!(cluster.status().groups[0].epoch, 0, "{phase}");
    }
}

#[test]
fn a_permanent_failure_stays_as_evidence() {
    let mut cluster = up(&json!({}));
    cluster.fail("m-0-0", &report(FailureCategory::ModelTruncated, None));
    cluster.settle();
    cluster.advance(7200);
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0"]);
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "False/ModelTruncated"
    );
    assert_eq!(
        cluster.condition(ConditionType::ModelReady).0,
        "False/ModelTruncated"
    );
    let (stalled, message) = cluster.condition(ConditionType::Stalled);
    assert_eq!(stalled, "True/ModelTruncated");
    assert!(
        message.contains("delete pod m-0-0 to try again"),
        "{message}"
    );
    assert_eq!(
        cluster.condition(ConditionType::Reconciling).0,
        "False/Settled"
    );

    cluster.delete("m-0-0", None);
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
    assert_eq!(cluster.status().groups[0].epoch, 1);
}

#[test]
fn a_new_spec_replaces_what_failed_for_good() {
    let mut cluster = up(&json!({}));
    cluster.fail("m-0-0", &report(FailureCategory::InsufficientMemory, None));
    cluster.settle();
    assert_eq!(
        cluster.condition(ConditionType::ModelReady).0,
        "Unknown/ModelLoading"
    );
    set(&mut cluster, &json!({"resources": {"memory": "4Gi"}}));
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
}

#[test]
fn too_little_memory_twice_is_for_good() {
    let mut cluster = up(&json!({}));
    let killed = || ContainerStateTerminated {
        exit_code: 137,
        reason: Some("OOMKilled".to_owned()),
        ..ContainerStateTerminated::default()
    };
    cluster.end("m-0-0", killed());
    cluster.settle();
    assert_eq!(cluster.status().groups[0].phase, GroupPhase::Restarting);
    cluster.advance(2);
    cluster.bring_up();
    cluster.end("m-0-0", killed());
    cluster.settle();
    let (stalled, message) = cluster.condition(ConditionType::Stalled);
    assert_eq!(stalled, "True/OOMKilled");
    assert!(message.contains("raise spec.resources.memory"), "{message}");
    assert_eq!(cluster.pod_names(), ["m-0-0"]);
}

#[test]
fn scaling_down_ends_groups_once_clients_are_sent_elsewhere() {
    let mut cluster = up(&json!({"replicas": 3}));
    set(&mut cluster, &json!({"replicas": 1}));
    cluster.settle();
    assert_eq!(cluster.pod_names().len(), 3, "nothing is deleted yet");
    let hooked = |cluster: &Cluster| {
        let pods = cluster.pods.iter();
        pods.filter(|pod| {
            let labels = pod.metadata.labels.as_ref();
            labels.is_some_and(|labels| labels.contains_key("llmops.dev/serving"))
        })
        .count()
    };
    assert_eq!(hooked(&cluster), 1);
    cluster.advance(4);
    cluster.settle();
    cluster.finish_deletions();
    cluster.settle();
    assert_eq!(cluster.pod_names(), ["m-0-0"]);
    assert_eq!(cluster.status().groups.len(), 1);
    set(&mut cluster, &json!({"replicas": 0}));
    cluster.bring_up();
    assert!(cluster.pod_names().is_empty());
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/ScaledToZero"
    );
}

#[test]
fn the_least_busy_group_ends() {
    let mut cluster = up(&json!({"replicas": 3, "drain": {"timeout": "1m"}}));
    cluster.says("m-0-0", 7, 0);
    cluster.says("m-1-0", 2, 0);
    cluster.says("m-2-0", 9, 0);
    set(
        &mut cluster,
        &json!({"replicas": 2, "drain": {"timeout": "1m"}}),
    );
    cluster.settle();
    let ending = |cluster: &Cluster| {
        let groups = cluster.status().groups;
        let ends = groups.iter().filter(|group| group.drain.is_some());
        ends.map(|group| group.index).collect::<Vec<_>>()
    };
    assert_eq!(ending(&cluster), [1]);

    // Its answers finish before its pod goes, however long the pod's own grace is.
    cluster.advance(30);
    cluster.settle();
    assert_eq!(cluster.pod_names().len(), 3);
    let deleting = |cluster: &Cluster| {
        let pods = cluster.pods.iter();
        pods.filter(|pod| pod.metadata.deletion_timestamp.is_some())
            .count()
    };
    assert_eq!(deleting(&cluster), 0);
    cluster.says("m-1-0", 0, 0);
    cluster.settle();
    assert_eq!(deleting(&cluster), 1);
}

#[test]
fn answers_that_do_not_finish_hold_a_group_only_so_long() {
    let mut cluster = up(&json!({"replicas": 2, "drain": {"timeout": "1m"}}));
    cluster.says("m-1-0", 3, 0);
    set(
        &mut cluster,
        &json!({"replicas": 1, "drain": {"timeout": "1m"}}),
    );
    cluster.says("m-0-0", 5, 0);
    cluster.settle();
    cluster.advance(59);
    cluster.settle();
    let is_deleting = |cluster: &mut Cluster| {
        cluster
            .pod_mut("m-1-0")
            .metadata
            .deletion_timestamp
            .is_some()
    };
    assert!(!is_deleting(&mut cluster));
    cluster.advance(1);
    let plan = cluster.plan();
    let ending = plan.groups.iter().find(|group| group.status.index == 1);
    let ending = ending.expect("it is there");
    let uid = cluster.pod_mut("m-1-0").metadata.uid.clone();
    assert_eq!(ending.hurry, uid, "its worker is told");
    let grace = ending.delete[0].grace;
    assert!(
        grace > Some(HURRIED_SECONDS),
        "errors have to reach clients"
    );
    cluster.settle();
    assert!(is_deleting(&mut cluster));
}

#[test]
fn without_a_time_for_answers_pods_end_in_their_own_grace() {
    let mut cluster = up(&json!({"replicas": 2}));
    cluster.says("m-1-0", 3, 0);
    set(&mut cluster, &json!({"replicas": 1}));
    cluster.says("m-0-0", 5, 0);
    cluster.settle();
    cluster.advance(4);
    let plan = cluster.plan();
    let ending = plan.groups.iter().find(|group| group.status.index == 1);
    let ending = ending.expect("it is there");
    assert_eq!((ending.delete[0].grace, &ending.hurry), (None, &None));
}

#[test]
fn a_group_wanted_again_before_it_ended_goes_on() {
    let mut cluster = up(&json!({"replicas": 2}));
    set(&mut cluster, &json!({"replicas": 1}));
    cluster.settle();
    set(&mut cluster, &json!({"replicas": 2}));
    cluster.bring_up();
    let group = &cluster.status().groups[1];
    assert_eq!((group.epoch, group.restarts), (0, 0));
    assert_eq!(group.drain, None);
    let labels = cluster.pod_mut("m-1-0").metadata.labels.clone();
    assert!(labels.is_some_and(|labels| labels.contains_key("llmops.dev/serving")));
}

#[test]
fn a_group_wanted_again_while_it_ends_is_made_anew() {
    let mut cluster = up(&json!({"replicas": 2}));
    set(&mut cluster, &json!({"replicas": 1}));
    cluster.settle();
    cluster.advance(4);
    cluster.settle();
    set(&mut cluster, &json!({"replicas": 2}));
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
    let groups = cluster.status().groups;
    assert!(groups.iter().all(|group| group.last_failure.is_none()));
}

#[test]
fn suspending_gives_everything_back() {
    let mut cluster = up(&json!({"replicas": 2}));
    set(&mut cluster, &json!({"replicas": 2, "suspend": true}));
    cluster.bring_up();
    assert!(cluster.pod_names().is_empty());
    assert_eq!(cluster.condition(ConditionType::Ready).0, "False/Suspended");
    assert_eq!(
        cluster.condition(ConditionType::Reconciling).0,
        "False/Settled"
    );
    set(&mut cluster, &json!({"replicas": 2}));
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
}

#[test]
fn a_pod_that_somebody_deletes_takes_its_group_along() {
    let mut cluster = up(&json!({"parallelism": {"tensor": 2, "nodes": 2}}));
    cluster.delete("m-0-1", None);
    cluster.round();
    let failure = cluster.status().groups[0]
        .last_failure
        .clone()
        .expect("a failure");
    assert_eq!(failure.reason, "PodDeleted");
    assert!(failure.message.contains("m-0-1"), "{}", failure.message);
    // Also when it was gone before anybody looked.
    cluster.advance(1);
    cluster.bring_up();
    cluster.pods.clear();
    cluster.round();
    assert_eq!(cluster.status().groups[0].epoch, 2);
}

#[test]
fn pods_of_an_earlier_object_of_this_name_are_waited_for() {
    let mut old = up(&json!({}));
    let mut cluster = Cluster::new(deployment(&json!({})));
    cluster.object.metadata.uid = Some("uid-new".to_owned());
    std::mem::swap(&mut cluster.pods, &mut old.pods);
    cluster.settle();
    let (ready, message) = cluster.condition(ConditionType::Ready);
    assert_eq!(ready, "False/GroupsStarting");
    assert!(
        message.contains("m-0-0 of an earlier LlamaDeployment"),
        "{message}"
    );
    cluster.pods.clear();
    cluster.bring_up();
    assert_eq!(
        cluster.condition(ConditionType::Ready).0,
        "True/AllGroupsReady"
    );
}

#[test]
fn a_secret_that_went_missing_is_made_again() {
    let mut cluster = Cluster::new(deployment(
        &json!({"parallelism": {"tensor": 2, "nodes": 2}}),
    ));
    assert!(cluster.plan().secret.is_some());
    cluster.settle();
    assert!(cluster.plan().secret.is_none(), "once is enough");
    cluster.schedule();
    cluster.wait(
        "m-0-0",
        "worker",
        "CreateContainerConfigError",
        "secret \"m-rendezvous\" not found",
    );
    assert!(cluster.plan().secret.is_some());
}

/// Something that happens around the operator, or to it.
#[derive(Clone, Debug)]
enum Happening {
    Round,
    Crash(usize),
    Schedule,
    Start,
    Ready,
    FinishDeletions,
    Fail(usize, FailureCategory),
    Delete(usize),
    Vanish(usize),
    Scale(u32),
    Suspend(bool),
    Memory(u32),
    Advance(i64),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => Just(Happening::Round),
        3 => (0_usize..6).prop_map(Happening::Crash),
        2 => Just(Happening::Schedule),
        2 => Just(Happening::Start),
        2 => Just(Happening::Ready),
        2 => Just(Happening::FinishDeletions),
        2 => (0_usize..8, proptest::sample::select(FailureCategory::ALL.to_vec()))
            .prop_map(|(pod, category)| Happening::Fail(pod, category)),
        1 => (0_usize..8).prop_map(Happening::Delete),
        1 => (0_usize..8).prop_map(Happening::Vanish),
        1 => (0_u32..4).prop_map(Happening::Scale),
        1 => any::<bool>().prop_map(Happening::Suspend),
        1 => (1_u32..3).prop_map(Happening::Memory),
        2 => (0_i64..400).prop_map(Happening::Advance),
    ]
}

struct World {
    cluster: Cluster,
    nodes: u32,
    replicas: u32,
    suspend: bool,
    memory: u32,
}

impl World {
    fn new(nodes: u32) -> Self {
        let mut world = Self {
            cluster: Cluster::new(deployment(&json!({}))),
            nodes,
            replicas: 2,
            suspend: false,
            memory: 1,
        };
        world.write_spec();
        world
    }

    fn write_spec(&mut self) {
        let spec = json!({
            "parallelism": {"tensor": 2 * self.nodes, "nodes": self.nodes},
            "replicas": self.replicas,
            "suspend": self.suspend,
            "resources": {"memory": format!("{}Gi", self.memory)},
        });
        set(&mut self.cluster, &spec);
    }

    fn pod(&self, index: usize) -> Option<String> {
        let names = self.cluster.pod_names();
        (!names.is_empty()).then(|| names[index % names.len()].clone())
    }

    fn happen(&mut self, happening: &Happening) {
        match *happening {
            Happening::Round => {
                self.cluster.round();
            }
            Happening::Crash(writes) => {
                self.cluster.round_until(writes);
            }
            Happening::Schedule => self.cluster.schedule(),
            Happening::Start => self.cluster.start(),
            Happening::Ready => self.cluster.make_ready(),
            Happening::FinishDeletions => self.cluster.finish_deletions(),
            Happening::Fail(index, category) => {
                if let Some(pod) = self.pod(index) {
                    self.cluster.fail(&pod, &report(category, None));
                }
            }
            Happening::Delete(index) => {
                if let Some(pod) = self.pod(index) {
                    self.cluster.delete(&pod, None);
                }
            }
            Happening::Vanish(index) => {
                let pod = self.pod(index);
                self.cluster.pods.retain(|live| live.metadata.name != pod);
            }
            Happening::Scale(replicas) => {
                self.replicas = replicas;
                self.write_spec();
            }
            Happening::Suspend(suspend) => {
                self.suspend = suspend;
                self.write_spec();
            }
            Happening::Memory(memory) => {
                self.memory = memory;
                self.write_spec();
            }
            Happening::Advance(seconds) => self.cluster.advance(seconds),
        }
    }

    /// Pods of one group are of one incarnation: an older one is gone before a newer is made.
    fn check_incarnations(&self) {
        for pod in &self.cluster.pods {
            let label = |pod: &k8s_openapi::api::core::v1::Pod, key: &str| {
                pod.metadata
                    .labels
                    .as_ref()
                    .and_then(|labels| labels.get(key))
                    .cloned()
            };
            for other in &self.cluster.pods {
                if label(pod, "llmops.dev/group") == label(other, "llmops.dev/group") {
                    assert_eq!(
                        label(pod, "llmops.dev/epoch"),
                        label(other, "llmops.dev/epoch")
                    );
                }
            }
        }
    }

    /// Somebody deletes the evidence of failures, time passes, the kubelet does its work.
    fn heal(&mut self) {
        for _ in 0..30 {
            let failed: Vec<_> = self
                .cluster
                .status()
                .groups
                .iter()
                .filter(|group| group.phase == GroupPhase::Failed)
                .map(|group| format!("m-{}-", group.index))
                .collect();
            for name in self.cluster.pod_names() {
                if failed.iter().any(|prefix| name.starts_with(prefix)) {
                    self.cluster.delete(&name, None);
                }
            }
            self.cluster.advance(301);
            self.cluster.settle();
            self.cluster.finish_deletions();
            self.cluster.schedule();
            self.cluster.start();
            self.cluster.make_ready();
        }
        self.cluster.settle();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_happens_it_converges(
        nodes in 1_u32..3,
        happenings in proptest::collection::vec(happening(), 0..40),
    ) {
        let mut world = World::new(nodes);
        for happening in &happenings {
            world.happen(happening);
            world.check_incarnations();
        }
        world.heal();
        let wanted = if world.suspend { 0 } else { world.replicas };
        let pods = usize::try_from(wanted * nodes).expect("small");
        prop_assert_eq!(world.cluster.pod_names().len(), pods);
        let status = world.cluster.status();
        prop_assert_eq!(status.ready_replicas, i32::try_from(wanted).expect("small"));
        let revision = world.cluster.plan().course.wanted;
        let halted = status.rollout.is_some_and(|rollout| rollout.failure.is_some());
        prop_assert!(halted || status.groups.iter().all(|group| group.revision == revision));
        prop_assert_eq!(world.cluster.round(), 0);
    }

    #[test]
    fn the_same_input_gives_the_same_plan(
        happenings in proptest::collection::vec(happening(), 0..30),
    ) {
        let mut world = World::new(2);
        for happening in &happenings {
            world.happen(happening);
        }
        let (one, other) = (world.cluster.plan(), world.cluster.plan());
        prop_assert_eq!(format!("{one:?}"), format!("{other:?}"));
    }
}
