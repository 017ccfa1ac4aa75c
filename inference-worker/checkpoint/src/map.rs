//! A file's bytes, mapped read-only.

#![allow(unsafe_code, reason = "mapping a file has no safe interface")]

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps `file`.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is read-only, private to this process and only read
        // while the header is parsed. Model volumes are mounted read-only; whoever
        // changes a file below us changes bytes that are checked as they are read,
        // and whoever cuts it ends this process with SIGBUS, never with a wrong
        // access.
        unsafe { Mmap::map(file) }.map(Self)
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}
