//! What the operator and the inference worker agree on, written once.
//!
//! The operator builds a [`LaunchArgs`] and puts its [`LaunchArgs::to_args`]
//! into a pod; the worker parses the same type. The worker answers with
//! [`StateReport`] on its internal port while it lives and with a
//! [`FailureReport`] as the container's termination message when it dies. Before any
//! group exists, [`InspectArgs`] and [`InspectionReport`] tell what a model takes.

pub mod adapters;
pub mod answers;
pub mod fetch;
pub mod inspect;
pub mod launch;
pub mod report;

pub use adapters::{
    AdapterArgs, AdapterList, AdapterModule, AdapterPhase, AdapterReport, MOST_ADAPTER_RANK,
    MOST_ADAPTERS,
};
pub use answers::{ANSWERS_WITHIN, AnswersReport, LONGEST_WINDOW, Spread};
pub use fetch::{CACHE_LOCK, CACHE_MODEL_FOLDER, FetchArgs, FetchSource, ModelFile, hex};
pub use inspect::{
    FittingChange, GroupShape, InspectArgs, InspectionReport, MemoryShare, ModelFacts, Room,
};
pub use launch::{
    Device, HANG_TIMEOUT_SECONDS, KvCacheDtype, LaunchArgs, SELF_TEST_INTERVAL_SECONDS,
};
pub use report::{
    FailureCategory, FailureReport, LoadProgress, RankMemory, RankPhase, RankReport,
    SelfTestReport, StateReport, WorkerPhase,
};

/// Port of the OpenAI API on a group's first pod.
pub const API_PORT: u16 = 8000;
/// Name of [`API_PORT`] in pods and Services.
pub const API_PORT_NAME: &str = "http";
/// Port of `/state`, `/metrics` and `/health` on every worker pod.
pub const INTERNAL_PORT: u16 = 8080;
/// Name of [`INTERNAL_PORT`] in pods.
pub const INTERNAL_PORT_NAME: &str = "internal";
/// Port on which the first pod of a group waits for the ranks of the others.
pub const RENDEZVOUS_PORT: u16 = 29500;
/// Name of [`RENDEZVOUS_PORT`] in pods and Services.
pub const RENDEZVOUS_PORT_NAME: &str = "rendezvous";

/// `GET` path that answers 200 once a worker can serve (readiness), on both ports.
pub const HEALTH_PATH: &str = "/health";
/// `GET` path that answers 200 while the worker process is alive, on the internal port.
pub const LIVE_PATH: &str = "/livez";
/// `GET` path of the [`StateReport`] on the internal port.
pub const STATE_PATH: &str = "/state";
/// `PUT` path of an [`AdapterList`] on the internal port of a group's first pod, where the
/// group was started with `--managed-lora-folder`; answers 202.
pub const ADAPTERS_PATH: &str = "/adapters";
/// `POST` path on the internal port that tells a worker how long its answers get once it is
/// asked to end, by [`DRAIN_SECONDS`]: the pod's grace will be shorter than what it was started
/// with. It never makes the time longer, and does nothing before a worker is asked to end.
pub const DRAIN_PATH: &str = "/drain";
/// Parameter of the query of [`DRAIN_PATH`].
pub const DRAIN_SECONDS: &str = "seconds";
/// `GET` path of the Prometheus metrics on the internal port.
pub const METRICS_PATH: &str = "/metrics";

/// Environment variable with the shared secret that ranks of other pods must show.
pub const RENDEZVOUS_TOKEN_ENV: &str = "LLAMA_RENDEZVOUS_TOKEN";
/// Environment variable with the address of a LeaderWorkerSet's first pod.
pub const LWS_LEADER_ADDRESS_ENV: &str = "LWS_LEADER_ADDRESS";
/// Environment variable with the number of pods in a group of a LeaderWorkerSet.
pub const LWS_GROUP_SIZE_ENV: &str = "LWS_GROUP_SIZE";
/// Environment variable with a pod's place in its group of a LeaderWorkerSet.
pub const LWS_WORKER_INDEX_ENV: &str = "LWS_WORKER_INDEX";
/// Environment variable with the bearer token that a model is fetched with.
pub const FETCH_TOKEN_ENV: &str = "LLAMA_FETCH_TOKEN";
/// Environment variable with certificates (PEM) to trust, besides the public ones, where a
/// model is fetched.
pub const FETCH_CA_ENV: &str = "LLAMA_FETCH_CA";
/// Environment variable with the name of the key that an S3 store is asked with; also the
/// key of the Secret that holds it.
pub const S3_KEY_ID_ENV: &str = "AWS_ACCESS_KEY_ID";
/// The same for the key itself.
pub const S3_SECRET_KEY_ENV: &str = "AWS_SECRET_ACCESS_KEY";
/// The same for the token of a session, where there is one.
pub const S3_SESSION_TOKEN_ENV: &str = "AWS_SESSION_TOKEN";
/// Environment variable with the node that runs the pod.
pub const NODE_NAME_ENV: &str = "LLAMA_NODE_NAME";
/// Environment variable with the pod's name.
pub const POD_NAME_ENV: &str = "LLAMA_POD_NAME";
/// Environment variable with the pod's own address.
pub const POD_IP_ENV: &str = "LLAMA_POD_IP";

/// Folder of a worker pod in which the model is mounted, read-only.
pub const MODEL_MOUNT: &str = "/model";
/// Folder of a worker pod in which adapters are mounted, read-only.
pub const ADAPTER_MOUNT: &str = "/adapters";
/// Where the model's volume is mounted while it is filled from a model image. Not
/// [`MODEL_MOUNT`], which would hide a model that the image itself keeps there.
pub const MODEL_FETCH_MOUNT: &str = "/llama-model";
/// Folder shared by the two init steps that fetch a model image.
pub const TOOLS_MOUNT: &str = "/llama-tools";
/// Where the worker image keeps the program that fetches a model from a server.
pub const MODEL_FETCH_PROGRAM: &str = "/usr/local/bin/llama-model-fetch";
/// Where the worker image keeps the program that copies a model out of an image.
pub const MODEL_COPY_PROGRAM: &str = "/usr/local/bin/llama-model-copy";
/// File that carries the [`FailureReport`] of a container that ended.
pub const TERMINATION_LOG: &str = "/dev/termination-log";
/// Kubernetes keeps this many bytes of a termination message.
pub const TERMINATION_LOG_LIMIT: usize = 4096;
