//! Headers of GGUF files, byte by byte.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A GGUF without weights.
#[derive(Clone)]
pub struct Header {
    pub version: u32,
    /// Key, type and bytes.
    pub metadata: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
    /// In place of the numbers that are there.
    pub counts: Option<(u64, u64)>,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Innermost first.
    pub dims: Vec<u64>,
    pub kind: u32,
    /// In place of the place behind the tensor before.
    pub start: Option<u64>,
}

const F32: u32 = 0;
const ALIGNMENT: u64 = 32;

pub fn text(text: &str) -> Vec<u8> {
    let len = (text.len() as u64).to_le_bytes();
    len.iter().chain(text.as_bytes()).copied().collect()
}

impl Header {
    fn new(architecture: &str) -> Self {
        let mut header = Self {
            version: 3,
            metadata: Vec::new(),
            tensors: Vec::new(),
            counts: None,
        };
        header.set("general.architecture", 8, text(architecture));
        let mut tokens = [8_u32.to_le_bytes().as_slice(), &64_u64.to_le_bytes()].concat();
        for id in 0..64 {
            tokens.extend(text(&format!("t{id}")));
        }
        header.set("tokenizer.ggml.tokens", 9, tokens);
        header
    }

    /// Two layers of Llama 3.
    pub fn llama() -> Self {
        let mut header = Self::new("llama");
        header.set_sizes("llama", &[("block_count", 2), ("feed_forward_length", 96)]);
        header.put_ends();
        for layer in 0..2 {
            header.put_attention(layer);
            header.put_network(layer, "", 96);
        }
        header
    }

    /// Four layers of Llama 4, two of them with experts.
    pub fn llama4() -> Self {
        let mut header = Self::new("llama4");
        let sizes = [
            ("block_count", 4),
            ("feed_forward_length", 96),
            ("expert_count", 4),
            ("expert_used_count", 1),
            ("expert_feed_forward_length", 32),
            ("interleave_moe_layer_step", 2),
        ];
        header.set_sizes("llama4", &sizes);
        header.put_ends();
        for layer in 0..4 {
            header.put_attention(layer);
            if layer % 2 == 0 {
                header.put_network(layer, "", 96);
                continue;
            }
            header.put_network(layer, "_shexp", 32);
            header.put(&format!("blk.{layer}.ffn_gate_inp.weight"), &[64, 4]);
            for (part, columns, rows) in [("gate", 64, 32), ("up", 64, 32), ("down", 32, 64)] {
                let name = format!("blk.{layer}.ffn_{part}_exps.weight");
                header.put(&name, &[columns, rows, 4]);
            }
        }
        header
    }

    /// Sets what both have, and `sizes`.
    fn set_sizes(&mut self, architecture: &str, sizes: &[(&str, u32)]) {
        let common = [
            ("context_length", 512),
            ("embedding_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("attention.key_length", 32),
            ("rope.dimension_count", 32),
        ];
        for (key, size) in common.iter().chain(sizes) {
            self.set(&format!("{architecture}.{key}"), 4, size.to_le_bytes());
        }
        let epsilon = format!("{architecture}.attention.layer_norm_rms_epsilon");
        self.set(&epsilon, 6, 1e-5_f32.to_le_bytes());
    }

    fn put_ends(&mut self) {
        self.put("token_embd.weight", &[64, 64]);
        self.put("output.weight", &[64, 64]);
        self.put("output_norm.weight", &[64]);
    }

    fn put_attention(&mut self, layer: usize) {
        for norm in ["attn_norm", "ffn_norm"] {
            self.put(&format!("blk.{layer}.{norm}.weight"), &[64]);
        }
        for (part, columns, rows) in [
            ("q", 64, 64),
            ("k", 64, 32),
            ("v", 64, 32),
            ("output", 64, 64),
        ] {
            self.put(&format!("blk.{layer}.attn_{part}.weight"), &[columns, rows]);
        }
    }

    fn put_network(&mut self, layer: usize, suffix: &str, width: u64) {
        for (part, columns, rows) in [("gate", 64, width), ("up", 64, width), ("down", width, 64)] {
            let name = format!("blk.{layer}.ffn_{part}{suffix}.weight");
            self.put(&name, &[columns, rows]);
        }
    }

    fn put(&mut self, name: &str, dims: &[u64]) {
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dims: dims.to_vec(),
            kind: F32,
            start: None,
        });
    }

    /// Sets `key`, in place of an older value.
    pub fn set(&mut self, key: &str, kind: u32, bytes: impl AsRef<[u8]>) {
        self.remove(key);
        let value = (key.to_owned(), kind, bytes.as_ref().to_vec());
        self.metadata.push(value);
    }

    pub fn set_size(&mut self, key: &str, size: u32) {
        self.set(key, 4, size.to_le_bytes());
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(known, ..)| known != key);
    }

    /// The header, and the length of what lies behind it.
    pub fn to_bytes(&self) -> (Vec<u8>, u64) {
        let counts = (self.tensors.len() as u64, self.metadata.len() as u64);
        let (tensors, keys) = self.counts.unwrap_or(counts);
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(tensors.to_le_bytes());
        out.extend(keys.to_le_bytes());
        for (key, kind, bytes) in &self.metadata {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut next = 0_u64;
        for tensor in &self.tensors {
            out.extend(text(&tensor.name));
            out.extend(u32::try_from(tensor.dims.len()).unwrap_or(0).to_le_bytes());
            for dim in &tensor.dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.start.unwrap_or(next).to_le_bytes());
            let values = tensor
                .dims
                .iter()
                .fold(1_u64, |n, dim| n.wrapping_mul(*dim));
            next = next
                .wrapping_add(values.wrapping_mul(4))
                .wrapping_add(ALIGNMENT - 1)
                / ALIGNMENT
                * ALIGNMENT;
        }
        let padding = (out.len() as u64).next_multiple_of(ALIGNMENT) - out.len() as u64;
        (out, padding + next.min(1 << 20))
    }

    /// Writes it with a hole in place of its weights.
    pub fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("model.gguf");
        let (header, rest) = self.to_bytes();
        let mut file = File::create(&path).expect("creates");
        file.write_all(&header).expect("writes");
        file.set_len(header.len() as u64 + rest).expect("grows");
        path
    }
}
