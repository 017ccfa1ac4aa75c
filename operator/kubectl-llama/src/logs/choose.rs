//! Whose logs are shown, and in which order. Pure.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::ResourceExt;
use llama_crds::v1alpha1::{GroupStatus, LlamaDeployment};
use llama_operator::labels;

/// Most pods whose logs are shown.
pub const MOST_PODS: usize = 64;

/// One container whose log is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its pod.
    pub pod: String,
    /// It.
    pub container: String,
    /// What its lines begin with.
    pub prefix: String,
}

/// A pod that has no log yet, and why, in a sentence.
pub type NoLog = String;

/// The sources of a deployment in the order in which they are shown, and pods without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Sources.
    pub sources: Vec<Source>,
    /// What is to be said of the other pods.
    pub without: Vec<NoLog>,
}

/// Place in its group of the pod that holds `rank`: pods hold equal runs of ranks. `None`
/// where the layout of the spec has no such rank.
pub fn pod_of_rank(deployment: &LlamaDeployment, rank: i32) -> Option<u32> {
    let layout = deployment.spec.parallelism;
    let ranks = layout.tensor.checked_mul(layout.pipeline)?;
    let each = ranks.checked_div(layout.nodes).filter(|each| *each > 0)?;
    let node = (0..ranks).contains(&rank).then_some(rank / each)?;
    u32::try_from(node).ok()
}

/// The logs of `pods` of `deployment` to be shown, with a failed rank's pod first.
///
/// # Errors
/// What was asked for and is not there.
pub fn choose(
    deployment: &LlamaDeployment,
    pods: &[Pod],
    group: Option<u32>,
    rank: Option<u32>,
) -> Result<Chosen, String> {
    let node = rank
        .map(|rank| {
            let place = i32::try_from(rank).ok();
            let place = place.and_then(|rank| pod_of_rank(deployment, rank));
            let layout = deployment.spec.parallelism;
            place.ok_or_else(|| {
                let last = layout.tensor * layout.pipeline - 1;
                format!("--rank is {rank}; expected 0 to {last}, the ranks of a group")
            })
        })
        .transpose()?;
    let groups = deployment.status.as_ref().map(|status| &*status.groups);
    let groups = groups.unwrap_or_default();
    let mut members: Vec<(u32, u32, &Pod)> = pods.iter().filter_map(member).collect();
    members.retain(|(of, place, _)| {
        group.is_none_or(|group| group == *of) && node.is_none_or(|node| node == *place)
    });
    members.sort_by_key(|(group, node, _)| {
        (!is_failed(deployment, groups, *group, *node), *group, *node)
    });
    let inspects = group.is_none() && rank.is_none() && members.is_empty();
    if members.is_empty() && !inspects {
        return Err(format!(
            "no pod of LlamaDeployment {} matches; expected one of groups {}",
            deployment.name_any(),
            known(groups)
        ));
    }
    if members.len() > MOST_PODS {
        return Err(format!(
            "{} pods match; expected at most {MOST_PODS}: choose with --group or --rank",
            members.len()
        ));
    }
    let mut chosen = Chosen::default();
    for (group, node, pod) in members {
        chosen.take(pod, &format!("{group}/{node}"));
    }
    if inspects {
        for pod in pods {
            if pod.labels().contains_key(labels::INSPECTION) {
                chosen.take(pod, "inspect");
            }
        }
    }
    Ok(chosen)
}

impl Chosen {
    fn take(&mut self, pod: &Pod, place: &str) {
        match container(pod) {
            Some(container) => self.sources.push(Source {
                pod: pod.name_any(),
                container,
                prefix: format!("[{place}] "),
            }),
            None => self.without.push(format!(
                "pod {} has no log yet: {}",
                pod.name_any(),
                waiting(pod)
            )),
        }
    }
}

fn known(groups: &[GroupStatus]) -> String {
    if groups.is_empty() {
        return "(none: no group exists)".to_owned();
    }
    let all: Vec<_> = groups.iter().map(|group| group.index.to_string()).collect();
    all.join(", ")
}

/// Group and place of a pod that belongs to a group.
fn member(pod: &Pod) -> Option<(u32, u32, &Pod)> {
    let label = |key: &str| pod.labels().get(key)?.parse().ok();
    Some((label(labels::GROUP)?, label(labels::NODE)?, pod))
}

/// Whether the pod `node` of `group` held the rank that failed last.
fn is_failed(deployment: &LlamaDeployment, groups: &[GroupStatus], group: u32, node: u32) -> bool {
    let entry = groups
        .iter()
        .find(|entry| u32::try_from(entry.index) == Ok(group));
    let failure = entry.and_then(|entry| entry.last_failure.as_ref());
    let rank = failure.and_then(|failure| failure.rank);
    rank.and_then(|rank| pod_of_rank(deployment, rank)) == Some(node)
}

/// The container of `pod` that ran last.
fn container(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let has_run = |container: &&ContainerStatus| {
        let state = container.state.as_ref();
        state.is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    };
    let mut main = status.container_statuses.iter().flatten();
    let mut first = status.init_container_statuses.iter().flatten();
    let last = main.rfind(has_run).or_else(|| first.rfind(has_run))?;
    Some(last.name.clone())
}

fn waiting(pod: &Pod) -> String {
    let status = pod.status.as_ref();
    let statuses = status.map(|status| {
        let first = status.init_container_statuses.iter().flatten();
        first.chain(status.container_statuses.iter().flatten())
    });
    let why = statuses.into_iter().flatten().find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.clone()?;
        Some(match &waiting.message {
            Some(message) => format!("{reason}: {message}"),
            None => reason,
        })
    });
    why.unwrap_or_else(
        || match pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) {
            Some(node) => format!("its containers have not started on node {node}"),
            None => "it has no node".to_owned(),
        },
    )
}
