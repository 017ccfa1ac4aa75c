//! Faults at a chosen operation of a step, for tests: builds with debug assertions end or
//! stop a rank there, or change a bit, if their environment says so. Other builds cannot.

#[cfg(not(debug_assertions))]
#[path = "fault/absent.rs"]
mod build;
#[cfg(debug_assertions)]
#[path = "fault/present.rs"]
mod build;

pub(super) use build::wrap;
