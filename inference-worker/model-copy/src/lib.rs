//! What programs that bring a model into a pod's volume have in common.

pub mod head;
pub mod progress;
pub mod report;
pub mod space;
