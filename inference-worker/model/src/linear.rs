//! A weight matrix as an operation of candle.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use crate::buffer::WeightBytes;
use crate::kernels::{self, Activations, BLOCK, Format, Isa, Rows};
use crate::ops::values;
use crate::threads::Threads;

/// Activation rows that one pass over the weights takes: few enough to stay in
/// the second-level cache while weight rows stream by.
const BATCH_ROWS: usize = 64;
/// Multiplications below which one thread is faster than several.
const ALONE_BELOW: usize = 1 << 18;
/// Pieces of work for each thread, so that a thread that was held up leaves
/// pieces to the others.
const PIECES_PER_THREAD: usize = 4;
/// Weight rows that a kernel takes together.
const ROW_STEP: usize = 4;

/// Bytes and scales that make no matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The chunks are empty, or no whole blocks, or not all of the columns.
    #[error(
        "chunks that end at {ends:?} of {columns} columns; they end at ascending multiples of {BLOCK}, the last at the last column"
    )]
    Chunks {
        /// Where they end.
        ends: Vec<usize>,
        /// Columns of the matrix.
        columns: usize,
    },
    /// The last row is cut short.
    #[error("{bytes} bytes are no whole rows of {row_bytes} bytes")]
    Bytes {
        /// All bytes.
        bytes: usize,
        /// Bytes of a row.
        row_bytes: usize,
    },
    /// Scales are missing, or too many.
    #[error("{scales} scales for {rows} rows")]
    Scales {
        /// Number of scales.
        scales: usize,
        /// Number of rows.
        rows: usize,
    },
}

/// What the bytes of a matrix mean.
#[derive(Clone, Debug)]
pub struct MatrixForm {
    /// Storage type.
    pub format: Format,
    /// Values in a row.
    pub columns: usize,
    /// See [`Rows::ends`].
    pub ends: Arc<[usize]>,
    /// See [`Rows::scales`].
    pub scales: Option<Arc<[f32]>>,
}

impl MatrixForm {
    /// Rows whose products are summed at once, without scales.
    pub fn plain(format: Format, columns: usize) -> Self {
        Self {
            format,
            columns,
            ends: Arc::new([columns]),
            scales: None,
        }
    }
}

/// A weight matrix in memory. Clones share it.
#[derive(Clone, Debug)]
pub struct Matrix {
    weight: WeightBytes,
    form: MatrixForm,
}

impl Matrix {
    /// The matrix whose rows are `weight`.
    ///
    /// # Errors
    /// When `form` does not fit itself or the bytes.
    pub fn new(weight: WeightBytes, form: MatrixForm) -> std::result::Result<Self, MatrixError> {
        if !kernels::cut_columns(&form.ends, form.columns) {
            return Err(MatrixError::Chunks {
                ends: form.ends.to_vec(),
                columns: form.columns,
            });
        }
        let (bytes, row_bytes) = (weight.len(), form.format.row_bytes(form.columns));
        if !bytes.is_multiple_of(row_bytes) {
            return Err(MatrixError::Bytes { bytes, row_bytes });
        }
        let rows = bytes / row_bytes;
        match form.scales.as_ref().map(|scales| scales.len()) {
            Some(scales) if scales != rows => Err(MatrixError::Scales { scales, rows }),
            _ => Ok(Self { weight, form }),
        }
    }

    /// Its rows.
    pub fn rows(&self) -> Rows<'_> {
        Rows {
            format: self.form.format,
            bytes: &self.weight,
            columns: self.form.columns,
            ends: &self.form.ends,
            scales: self.form.scales.as_deref(),
        }
    }
}

/// A matrix that multiplies f32 activations: `[m, columns]` becomes `[m, rows]`.
#[derive(Clone, Debug)]
pub struct Linear {
    matrix: Matrix,
    isa: Isa,
    threads: Arc<Threads>,
}

impl Linear {
    /// Multiplies with `matrix` on `threads`.
    pub(crate) fn new(matrix: Matrix, isa: Isa, threads: Arc<Threads>) -> Self {
        Self {
            matrix,
            isa,
            threads,
        }
    }

    /// Multiplies `[m, columns]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }

    fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.matrix.rows();
        let (count, batch) = (rows.count(), x.len() / rows.columns);
        let alone = self.threads.count() == 1 || count * x.len() < ALONE_BELOW;
        let x = Activations::new(self.isa, rows.format, x, rows.columns);
        let mut out = vec![0.0; count * batch];
        if alone {
            self.multiply_here(&rows, &x, batch, &mut out);
            return out;
        }
        let pieces = self.threads.count() * PIECES_PER_THREAD;
        let step = count.div_ceil(pieces).next_multiple_of(ROW_STEP);
        let starts: Vec<usize> = (0..count).step_by(step).collect();
        let parts = self.threads.map(&starts, |&start| {
            let rows = rows.part(start..(start + step).min(count));
            let mut part = vec![0.0; rows.count() * batch];
            self.multiply_here(&rows, &x, batch, &mut part);
            part
        });
        for (start, part) in starts.iter().zip(&parts) {
            let width = part.len() / batch;
            for (out, part) in out.chunks_exact_mut(count).zip(part.chunks_exact(width)) {
                out[*start..start + width].copy_from_slice(part);
            }
        }
        out
    }

    fn multiply_here(&self, rows: &Rows<'_>, x: &Activations<'_>, batch: usize, out: &mut [f32]) {
        let count = rows.count();
        for (number, out) in out.chunks_mut(BATCH_ROWS * count).enumerate() {
            let start = number * BATCH_ROWS;
            let range = start..batch.min(start + BATCH_ROWS);
            kernels::matmul(self.isa, rows, x, range, (out, count));
        }
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, columns) = layout.shape().dims2()?;
        let rows = self.matrix.rows();
        if columns != rows.columns {
            candle_core::bail!("{columns} values for a matrix of {} columns", rows.columns);
        }
        let out = self.multiply(values(storage, layout)?);
        Ok((CpuStorage::F32(out), Shape::from((batch, rows.count()))))
    }
}
