//! Whose logs are shown, and in which order.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use kubectl_llama::logs::choose::{Chosen, choose, pod_of_rank};
use serde_json::json;
use support::{deployment, failing, healthy, merged, pod, pods};

fn names(chosen: &Chosen) -> Vec<&str> {
    let all = chosen.sources.iter();
    all.map(|source| source.pod.as_str()).collect()
}

#[test]
fn ranks_are_in_equal_runs_of_pods() {
    let object = deployment(healthy());
    let places: Vec<_> = (-1..5).map(|rank| pod_of_rank(&object, rank)).collect();
    assert_eq!(places, [None, Some(0), Some(0), Some(1), Some(1), None]);
}

#[test]
fn the_pod_of_the_failed_rank_comes_first() {
    let chosen = choose(&deployment(healthy()), &pods(), None, None).expect("pods match");
    assert_eq!(
        names(&chosen),
        ["chat-0-0", "chat-0-1", "chat-1-0", "chat-1-1"]
    );
    let chosen = choose(&deployment(failing()), &pods(), None, None).expect("pods match");
    assert_eq!(
        names(&chosen),
        ["chat-1-1", "chat-0-0", "chat-0-1", "chat-1-0"]
    );
    assert_eq!(chosen.sources[0].prefix, "[1/1] ");
    assert_eq!(chosen.sources[0].container, "worker");
}

#[test]
fn group_and_rank_choose() {
    let object = deployment(healthy());
    let chosen = choose(&object, &pods(), Some(1), None).expect("pods match");
    assert_eq!(names(&chosen), ["chat-1-0", "chat-1-1"]);
    let chosen = choose(&object, &pods(), None, Some(3)).expect("pods match");
    assert_eq!(names(&chosen), ["chat-0-1", "chat-1-1"]);
    let none = choose(&object, &pods(), Some(5), None).expect_err("there is no group 5");
    assert_eq!(
        none,
        "no pod of LlamaDeployment chat matches; expected one of groups 0, 1"
    );
    let none = choose(&object, &pods(), None, Some(4)).expect_err("there is no rank 4");
    assert_eq!(none, "--rank is 4; expected 0 to 3, the ranks of a group");
}

#[test]
fn a_container_of_initialization_is_shown_until_the_worker_runs() {
    let waiting = json!([{
        "name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": "PodInitializing"}},
    }]);
    let fetching = json!([{
        "name": "fetch-model", "image": "m", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"running": {}},
    }]);
    let fetches = json!({"status": {
        "containerStatuses": waiting, "initContainerStatuses": fetching,
    }});
    let pulls = json!({"status": {"containerStatuses": [{
        "name": "worker", "image": "w", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
    }]}});
    let homeless = json!({
        "spec": {"nodeName": null}, "status": {"containerStatuses": null},
    });
    let pods = [pod(0, 0, &fetches), pod(0, 1, &pulls), pod(1, 0, &homeless)];
    let chosen = choose(&deployment(healthy()), &pods, None, None).expect("pods match");
    assert_eq!(names(&chosen), ["chat-0-0"]);
    assert_eq!(chosen.sources[0].container, "fetch-model");
    assert_eq!(
        chosen.without,
        [
            "pod chat-0-1 has no log yet: ImagePullBackOff: no such image",
            "pod chat-1-0 has no log yet: it has no node",
        ]
    );
}

#[test]
fn without_groups_the_inspection_is_shown() {
    let object = merged(healthy(), &json!({"status": {"groups": []}}));
    let labels = json!({"metadata": {"name": "chat-inspect", "labels": {
        "llmops.dev/group": null, "llmops.dev/inspection": "abcd",
    }}});
    let pods = [pod(0, 0, &labels)];
    let chosen = choose(&deployment(object.clone()), &pods, None, None).expect("one");
    assert_eq!(names(&chosen), ["chat-inspect"]);
    let empty = choose(&deployment(object), &[], None, None).expect("nothing is no error");
    assert_eq!(empty, Chosen::default());
}

#[test]
fn too_many_pods_are_refused() {
    let pods: Vec<_> = (0..65).map(|group| pod(group, 0, &json!({}))).collect();
    let refused = choose(&deployment(healthy()), &pods, None, None).expect_err("too many");
    assert_eq!(
        refused,
        "65 pods match; expected at most 64: choose with --group or --rank"
    );
}
