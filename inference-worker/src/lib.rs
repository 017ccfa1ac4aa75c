//! Inference worker: tensor-parallel ranks of a Llama model behind the OpenAI API.
//!
//! `llama-worker serve` is a pod's [`supervisor`]. It starts the pod's ranks
//! ([`rank`]) as child processes, which compute steps together ([`comm`]). Rank
//! 0 plans the steps ([`scheduler`]); the first pod's supervisor answers clients
//! ([`server`], [`openai`]) and talks to rank 0 in tokens ([`engine`]).

pub mod adapters;
pub mod bench;
pub mod cgroup;
pub mod comm;
mod digest;
pub mod embedding;
pub mod engine;
pub mod failure;
pub mod inspect;
pub mod logits;
pub mod metrics;
pub mod openai;
pub mod plan;
mod quantity;
pub mod rank;
pub mod replay;
pub mod scheduler;
pub mod server;
pub mod shard;
pub mod structured;
pub mod supervisor;
pub mod telemetry;
mod termination;
pub mod tools;
