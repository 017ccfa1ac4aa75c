//! What a worker says of itself, alive (`/state`) or dead (termination message).

use serde::{Deserialize, Serialize};

use crate::adapters::AdapterReport;
use crate::{AnswersReport, TERMINATION_LOG_LIMIT};

/// Why a group stopped, in words that can be a metric label, a condition
/// reason and an event reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureCategory {
    /// The model file is not where the spec says.
    ModelNotFound,
    /// The model file is shorter than its own header says.
    ModelTruncated,
    /// The model file cannot be read as what it claims to be.
    ModelInvalid,
    /// The model is well formed but of a kind that this worker does not run.
    ModelUnsupported,
    /// The model cannot be split over this many ranks.
    InvalidLayout,
    /// Weights and cache do not fit the memory limit.
    InsufficientMemory,
    /// A flag or environment variable is wrong, or asks for what this build lacks.
    InvalidConfiguration,
    /// The volume has no room for the model.
    InsufficientStorage,
    /// What holds the model does not let this pod read it.
    SourceUnauthorized,
    /// What holds the model does not answer, or breaks off.
    SourceUnreachable,
    /// The bytes that came are not those of the digest.
    DigestMismatch,
    /// A rank's process ended.
    RankDied,
    /// A rank's process stopped answering.
    RankSilent,
    /// A rank was given another step plan than its peers.
    PlanMismatch,
    /// The golden answer is not the one that was expected, or ranks differ about it.
    SelfTestMismatch,
    /// The ranks did not find each other in time, or disagree on what they run.
    RendezvousFailed,
    /// A connection between ranks of different pods broke.
    PeerLost,
    /// A defect of the worker.
    Internal,
}

impl FailureCategory {
    /// Every category, for tests and documentation.
    pub const ALL: [Self; 18] = [
        Self::ModelNotFound,
        Self::ModelTruncated,
        Self::ModelInvalid,
        Self::ModelUnsupported,
        Self::InvalidLayout,
        Self::InsufficientMemory,
        Self::InvalidConfiguration,
        Self::InsufficientStorage,
        Self::SourceUnauthorized,
        Self::SourceUnreachable,
        Self::DigestMismatch,
        Self::RankDied,
        Self::RankSilent,
        Self::PlanMismatch,
        Self::SelfTestMismatch,
        Self::RendezvousFailed,
        Self::PeerLost,
        Self::Internal,
    ];

    /// The CamelCase name used in conditions, events and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ModelNotFound => "ModelNotFound",
            Self::ModelTruncated => "ModelTruncated",
            Self::ModelInvalid => "ModelInvalid",
            Self::ModelUnsupported => "ModelUnsupported",
            Self::InvalidLayout => "InvalidLayout",
            Self::InsufficientMemory => "InsufficientMemory",
            Self::InvalidConfiguration => "InvalidConfiguration",
            Self::InsufficientStorage => "InsufficientStorage",
            Self::SourceUnauthorized => "SourceUnauthorized",
            Self::SourceUnreachable => "SourceUnreachable",
            Self::DigestMismatch => "DigestMismatch",
            Self::RankDied => "RankDied",
            Self::RankSilent => "RankSilent",
            Self::PlanMismatch => "PlanMismatch",
            Self::SelfTestMismatch => "SelfTestMismatch",
            Self::RendezvousFailed => "RendezvousFailed",
            Self::PeerLost => "PeerLost",
            Self::Internal => "Internal",
        }
    }

    /// Whether the same spec would fail the same way again, so that starting
    /// the group once more helps nobody.
    pub fn is_permanent(self) -> bool {
        match self {
            Self::ModelNotFound
            | Self::ModelTruncated
            | Self::ModelInvalid
            | Self::ModelUnsupported
            | Self::InvalidLayout
            | Self::InsufficientMemory
            | Self::InvalidConfiguration
            | Self::InsufficientStorage
            | Self::SourceUnauthorized
            | Self::DigestMismatch => true,
            Self::SourceUnreachable
            | Self::RankDied
            | Self::RankSilent
            | Self::PlanMismatch
            | Self::SelfTestMismatch
            | Self::RendezvousFailed
            | Self::PeerLost
            | Self::Internal => false,
        }
    }

    /// Whether the model itself, and not its surroundings, is at fault.
    pub fn concerns_model(self) -> bool {
        matches!(
            self,
            Self::ModelNotFound
                | Self::ModelTruncated
                | Self::ModelInvalid
                | Self::ModelUnsupported
                | Self::SourceUnauthorized
                | Self::SourceUnreachable
                | Self::DigestMismatch
        )
    }

    /// The worker's exit code: 64 for wrong input, 70 for a failure while running
    /// (the numbers of `sysexits.h` for usage and software errors).
    pub fn exit_code(self) -> u8 {
        if self.is_permanent() { 64 } else { 70 }
    }
}

impl std::fmt::Display for FailureCategory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The first failure of a group: what, who, where and when in the step sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureReport {
    /// What kind of failure.
    pub category: FailureCategory,
    /// One sentence with names and numbers that an operator can act on.
    pub message: String,
    /// The rank that failed first, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// The node that ran that rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The step that was running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Incarnation of the group.
    pub epoch: u64,
}

