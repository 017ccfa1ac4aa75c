//! NCCL's communicators, non-blocking: no call waits, whatever peers do.
#![allow(unsafe_code, reason = "NCCL is a C library")]

use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::cuda_backend::cudarc::nccl::sys;
use llama_model::CollectiveError;

/// `NCCL_CONFIG_INITIALIZER` of nccl.h.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const UNDEFINED: i32 = i32::MIN;
/// The version whose configuration is filled below, as `NCCL_VERSION` numbers it.
const CONFIG_VERSION: u32 = 23004;

/// What NCCL said when it did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Whether a peer or the network may be the cause.
    pub(super) concerns_peers: bool,
    /// NCCL's words.
    pub(super) reason: String,
}

impl Fault {
    /// The error of `operation`.
    pub(super) fn of(self, operation: &str) -> CollectiveError {
        CollectiveError::Transport {
            operation: format!("NCCL: {operation}"),
            reason: self.reason,
        }
    }
}

/// Whether a call or what it began is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    UnderWay,
}

fn judge(code: sys::ncclResult_t, comm: sys::ncclComm_t) -> Result<Progress, Fault> {
    use sys::ncclResult_t as Code;
    match code {
        Code::ncclSuccess => Ok(Progress::Done),
        Code::ncclInProgress => Ok(Progress::UnderWay),
        code => Err(Fault {
            concerns_peers: matches!(
                code,
                Code::ncclRemoteError | Code::ncclSystemError | Code::ncclTimeout
            ),
            reason: words(code, comm),
        }),
    }
}

/// NCCL's sentence for `code`, and what it logged last.
fn words(code: sys::ncclResult_t, comm: sys::ncclComm_t) -> String {
    // SAFETY: NCCL answers any code with a static string, and gives its last
    // message as a string or null; a null communicator is allowed there.
    let (sentence, detail) = unsafe {
        (
            text(sys::ncclGetErrorString(code)),
            text(sys::ncclGetLastError(comm)),
        )
    };
    match (sentence, detail) {
        (Some(sentence), Some(detail)) => format!("{sentence} ({detail})"),
        (Some(sentence), None) => sentence,
        (None, _) => format!("{code:?}"),
    }
}

/// # Safety
/// `string` is null or points to a string that ends with a zero.
unsafe fn text(string: *const c_char) -> Option<String> {
    if string.is_null() {
        return None;
    }
    // SAFETY: as above.
    let text = unsafe { CStr::from_ptr(string) }.to_string_lossy();
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// What the ranks of a communicator find each other by.
#[derive(Clone, Copy)]
pub(super) struct UniqueId(sys::ncclUniqueId);

impl UniqueId {
    /// A new one; this process answers the ranks that come with it.
    pub(super) fn new() -> Result<Self, Fault> {
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        // SAFETY: `id` is a valid place for an identifier.
        let code = unsafe { sys::ncclGetUniqueId(&raw mut id) };
        judge(code, ptr::null_mut()).map(|_| Self(id))
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        self.0.internal.map(i8::cast_unsigned).to_vec()
    }

    /// `None` when the length differs.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 128] = bytes.try_into().ok()?;
        Some(Self(sys::ncclUniqueId {
            internal: bytes.map(u8::cast_signed),
        }))
    }
}

/// Memory of the device that an operation reads or writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) address: u64,
    pub(super) count: usize,
    pub(super) kind: sys::ncclDataType_t,
}

impl Span {
    /// No values.
    pub(super) const EMPTY: Self = Self {
        address: 0,
        count: 0,
        kind: sys::ncclDataType_t::ncclFloat32,
    };
}

/// Where NCCL writes a communicator that it makes. It may write once more after the
/// call, from a thread of its own, so the place is never given back.
struct Place(*mut sys::ncclComm_t);

impl Place {
    fn new() -> Self {
        Self(Box::into_raw(Box::new(ptr::null_mut())))
    }

    /// The communicator; null before NCCL has written it.
    fn get(&self) -> sys::ncclComm_t {
        // SAFETY: the place is valid for ever; NCCL writes it whole.
        unsafe { ptr::read_volatile(self.0) }
    }
}

/// One rank's end of a group of devices. Operations are put on one stream and run
/// there in order. When it is dropped, what is under way is aborted.
pub(super) struct Communicator {
    raw: sys::ncclComm_t,
    stream: Arc<CudaStream>,
}

// SAFETY: NCCL's communicators may be used by any thread, by one at a time.
unsafe impl Send for Communicator {}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator")
            .field("open", &!self.raw.is_null())
            .finish_non_exhaustive()
    }
}

impl Communicator {
    /// Begins to connect `world` ranks, each on the current device of its thread.
    /// They are connected once [`Communicator::progress`] says so.
    pub(super) fn begin(
        id: UniqueId,
        (rank, world): (i32, i32),
        stream: Arc<CudaStream>,
    ) -> Result<Self, Fault> {
        let mut config = configuration();
        let place = Place::new();
        // SAFETY: both places are valid; NCCL copies the configuration.
        let code =
            unsafe { sys::ncclCommInitRankConfig(place.0, world, id.0, rank, &raw mut config) };
        let raw = place.get();
        let communicator = Self { raw, stream };
        judge(code, raw)?;
        Ok(communicator)
    }

