//! The operator: makes the pods, Services and Secrets that a `LlamaDeployment` asks for,
//! keeps its groups alive, and says in status and events what is going on.
//!
//! [`reconcile`] holds the rounds, [`models`] those of a `LlamaModel`, [`run`] everything
//! around them.

pub mod args;
pub mod backoff;
pub mod cluster;
pub mod context;
pub mod events;
pub mod http;
pub mod labels;
pub mod lease;
pub mod metrics;
pub mod models;
pub mod names;
pub mod reconcile;
pub mod run;
pub mod telemetry;