impl FailureReport {
    /// The report as a termination message: JSON of at most
    /// [`TERMINATION_LOG_LIMIT`] bytes, the sentence cut where it would be longer.
    pub fn to_termination_message(&self) -> String {
        let mut report = self.clone();
        loop {
            let json = serde_json::to_string(&report).unwrap_or_default();
            if json.len() <= TERMINATION_LOG_LIMIT || report.message.is_empty() {
                return json;
            }
            let excess = json.len() - TERMINATION_LOG_LIMIT;
            let mut keep = report.message.len().saturating_sub(excess + 4);
            while !report.message.is_char_boundary(keep) {
                keep -= 1;
            }
            report.message.truncate(keep);
            if keep > 0 {
                report.message.push('…');
            }
        }
    }

    /// Reads a termination message; `None` when it is not one of ours.
    pub fn from_termination_message(text: &str) -> Option<Self> {
        serde_json::from_str(text.trim()).ok()
    }
}

/// What a worker pod is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerPhase {
    /// The model is being fetched, before the worker starts.
    Fetching,
    /// Reading flags and the model's header.
    #[default]
    Starting,
    /// Waiting for the ranks of other pods.
    Rendezvous,
    /// Ranks are reading their slices of the weights.
    LoadingWeights,
    /// Ranks are computing the golden answer, and load the adapters that the pod was
    /// started with.
    SelfTest,
    /// Serving.
    Ready,
    /// Finishing running answers after SIGTERM.
    Draining,
    /// Over; `failure` says why.
    Failed,
}

impl WorkerPhase {
    /// The CamelCase name used in status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fetching => "Fetching",
            Self::Starting => "Starting",
            Self::Rendezvous => "Rendezvous",
            Self::LoadingWeights => "LoadingWeights",
            Self::SelfTest => "SelfTest",
            Self::Ready => "Ready",
            Self::Draining => "Draining",
            Self::Failed => "Failed",
        }
    }
}

/// What one rank is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RankPhase {
    /// The process runs but has not yet begun to read weights.
    #[default]
    Starting,
    /// Reading its slice of the weights.
    LoadingWeights,
    /// Waiting for a step plan or computing one.
    Ready,
    /// Ended or silent.
    Failed,
}

/// How far the model is fetched, or the weights are loaded over the ranks of one pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadProgress {
    /// Bytes that are there.
    pub bytes_done: u64,
    /// Bytes that there will be; 0 as long as that is not known.
    pub bytes_total: u64,
    /// Bytes that came in a second, on average since it began.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Seconds until all are there at that rate, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
}

/// The golden answer, which all ranks of a group computed together before it served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SelfTestReport {
    /// Digest of the answer's tokens and of the bits of their probabilities: the same
    /// wherever the same build computes the same weights in the same order of sums.
    pub answer: String,
    /// Tokens of the answer.
    pub tokens: u32,
    /// Milliseconds that it took.
    pub millis: u64,
    /// How often it was given again since, bit by bit.
    #[serde(default)]
    pub repeats: u32,
}

/// What a rank has taken of memory. Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RankMemory {
    /// On CPU cores, the most that the rank's process took since it serves, without pages of
    /// files and with its part of what ranks share; with a device, what that says is used.
    pub used_bytes: u64,
    /// The part of it that blocks of the KV cache have taken so far. Blocks are taken
    /// when they are first used, on a device all at once.
    pub kv_cache_bytes: u64,
}

/// One rank as its pod sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RankReport {
    /// Tensor-parallel rank, from 0.
    pub rank: u32,
    /// Process id inside the pod.
    pub pid: u32,
    /// What it is doing.
    pub phase: RankPhase,
    /// Milliseconds since its last heartbeat.
    pub heartbeat_age_ms: u64,
    /// Last step it finished.
    pub step: u64,
    /// What it has taken of memory, once it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<RankMemory>,
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Answer of `/state` on the internal port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StateReport {
    /// Name of the group.
    pub group: String,
    /// Revision that the pod was made from.
    pub revision: String,
    /// Incarnation of the group.
    pub epoch: u64,
    /// The pod's place in the group.
    pub node_index: u32,
    /// What the pod is doing.
    pub phase: WorkerPhase,
    /// How far the model is fetched or loaded.
    pub load: LoadProgress,
    /// The pod's ranks, in order.
    pub ranks: Vec<RankReport>,
    /// Requests being computed (first pod only).
    pub running: u32,
    /// Requests waiting for room (first pod only).
    pub waiting: u32,
    /// The golden answer, once it is there (first pod only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub self_test: Option<SelfTestReport>,
    /// The adapters that it was told to have (first pod only).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterReport>,
    /// How its answers did within the time that was asked about (first pod only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<AnswersReport>,
    /// Why the group is over, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureReport>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn report(message: String) -> FailureReport {
        FailureReport {
            category: FailureCategory::RankDied,
            message,
            rank: Some(2),
            node: Some("gpu-07".to_owned()),
            step: Some(41),
            epoch: 3,
        }
    }

    proptest! {
        #[test]
        fn termination_messages_fit_and_read_back(message in "\\PC{0,6000}") {
            let report = report(message);
            let text = report.to_termination_message();
            prop_assert!(text.len() <= TERMINATION_LOG_LIMIT);
            let back = FailureReport::from_termination_message(&text).expect("reads back");
            prop_assert_eq!(back.rank, report.rank);
            if text.len() < TERMINATION_LOG_LIMIT - 16 && report.message.len() < 1000 {
                prop_assert_eq!(back, report);
            }
        }
    }

    #[test]
    fn other_text_is_not_a_report() {
        assert_eq!(FailureReport::from_termination_message("oom"), None);
    }

    #[test]
    fn category_names_are_what_serde_writes() {
        for category in FailureCategory::ALL {
            let json = serde_json::to_string(&category).expect("serializes");
            assert_eq!(json, format!("\"{category}\""));
        }
    }
}
