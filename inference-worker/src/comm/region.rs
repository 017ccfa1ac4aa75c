//! A piece of memory that the processes of one pod share.
//!
//! The supervisor makes it as a memfd, which has no name and so cannot be left
//! behind, and its children inherit the descriptor.
#![allow(
    unsafe_code,
    reason = "mapping memory and viewing it as shared types cannot be expressed safely"
)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Shared memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The memfd could not be made.
    #[error("create {bytes} bytes of shared memory")]
    Create {
        /// Wanted size.
        bytes: usize,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The memfd could not be mapped.
    #[error("map {bytes} bytes of shared memory")]
    Map {
        /// Wanted size.
        bytes: usize,
        /// What the kernel said.
        #[source]
        source: Errno,
    },
    /// The inherited descriptor holds something else.
    #[error("descriptor {fd} holds {found} bytes of shared memory, expected {expected}")]
    Size {
        /// The descriptor.
        fd: RawFd,
        /// Its size.
        found: u64,
        /// Size that this layout needs.
        expected: usize,
    },
}

/// Types that may live in a [`Region`].
///
/// # Safety
/// Every bit pattern, all zeroes included, must be a valid value, and every
/// field must be an atomic (or an array of atomics), so that other processes
/// may change it at any time. No field may hold an address.
pub unsafe trait SharedLayout {}

/// A mapping of shared memory, zeroed when created.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the process, not to a thread; access goes
// through atomics or through the raw byte functions, whose callers synchronise.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Makes `len` zeroed bytes whose descriptor children inherit.
    ///
    /// # Errors
    /// When the kernel refuses the memory.
    pub fn create(len: usize) -> Result<Self, RegionError> {
        let create = |source| RegionError::Create { bytes: len, source };
        // Without MFD_CLOEXEC: ranks receive the descriptor by number.
        let fd = rustix::fs::memfd_create("llama-ranks", MemfdFlags::empty()).map_err(create)?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(create)?;
        Self::map(fd, len)
    }

    /// Maps the region behind the inherited descriptor `fd`.
    ///
    /// # Errors
    /// When `fd` is not a region of `len` bytes.
    pub fn from_inherited(fd: RawFd, len: usize) -> Result<Self, RegionError> {
        // SAFETY: the supervisor opened this descriptor for this process and
        // nothing else here uses it; if it is not open, fstat below fails.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let found = rustix::fs::fstat(&fd)
            .map_err(|source| RegionError::Map { bytes: len, source })?
            .st_size;
        let found = u64::try_from(found).unwrap_or(0);
        if found != len as u64 {
            return Err(RegionError::Size {
                fd: fd.as_raw_fd(),
                found,
                expected: len,
            });
        }
        Self::map(fd, len)
    }

    fn map(fd: OwnedFd, len: usize) -> Result<Self, RegionError> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches
        // no existing memory.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                0,
            )
        }
        .map_err(|source| RegionError::Map { bytes: len, source })?;
        let base = NonNull::new(address.cast()).ok_or(RegionError::Map {
            bytes: len,
            source: Errno::NOMEM,
        })?;
        Ok(Self { base, len, fd })
    }

    /// The descriptor's number, the same in children that inherit it.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The value of type `T` at byte `offset`; `None` outside the region or
    /// when `offset` does not fit `T`'s alignment.
    pub fn at<T: SharedLayout>(&self, offset: usize) -> Option<&T> {
        let end = offset.checked_add(size_of::<T>())?;
        if end > self.len || !offset.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: in bounds and aligned (the base is page-aligned); `T` accepts
        // any bits and is made of atomics by the contract of `SharedLayout`.
        Some(unsafe { self.base.add(offset).cast::<T>().as_ref() })
    }

    /// Copies `bytes` to `offset`. Returns `false` when they do not fit.
    ///
    /// The caller must know, by its own protocol, that no process reads or
    /// writes that range meanwhile.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        let Some(end) = offset.checked_add(bytes.len()) else {
            return false;
        };
        if end > self.len {
            return false;
        }
        // SAFETY: in bounds; the protocol of the caller excludes other access,
        // and `bytes` is ordinary memory that cannot overlap the mapping.
        unsafe {
            self.base
                .add(offset)
                .as_ptr()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        true
    }

    /// Copies `values` to byte `offset`; see [`Region::write`].
    pub fn write_floats(&self, offset: usize, values: &[f32]) -> bool {
        // SAFETY: any f32 slice may be viewed as its bytes.
        let bytes =
            unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        self.write(offset, bytes)
    }

    /// `len` floats from byte `offset`; `None` when out of range or not aligned.
    /// See [`Region::bytes`].
    pub fn floats(&self, offset: usize, len: usize) -> Option<&[f32]> {
        let bytes = self.bytes(offset, len.checked_mul(size_of::<f32>())?)?;
        // SAFETY: every bit pattern is an f32.
        let (before, floats, after) = unsafe { bytes.align_to::<f32>() };
        (before.is_empty() && after.is_empty()).then_some(floats)
    }

    /// The bytes at `offset..offset + len`; `None` when out of range.
    ///
    /// The caller must know, by its own protocol, that no process writes the
    /// range while the slice lives.
    pub fn bytes(&self, offset: usize, len: usize) -> Option<&[u8]> {
        let end = offset.checked_add(len)?;
        if end > self.len {
            return None;
        }
        // SAFETY: in bounds, initialised (memfd pages are zeroed), and the
        // caller's protocol excludes writers for the lifetime of the slice.
        Some(unsafe { std::slice::from_raw_parts(self.base.add(offset).as_ptr(), len) })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; borrows of it cannot
        // outlive `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "unmap shared memory");
        }
    }
}
