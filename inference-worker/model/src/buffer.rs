//! Memory for weights.

#![allow(
    unsafe_code,
    reason = "aligned memory is taken from the system and viewed as bytes"
)]

use std::alloc::{self, Layout};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::error::ModelError;

/// Size of a huge page. Buffers from this size on are mapped.
const HUGE_PAGE: usize = 2 << 20;
/// A multiple of every size of pages.
const PAGES: usize = 64 << 10;
/// Alignment of smaller ones: a cache line, or a vector of 64 bytes.
const ALIGNMENT: usize = 64;

/// Memory that the system did not give.
#[derive(Debug, thiserror::Error)]
#[error("the system gave no {bytes} bytes of memory for weights")]
pub(crate) struct BufferError {
    /// Wanted size.
    pub(crate) bytes: usize,
    /// What it said.
    #[source]
    pub(crate) source: io::Error,
}

impl From<BufferError> for ModelError {
    fn from(error: BufferError) -> Self {
        Self::Memory(format!("{error}: {}", error.source))
    }
}

/// Bytes of its own, zero at first, that begin at a multiple of 64; at one of 2 MiB
/// where there are at least so many, in huge pages if the system has them. Pages
/// are taken as they are written.
///
/// It is filled as a `&mut [u8]`, by several threads in parts of it, and then
/// shared as [`WeightBytes`].
#[derive(Debug)]
pub(crate) struct Buffer {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the buffer alone, and is reached through borrows
// of it.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes.
    ///
    /// # Errors
    /// When the system does not have so many.
    pub(crate) fn zeroed(len: usize) -> Result<Self, BufferError> {
        let base = if len >= HUGE_PAGE {
            map(len)
        } else {
            allocate(len)
        };
        match base {
            Ok(base) => Ok(Self { base, len }),
            Err(source) => Err(BufferError { bytes: len, source }),
        }
    }
}

/// The layout of a small buffer, at least one byte.
fn layout(len: usize) -> io::Result<Layout> {
    Layout::from_size_align(len.max(1), ALIGNMENT)
        .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))
}

fn allocate(len: usize) -> io::Result<NonNull<u8>> {
    let layout = layout(len)?;
    // SAFETY: the layout's size is not zero.
    let base = unsafe { alloc::alloc_zeroed(layout) };
    NonNull::new(base).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Maps more than `len` bytes and gives back what lies before the first multiple of
/// a huge page, and what lies behind the pages of `len` from there.
fn map(len: usize) -> io::Result<NonNull<u8>> {
    let out_of_memory = || io::Error::from(io::ErrorKind::OutOfMemory);
    let kept = len.checked_next_multiple_of(PAGES);
    let kept = kept.ok_or_else(out_of_memory)?;
    let mapped = kept.checked_add(HUGE_PAGE).ok_or_else(out_of_memory)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no
    // existing memory.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            mapped,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }?
    .cast::<u8>();
    let before = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
    // SAFETY: `before` is less than a huge page, so `kept` bytes follow it in the
    // mapping, and behind them there is something; nothing uses what is given back.
    unsafe {
        let base = start.add(before);
        if before > 0 {
            rustix::mm::munmap(start.cast(), before)?;
        }
        rustix::mm::munmap(base.add(kept).cast(), HUGE_PAGE - before)?;
        // Only a wish: a kernel without huge pages refuses it.
        rustix::mm::madvise(base.cast(), kept, Advice::LinuxHugepage).ok();
        NonNull::new(base).ok_or_else(out_of_memory)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len >= HUGE_PAGE {
            let kept = self.len.next_multiple_of(PAGES);
            // SAFETY: what is left of the mapping made in `map`. It cannot fail, and
            // no borrow outlives the buffer.
            unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), kept) }.ok();
        } else if let Ok(layout) = layout(self.len) {
            // SAFETY: allocated in `allocate` with this layout.
            unsafe { alloc::dealloc(self.base.as_ptr(), layout) }
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that are ours.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

/// A buffer that is complete, and that others may share.
#[derive(Clone, Debug)]
pub(crate) struct WeightBytes(Arc<Buffer>);

impl From<Buffer> for WeightBytes {
    fn from(buffer: Buffer) -> Self {
        Self(Arc::new(buffer))
    }
}

impl Deref for WeightBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_aligned_and_written_in_parts() {
        for (len, alignment) in [
            (0, ALIGNMENT),
            (1, ALIGNMENT),
            (100_001, ALIGNMENT),
            (HUGE_PAGE - 1, ALIGNMENT),
            (HUGE_PAGE, HUGE_PAGE),
            (2 * HUGE_PAGE + 12_345, HUGE_PAGE),
        ] {
            let mut buffer = Buffer::zeroed(len).expect("small");
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().addr().is_multiple_of(alignment), "{len}");
            assert!(buffer.iter().all(|byte| *byte == 0), "{len}");
            std::thread::scope(|scope| {
                for (part, number) in buffer.chunks_mut(len.div_ceil(3).max(1)).zip(1..) {
                    scope.spawn(move || part.fill(number));
                }
            });
            for (part, number) in buffer.chunks(len.div_ceil(3).max(1)).zip(1..) {
                assert!(part.iter().all(|byte| *byte == number), "{len}");
            }
        }
    }

    #[test]
    fn impossible_sizes_are_an_error() {
        for bytes in [
            usize::MAX,
            usize::MAX - HUGE_PAGE,
            isize::MAX as usize,
            1 << 60,
        ] {
            let error = Buffer::zeroed(bytes).expect_err("more than there is");
            assert_eq!(
                error.to_string(),
                format!("the system gave no {bytes} bytes of memory for weights")
            );
        }
    }
}
