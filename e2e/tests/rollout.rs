//! Changes while answers stream: nothing that was begun is cut, and nothing is refused.

mod support;

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::{Value, json};
use support::clients::{answer_tokens, answer_within};
use support::small::{NAME, small, with_room_for};
use support::{Place, READY_WITHIN, condition, place};

/// Groups before and after.
const GROUPS: u32 = 2;
/// Clients that ask all the time, half of them on connections that they keep.
const CLIENTS: usize = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

#[tokio::test]
async fn with_room_for_one_more_a_new_group_starts_first() -> anyhow::Result<()> {
    let Some(place) = place("e2e-surge").await? else {
        return Ok(());
    };
    let room = with_room_for(&place, u64::from(GROUPS) + 1).await?;
    let seen = roll(&place, room).await?;
    ensure!(seen.modes == ["Surge"] && seen.least == 2, "{seen:?}");
    place.remove_namespace().await
}

#[tokio::test]
async fn without_room_an_old_group_ends_first_and_the_other_serves() -> anyhow::Result<()> {
    let Some(place) = place("e2e-replace").await? else {
        return Ok(());
    };
    let room = with_room_for(&place, u64::from(GROUPS)).await?;
    let seen = roll(&place, room).await?;
    ensure!(
        seen.modes == ["DrainThenReplace"] && seen.least == 1,
        "{seen:?}"
    );
    place.remove_namespace().await
}

#[tokio::test]
async fn with_much_room_new_groups_start_first_and_fewer_groups_cut_nothing() -> anyhow::Result<()>
{
    let Some(place) = place("e2e-room").await? else {
        return Ok(());
    };
    let seen = roll(&place, |_: &mut Value| ()).await?;
    ensure!(seen.modes == ["Surge"] && seen.least == 2, "{seen:?}");

    let clients = place.clients(NAME, CLIENTS).await?;
    place.kubectl(["scale", "ld", NAME, "--replicas=1"]).await?;
    let within = READY_WITHIN + drain_within()?;
    place.wait_ready_within(NAME, 1, within).await?;
    clients.end().await?;
    place.remove_namespace().await
}

/// Rolls groups, changed by `change`, to the next revision while clients ask.
async fn roll(place: &Place, change: impl Fn(&mut Value)) -> anyhow::Result<Seen> {
    let drain = format!("{}s", drain_within()?.as_secs());
    let change = |object: &mut Value| {
        change(object);
        object["spec"]["drain"] = json!({"timeout": drain});
    };
    place.apply(small(GROUPS, change)).await?;
    place.wait_ready(NAME, GROUPS.into()).await?;
    let clients = place.clients(NAME, CLIENTS).await?;
    place
        .apply(small(GROUPS, |object| {
            change(object);
            object["spec"]["restart"] = json!({"id": "again"});
        }))
        .await?;
    let seen = watch(place).await?;
    clients.end().await?;
    Ok(seen)
}

/// How long a group may take to finish its answers.
fn drain_within() -> anyhow::Result<Duration> {
    Ok(answer_within(answer_tokens()?))
}

/// What was seen of a rollout.
#[derive(Debug)]
struct Seen {
    /// Modes, each once.
    modes: Vec<String>,
    /// Sentences, each once.
    messages: Vec<String>,
    /// Fewest groups that served.
    least: i64,
}

/// Looks on until all groups have the new revision and the old ones are gone.
async fn watch(place: &Place) -> anyhow::Result<Seen> {
    let mut seen = Seen {
        modes: Vec::new(),
        messages: Vec::new(),
        least: GROUPS.into(),
    };
    // Each group that ends finishes its answers first.
    let deadline = Instant::now() + READY_WITHIN + GROUPS * drain_within()?;
    loop {
        let object = place.get(["ld", NAME]).await?;
        let status = &object["status"];
        if status["observedGeneration"] == object["metadata"]["generation"] {
            seen.least = seen
                .least
                .min(status["readyReplicas"].as_i64().unwrap_or(0));
            note(&mut seen.modes, &status["rollout"]["mode"]);
            note(&mut seen.messages, &status["rollout"]["message"]);
            let is_over = condition(&object, "Ready").starts_with("True")
                && status["rollout"].is_null()
                && status["replicas"] == GROUPS;
            if is_over {
                return Ok(seen);
            }
        }
        ensure!(Instant::now() < deadline, "{seen:?}: {status}");
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

fn note(seen: &mut Vec<String>, what: &Value) {
    let text = what.as_str().unwrap_or_default();
    if !text.is_empty() && seen.iter().all(|known| known != text) {
        seen.push(text.to_owned());
    }
}
