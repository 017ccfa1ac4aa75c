//! Pages of `status` and `plan`, state by state.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use kubectl_llama::plan::file;
use kubectl_llama::plan::page::{Verdict, page as plan_page, verdict};
use kubectl_llama::status::page::page;
use kubectl_llama::status::table::table;
use kubectl_llama::status::{Facts, is_ready};
use serde_json::{Value, json};
use support::{
    deployment, draining, failing, healthy, merged, now, paused_rollout, pod, pods, refused,
    warning,
};

fn facts(object: Value) -> Facts {
    Facts {
        deployment: deployment(object),
        pods: pods(),
        warnings: Vec::new(),
    }
}

#[test]
fn a_healthy_deployment() {
    let facts = facts(healthy());
    assert!(is_ready(&facts.deployment));
    insta::assert_snapshot!(page(&facts, now()));
}

#[test]
fn a_group_that_failed_is_told_with_its_cause() {
    let mut facts = facts(failing());
    assert!(!is_ready(&facts.deployment));
    facts.pods = vec![
        pod(0, 0, &json!({})),
        pod(0, 1, &json!({"status": {"conditions": []}})),
    ];
    facts.warnings = vec![
        warning("LlamaDeployment", "chat", "RankDied", 75, 3),
        warning("Pod", "chat-1-1", "BackOff", 20, 1),
    ];
    insta::assert_snapshot!(page(&facts, now()));
}

#[test]
fn what_has_nothing_to_say_takes_no_line() {
    let empty = json!([support::condition(
        "Reconciling",
        "True",
        "GroupsEnding",
        ""
    )]);
    let mut object = merged(healthy(), &json!({"status": {"conditions": empty}}));
    object["status"]["groups"][0]["message"] = json!("group chat-0 serves");
    let page = page(&facts(object), now());
    assert!(page.contains("GroupsEnding for 12m\n\nGroups"), "{page}");
    assert!(!page.contains("group chat-0 serves"), "{page}");
}

#[test]
fn no_more_than_eight_warnings_are_shown_the_latest_first() {
    let mut facts = facts(healthy());
    facts.warnings = (1..=10)
        .map(|number| warning("Pod", "chat-0-0", &format!("Reason{number}"), number, 1))
        .collect();
    let page = page(&facts, now());
    let shown: Vec<_> = page
        .lines()
        .filter(|line| line.contains("Reason"))
        .collect();
    assert_eq!(shown.len(), 8);
    assert!(shown[0].contains("1s ago, Reason1:"), "{page}");
    assert!(page.ends_with("  and 2 older ones\n"), "{page}");
}

#[test]
fn a_plan_that_does_not_fit() {
    let facts = facts(refused());
    insta::assert_snapshot!("status_of_a_refused_plan", page(&facts, now()));
    assert_eq!(verdict(&facts.deployment), Verdict::Bad);
    let text = plan_page(&facts.deployment).expect("it can be written");
    insta::assert_snapshot!("plan_that_does_not_fit", text);
}

#[test]
fn a_rollout_that_is_paused() {
    insta::assert_snapshot!(page(&facts(paused_rollout()), now()));
}

#[test]
fn every_source_is_named() {
    let mut object = healthy();
    object["spec"]["model"]["source"] = json!({"http": {
        "url": "https://models.example/chat",
        "files": [{"name": "a", "sha256": "0"}, {"name": "b", "sha256": "1"}],
        "tokenSecretRef": {"name": "access", "key": "token"},
    }});
    let page = page(&facts(object), now());
    let line = "from http (url https://models.example/chat, 2 files, tokenSecretRef access)\n";
    assert!(page.contains(line), "{page}");
}

#[test]
fn a_group_that_drains() {
    insta::assert_snapshot!(page(&facts(draining()), now()));
}

#[test]
fn what_nobody_has_looked_at_is_not_ready() {
    let old = merged(healthy(), &json!({"metadata": {"generation": 4}}));
    assert!(!is_ready(&deployment(old.clone())));
    let text = page(&facts(old), now());
    let first = "LlamaDeployment team/chat: the operator has not looked at this spec yet\n";
    assert!(text.starts_with(first), "{text}");
    let new = merged(healthy(), &json!({"status": null}));
    assert!(!is_ready(&deployment(new.clone())));
    assert!(page(&facts(new), now()).starts_with(first));
    let paused = json!({"metadata": {"annotations": {"llmops.dev/paused": "true"}}});
    let text = page(&facts(merged(healthy(), &paused)), now());
    assert!(
        text.contains("Paused       the annotation llmops.dev/paused"),
        "{text}"
    );
}

#[test]
fn a_table_of_several() {
    let other = json!({"metadata": {"name": "other", "namespace": "lab"}, "status": null});
    let all = [
        deployment(healthy()),
        deployment(failing()),
        deployment(merged(healthy(), &other)),
    ];
    insta::assert_snapshot!(table(&all, true, now()));
    assert!(table(&all, false, now()).starts_with("NAME "));
    assert_eq!(table(&[], true, now()), "");
}

