//! Who a rank is, and whether it belongs.

use std::net::SocketAddr;

use llama_model::blocks::KvCapacity;
use serde::{Deserialize, Serialize};

use crate::adapters::AdapterArgs;
use crate::comm::placement::Placement;

/// What ranks of one group must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of the group.
    pub group: String,
    /// Revision of the pods.
    pub revision: String,
    /// Incarnation of the group.
    pub epoch: u64,
    /// How the ranks divide the model, and where they are.
    pub placement: Placement,
    /// Hash of the model file's header.
    pub digest: String,
    /// Longest sequence in tokens.
    pub max_tokens: u32,
    /// Type of the activations.
    pub compute: String,
    /// Type of the cached keys and values.
    pub kv: String,
    /// Room for adapters.
    pub adapters: AdapterArgs,
    /// Version of the worker.
    pub build: String,
}

/// One rank's own particulars.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The rank.
    pub rank: u32,
    /// The node it runs on.
    pub node: String,
    /// What its pod has memory for.
    pub capacity: KvCapacity,
    /// Where it waits for higher ranks.
    pub listen: SocketAddr,
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) token: String,
    pub(super) identity: Identity,
    pub(super) member: Member,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Roster(Vec<Member>),
    Refused(String),
}

/// What a rank does with a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Member,
    /// Not of this group: send it away and go on waiting.
    Stranger(String),
    /// Of this group, but running something else: the group cannot form.
    Disagreement(String),
}

/// Judges a caller's greeting. Tokens are compared by their hashes, whose
/// comparison takes the same time wherever they differ.
pub(super) fn judge(token: &str, own: &Identity, hello: &Hello) -> Verdict {
    if blake3::hash(token.as_bytes()) != blake3::hash(hello.token.as_bytes()) {
        return Verdict::Stranger("wrong rendezvous token".to_owned());
    }
    let theirs = &hello.identity;
    let differs =
        |what: &str, theirs: &str, own: &str| format!("its {what} is {theirs}, expected {own}");
    if theirs.group != own.group {
        return Verdict::Stranger(differs("group", &theirs.group, &own.group));
    }
    if theirs.epoch != own.epoch {
        let (theirs, own) = (theirs.epoch.to_string(), own.epoch.to_string());
        return Verdict::Stranger(differs("epoch", &theirs, &own));
    }
    for ((what, theirs), (_, own)) in terms(theirs).iter().zip(&terms(own)) {
        if theirs != own {
            return Verdict::Disagreement(differs(what, theirs, own));
        }
    }
    let world = own.placement.world();
    let rank = hello.member.rank;
    if rank == 0 || rank as usize >= world {
        return Verdict::Disagreement(format!("it calls itself rank {rank} of {world}"));
    }
    Verdict::Member
}

/// What ranks of one group and epoch can still disagree on, by name.
fn terms(identity: &Identity) -> [(&'static str, String); 9] {
    let Placement {
        layout,
        ranks_per_pod,
    } = identity.placement;
    [
        ("revision", identity.revision.clone()),
        ("build", identity.build.clone()),
        ("tensor parallel size", layout.tensor.to_string()),
        ("pipeline parallel size", layout.pipeline.to_string()),
        ("number of ranks per node", ranks_per_pod.to_string()),
        ("model digest", identity.digest.clone()),
        ("max_tokens", identity.max_tokens.to_string()),
        ("compute type", identity.compute.clone()),
        ("KV cache type", identity.kv.clone()),
    ]
}
