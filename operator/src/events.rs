//! Kubernetes events.
//!
//! Each event has a name made from what it tells, so that telling it again (after a
//! restart, after a failed write) is refused by the API server and harmless. kube's own
//! recorder is not used: it joins events of one reason within six minutes and keeps the
//! first note, and the second rank that dies would never be named.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use crate::labels::FIELD_MANAGER;

/// The API server refuses longer notes (in bytes).
const NOTE_LIMIT: usize = 1024;

/// Something worth an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whether something is wrong.
    pub warning: bool,
    /// The kind in one word.
    pub reason: String,
    /// What the operator does about it, in one word.
    pub action: &'static str,
    /// A sentence with names and numbers.
    pub note: String,
    /// What tells this occurrence from others of the same object and reason, for
    /// example group and epoch.
    pub occurrence: String,
}

/// The event that tells `notice` of `object`.
pub fn event(object: &ObjectReference, notice: &Notice, reporter: &str, now: Timestamp) -> Event {
    let owner = object.name.as_deref().unwrap_or_default();
    let uid: String = object
        .uid
        .iter()
        .flat_map(|uid| uid.chars())
        .take(8)
        .collect();
    let reason = notice.reason.to_ascii_lowercase();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{owner}.{uid}.{reason}.{}", notice.occurrence)),
            namespace: object.namespace.clone(),
            ..ObjectMeta::default()
        },
        type_: Some(if notice.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(notice.reason.clone()),
        action: Some(notice.action.to_owned()),
        note: Some(shortened(&notice.note)),
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(format!("llmops.dev/{FIELD_MANAGER}")),
        reporting_instance: Some(reporter.to_owned()),
        regarding: Some(object.clone()),
        ..Event::default()
    }
}

/// Publishes `notice`, unless it was published before.
pub async fn publish(
    client: &Client,
    object: &ObjectReference,
    notice: &Notice,
    reporter: &str,
    now: Timestamp,
) -> Result<(), kube::Error> {
    let namespace = object.namespace.as_deref().unwrap_or("default");
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let event = event(object, notice, reporter, now);
    match events.create(&PostParams::default(), &event).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        other => other.map(|_| ()),
    }
}

fn shortened(note: &str) -> String {
    if note.len() <= NOTE_LIMIT {
        return note.to_owned();
    }
    let mut cut = NOTE_LIMIT - '…'.len_utf8();
    while !note.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}…", &note[..cut])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(note: &str) -> Notice {
        Notice {
            warning: true,
            reason: "RankDied".to_owned(),
            action: "Recreate",
            note: note.to_owned(),
            occurrence: "0-3".to_owned(),
        }
    }

    #[test]
    fn one_occurrence_has_one_name() {
        let object = ObjectReference {
            name: Some("m".to_owned()),
            namespace: Some("team".to_owned()),
            uid: Some("12345678-aaaa".to_owned()),
            ..ObjectReference::default()
        };
        let event = event(&object, &notice("x"), "pod-1", Timestamp::UNIX_EPOCH);
        assert_eq!(
            event.metadata.name.as_deref(),
            Some("m.12345678.rankdied.0-3")
        );
        assert_eq!(event.type_.as_deref(), Some("Warning"));
    }

    #[test]
    fn notes_fit_in_bytes() {
        let note = "é".repeat(2000);
        let short = shortened(&note);
        assert!(short.len() <= NOTE_LIMIT && short.ends_with('…'));
        assert_eq!(shortened("short"), "short");
    }
}
