//! Looking a rank's part up in the headers.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

use super::{
    FeedForward, FeedForwardSlices, LayerSlices, MatrixSlice, ModelSlices, Place, ScaleSlice,
    Source, VectorSlice, Wanted, float_format, known_types,
};
use crate::checkpoint::{Checkpoint, Content, Shards, cut_name, cut_scales_name};
use crate::config::{Experts, LlamaConfig, RopeScaling};
use crate::error::ModelError;
use crate::format::{BLOCK, Format};
use crate::gguf::GgmlType;
use crate::names::{ExpertPart, Names, Part};
use crate::shard::Shard;
use crate::stored::{Region, StoredTensor, StoredType};

/// How many names a message lists.
const LISTED_TENSORS: usize = 4;
/// 4-bit values in a 32-bit word.
const WORD_VALUES: usize = 8;
/// Tensors of quantised checkpoints that a forward pass with exact activations
/// does not read.
const UNREAD: [&str; 3] = [".input_scale", ".input_scale_ub", ".weight_shape"];

/// Looks tensors up and remembers which.
pub(super) struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    shard: &'a Shard,
    used: RefCell<BTreeSet<String>>,
}

impl<'a> Finder<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, shard: &'a Shard) -> Self {
        Self {
            checkpoint,
            shard,
            used: RefCell::default(),
        }
    }

    fn config(&self) -> &'a LlamaConfig {
        self.checkpoint.config()
    }

    fn names(&self) -> Names {
        self.checkpoint.names()
    }

    pub(super) fn model(&self) -> Result<ModelSlices, ModelError> {
        let config = self.config();
        let (shard, names) = (self.shard, self.names());
        let layers = shard
            .layers
            .clone()
            .map(|layer| self.layer(layer))
            .collect::<Result<_, _>>()?;
        let shape = (config.vocab, config.hidden);
        let vocabulary = |name| self.matrix(Wanted::rows(name, shape, shard.vocab.clone()));
        let (first, last) = (shard.is_first_stage(), shard.is_last_stage());
        let embedding = first.then(|| vocabulary(names.embedding())).transpose()?;
        let head = match (last, config.tied) {
            (true, false) => Some(vocabulary(names.head())?),
            (true, true) if !first => Some(vocabulary(names.embedding())?),
            _ => None,
        };
        let replicas = shard.layout.tensor;
        let norm = last
            .then(|| self.vector(names.norm(), config.hidden, replicas))
            .transpose()?;
        let rope_factors = match config.rope.scaling {
            RopeScaling::Factors => Some(self.vector(
                crate::config::ROPE_FACTORS.to_owned(),
                config.rope.dim / 2,
                shard.layout.world(),
            )?),
            _ => None,
        };
        Ok(ModelSlices {
            embedding,
            layers,
            norm,
            head,
            rope_factors,
        })
    }

    fn layer(&self, layer: usize) -> Result<LayerSlices, ModelError> {
        let config = self.config();
        let shard = self.shard;
        let name = |part| self.names().layer(layer, part);
        let (hidden, query, kv) = (config.hidden, config.query_width(), config.kv_width());
        let rows =
            |part, height, range| self.matrix(Wanted::rows(name(part), (height, hidden), range));
        let kv_rows = |part| {
            let wanted = Wanted::rows(name(part), (kv, hidden), shard.kv_range(config));
            self.matrix(wanted.replicated(shard.kv_replicas(config)))
        };
        let norm = |part| self.vector(name(part), hidden, shard.layout.tensor);
        Ok(LayerSlices {
            attention_norm: norm(Part::AttentionNorm)?,
            query: rows(Part::Query, query, shard.query_range(config))?,
            key: kv_rows(Part::Key)?,
            value: kv_rows(Part::Value)?,
            output: self.matrix(Wanted::columns(
                name(Part::Output),
                (hidden, query),
                shard.query_range(config),
                shard.query_ends(config),
            ))?,
            feed_forward_norm: norm(Part::FeedForwardNorm)?,
            feed_forward: match config.experts {
                Some(experts) if config.layers[layer].experts => self.experts(layer, experts)?,
                _ => FeedForward::Dense(Box::new(self.network(
                    [Part::Gate, Part::Up, Part::Down].map(name),
                    config.ffn,
                    &shard.ffn,
                )?)),
            },
        })
    }

    fn experts(&self, layer: usize, experts: Experts) -> Result<FeedForward, ModelError> {
        let name = |part| self.names().layer(layer, part);
        let hidden = self.config().hidden;
        let router = Wanted::rows(
            name(Part::Router),
            (experts.count, hidden),
            0..experts.count,
        );
        let shared = [Part::SharedGate, Part::SharedUp, Part::SharedDown].map(name);
        Ok(FeedForward::Experts {
            router: Box::new(self.matrix(router.replicated(self.shard.layout.tensor))?),
            shared: Box::new(self.network(shared, experts.shared_ffn, &self.shard.shared_ffn)?),
            experts: (0..experts.count)
                .map(|expert| self.expert(layer, expert, experts))
                .collect::<Result<_, _>>()?,
        })
    }

    fn network(
        &self,
        [gate, up, down]: [String; 3],
        width: usize,
        range: &Range<usize>,
    ) -> Result<FeedForwardSlices, ModelError> {
        let config = self.config();
        let rows = |name| self.matrix(Wanted::rows(name, (width, config.hidden), range.clone()));
        let ends = Shard::ffn_ends(config, width, range);
        let down = Wanted::columns(down, (config.hidden, width), range.clone(), ends);
        Ok(FeedForwardSlices {
            gate: rows(gate)?,
            up: rows(up)?,
            down: self.matrix(down)?,
        })
    }

    /// One expert, from tensors of its own or from those that hold all experts.
    fn expert(
        &self,
        layer: usize,
        expert: usize,
        experts: Experts,
    ) -> Result<FeedForwardSlices, ModelError> {
        let own = [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down]
            .map(|part| self.names().expert(layer, expert, part));
        let range = &self.shard.expert_ffn;
        let is_fused = self
            .tensor(&self.names().fused_experts(layer, ExpertPart::Down))
            .is_some();
        if !is_fused || !matches!(self.checkpoint.content(), Content::Stored) {
            return self.network(own, experts.ffn, range);
        }
        let config = self.config();
        let [gate, up, down] = own;
        let (hidden, width) = (config.hidden, experts.ffn);
        let rows = |name, part| {
            let wanted = Wanted::rows(name, (width, hidden), range.clone());
            self.fused(wanted, (layer, expert, part), experts)
        };
        let ends = Shard::ffn_ends(config, width, range);
        let down = Wanted::columns(down, (hidden, width), range.clone(), ends);
        Ok(FeedForwardSlices {
            gate: rows(gate, ExpertPart::Gate)?,
            up: rows(up, ExpertPart::Up)?,
            down: self.fused(down, (layer, expert, ExpertPart::Down), experts)?,
        })
    }

    /// A part of an expert's matrix, out of a tensor that holds all experts.
    fn fused(
        &self,
        wanted: Wanted,
        (layer, expert, part): (usize, usize, ExpertPart),
        experts: Experts,
    ) -> Result<MatrixSlice, ModelError> {
        let name = self.names().fused_experts(layer, part);
        if self.names() == Names::Gguf {
            let tensor = self.find(&name, &[experts.count, wanted.height, wanted.width])?;
            let bytes = tensor.bytes / experts.count as u64;
            return self.stored(wanted, tensor, expert as u64 * bytes);
        }
        // Hugging Face stores experts with one row an input: [in, out].
        let (inputs, outputs) = (wanted.width, wanted.height);
        let (first, row) = match part {
            ExpertPart::Gate => (0, 2 * outputs),
            ExpertPart::Up => (outputs, 2 * outputs),
            ExpertPart::Down => (0, outputs),
        };
        let tensor = self.find(&name, &[experts.count, inputs, row])?;
        let StoredType::Format(format) = tensor.stored else {
            return Err(self.wrong_type(tensor));
        };
        let Some(size) = format.value_bytes().filter(|_| format != Format::F8E4M3) else {
            return Err(self.wrong_type(tensor));
        };
        let at = (expert * inputs + wanted.columns.start) * row + first + wanted.rows.start;
        let region = Region {
            start: tensor.start + (at * size) as u64,
            len: (wanted.rows.len() * size) as u64,
            stride: (row * size) as u64,
            count: wanted.columns.len() as u64,
        };
        let place = Place {
            file: tensor.file,
            region,
        };
        Ok(wanted.slice(format, None, Source::Columns(place)))
    }

    fn matrix(&self, wanted: Wanted) -> Result<MatrixSlice, ModelError> {
        if !wanted.width.is_multiple_of(BLOCK) {
            return Err(self.checkpoint.unsupported(&format!(
                "tensor {} has {} columns; this worker takes multiples of {BLOCK}",
                wanted.name, wanted.width
            )));
        }
        match self.checkpoint.content() {
            Content::Random(format) => {
                let source = Source::Random {
                    first_row: wanted.rows.start,
                    first_column: wanted.columns.start,
                    width: wanted.width,
                };
                return Ok(wanted.slice(*format, None, source));
            }
            Content::Shards(shards) => return self.cut(wanted, shards),
            Content::Stored => {}
        }
        if self.tensor(&wanted.name).is_none()
            && let Some(stem) = wanted.name.strip_suffix(".weight")
            && let Some(words) = self.tensor(&format!("{stem}.weight_packed"))
        {
            return self.packed(&wanted, stem, words);
        }
        let tensor = self.find(&wanted.name, &[wanted.height, wanted.width])?;
        self.stored(wanted, tensor, 0)
    }

    /// A part that was cut out for this rank beforehand.
    fn cut(&self, wanted: Wanted, shards: &Shards) -> Result<MatrixSlice, ModelError> {
        let tensors = shards.of(self.shard)?;
        let missing = || {
            self.checkpoint.invalid(&format!(
                "the part of rank {} of tensor {}, or its scales, is missing",
                self.shard.rank, wanted.name
            ))
        };
        let (format, tensor) = Format::ALL
            .into_iter()
            .find_map(|format| Some((format, tensors.get(&cut_name(&wanted.name, format))?)))
            .ok_or_else(missing)?;
        let shape = [wanted.rows.len(), format.row_bytes(wanted.columns.len())];
        if tensor.shape != shape || tensor.stored != StoredType::Bytes {
            return Err(self.wrong_shape(tensor, &shape));
        }
        let whole = |tensor: &StoredTensor| Place {
            file: tensor.file,
            region: Region::one(tensor.start, tensor.bytes),
        };
        let scales = match tensors.get(&cut_scales_name(&wanted.name)) {
            None if format == Format::F8E4M3 => return Err(missing()),
            None => None,
            Some(scales) if scales.shape != [wanted.rows.len()] => {
                return Err(self.wrong_shape(scales, &[wanted.rows.len()]));
            }
            Some(scales) if scales.stored != StoredType::Format(Format::F32) => {
                return Err(self.wrong_type(scales));
            }
            Some(scales) => Some(ScaleSlice {
                name: scales.name.clone(),
                place: whole(scales),
                format: Format::F32,
                replicas: 1,
            }),
        };
        Ok(wanted.slice(format, scales, Source::Copy(whole(tensor))))
    }

    /// A part of a matrix whose rows begin `base` bytes into `tensor`.
    fn stored(
        &self,
        wanted: Wanted,
        tensor: &StoredTensor,
        base: u64,
    ) -> Result<MatrixSlice, ModelError> {
        let place = |columns: Range<usize>| {
            let bytes = |columns| tensor.stored.row_bytes(columns);
            let (row, skip, len) = bytes(wanted.width)
                .zip(bytes(columns.start))
                .zip(bytes(columns.len()))
                .map(|((row, skip), len)| (row, skip, len))
                .ok_or_else(|| self.wrong_type(tensor))?;
            let start = tensor.start + base + wanted.rows.start as u64 * row + skip;
            Ok(Place {
                file: tensor.file,
                region: Region::new(start, len, row, wanted.rows.len() as u64),
            })
        };
        match tensor.stored {
            StoredType::Format(Format::F8E4M3) => {
                let scales = self.scales(&wanted)?;
                let source = Source::Copy(place(wanted.columns.clone())?);
                Ok(wanted.slice(Format::F8E4M3, Some(scales), source))
            }
            StoredType::Format(format) => {
                let source = Source::Copy(place(wanted.columns.clone())?);
                Ok(wanted.slice(format, None, source))
            }
            StoredType::Int8 => {
                let scales = self.scales(&wanted)?;
                let source = Source::Int8(place(wanted.columns.clone())?);
                Ok(wanted.slice(Format::Q8_0, Some(scales), source))
            }
            StoredType::Ggml(kind) if is_k_quant(kind) => {
                let block = usize::try_from(kind.block_len().unwrap_or(1)).unwrap_or(1);
                let start = wanted.columns.start / block * block;
                let end = wanted.columns.end.next_multiple_of(block);
                let source = Source::Requantize {
                    place: place(start..end.min(wanted.width))?,
                    kind,
                    skip: wanted.columns.start - start,
                };
                Ok(wanted.slice(Format::Q8_0, None, source))
            }
            _ => Err(self.wrong_type(tensor)),
        }
    }

    /// The scales of a matrix's rows.
    fn scales(&self, wanted: &Wanted) -> Result<ScaleSlice, ModelError> {
        let name = format!("{}_scale", wanted.name);
        let tensor = self.required(&name)?;
        let format = float_format(tensor.stored).ok_or_else(|| self.wrong_type(tensor))?;
        let size = format.value_bytes().unwrap_or(1) as u64;
        let is_one = tensor.shape.iter().all(|size| *size == 1);
        let region = if is_one {
            Region::one(tensor.start, size)
        } else if matches!(tensor.shape[..], [rows] | [rows, 1] if rows == wanted.height) {
            let start = tensor.start + wanted.rows.start as u64 * size;
            Region::one(start, wanted.rows.len() as u64 * size)
        } else {
            return Err(self.wrong_shape(tensor, &[wanted.height, 1]));
        };
        let place = Place {
            file: tensor.file,
            region,
        };
        let is_shared = is_one || wanted.columns.len() < wanted.width;
        Ok(ScaleSlice {
            name,
            place,
            format,
            replicas: if is_shared {
                self.shard.layout.tensor
            } else {
                wanted.replicas
            },
        })
    }

    /// A part of a matrix of packed 4-bit integers.
    fn packed(
        &self,
        wanted: &Wanted,
        stem: &str,
        words: &StoredTensor,
    ) -> Result<MatrixSlice, ModelError> {
        let Some(packing) = self.checkpoint.quantization().packed else {
            return Err(self.checkpoint.invalid(&format!(
                "tensor {} is packed, but quantization_config names no 4-bit weights",
                words.name
            )));
        };
        let (height, width) = (wanted.height, wanted.width);
        if words.stored != StoredType::Int32 {
            return Err(self.wrong_type(words));
        }
        let words = self.find(&words.name, &[height, width / WORD_VALUES])?;
        let groups = width.div_ceil(packing.group);
        let scales = self.find(&format!("{stem}.weight_scale"), &[height, groups])?;
        let scale_format = float_format(scales.stored).ok_or_else(|| self.wrong_type(scales))?;
        let part = |tensor: &StoredTensor, columns: Range<usize>, row: usize, size: usize| {
            let at = (wanted.rows.start * row + columns.start) * size;
            Place {
                file: tensor.file,
                region: Region::new(
                    tensor.start + at as u64,
                    (columns.len() * size) as u64,
                    (row * size) as u64,
                    wanted.rows.len() as u64,
                ),
            }
        };
        let of = |unit: usize| wanted.columns.start / unit..wanted.columns.end.div_ceil(unit);
        let size = scale_format.value_bytes().unwrap_or(1);
        let source = Source::Int4 {
            words: part(
                words,
                of(WORD_VALUES),
                width / WORD_VALUES,
                size_of::<u32>(),
            ),
            scales: part(scales, of(packing.group), groups, size),
            scale_format,
            group: packing.group,
            offset: wanted.columns.start % packing.group,
        };
        Ok(wanted.clone().slice(Format::Q4_0, None, source))
    }

    fn vector(&self, name: String, len: usize, replicas: usize) -> Result<VectorSlice, ModelError> {
        let (format, place) = match self.checkpoint.content() {
            Content::Random(_) => (Format::F32, None),
            Content::Stored | Content::Shards(_) => {
                let tensor = match self.checkpoint.content() {
                    Content::Shards(shards) => shards.of(self.shard)?.get(&name),
                    _ => self.tensor(&name),
                };
                let tensor = self.checked(&name, tensor, &[len])?;
                let format = float_format(tensor.stored).ok_or_else(|| self.wrong_type(tensor))?;
                let place = Place {
                    file: tensor.file,
                    region: Region::one(tensor.start, tensor.bytes),
                };
                (format, Some(place))
            }
        };
        Ok(VectorSlice {
            name,
            format,
            len,
            place,
            replicas,
        })
    }

    fn tensor(&self, name: &str) -> Option<&'a StoredTensor> {
        self.checkpoint.tensors().get(name)
    }

    fn required(&self, name: &str) -> Result<&'a StoredTensor, ModelError> {
        self.noted(name, self.tensor(name))
    }

    fn noted(
        &self,
        name: &str,
        tensor: Option<&'a StoredTensor>,
    ) -> Result<&'a StoredTensor, ModelError> {
        let Some(tensor) = tensor else {
            return Err(self
                .checkpoint
                .invalid(&format!("tensor {name} is missing")));
        };
        self.used.borrow_mut().insert(tensor.name.clone());
        Ok(tensor)
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<&'a StoredTensor, ModelError> {
        self.checked(name, self.tensor(name), shape)
    }

    fn checked(
        &self,
        name: &str,
        tensor: Option<&'a StoredTensor>,
        shape: &[usize],
    ) -> Result<&'a StoredTensor, ModelError> {
        let tensor = self.noted(name, tensor)?;
        if tensor.shape != shape {
            return Err(self.wrong_shape(tensor, shape));
        }
        Ok(tensor)
    }

    fn wrong_shape(&self, tensor: &StoredTensor, expected: &[usize]) -> ModelError {
        self.checkpoint.invalid(&format!(
            "tensor {} has the shape {:?}, expected {expected:?}",
            tensor.name, tensor.shape
        ))
    }

    fn wrong_type(&self, tensor: &StoredTensor) -> ModelError {
        self.checkpoint.unsupported(&format!(
            "tensor {} is stored as {}; this worker computes with {}",
            tensor.name,
            tensor.stored,
            known_types()
        ))
    }

    /// A tensor that nothing reads would change the result if it were read: a
    /// bias, an adapter.
    pub(super) fn refuse_unused(&self) -> Result<(), ModelError> {
        let used = self.used.borrow();
        let is_read = |name: &str| {
            used.contains(name)
                || UNREAD.iter().any(|suffix| name.ends_with(suffix))
                || name.ends_with("rotary_emb.inv_freq")
                || self.checkpoint.is_skipped(name)
        };
        let unused: Vec<&str> = self
            .checkpoint
            .tensors()
            .keys()
            .map(String::as_str)
            .filter(|name| !is_read(name))
            .collect();
        if unused.is_empty() {
            return Ok(());
        }
        let mut listed = unused[..unused.len().min(LISTED_TENSORS)].join(", ");
        if unused.len() > LISTED_TENSORS {
            listed.push_str(", …");
        }
        let count = match unused.len() {
            1 => "1 tensor is".to_owned(),
            count => format!("{count} tensors are"),
        };
        Err(self.checkpoint.unsupported(&format!(
            "{count} not part of a Llama model that this worker computes: {listed}"
        )))
    }
}

/// Whether blocks of `kind` can be widened to be quantised anew.
fn is_k_quant(kind: GgmlType) -> bool {
    [
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
    ]
    .contains(&kind)
}
