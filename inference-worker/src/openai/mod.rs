//! The OpenAI API as data: what clients send, what they get, and stop strings.
//! Nothing here does I/O.

pub mod error;
pub mod request;
pub mod response;
pub mod responses;
pub mod stop;

pub use error::ApiError;
pub use request::{
    DetokenizeRequest, EmbeddingInput, LoadAdapterRequest, Prompt, ResponsesRequest,
    TokenizeRequest, UnloadAdapterRequest, ValidRequest,
};
pub use stop::StopMatcher;
