//! The device memory of candle's tensors.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr,
};
use candle_core::cuda_backend::cudarc::nccl::sys::ncclDataType_t as Kind;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor};

use super::communicator::Span;

/// Where the values of a contiguous tensor begin and end in its storage.
fn range(layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(range) => Ok(range),
        None => candle_core::bail!("a tensor of {:?} is not contiguous", layout.shape()),
    }
}

fn unsupported(storage: &CudaStorage) -> candle_core::Error {
    use candle_core::backend::BackendStorage;
    candle_core::Error::Msg(format!("ranks exchange floats, not {:?}", storage.dtype()))
}

/// Calls `work` with the memory of a tensor, which it may read.
pub(super) fn reading<R>(
    tensor: &Tensor,
    stream: &CudaStream,
    work: impl FnOnce(Span) -> R,
) -> Result<R> {
    fn span<T: DeviceRepr, R>(
        slice: &CudaSlice<T>,
        (start, end): (usize, usize),
        (kind, stream): (Kind, &CudaStream),
        work: impl FnOnce(Span) -> R,
    ) -> R {
        let view = slice.slice(start..end);
        let (address, _in_use) = view.device_ptr(stream);
        let count = end - start;
        work(Span {
            address,
            count,
            kind,
        })
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        candle_core::bail!("a tensor is not on a CUDA device");
    };
    let range = range(layout)?;
    match &storage.slice {
        CudaStorageSlice::F32(slice) => Ok(span(slice, range, (Kind::ncclFloat32, stream), work)),
        CudaStorageSlice::F16(slice) => Ok(span(slice, range, (Kind::ncclFloat16, stream), work)),
        CudaStorageSlice::BF16(slice) => Ok(span(slice, range, (Kind::ncclBfloat16, stream), work)),
        _ => Err(unsupported(storage)),
    }
}

/// Calls `work` with the memory of a tensor, which it may change.
pub(super) fn writing<R>(
    tensor: &Tensor,
    stream: &Arc<CudaStream>,
    work: impl FnOnce(Span) -> R,
) -> Result<R> {
    let write = Write {
        stream,
        work: RefCell::new(Some(work)),
        result: RefCell::new(None),
    };
    tensor.inplace_op1(&write)?;
    match write.result.into_inner() {
        Some(result) => Ok(result),
        None => candle_core::bail!("a tensor is not on a CUDA device"),
    }
}

/// Work on a tensor's memory as candle's operation in place.
struct Write<'a, W, R> {
    stream: &'a CudaStream,
    work: RefCell<Option<W>>,
    result: RefCell<Option<R>>,
}

impl<W: FnOnce(Span) -> R, R> Write<'_, W, R> {
    fn span<T: DeviceRepr>(
        &self,
        slice: &mut CudaSlice<T>,
        (start, end): (usize, usize),
        kind: Kind,
    ) {
        let mut view = slice.slice_mut(start..end);
        let (address, _in_use) = view.device_ptr_mut(self.stream);
        let count = end - start;
        let work = self.work.take();
        self.result.replace(work.map(|work| {
            work(Span {
                address,
                count,
                kind,
            })
        }));
    }
}

impl<W: FnOnce(Span) -> R, R> InplaceOp1 for Write<'_, W, R> {
    fn name(&self) -> &'static str {
        "exchange"
    }

    fn cpu_fwd(&self, _storage: &mut CpuStorage, _layout: &Layout) -> Result<()> {
        candle_core::bail!("NCCL exchanges what is on CUDA devices")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let range = range(layout)?;
        match &mut storage.slice {
            CudaStorageSlice::F32(slice) => self.span(slice, range, Kind::ncclFloat32),
            CudaStorageSlice::F16(slice) => self.span(slice, range, Kind::ncclFloat16),
            CudaStorageSlice::BF16(slice) => self.span(slice, range, Kind::ncclBfloat16),
            _ => return Err(unsupported(storage)),
        }
        Ok(())
    }
}
