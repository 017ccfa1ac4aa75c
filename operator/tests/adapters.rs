//! Adapters beside the model: what pods are started with, whom to tell of a change, and what
//! status says.

#![allow(clippy::expect_used, reason = "a test stops where it cannot go on")]

mod support;

use llama_contract::{AdapterPhase, AdapterReport};
use llama_crds::v1alpha1::AdapterStatus;
use llama_operator::reconcile::adapters::{orders, untold};
use llama_operator::reconcile::observe::PodState;
use llama_operator::reconcile::validate::{ValidationError, validate};
use serde_json::{Value, json};
use support::{Cluster, deployment};

/// Two places, and adapters of these names and folders.
fn spec(loaded: &[(&str, &str)]) -> Value {
    let adapter = |(name, path): &(&str, &str)| json!({"name": name, "path": path});
    let loaded: Vec<_> = loaded.iter().map(adapter).collect();
    json!({
        "replicas": 2,
        "adapters": {"claimName": "loras", "places": 2, "maxRank": 8, "loaded": loaded},
    })
}

/// The first pod of group `index` said that it has these.
fn says(cluster: &mut Cluster, index: u32, adapters: &[(&str, &str, AdapterPhase)]) {
    let name = format!("m-{index}-0");
    let uid = cluster.pod_mut(&name).metadata.uid.clone().expect("a UID");
    let report = |(name, path, phase): &(&str, &str, AdapterPhase)| AdapterReport {
        module: format!("{name}=/adapters/{path}")
            .parse()
            .expect("a module"),
        phase: *phase,
        message: (*phase == AdapterPhase::Refused).then(|| "no such folder".to_owned()),
    };
    let state = PodState {
        adapters: adapters.iter().map(report).collect(),
        ..PodState::default()
    };
    cluster.observed.states.insert(uid, state);
}

/// What is told to whom, as names of adapters.
fn told(cluster: &Cluster) -> Vec<Vec<String>> {
    let plan = cluster.plan();
    let orders = orders(&plan.groups, &plan.templates, &cluster.observed());
    let names = |list: llama_contract::AdapterList| {
        let named = list.adapters.into_iter();
        named
            .map(|module| format!("{}={}", module.name, module.folder.display()))
            .collect()
    };
    orders.into_iter().map(|(_, list)| names(list)).collect()
}

fn asked(cluster: &Cluster) -> usize {
    let plan = cluster.plan();
    let observed = cluster.observed();
    untold(&plan.groups, &plan.templates, &observed, &plan.adapters).len()
}

fn serving(loaded: &[(&str, &str)]) -> Cluster {
    let mut cluster = Cluster::new(deployment(&spec(loaded)));
    cluster.bring_up();
    assert_eq!(cluster.status().ready_replicas, 2);
    cluster
}

fn status(name: &str, path: &str, groups: i32, message: Option<&str>) -> AdapterStatus {
    AdapterStatus {
        name: name.to_owned(),
        path: path.to_owned(),
        groups,
        message: message.map(str::to_owned),
    }
}

#[test]
fn pods_start_with_the_room_and_the_list_of_the_moment() {
    let cluster = serving(&[("legal", "legal/v1")]);
    let pod = cluster.pods[0].spec.as_ref().expect("a spec");
    let args = pod.containers[0].args.as_ref().expect("arguments");
    for wanted in [
        "--max-loras=2",
        "--max-lora-rank=8",
        "--managed-lora-folder=/adapters",
        "--lora-modules=legal=/adapters/legal/v1",
    ] {
        assert!(args.iter().any(|arg| arg == wanted), "{wanted} in {args:?}");
    }
    let volumes = pod.volumes.as_ref().expect("volumes");
    let claim = volumes.iter().find(|volume| volume.name == "adapters");
    let claim = claim.and_then(|volume| volume.persistent_volume_claim.as_ref());
    let claim = claim.expect("a claim");
    assert_eq!(
        (claim.claim_name.as_str(), claim.read_only),
        ("loras", Some(true))
    );
}

