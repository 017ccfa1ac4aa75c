//! Reading an adapter's matrices.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use candle_core::Device;
use llama_checkpoint::adapter::{Change, ThinMatrix};
use llama_checkpoint::{BLOCK, Format, ModelError};

use super::{Adapter, Changes, Thin};
use crate::buffer::{Buffer, WeightBytes};
use crate::device::{self, Precision};
use crate::kernels;
use crate::linear::{Matrix, MatrixForm};

/// A matrix as it was read, its rows in the order of the model.
pub(super) struct Raw<'a> {
    name: &'a str,
    format: Format,
    bytes: Vec<u8>,
    rows: usize,
    columns: usize,
    ends: Vec<usize>,
    /// Factor of all rows.
    scale: Option<f32>,
}

impl Raw<'_> {
    fn scales(&self) -> Option<Vec<f32>> {
        self.scale.map(|scale| vec![scale; self.rows])
    }
}

/// The file of an adapter's matrices.
pub(super) struct Reader {
    path: PathBuf,
    file: File,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(|source| ModelError::Io {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// The changes of each of `layers`, with what `matrix` makes of their matrices.
    pub(super) fn adapter<M>(
        &self,
        changes: &[Change],
        layers: &Range<usize>,
        matrix: impl Fn(Raw<'_>) -> Result<M, ModelError>,
    ) -> Result<Adapter<M>, ModelError> {
        let mut adapter: Adapter<M> = layers.clone().map(|_| Changes::new()).collect();
        for change in changes {
            let width = change.b.columns.next_multiple_of(BLOCK);
            let a = Raw {
                ends: change.ends.clone(),
                ..self.raw(&change.a)?
            };
            let mut b = self.raw(&change.b)?;
            if let Some(head) = change.reordered_heads {
                b.bytes = side_by_side(&b.bytes, b.bytes.len() / b.rows.max(1), head);
            }
            b.bytes = widened(&b, width);
            let b = Raw {
                columns: width,
                ends: vec![width],
                scale: Some(change.scale),
                ..b
            };
            let thin = Thin {
                a: matrix(a)?,
                b: matrix(b)?,
                width,
            };
            adapter[change.layer - layers.start].insert(change.target, thin);
        }
        Ok(adapter)
    }

    fn raw<'a>(&self, matrix: &'a ThinMatrix) -> Result<Raw<'a>, ModelError> {
        let bytes = usize::try_from(matrix.region.bytes()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; bytes];
        let mut rest = bytes.as_mut_slice();
        for stretch in matrix.region.stretches() {
            let len = usize::try_from(stretch.end - stretch.start).unwrap_or(usize::MAX);
            let (part, behind) = rest.split_at_mut(len.min(rest.len()));
            let read = self.file.read_exact_at(part, stretch.start);
            read.map_err(|source| ModelError::Io {
                path: self.path.display().to_string(),
                source,
            })?;
            rest = behind;
        }
        let mut values = vec![0.0; matrix.rows * matrix.columns];
        kernels::unpack(matrix.format, &bytes, None, &mut values);
        if values.iter().any(|value| !value.is_finite()) {
            return Err(ModelError::Invalid(format!(
                "{}: tensor {} holds values that are no numbers",
                self.path.display(),
                matrix.name
            )));
        }
        Ok(Raw {
            name: &matrix.name,
            format: matrix.format,
            bytes,
            rows: matrix.rows,
            columns: matrix.columns,
            ends: vec![matrix.columns],
            scale: None,
        })
    }
}

/// Rows whose halves of each head turn together, put side by side as in a GGUF: row j
/// of the first half, then row j of the second.
fn side_by_side(rows: &[u8], row_bytes: usize, head: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len());
    for rows in rows.chunks_exact(head * row_bytes) {
        let (first, second) = rows.split_at(head / 2 * row_bytes);
        for (a, b) in first
            .chunks_exact(row_bytes)
            .zip(second.chunks_exact(row_bytes))
        {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}

/// The rows with zeros behind, each `width` values long.
fn widened(raw: &Raw<'_>, width: usize) -> Vec<u8> {
    let row = raw.bytes.len() / raw.rows.max(1);
    let size = row / raw.columns.max(1);
    let mut out = vec![0; raw.rows * width * size];
    for (out, values) in out
        .chunks_exact_mut(width * size)
        .zip(raw.bytes.chunks_exact(row))
    {
        out[..row].copy_from_slice(values);
    }
    out
}

/// A matrix for this crate's kernels.
pub(super) fn on_cores(raw: Raw<'_>) -> Result<Matrix, ModelError> {
    let mut buffer = Buffer::zeroed(raw.bytes.len())?;
    buffer.copy_from_slice(&raw.bytes);
    let form = MatrixForm {
        format: raw.format,
        columns: raw.columns,
        scales: raw.scales().map(Into::into),
        ends: raw.ends.into(),
    };
    Matrix::new(WeightBytes::from(buffer), form)
        .map_err(|error| ModelError::Invalid(format!("tensor {}: {error}", raw.name)))
}

/// A matrix on a device.
pub(super) fn on_device(
    raw: &Raw<'_>,
    place: (&Device, Precision),
) -> Result<device::Matrix, ModelError> {
    let scales = raw.scales();
    let values = (&raw.bytes[..], scales.as_deref());
    let shape = (raw.rows, raw.columns);
    device::Matrix::from_bytes(values, raw.format, shape, place)
        .map_err(|error| ModelError::Memory(format!("tensor {}: {error}", raw.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_are_put_side_by_side() {
        let rows: Vec<u8> = (0..16).collect();
        let expected = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15];
        assert_eq!(side_by_side(&rows, 2, 4), expected);
    }
}
