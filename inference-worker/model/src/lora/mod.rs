//! `LoRA` adapters (Hu et al. 2021): small changes of a model's matrices that sequences
//! of one batch may each have their own of. `W·x` becomes `W·x + s·B·(A·x)`.
//!
//! Where ranks share a matrix by columns, each has a part of `A·x` only. The parts are
//! summed together with those of `W·x`, in the same order, and every rank multiplies
//! the sum by B: one exchange as before, and the same bits for any number of ranks.

mod load;
pub(crate) mod rows;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use llama_checkpoint::adapter::{AdapterBase, AdapterFiles, AdapterRoom, Target};
use llama_checkpoint::{Checkpoint, ModelError, Shard};

use crate::device::{self, Precision};
use crate::linear;
use crate::step::Segment;

/// A change of one matrix.
#[derive(Clone, Debug)]
pub(crate) struct Thin<M> {
    /// `[rank, columns]`.
    pub(crate) a: M,
    /// `[rows, width]`, scaled.
    pub(crate) b: M,
    /// Columns of B: the rank, and zeros up to a multiple of what kernels take at a time.
    pub(crate) width: usize,
}

/// The changes of one layer's matrices.
pub(crate) type Changes<M> = BTreeMap<Target, Thin<M>>;

/// An adapter's part of one rank: the changes of each of its layers.
pub(crate) type Adapter<M> = Vec<Changes<M>>;

/// The adapters that a model holds, by the place that segments name.
pub(crate) type Adapters<M> = BTreeMap<u32, Adapter<M>>;

/// An adapter in memory, for one rank of one model.
#[derive(Debug)]
pub struct LoadedAdapter {
    pub(crate) matrices: Matrices,
    /// Rank of its changes.
    pub rank: usize,
    /// Hash of its settings and its header, which all ranks of a group agree on.
    pub fingerprint: u64,
}

#[derive(Debug)]
pub(crate) enum Matrices {
    Cores(Adapter<linear::Matrix>),
    Device(Adapter<device::Matrix>),
}

/// Where a model multiplies.
#[derive(Clone, Debug)]
enum Place {
    Cores,
    Device(Device, Precision),
}

/// Reads a rank's part of the adapter in a folder. Fails when its files are missing or
/// damaged, when it does not fit the model or the room, or when there is no memory.
pub type AdapterLoader = Box<dyn Fn(&Path) -> Result<LoadedAdapter, ModelError> + Send>;

/// Loads adapters of a rank's part of a model; needs neither the model nor its files.
#[derive(Clone, Debug)]
pub(crate) struct Loading {
    base: AdapterBase,
    room: AdapterRoom,
    place: Place,
}

impl Loading {
    /// For a model that this crate's kernels multiply.
    pub(crate) fn on_cores(checkpoint: &Checkpoint, shard: Shard, room: AdapterRoom) -> Self {
        Self {
            base: AdapterBase::new(checkpoint, shard),
            room,
            place: Place::Cores,
        }
    }

    /// For a model on a device.
    pub(crate) fn on_device(
        checkpoint: &Checkpoint,
        shard: Shard,
        room: AdapterRoom,
        (device, precision): (&Device, Precision),
    ) -> Self {
        Self {
            base: AdapterBase::new(checkpoint, shard),
            room,
            place: Place::Device(device.clone(), precision),
        }
    }

    /// See [`AdapterLoader`].
    pub(crate) fn loader(&self) -> AdapterLoader {
        let loading = self.clone();
        Box::new(move |folder| loading.load(folder))
    }

    fn load(&self, folder: &Path) -> Result<LoadedAdapter, ModelError> {
        let files = AdapterFiles::open(folder)?;
        let changes = files.locate(&self.base, self.room)?;
        let layers = &self.base.shard.layers;
        let reader = load::Reader::open(files.path())?;
        let matrices = match &self.place {
            Place::Cores => Matrices::Cores(reader.adapter(&changes, layers, load::on_cores)?),
            Place::Device(device, precision) => {
                let place = (device, *precision);
                Matrices::Device(
                    reader.adapter(&changes, layers, |raw| load::on_device(&raw, place))?,
                )
            }
        };
        Ok(LoadedAdapter {
            matrices,
            rank: files.rank(),
            fingerprint: files.fingerprint(),
        })
    }
}

/// The rows of a step by the adapters that change them, in order of the adapters.
pub(crate) fn rows_by_adapter(segments: &[Segment]) -> BTreeMap<u32, Vec<u32>> {
    let mut groups: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut start = 0;
    for segment in segments {
        let end = start + u32::try_from(segment.tokens.len()).unwrap_or(u32::MAX);
        if let Some(adapter) = segment.adapter {
            groups.entry(adapter).or_default().extend(start..end);
        }
        start = end;
    }
    groups
}

/// Whether every adapter that `segments` name is among those that a model holds.
pub(crate) fn check<M>(adapters: &Adapters<M>, segments: &[Segment]) -> Result<(), String> {
    let named = segments.iter().filter_map(|segment| segment.adapter);
    match named
        .into_iter()
        .find(|place| !adapters.contains_key(place))
    {
        None => Ok(()),
        Some(place) => Err(format!("no adapter is loaded at place {place}")),
    }
}
