//! A file's bytes, mapped read-only.

#![allow(unsafe_code, reason = "mapping a file has no safe interface")]

use std::fs::File;
use std::io;

use memmap2::{Mmap, UncheckedAdvice};

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps `file`.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is read-only and private to this process. Model
        // volumes are mounted read-only; whoever changes a served file below us
        // changes bytes that are only ever read as plain numbers, and whoever
        // cuts it ends this process with SIGBUS, never with a wrong access.
        unsafe { Mmap::map(file) }.map(Self)
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Drops the pages from this process; later reads bring them back.
    pub(crate) fn release_pages(&self) -> io::Result<()> {
        // SAFETY: for a file mapping that is never written, dropping pages
        // leaves the contents as they are in the file.
        unsafe { self.0.unchecked_advise(UncheckedAdvice::DontNeed) }
    }
}
