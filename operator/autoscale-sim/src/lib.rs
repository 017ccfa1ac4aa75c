//! Simulates groups of GPUs that serve LLM requests, and autoscaling policies
//! that decide how many of them there are.
//!
//! A [`trace`] of requests goes through a gateway to groups that batch
//! continuously ([`engine`]); every few seconds a [`policy`] sees what a
//! controller would see and says how many groups it wants; a [`report`] says
//! what the users got and what it cost. No clock, no network: the same trace,
//! seed and policy give the same report.

pub mod chart;
mod count;
pub mod engine;
pub mod model;
pub mod policy;
pub mod random;
pub mod report;
pub mod trace;
