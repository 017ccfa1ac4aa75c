//! A name look-up that works in a static program, where the C library's does not.

pub mod dns;
