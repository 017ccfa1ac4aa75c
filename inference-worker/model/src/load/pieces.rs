//! Cutting the reading of matrices into pieces, and taking them in file order.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use llama_checkpoint::slices::{MatrixSlice, Place, Source};
use llama_checkpoint::{ModelError, WeightFile};

use super::{convert, value_bytes};
use crate::buffer::Buffer;

/// Threads of a rank that read. With more of them the kernel takes the file for one
/// that is read here and there, and reads less ahead.
const READERS: usize = 3;
/// Bytes of a matrix that one piece fills.
const PIECE_BYTES: usize = 4 << 20;
/// Shorter stretches are read together with what lies between them, which takes less
/// time than a call for each.
const SHORT_STRETCH: u64 = 512;
/// Bytes that are read at once where stretches are read together.
const SPAN_BYTES: u64 = 1 << 20;
/// Columns that are turned into rows together.
const TURNED_COLUMNS: usize = 64;

/// The open files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Files(Vec<(String, File)>);

/// Part of a matrix that one thread fills.
struct Piece<'a> {
    slice: &'a MatrixSlice,
    rows: Range<usize>,
    out: &'a mut [u8],
}

impl Piece<'_> {
    /// The file that it is read from, and where there.
    fn start(&self) -> Option<(usize, u64)> {
        let place = *self.slice.source.places().first()?;
        let stretches = RowStretches::new(place, self.slice.rows);
        Some((stretches.file, stretches.at(self.rows.start)))
    }
}

