//! Between the front of a group and its rank 0: requests in tokens go one way,
//! tokens come back.
//!
//! [`frames`] is what travels, [`client`] is the front's end, [`plan`] is what
//! rank 0 tells the other ranks.

pub mod client;
pub mod frames;
pub mod plan;

pub use client::{EngineClient, Generation, GenerationEvent, SubmitError};
pub use frames::{EngineStats, FromEngine, Submit, ToEngine};
pub use plan::StepPlan;
