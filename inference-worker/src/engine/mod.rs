//! Between the front of a group and its rank 0: requests in tokens go one way,
//! tokens come back.
//!
//! [`frames`] is what travels, [`client`] is the front's end; rank 0's end is
//! [`crate::rank::engine`].

pub mod client;
pub mod frames;

pub use client::{EngineClient, Generation, GenerationEvent, SubmitError};
pub use frames::{EngineStats, FromEngine, Submit, ToEngine, TokenLogprobs, Work};
