//! Inference worker.
// NOTE to the owner: engine, metrics, openai and server are written by the project lead (see
// src/api, a plain file, for what they hold); write rank/, supervisor/, main.rs and tests on top.
pub mod comm;
pub mod engine;
pub mod failure;
pub mod metrics;
pub mod openai;
pub mod scheduler;
pub mod server;
