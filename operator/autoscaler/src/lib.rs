//! How many groups of a model there are to be, from the work that its tokens make.
//!
//! [`decide`](decide::decide) is a function of what is remembered, what is seen and what time
//! it is. It has no clock and does no I/O, so that the operator, a simulator, a replay of
//! recorded snapshots and tests run the same code.
//!
//! Work is counted in replica-seconds, demand in replica-equivalents: how many groups would be
//! just busy with it at the SLO's time from token to token.

pub mod actuate;
pub mod arrivals;
pub mod counters;
pub mod decide;
pub mod decision;
pub mod fleet;
pub mod forecast;
pub mod freshness;
pub mod learn;
pub mod mix;
pub mod model;
pub mod needs;
pub mod reason;
pub mod settings;
pub mod snapshot;
pub mod supply;
pub mod time;
pub mod trim;
