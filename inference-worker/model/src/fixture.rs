//! Small GGUF files with random weights, for tests of this and other crates.

mod bert;

use std::path::Path;

use half::f16;

use crate::error::ModelError;
use crate::gguf::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgmlType, MAGIC, Value};
use crate::kernels::Format;
use crate::text::byte_characters;

pub use bert::TinyBert;

const VERSION: u32 = 3;
/// Tokens behind the 256 bytes and the merges.
const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const MERGES: [(&str, &str); 5] = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "a"),
    ("i", "n"),
    ("Ġ", "the"),
];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A GGUF being written.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    /// Metadata, in order.
    pub metadata: Vec<(String, Value)>,
    /// Name, sizes (innermost first), type and bytes of each tensor.
    pub tensors: Vec<(String, Vec<u64>, GgmlType, Vec<u8>)>,
}

impl GgufWriter {
    /// Sets `key`, in place of an older value.
    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(known, _)| known != key);
        self.metadata.push((key.to_owned(), value));
    }

    /// Sets a text.
    pub fn set_text(&mut self, key: &str, value: &str) {
        self.set(key, Value::Text(value.to_owned()));
    }

    /// The file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        let alignment = self.metadata.iter().find_map(|(key, value)| match value {
            Value::Unsigned(alignment) if key == ALIGNMENT_KEY => Some(*alignment),
            _ => None,
        });
        let alignment = usize::try_from(alignment.unwrap_or(DEFAULT_ALIGNMENT)).unwrap_or(1);
        let mut offset = 0;
        for (name, dims, ggml_type, bytes) in &self.tensors {
            put_text(&mut out, name);
            out.extend(u32::try_from(dims.len()).unwrap_or(u32::MAX).to_le_bytes());
            for dim in dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(ggml_type.0.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += bytes.len().next_multiple_of(alignment);
        }
        for (.., bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(alignment), 0);
            out.extend_from_slice(bytes);
        }
        out
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ModelError> {
        std::fs::write(path, self.to_bytes()).map_err(|source| ModelError::Io {
            path: path.display().to_string(),
            source,
        })
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_list<T>(
    out: &mut Vec<u8>,
    kind: u32,
    list: impl ExactSizeIterator<Item = T>,
    put: impl Fn(&mut Vec<u8>, T),
) {
    out.extend(9_u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((list.len() as u64).to_le_bytes());
    for item in list {
        put(out, item);
    }
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let put = |out: &mut Vec<u8>, kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        Value::Unsigned(value) => put(out, 10, &value.to_le_bytes()),
        Value::Signed(value) => put(out, 11, &value.to_le_bytes()),
        Value::Float(value) => put(out, 12, &value.to_le_bytes()),
        Value::Bool(value) => put(out, 7, &[u8::from(*value)]),
        Value::Text(text) => {
            put(out, 8, &[]);
            put_text(out, text);
        }
        Value::UnsignedList(list) => {
            put_list(out, 10, list.iter(), |out, v| out.extend(v.to_le_bytes()));
        }
        Value::SignedList(list) => {
            put_list(out, 11, list.iter(), |out, v| out.extend(v.to_le_bytes()));
        }
        Value::FloatList(list) => {
            put_list(out, 6, list.iter(), |out, v| out.extend(v.to_le_bytes()));
        }
        Value::BoolList(list) => put_list(out, 7, list.iter(), |out, v| out.push(u8::from(*v))),
        Value::TextList(list) => put_list(out, 8, list.iter(), put_text),
    }
}

/// Shape of a random Llama model.
#[derive(Clone, Debug)]
pub struct TinyLlama {
    /// Transformer layers.
    pub layers: usize,
    /// Query heads, each [`TinyLlama::head_dim`] wide.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Type of every matrix.
    pub format: Format,
    /// Whether the output head has weights of its own.
    pub own_output: bool,
    /// Whether there is a `rope_freqs.weight`, as in Llama 3.1.
    pub rope_factors: bool,
    /// The same seed makes the same weights.
    pub seed: u64,
}

impl Default for TinyLlama {
    fn default() -> Self {
        Self {
            layers: 2,
            heads: 8,
            kv_heads: 4,
            head_dim: 32,
            hidden: 128,
            ffn: 256,
            format: Format::F32,
            own_output: true,
            rope_factors: false,
            seed: 1,
        }
    }
}

impl TinyLlama {
    /// The model as a file to be written.
    pub fn gguf(&self) -> GgufWriter {
        let mut gguf = GgufWriter::default();
        self.put_metadata(&mut gguf);
        put_tokenizer(&mut gguf);
        let vocab = vocabulary().len();
        let mut noise = Noise(self.seed);
        let mut matrix = |name: String, columns: usize, rows: usize| {
            let bytes = noise.matrix(self.format, columns, rows);
            let dims = vec![columns as u64, rows as u64];
            gguf.tensors.push((name, dims, ggml(self.format), bytes));
        };
        let (query, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        matrix("token_embd.weight".to_owned(), self.hidden, vocab);
        if self.own_output {
            matrix("output.weight".to_owned(), self.hidden, vocab);
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            matrix(name("attn_q"), self.hidden, query);
            matrix(name("attn_k"), self.hidden, kv);
            matrix(name("attn_v"), self.hidden, kv);
            matrix(name("attn_output"), query, self.hidden);
            matrix(name("ffn_gate"), self.hidden, self.ffn);
            matrix(name("ffn_up"), self.hidden, self.ffn);
            matrix(name("ffn_down"), self.ffn, self.hidden);
        }
        let norms = (0..self.layers)
            .flat_map(|layer| {
                ["attn_norm", "ffn_norm"].map(|part| format!("blk.{layer}.{part}.weight"))
            })
            .chain(["output_norm.weight".to_owned()]);
        for name in norms {
            let values: Vec<f32> = (0..self.hidden).map(|_| 1.0 + 0.2 * noise.next()).collect();
            put_floats(&mut gguf, name, &values);
        }
        if self.rope_factors {
            let values: Vec<f32> = (0..self.head_dim / 2)
                .map(|pair| 1.0 + pair as f32 / 2.0)
                .collect();
            put_floats(&mut gguf, "rope_freqs.weight".to_owned(), &values);
        }
        gguf
    }

    fn put_metadata(&self, gguf: &mut GgufWriter) {
        gguf.set_text("general.architecture", "llama");
        gguf.set_text("general.name", "tiny random llama");
        for (key, value) in [
            ("block_count", self.layers),
            ("context_length", 512),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.ffn),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
        ] {
            gguf.set(&format!("llama.{key}"), Value::Unsigned(value as u64));
        }
        gguf.set(
            "llama.attention.layer_norm_rms_epsilon",
            Value::Float(f64::from(1e-5_f32)),
        );
    }
}

fn put_floats(gguf: &mut GgufWriter, name: String, values: &[f32]) {
    let bytes = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let dims = vec![values.len() as u64];
    gguf.tensors.push((name, dims, GgmlType::F32, bytes));
}

fn ggml(format: Format) -> GgmlType {
    GgmlType::of(format).unwrap_or(GgmlType::F32)
}

fn vocabulary() -> Vec<String> {
    byte_characters()
        .map(|character| character.to_string())
        .chain(MERGES.map(|(left, right)| format!("{left}{right}")))
        .chain(SPECIAL_TOKENS.map(str::to_owned))
        .collect()
}

fn put_tokenizer(gguf: &mut GgufWriter) {
    let vocabulary = vocabulary();
    let plain = vocabulary.len() - SPECIAL_TOKENS.len();
    let types = (0..vocabulary.len()).map(|id| if id < plain { 1 } else { 3 });
    let merges = MERGES.map(|(left, right)| format!("{left} {right}"));
    let id = |special: usize| Value::Unsigned((plain + special) as u64);
    gguf.set_text("tokenizer.ggml.model", "gpt2");
    gguf.set_text("tokenizer.ggml.pre", "smollm");
    gguf.set(
        "tokenizer.ggml.token_type",
        Value::SignedList(types.collect()),
    );
    gguf.set(
        "tokenizer.ggml.merges",
        Value::TextList(merges.iter().collect()),
    );
    gguf.set("tokenizer.ggml.bos_token_id", id(1));
    gguf.set("tokenizer.ggml.eos_token_id", id(2));
    gguf.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    gguf.set_text("tokenizer.chat_template", CHAT_TEMPLATE);
    gguf.set(
        "tokenizer.ggml.tokens",
        Value::TextList(vocabulary.iter().collect()),
    );
}

/// The bytes of a random matrix; the same seed makes the same.
pub fn random_matrix(format: Format, columns: usize, rows: usize, seed: u64) -> Vec<u8> {
    Noise(seed).matrix(format, columns, rows)
}

/// Random numbers: `SplitMix64`.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Between −1 and 1.
    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// A matrix whose products keep about the size of what they multiply.
    fn matrix(&mut self, format: Format, columns: usize, rows: usize) -> Vec<u8> {
        let size = (3.0 / columns as f32).sqrt();
        let mut bytes = Vec::with_capacity(rows * format.row_bytes(columns));
        match format {
            Format::F32 => {
                bytes.extend((0..rows * columns).flat_map(|_| (size * self.next()).to_le_bytes()));
            }
            Format::F16 => bytes.extend(
                (0..rows * columns).flat_map(|_| f16::from_f32(size * self.next()).to_le_bytes()),
            ),
            Format::Bf16 => bytes.extend(
                (0..rows * columns)
                    .flat_map(|_| half::bf16::from_f32(size * self.next()).to_le_bytes()),
            ),
            Format::Q4_0 => self.blocks(format, rows * columns, &[size / 8.0], &mut bytes),
            Format::Q4_1 => {
                self.blocks(format, rows * columns, &[size / 7.5, -size], &mut bytes);
            }
            Format::F8E4M3 => bytes.extend((0..rows * columns).map(|_| {
                let [byte, ..] = self.bits().to_le_bytes();
                // All bits but the sign mean that there is no number.
                if byte & 0x7F == 0x7F { 0 } else { byte }
            })),
            Format::Q8_0 => self.blocks(format, rows * columns, &[size / 127.0], &mut bytes),
        }
        bytes
    }

    /// Blocks that begin with `head` and go on with random bytes.
    fn blocks(&mut self, format: Format, values: usize, head: &[f32], out: &mut Vec<u8>) {
        for _ in 0..values / crate::kernels::BLOCK {
            let end = out.len() + format.block_bytes();
            out.extend(head.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
            while out.len() < end {
                let [byte, ..] = self.bits().to_le_bytes();
                // −128 is not written by ggml's quantiser.
                out.push(if byte == 0x80 { 0x81 } else { byte });
            }
        }
    }
}