#[test]
fn a_change_of_the_list_makes_no_pods_and_tells_groups() {
    use AdapterPhase::{Loaded, Loading};
    let mut cluster = serving(&[("legal", "legal/v1")]);
    // Nobody has told yet, so both are asked, and nobody is told anything.
    assert_eq!((asked(&cluster), told(&cluster).len()), (2, 0));
    says(&mut cluster, 0, &[("legal", "legal/v1", Loaded)]);
    says(&mut cluster, 1, &[("legal", "legal/v1", Loaded)]);
    cluster.settle();
    assert_eq!(
        cluster.status().adapters,
        [status("legal", "legal/v1", 2, None)]
    );
    // At rest nothing is known of pods any more, and nobody is asked.
    cluster.observed.states.clear();
    assert_eq!((asked(&cluster), cluster.round()), (0, 0));

    let pods = cluster.pod_names();
    let revision = cluster.status().updated_revision;
    cluster.set(&spec(&[("legal", "legal/v2"), ("medical", "medical")]));
    cluster.settle();
    assert_eq!(cluster.pod_names(), pods);
    assert_eq!(cluster.status().updated_revision, revision);
    assert_eq!(asked(&cluster), 2);
    says(&mut cluster, 0, &[("legal", "legal/v1", Loaded)]);
    let list = ["legal=/adapters/legal/v2", "medical=/adapters/medical"];
    assert_eq!(told(&cluster), [list]);
    let new = |phase| [("legal", "legal/v2", phase), ("medical", "medical", phase)];
    says(&mut cluster, 0, &new(Loaded));
    says(&mut cluster, 1, &new(Loading));
    cluster.settle();
    let expected = |groups| {
        [
            status("legal", "legal/v2", groups, None),
            status("medical", "medical", groups, None),
        ]
    };
    assert_eq!(cluster.status().adapters, expected(1));
    assert_eq!((asked(&cluster), told(&cluster).len()), (2, 0));
    says(&mut cluster, 1, &new(Loaded));
    cluster.settle();
    assert_eq!(cluster.status().adapters, expected(2));
    assert_eq!(asked(&cluster), 0);
}

#[test]
fn what_is_taken_off_the_list_is_told_until_no_group_has_it() {
    use AdapterPhase::Loaded;
    let mut cluster = serving(&[("legal", "legal")]);
    for group in 0..2 {
        says(&mut cluster, group, &[("legal", "legal", Loaded)]);
    }
    cluster.settle();
    cluster.observed.states.clear();
    cluster.set(&spec(&[]));
    cluster.settle();
    let leaving = Some("is forgotten once no request uses it");
    assert_eq!(
        cluster.status().adapters,
        [status("legal", "legal", 2, leaving)]
    );
    assert_eq!(asked(&cluster), 2);
    says(&mut cluster, 0, &[]);
    says(&mut cluster, 1, &[("legal", "legal", Loaded)]);
    assert_eq!(told(&cluster), [Vec::<String>::new()]);
    says(&mut cluster, 1, &[]);
    cluster.settle();
    assert_eq!(cluster.status().adapters, []);
    assert_eq!((asked(&cluster), told(&cluster).len()), (0, 0));
}

#[test]
fn an_adapter_at_fault_is_said_once_and_serves_nowhere() {
    let mut cluster = serving(&[("legal", "legal")]);
    for group in 0..2 {
        says(
            &mut cluster,
            group,
            &[("legal", "legal", AdapterPhase::Refused)],
        );
    }
    cluster.settle();
    let why = Some("group 0: no such folder");
    assert_eq!(
        cluster.status().adapters,
        [status("legal", "legal", 0, why)]
    );
    assert_eq!((asked(&cluster), told(&cluster).len()), (0, 0));
}

#[test]
fn more_room_is_another_revision() {
    let mut cluster = serving(&[]);
    let before = cluster.status().updated_revision;
    let mut changed = spec(&[]);
    changed["adapters"]["places"] = json!(3);
    cluster.set(&changed);
    cluster.round();
    assert_ne!(cluster.status().updated_revision, before);
}

#[test]
fn wrong_lists_are_refused_by_name() {
    let refused = |changes: &Value| {
        let object = deployment(changes);
        validate(&object, &Cluster::new(object.clone()).observed()).expect_err("must be refused")
    };
    let three = spec(&[("a", "a"), ("b", "b"), ("c", "c")]);
    let many = ValidationError::TooManyAdapters {
        count: 3,
        places: 2,
    };
    assert_eq!(refused(&three), many);
    for named in ["a", "m"] {
        let twice = spec(&[("a", "a"), (named, "b")]);
        let name = named.to_owned();
        assert_eq!(refused(&twice), ValidationError::AdapterNameTaken { name });
    }
    let error = refused(&spec(&[("a", "../x")])).to_string();
    assert!(error.starts_with("spec.adapters.loaded.path"), "{error}");
    let mut rank = spec(&[]);
    rank["adapters"]["maxRank"] = json!(0);
    assert!(
        refused(&rank)
            .to_string()
            .starts_with("spec.adapters.maxRank")
    );
}
