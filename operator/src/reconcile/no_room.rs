//! Why a group has no place, in words with names and numbers. Pure.

use super::placement::{Area, Need, domains, seats};
use crate::cluster::capacity::NodeRoom;

/// Nodes that a message names at most.
const NAMED: usize = 4;

/// What is missing, of `all` nodes that are ready: in each of `areas`, the resource of which
/// the best nodes have too little, and theirs.
pub(super) fn explain(need: &Need<'_>, areas: &[Area<'_, '_>], all: usize) -> String {
    match areas {
        [only] if only.pool.is_none() => without_pools(need, &only.nodes, all),
        pools => with_pools(need, pools, all),
    }
}

fn without_pools(need: &Need<'_>, allowed: &[&NodeRoom], all: usize) -> String {
    if allowed.is_empty() {
        return format!(
            "none of the {all} nodes that are ready matches spec.placement (nodeSelector and \
             tolerations)"
        );
    }
    let (place, candidates) = match required(need) {
        None => ("free now".to_owned(), allowed.to_vec()),
        Some(key) => {
            let Some((value, nodes)) = best_domain(need, key, allowed) else {
                return format!("no node has the label {key} of spec.placement.topology.required");
            };
            (format!("best is {value}"), nodes)
        }
    };
    let scarce = scarcest(need, &candidates);
    let found = most_first(&scarce, &candidates);
    format!(
        "{}; {place}: {}",
        wanted(need, &scarce),
        named(&scarce, &found)
    )
}

fn with_pools(need: &Need<'_>, pools: &[Area<'_, '_>], all: usize) -> String {
    let nodes: Vec<_> = pools.iter().flat_map(|area| area.nodes.clone()).collect();
    let scarce = scarcest(need, &nodes);
    let told: Vec<_> = pools
        .iter()
        .map(|area| {
            let name = area.pool.map_or("", |pool| &pool.name);
            format!("pool {name}: {}", of_pool(need, &area.nodes, &scarce, all))
        })
        .collect();
    format!("{}; {}", wanted(need, &scarce), told.join("; "))
}

/// What a pool lacks. Names its resource where that is not `told`, which the sentence
/// began with.
fn of_pool(need: &Need<'_>, nodes: &[&NodeRoom], told: &str, all: usize) -> String {
    if nodes.is_empty() {
        return format!("none of the {all} nodes that are ready matches it");
    }
    let (best, candidates) = match required(need) {
        None => (None, nodes.to_vec()),
        Some(key) => match best_domain(need, key, nodes) {
            None => return format!("no node has the label {key}"),
            Some((_, best)) if seats(need, &best) == 0 => (None, nodes.to_vec()),
            Some((value, best)) => (Some(value), best),
        },
    };
    let scarce = scarcest(need, &candidates);
    let what = if scarce == told {
        String::new()
    } else {
        format!(" {}", unit(&scarce))
    };
    let amount = need.each.get(&scarce).copied().unwrap_or(0);
    let found = most_first(&scarce, &candidates);
    let most = found.first().map_or(0, |(free, _)| *free);
    if most < amount {
        let none = format!("none has {}{what}", shown(&scarce, amount));
        return match found.first() {
            Some((free, name)) if *free > 0 => {
                format!("{none}, {name} has {}", shown(&scarce, *free))
            }
            _ => none,
        };
    }
    match best {
        Some(value) => format!("best is {value} with {}{what}", amounts(&scarce, &found)),
        None if what.is_empty() => named(&scarce, &found),
        None => format!("{what}: {}", named(&scarce, &found))
            .trim_start()
            .to_owned(),
    }
}

fn required<'a>(need: &Need<'a>) -> Option<&'a str> {
    let topology = need.placement.topology.as_ref();
    topology.and_then(|topology| topology.required.as_deref())
}

/// The value of the label `key` whose nodes take the most pods.
fn best_domain<'n>(
    need: &Need<'_>,
    key: &str,
    nodes: &[&'n NodeRoom],
) -> Option<(String, Vec<&'n NodeRoom>)> {
    domains(key, nodes)
        .into_iter()
        .max_by_key(|(_, nodes)| seats(need, nodes))
}

/// What is asked for.
fn wanted(need: &Need<'_>, scarce: &str) -> String {
    let amount = need.each.get(scarce).copied().unwrap_or(0);
    let (pods, whose) = match need.pods {
        1 => ("1 pod needs".to_owned(), "its"),
        pods => (format!("{pods} pods each need"), "their"),
    };
    let near = required(need).map_or_else(String::new, |key| format!(" within one {key}"));
    format!(
        "{pods} {} {} free on {whose} node{near}",
        shown(scarce, amount),
        unit(scarce),
    )
}

/// What nodes have free of `resource`, and their names, the most first.
fn most_first<'n>(resource: &str, nodes: &[&'n NodeRoom]) -> Vec<(u64, &'n str)> {
    let mut found: Vec<_> = nodes
        .iter()
        .map(|node| {
            let free = node.free.get(resource).copied().unwrap_or(0);
            (free, node.name.as_str())
        })
        .collect();
    found.sort_by(|one, other| (other.0, one.1).cmp(&(one.0, other.1)));
    found
}

/// "a has 6, b has 2"
fn named(resource: &str, found: &[(u64, &str)]) -> String {
    let mut names: Vec<String> = found
        .iter()
        .take(NAMED)
        .map(|(free, name)| format!("{name} has {}", shown(resource, *free)))
        .collect();
    match found.len().saturating_sub(NAMED) {
        0 => {}
        more => names.push(format!("{more} more nodes have no more")),
    }
    names.join(", ")
}

/// "8, 6 and 2"
fn amounts(resource: &str, found: &[(u64, &str)]) -> String {
    let shown = |(free, _): &(u64, &str)| shown(resource, *free);
    let mut all: Vec<String> = found.iter().take(NAMED).map(shown).collect();
    match found.len().saturating_sub(NAMED) {
        0 => {}
        more => all.push(format!("{more} with no more")),
    }
    let last = all.pop().unwrap_or_default();
    if all.is_empty() {
        return last;
    }
    format!("{} and {last}", all.join(", "))
}

/// The resource that lets the fewest pods in.
fn scarcest(need: &Need<'_>, nodes: &[&NodeRoom]) -> String {
    let seats_of = |resource: &String, amount: u64| -> u64 {
        nodes
            .iter()
            .map(|node| node.free.get(resource).copied().unwrap_or(0) / amount)
            .sum()
    };
    need.each
        .iter()
        .filter(|(_, amount)| **amount > 0)
        .min_by_key(|(resource, amount)| {
            // Of equals the one that is not plain CPU or memory: GPUs are what people ask for.
            let plain = !resource.contains('/');
            (seats_of(resource, **amount), plain)
        })
        .map(|(resource, _)| resource.clone())
        .unwrap_or_default()
}

fn unit(resource: &str) -> &str {
    if resource == "cpu" { "CPU" } else { resource }
}

/// An amount as people write it.
fn shown(resource: &str, thousandths: u64) -> String {
    const MIB: u64 = 1 << 20;
    if resource == "memory" || resource == "ephemeral-storage" {
        return format!("{}Mi", thousandths / 1000 / MIB);
    }
    if thousandths.is_multiple_of(1000) {
        (thousandths / 1000).to_string()
    } else {
        format!("{thousandths}m")
    }
}
