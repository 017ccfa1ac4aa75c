//! Shapes for tests.

use crate::config::{LayerKind, LlamaConfig, Rope, RopePairs, RopeScaling};

/// A Llama of two layers with heads of 64.
pub fn config(heads: usize, kv_heads: usize, ffn: usize, vocab: usize) -> LlamaConfig {
    LlamaConfig {
        hidden: heads * 64,
        ffn,
        heads,
        kv_heads,
        head_dim: 64,
        layers: vec![LayerKind::PLAIN; 2],
        rope: Rope {
            dim: 64,
            base: 1e4,
            pairs: RopePairs::Neighbours,
            scaling: RopeScaling::None,
        },
        experts: None,
        chunk: None,
        qk_norm: false,
        temperature: None,
        rms_epsilon: 1e-5,
        context_length: 2048,
        vocab,
        tied: false,
    }
}