    /// Begins to connect the ranks of the same `color`, ordered by `key`. All ranks
    /// of this communicator take part. The new one is there once
    /// [`Communicator::progress`] of this one says that the call is done.
    pub(super) fn begin_split(&self, color: i32, key: i32) -> Result<Splitting, Fault> {
        let mut config = configuration();
        let splitting = Splitting {
            place: Place::new(),
            stream: Arc::clone(&self.stream),
        };
        // SAFETY: the communicator is open and both places are valid; NCCL copies
        // the configuration.
        let code =
            unsafe { sys::ncclCommSplit(self.raw, color, key, splitting.place.0, &raw mut config) };
        judge(code, self.raw)?;
        Ok(splitting)
    }

    /// Whether the last call is done.
    pub(super) fn progress(&self) -> Result<Progress, Fault> {
        let mut code = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is open and `code` a valid place.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.raw, &raw mut code) };
        judge(asked, self.raw)?;
        judge(code, self.raw)
    }

    /// Puts a sum over all ranks on the stream, in place.
    ///
    /// # Safety
    /// `span` is memory of the stream's device and stays so until the operation is
    /// done; nothing but operations of the same stream uses it.
    pub(super) unsafe fn all_reduce_sum(&self, span: Span) -> Result<Progress, Fault> {
        let address = span.address as *mut c_void;
        // SAFETY: the communicator is open; the rest is the caller's promise.
        let code = unsafe {
            sys::ncclAllReduce(
                address,
                address,
                span.count,
                span.kind,
                sys::ncclRedOp_t::ncclSum,
                self.raw,
                self.stream.cu_stream().cast(),
            )
        };
        judge(code, self.raw)
    }

    /// Puts on the stream: `part` of every rank into `out`, one after another, of
    /// `lens[r]` values for rank r.
    ///
    /// # Safety
    /// As [`Communicator::all_reduce_sum`] for both spans; `part` has `lens[rank]`
    /// values and `out` the sum of all.
    pub(super) unsafe fn all_gather(
        &self,
        rank: usize,
        (part, out): (Span, Span),
        lens: &[usize],
    ) -> Result<Progress, Fault> {
        // SAFETY: opens a group of calls, which is closed below whatever happens.
        judge(unsafe { sys::ncclGroupStart() }, self.raw)?;
        let mut first = Ok(Progress::Done);
        let mut address = out.address;
        for (root, len) in lens.iter().enumerate() {
            let from = if root == rank { part.address } else { 0 };
            // SAFETY: the communicator is open; the rest is the caller's promise.
            let code = unsafe {
                sys::ncclBroadcast(
                    from as *const c_void,
                    address as *mut c_void,
                    *len,
                    out.kind,
                    i32::try_from(root).unwrap_or(i32::MAX),
                    self.raw,
                    self.stream.cu_stream().cast(),
                )
            };
            let judged = judge(code, self.raw);
            first = first.and(judged);
            address += (*len * size_of_kind(out.kind)) as u64;
        }
        // SAFETY: closes the group.
        let code = unsafe { sys::ncclGroupEnd() };
        let judged = judge(code, self.raw);
        first.and(judged)
    }

    /// Puts on the stream: `span` to rank `peer`.
    ///
    /// # Safety
    /// As [`Communicator::all_reduce_sum`].
    pub(super) unsafe fn send(&self, span: Span, peer: i32) -> Result<Progress, Fault> {
        // SAFETY: the communicator is open; the rest is the caller's promise.
        let code = unsafe {
            sys::ncclSend(
                span.address as *const c_void,
                span.count,
                span.kind,
                peer,
                self.raw,
                self.stream.cu_stream().cast(),
            )
        };
        judge(code, self.raw)
    }

    /// Puts on the stream: what rank `peer` sends into `span`.
    ///
    /// # Safety
    /// As [`Communicator::all_reduce_sum`].
    pub(super) unsafe fn receive(&self, span: Span, peer: i32) -> Result<Progress, Fault> {
        // SAFETY: the communicator is open; the rest is the caller's promise.
        let code = unsafe {
            sys::ncclRecv(
                span.address as *mut c_void,
                span.count,
                span.kind,
                peer,
                self.raw,
                self.stream.cu_stream().cast(),
            )
        };
        judge(code, self.raw)
    }

    /// Ends it and everything under way, here and not on peers.
    pub(super) fn abort(&mut self) {
        let raw = std::mem::replace(&mut self.raw, ptr::null_mut());
        if raw.is_null() {
            return;
        }
        // SAFETY: the communicator was open and is never used again.
        let code = unsafe { sys::ncclCommAbort(raw) };
        if let Err(fault) = judge(code, ptr::null_mut()) {
            tracing::warn!(reason = fault.reason, "abort an NCCL communicator");
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}

/// A communicator that is being split off another.
pub(super) struct Splitting {
    place: Place,
    stream: Arc<CudaStream>,
}

impl Splitting {
    /// The new communicator, once the call is done.
    pub(super) fn finish(self) -> Communicator {
        Communicator {
            raw: self.place.get(),
            stream: self.stream,
        }
    }
}

fn size_of_kind(kind: sys::ncclDataType_t) -> usize {
    use sys::ncclDataType_t as Kind;
    match kind {
        Kind::ncclFloat16 | Kind::ncclBfloat16 => 2,
        _ => 4,
    }
}

/// Everything as NCCL decides, but for calls that must not block.
fn configuration() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}
