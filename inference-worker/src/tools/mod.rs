//! Functions that a model may call: what requests say of them, calls in the text of
//! an answer, and grammars that require a call. Nothing here does I/O.
//!
//! Models write calls in one of two notations ([`ToolFormat`]). [`ToolStream`] reads
//! either as it comes; text that is no call comes out as content.

mod delta;
mod format;
mod json;
mod literal;
mod markers;
mod pythonic;
mod required;
mod scanner;
mod stream;
#[cfg(test)]
mod tests;
mod tool;

pub use delta::ToolDelta;
pub use format::{MARKERS, ToolFormat};
pub use required::{RequiredCall, required_calls};
pub use stream::ToolStream;
pub use tool::{Tool, ToolShape};

/// Most calls of one answer; what follows is content.
pub const MAX_CALLS: usize = 128;
/// Most bytes of the arguments of one call.
pub const MAX_ARGUMENT_BYTES: usize = 256 << 10;
/// Deepest nesting of arguments.
const MAX_DEPTH: usize = 64;
/// Most bytes that are held back until it is known whether they begin a call.
const MAX_HELD: usize = 1024;
