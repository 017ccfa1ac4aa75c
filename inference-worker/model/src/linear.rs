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
pub(crate) enum MatrixError {
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
pub(crate) struct MatrixForm {
    /// Storage type.
    pub(crate) format: Format,
    /// Values in a row.
    pub(crate) columns: usize,
    /// See [`Rows::ends`].
    pub(crate) ends: Arc<[usize]>,
    /// See [`Rows::scales`].
    pub(crate) scales: Option<Arc<[f32]>>,
}

/// A weight matrix in memory. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    weight: WeightBytes,
    form: MatrixForm,
}

impl Matrix {
    /// The matrix whose rows are `weight`.
    ///
    /// # Errors
    /// When `form` does not fit itself or the bytes.
    pub(crate) fn new(
        weight: WeightBytes,
        form: MatrixForm,
    ) -> std::result::Result<Self, MatrixError> {
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
    pub(crate) fn rows(&self) -> Rows<'_> {
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

    pub(crate) fn multiply(&self, x: &[f32]) -> Vec<f32> {
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::buffer::Buffer;

    fn weight(bytes: usize) -> WeightBytes {
        let mut buffer = Buffer::zeroed(bytes).expect("small");
        for (byte, number) in buffer.iter_mut().zip(0_u32..) {
            // FP8 values of an exponent that varies little.
            *byte = 0x30 | (number.wrapping_mul(0x9E37_79B9) >> 24).to_le_bytes()[0] & 0x8F;
        }
        buffer.into()
    }

    fn form(columns: usize, ends: &[usize], scales: usize) -> MatrixForm {
        MatrixForm {
            format: Format::F8E4M3,
            columns,
            ends: ends.into(),
            scales: Some((0..scales).map(|row| 1.0 / (row + 1) as f32).collect()),
        }
    }

    #[test]
    fn a_form_that_does_not_fit_is_named() {
        let refused = |bytes, form| {
            Matrix::new(weight(bytes), form)
                .expect_err("does not fit")
                .to_string()
        };
        for ends in [&[][..], &[0, 64], &[32], &[33, 64], &[64, 64], &[32, 96]] {
            assert_eq!(
                refused(128, form(64, ends, 2)),
                format!(
                    "chunks that end at {ends:?} of 64 columns; they end at ascending multiples of 32, the last at the last column"
                )
            );
        }
        assert_eq!(
            refused(127, form(64, &[32, 64], 2)),
            "127 bytes are no whole rows of 64 bytes"
        );
        assert_eq!(refused(128, form(64, &[32, 64], 3)), "3 scales for 2 rows");
    }

    #[test]
    fn any_number_of_threads_gives_the_bits_of_the_rows() {
        const COLUMNS: usize = 1536;
        const ROWS: usize = 333;
        let form = form(COLUMNS, &[512, 992, COLUMNS], ROWS);
        let matrix = Matrix::new(weight(ROWS * COLUMNS), form).expect("fits");
        let x: Vec<f32> = (0..70 * COLUMNS).map(|i| (i as f32).sin()).collect();
        let x = Tensor::from_vec(x, (70, COLUMNS), &Device::Cpu).expect("tensor");
        let product = |threads: usize, x: &Tensor| {
            let threads = Arc::new(Threads::new(threads).expect("threads"));
            let linear = Linear::new(matrix.clone(), Isa::best(), threads);
            let out = linear.forward(x).expect("shapes fit");
            out.to_vec2::<f32>().expect("a matrix")
        };
        let all = product(1, &x);
        assert_eq!((all.len(), all[0].len()), (70, ROWS));
        assert_eq!(all, product(3, &x));
        let last = x.narrow(0, 69, 1).and_then(|x| x.contiguous());
        assert_eq!(all[69..], product(2, &last.expect("a row")));

        let mut row = vec![0.0; COLUMNS];
        matrix.rows().unpack_row(7, &mut row);
        let x = x.to_vec2::<f32>().expect("a matrix");
        let products = row
            .iter()
            .zip(&x[5])
            .map(|(w, x)| f64::from(*w) * f64::from(*x));
        assert!((products.sum::<f64>() - f64::from(all[5][7])).abs() < 1e-5);
    }

    #[test]
    fn a_wrong_width_is_refused() {
        let matrix = Matrix::new(
            weight(64),
            MatrixForm {
                scales: None,
                ..form(64, &[64], 1)
            },
        );
        let threads = Arc::new(Threads::new(1).expect("threads"));
        let linear = Linear::new(matrix.expect("fits"), Isa::best(), threads);
        let x = Tensor::from_vec(vec![0.0_f32; 32], (1, 32), &Device::Cpu).expect("tensor");
        let error = linear.forward(&x).expect_err("32 of 64").to_string();
        assert!(
            error.contains("32 values for a matrix of 64 columns"),
            "{error}"
        );
    }
}
