//! Weight matrices that candle multiplies on any of its devices.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor};
use llama_checkpoint::{BLOCK, Format};

use crate::kernels;

/// In which precision dense matrices are kept and multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As the file stores them; 8-bit floats as bf16.
    #[default]
    Stored,
    /// f32, for comparisons: takes twice the memory of half precision, or more.
    Full,
}

/// A weight matrix `[rows, columns]` on a device.
#[derive(Clone, Debug)]
pub struct Matrix {
    weight: Weight,
    /// Factors of the rows.
    scales: Option<Tensor>,
}

#[derive(Clone, Debug)]
enum Weight {
    /// f32, f16 or bf16.
    Dense(Tensor),
    /// Blocks of ggml, multiplied as they are.
    Quantized(QMatMul),
}

impl From<Tensor> for Matrix {
    /// A matrix of floats.
    fn from(weight: Tensor) -> Self {
        Self {
            weight: Weight::Dense(weight),
            scales: None,
        }
    }
}

impl Matrix {
    /// A matrix out of the bytes of its rows and, where its form has them, a scale a
    /// row.
    ///
    /// # Errors
    /// When there are too few or too many bytes or scales, or the device has no room.
    pub fn from_bytes(
        (bytes, scales): (&[u8], Option<&[f32]>),
        format: Format,
        (rows, columns): (usize, usize),
        (device, precision): (&Device, Precision),
    ) -> Result<Self> {
        let expected = rows * format.row_bytes(columns);
        if bytes.len() != expected {
            candle_core::bail!(
                "{} bytes for {rows} rows of {columns} values in {}, expected {expected}",
                bytes.len(),
                format.name()
            );
        }
        if let Some(scales) = scales.filter(|scales| scales.len() != rows) {
            candle_core::bail!("{} scales for {rows} rows", scales.len());
        }
        let shape = (rows, columns);
        let weight = match storage(format, columns, (device, precision)) {
            Storage::Dense(dtype) => Weight::Dense(Tensor::from_raw_buffer(
                bytes,
                dtype,
                &[rows, columns],
                device,
            )?),
            Storage::Widened(dtype) => {
                let mut values = vec![0.0; rows * columns];
                kernels::unpack(format, bytes, None, &mut values);
                let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
                Weight::Dense(values.to_dtype(dtype)?.to_device(device)?)
            }
            Storage::Quantized(dtype) => {
                let storage = QStorage::from_data(Cow::Borrowed(bytes), device, dtype)?;
                Weight::Quantized(QMatMul::from_qtensor(QTensor::new(storage, shape)?)?)
            }
        };
        let scales = scales
            .map(|scales| Tensor::from_slice(scales, (1, rows), device))
            .transpose()?;
        Ok(Self { weight, scales })
    }

    /// `x · selfᵀ` for f32 `x` of shape `[m, columns]`, in f32. Dense products are
    /// taken in the precision of the weights.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = match &self.weight {
            Weight::Dense(weight) => x
                .to_dtype(weight.dtype())?
                .matmul(&weight.t()?)?
                .to_dtype(DType::F32)?,
            Weight::Quantized(weight) => weight.forward(x)?,
        };
        match &self.scales {
            None => Ok(product),
            Some(scales) => product.broadcast_mul(scales),
        }
    }
}

enum Storage {
    Dense(DType),
    Quantized(GgmlDType),
    /// Of more bits on the device than in the file.
    Widened(DType),
}

fn storage(format: Format, columns: usize, (device, precision): (&Device, Precision)) -> Storage {
    match format {
        Format::F16 | Format::Bf16 | Format::F8E4M3 if precision == Precision::Full => {
            Storage::Widened(DType::F32)
        }
        Format::F32 => Storage::Dense(DType::F32),
        Format::F16 => Storage::Dense(DType::F16),
        Format::Bf16 => Storage::Dense(DType::BF16),
        // Every value is one of bf16 too. candle multiplies no 8-bit floats.
        Format::F8E4M3 => Storage::Widened(DType::BF16),
        Format::Q4_0 => Storage::Quantized(GgmlDType::Q4_0),
        // candle's CPU device takes two blocks of it at a time.
        Format::Q4_1 if device.is_cpu() && !columns.is_multiple_of(2 * BLOCK) => {
            Storage::Widened(DType::F32)
        }
        Format::Q4_1 => Storage::Quantized(GgmlDType::Q4_1),
        Format::Q8_0 => Storage::Quantized(GgmlDType::Q8_0),
    }
}