#[test]
fn a_plan_that_fits() {
    let object = deployment(healthy());
    assert_eq!(verdict(&object), Verdict::Good);
    insta::assert_snapshot!(plan_page(&object).expect("it can be written"));
}

#[test]
fn a_plan_for_gpus_whose_memory_is_not_known() {
    let why = "the memory of the GPUs is not known";
    let unknown = support::condition("Planned", "Unknown", "GPUMemoryUnknown", why);
    let changes = json!({
        "spec": {"resources": {"accelerator": "Gpu"}},
        "status": {"conditions": [unknown], "plan": {
            "memoryBytes": null, "fits": null, "maxSequencesAtMaxTokens": null,
            "totalTokens": null, "kvHeadReplication": 2, "neededBytes": 4_418_308_096_i64,
            "perPod": {"adapterBytes": 1_048_576}, "perRank": {"adapterBytes": 524_288},
        }},
    });
    let object = deployment(merged(healthy(), &changes));
    assert_eq!(verdict(&object), Verdict::Unknown);
    insta::assert_snapshot!(plan_page(&object).expect("it can be written"));
}

#[test]
fn an_inspection_that_failed() {
    let changes = json!({"status": {
        "plan": null,
        "conditions": [support::condition("Planned", "False", "ModelNotFound", "no file m.gguf")],
        "inspection": {
            "inputs": "abcd", "pod": "uid-1", "failures": 1, "reason": "ModelNotFound",
            "message": "there is no file m.gguf", "stopped": true, "time": support::ago(60),
        },
    }});
    let object = deployment(merged(healthy(), &changes));
    assert_eq!(verdict(&object), Verdict::Bad);
    insta::assert_snapshot!(plan_page(&object).expect("it can be written"));
}

#[test]
fn no_plan_is_bad_only_where_one_is_wanted() {
    let none = json!({"status": {"plan": null}});
    let object = deployment(merged(healthy(), &none));
    assert_eq!(verdict(&object), Verdict::Unknown);
    let disabled = json!({"spec": {"planPolicy": "Disabled"}, "status": {"plan": null}});
    let object = deployment(merged(healthy(), &disabled));
    assert_eq!(verdict(&object), Verdict::Good);
}

const SAMPLE: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: other}
---
apiVersion: llmops.dev/v1alpha1
kind: LlamaDeployment
metadata:
  name: big
spec:
  model:
    source:
      image: {reference: 'models:1', path: /models/big}
  parallelism: {tensor: 8, pipeline: 2, nodes: 4}
  resources:
    accelerator: Gpu
    cpu: 32
    memory: 256Gi
  replicas: 2
";

#[test]
fn a_file_is_checked_as_the_operator_would() {
    let all = file::manifests(SAMPLE, "team").expect("it has one");
    assert_eq!(all.len(), 1);
    let checked = file::check(&all[0]);
    assert!(checked.is_ok(), "{checked:?}");
    insta::assert_snapshot!(file::page(&all[0], &checked, &Ok(())));
}

#[test]
fn a_file_that_the_operator_would_refuse() {
    let text = SAMPLE.replace("nodes: 4", "nodes: 3");
    let all = file::manifests(&text, "team").expect("it has one");
    let checked = file::check(&all[0]);
    let answer = Err("spec.parallelism:\n wrong".to_owned());
    insta::assert_snapshot!(file::page(&all[0], &checked, &answer));
}

#[test]
fn files_without_a_deployment_say_what_was_expected() {
    for (text, problem) in [
        (
            "",
            "expected a LlamaDeployment of llmops.dev/v1alpha1, found none",
        ),
        (
            "kind: Pod",
            "expected a LlamaDeployment of llmops.dev/v1alpha1, found none",
        ),
        (
            "kind: LlamaDeployment\napiVersion: llmops.dev/v1",
            "apiVersion is \"llmops.dev/v1\"; expected llmops.dev/v1alpha1",
        ),
        (
            "kind: LlamaDeployment\napiVersion: llmops.dev/v1alpha1",
            "metadata.name is missing; expected a name",
        ),
        ("a: [", "expected YAML or JSON: "),
    ] {
        let said = file::manifests(text, "team").expect_err(text);
        assert!(
            said.starts_with(problem) && !said.contains('\n'),
            "{text}: {said}"
        );
    }
}

#[test]
fn a_file_in_json_or_with_a_namespace_of_its_own() {
    let text = json!({
        "kind": "LlamaDeployment", "apiVersion": "llmops.dev/v1alpha1",
        "metadata": {"name": "m", "namespace": "lab"},
    });
    let all = file::manifests(&text.to_string(), "team").expect("it has one");
    assert_eq!((&*all[0].name, &*all[0].namespace), ("m", "lab"));
    assert!(file::check(&all[0]).is_err(), "it has no spec");
}