/// Fills each buffer with the rows of its slice.
///
/// # Errors
/// The first that a thread meets; the others stop then.
pub(super) fn fill(
    files: &Files,
    slices: &[&MatrixSlice],
    buffers: &mut [Buffer],
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), ModelError> {
    let total: u64 = buffers.iter().map(|buffer| buffer.len() as u64).sum();
    progress(0, total);
    let mut pieces = Vec::new();
    for (slice, buffer) in slices.iter().zip(buffers) {
        cut(slice, buffer, &mut pieces);
    }
    pieces.sort_by_cached_key(Piece::start);
    let queue = Mutex::new(pieces.into_iter());
    let (done, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = || -> Result<(), ModelError> {
        while !failed.load(Ordering::Relaxed) {
            let piece = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(piece) = piece else { break };
            let len = piece.out.len() as u64;
            if let Err(error) = files.fill(piece) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
            let before = done.fetch_add(len, Ordering::Relaxed);
            progress(before + len, total);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(work)).collect();
        let results = readers.into_iter().map(|reader| {
            reader
                .join()
                .unwrap_or_else(|_| Err(ModelError::Invalid("a reading thread ended".to_owned())))
        });
        // All of them, so that no thread is left behind an error.
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Cuts the filling of a buffer by rows. Matrices that are stored by columns are
/// filled in one piece.
fn cut<'a>(slice: &'a MatrixSlice, buffer: &'a mut Buffer, pieces: &mut Vec<Piece<'a>>) {
    let row_bytes = slice.format.row_bytes(slice.columns);
    let rows = match slice.source {
        Source::Columns(_) => slice.rows,
        _ => (PIECE_BYTES / row_bytes.max(1)).clamp(1, slice.rows.max(1)),
    };
    let outs = buffer.chunks_mut((rows * row_bytes).max(1));
    pieces.extend(outs.enumerate().map(|(number, out)| Piece {
        slice,
        rows: number * rows..slice.rows.min((number + 1) * rows),
        out,
    }));
}

/// The stretches of a matrix, one a row.
#[derive(Clone, Copy)]
struct RowStretches {
    file: usize,
    start: u64,
    len: u64,
    stride: u64,
}

impl RowStretches {
    fn new(place: Place, rows: usize) -> Self {
        let region = place.region;
        let one = region.count == 1;
        let len = region.bytes() / (rows as u64).max(1);
        Self {
            file: place.file,
            start: region.start,
            len,
            stride: if one { len } else { region.stride },
        }
    }

    /// Where row `row` begins.
    fn at(&self, row: usize) -> u64 {
        self.start + row as u64 * self.stride
    }
}

impl Files {
    /// Opens the files of a checkpoint.
    pub(crate) fn of(files: &[WeightFile]) -> Result<Self, ModelError> {
        super::open(files).map(Self)
    }

    /// Fills `out` with the bytes of `file` from `start` on.
    pub(super) fn read(&self, file: usize, start: u64, out: &mut [u8]) -> Result<(), ModelError> {
        let (path, file) = &self.0[file];
        file.read_exact_at(out, start).map_err(|source| {
            if source.kind() == std::io::ErrorKind::UnexpectedEof {
                return ModelError::Truncated(format!(
                    "{path} became shorter while it was read: {} bytes at byte {start} are gone",
                    out.len()
                ));
            }
            ModelError::Io {
                path: path.clone(),
                source,
            }
        })
    }

    fn fill(&self, piece: Piece<'_>) -> Result<(), ModelError> {
        let Piece { slice, rows, out } = piece;
        let columns = slice.columns;
        match &slice.source {
            Source::Copy(place) => self.read_rows(RowStretches::new(*place, slice.rows), rows, out),
            Source::Columns(place) => self.turn(slice, *place, out),
            Source::Int8(place) => {
                let bytes = self.rows_of(*place, slice.rows, rows)?;
                convert::int8(&bytes, out);
                Ok(())
            }
            Source::Int4 {
                words,
                scales,
                scale_format,
                group,
                offset,
            } => {
                let words = self.rows_of(*words, slice.rows, rows.clone())?;
                let scales = self.rows_of(*scales, slice.rows, rows)?;
                let packing = convert::Packing {
                    scale_format: *scale_format,
                    group: *group,
                    offset: *offset,
                    columns,
                };
                convert::int4(&slice.name, &words, &scales, packing, out)
            }
            Source::Requantize { place, kind, skip } => {
                let bytes = self.rows_of(*place, slice.rows, rows.clone())?;
                let part = *skip..skip + columns;
                convert::requantize(&slice.name, *kind, (&bytes, rows.len()), part, out)
            }
            Source::Random {
                first_row,
                first_column,
                width,
            } => {
                let rows = first_row + rows.start..first_row + rows.end;
                let columns = *first_column..first_column + columns;
                convert::random(&slice.name, slice.format, (rows, columns, *width), out);
                Ok(())
            }
        }
    }

    /// The stored bytes of the rows `range` of a matrix of `rows`.
    fn rows_of(
        &self,
        place: Place,
        rows: usize,
        range: Range<usize>,
    ) -> Result<Vec<u8>, ModelError> {
        let stretches = RowStretches::new(place, rows);
        let len = usize::try_from(stretches.len).unwrap_or(usize::MAX);
        let mut bytes = vec![0; range.len() * len];
        self.read_rows(stretches, range, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads the stretches `range` one behind the other into `out`.
    fn read_rows(
        &self,
        stretches: RowStretches,
        range: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), ModelError> {
        let RowStretches {
            file, len, stride, ..
        } = stretches;
        if len == stride {
            return self.read(file, stretches.at(range.start), out);
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len as u64 >= SHORT_STRETCH {
            for (row, out) in range.zip(out.chunks_mut(len)) {
                self.read(file, stretches.at(row), out)?;
            }
            return Ok(());
        }
        let stride = usize::try_from(stride).unwrap_or(usize::MAX);
        let together = (usize::try_from(SPAN_BYTES).unwrap_or(1) / stride).max(1);
        let mut span = Vec::new();
        for (number, out) in out.chunks_mut(together * len).enumerate() {
            let rows = out.len() / len;
            span.resize((rows - 1) * stride + len, 0);
            self.read(
                file,
                stretches.at(range.start + number * together),
                &mut span,
            )?;
            for (out, row) in out.chunks_mut(len).zip(span.chunks(stride)) {
                out.copy_from_slice(&row[..len]);
            }
        }
        Ok(())
    }

    /// Reads a matrix that is stored by columns.
    fn turn(&self, slice: &MatrixSlice, place: Place, out: &mut [u8]) -> Result<(), ModelError> {
        let stretches = RowStretches::new(place, slice.columns);
        let size = value_bytes(slice.format);
        let mut block = Vec::new();
        for start in (0..slice.columns).step_by(TURNED_COLUMNS) {
            let columns = start..slice.columns.min(start + TURNED_COLUMNS);
            block.resize(columns.len() * slice.rows * size, 0);
            self.read_rows(stretches, columns.clone(), &mut block)?;
            convert::turn(&block, size, (slice.columns, columns), out);
        }
        Ok(())
    }
}
