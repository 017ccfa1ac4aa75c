//! Checkpoints of the great models without their weights: real headers and
//! `config.json`, over files with holes in place of data.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::expect_used,
    reason = "each test file uses a part, and tests may fail"
)]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use llama_checkpoint::Checkpoint;
use llama_checkpoint::checkpoint::LoadFormat;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A model whose checkpoint can be made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    Llama8b,
    Llama70b,
    Llama405b,
    /// With every matrix of the layers in 8-bit floats.
    Llama405bFp8,
    /// With the feed-forward networks of layers 1 to 124 so, as Meta publishes it.
    Llama405bMetaFp8,
    Scout,
    Maverick,
}

impl Model {
    pub const ALL: [Self; 7] = [
        Self::Llama8b,
        Self::Llama70b,
        Self::Llama405b,
        Self::Llama405bFp8,
        Self::Llama405bMetaFp8,
        Self::Scout,
        Self::Maverick,
    ];

    fn is_llama4(self) -> bool {
        matches!(self, Self::Scout | Self::Maverick)
    }

    /// Hidden size, feed-forward size, layers, heads.
    fn shape(self) -> (usize, usize, usize, usize) {
        match self {
            Self::Llama8b => (4096, 14336, 32, 32),
            Self::Llama70b => (8192, 28672, 80, 64),
            Self::Llama405b | Self::Llama405bFp8 | Self::Llama405bMetaFp8 => {
                (16384, 53248, 126, 128)
            }
            Self::Scout | Self::Maverick => (5120, 8192, 48, 40),
        }
    }

    pub fn config(self) -> Value {
        if self.is_llama4() {
            return self.llama4_config();
        }
        let (hidden, ffn, layers, heads) = self.shape();
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
            "rope_theta": 500_000.0, "torch_dtype": "bfloat16", "use_cache": true,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        });
        match self {
            Self::Llama405bFp8 => {
                config["quantization_config"] = json!({
                    "quant_method": "compressed-tensors", "format": "float-quantized",
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                        "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}}},
                    "ignore": ["lm_head"]});
            }
            Self::Llama405bMetaFp8 => {
                config["quantization_config"] = json!({
                    "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                    "modules_to_not_convert": ["lm_head"]});
            }
            _ => {}
        }
        config
    }

    fn llama4_config(self) -> Value {
        let is_scout = self == Self::Scout;
        let scaling = json!({"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
            "high_freq_factor": 1.0, "original_max_position_embeddings": 8192});
        json!({
            "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
            "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1408},
            "text_config": {
                "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48,
                "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
                "intermediate_size": 8192, "intermediate_size_mlp": 16384, "vocab_size": 202_048,
                "max_position_embeddings": if is_scout { 10_485_760 } else { 1_048_576 },
                "num_local_experts": if is_scout { 16 } else { 128 }, "num_experts_per_tok": 1,
                "interleave_moe_layer_step": if is_scout { 1 } else { 2 },
                "use_qk_norm": is_scout, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
                "rope_scaling": if is_scout { scaling } else { Value::Null },
                "attention_chunk_size": 8192, "attn_temperature_tuning": 4, "floor_scale": 8192,
                "attn_scale": 0.1, "hidden_act": "silu", "attention_bias": false,
                "no_rope_layers": [], "moe_layers": null,
            },
        })
    }

    /// Name, type and shape of every tensor.
    fn tensors(self) -> Vec<(String, &'static str, Vec<usize>)> {
        let (hidden, ffn, layers, _) = self.shape();
        let vocab = if self.is_llama4() { 202_048 } else { 128_256 };
        let prefix = if self.is_llama4() {
            "language_model."
        } else {
            ""
        };
        let mut all = vec![
            (
                format!("{prefix}model.embed_tokens.weight"),
                "BF16",
                vec![vocab, hidden],
            ),
            (
                format!("{prefix}lm_head.weight"),
                "BF16",
                vec![vocab, hidden],
            ),
            (format!("{prefix}model.norm.weight"), "BF16", vec![hidden]),
        ];
        if self.is_llama4() {
            all.push((
                "vision_model.class_embedding".to_owned(),
                "BF16",
                vec![1408],
            ));
        }
        for layer in 0..layers {
            let base = format!("{prefix}model.layers.{layer}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                all.push((format!("{base}.{norm}.weight"), "BF16", vec![hidden]));
            }
            if self.has_experts(layer) {
                let base = format!("{base}.feed_forward.experts");
                let count = self.experts();
                let gate_up = vec![count, hidden, 2 * ffn];
                all.push((format!("{base}.gate_up_proj"), "BF16", gate_up));
                let down = vec![count, ffn, hidden];
                all.push((format!("{base}.down_proj"), "BF16", down));
            }
            for (part, rows, columns) in self.matrices(layer) {
                let is_fp8 = match self {
                    Self::Llama405bFp8 => true,
                    Self::Llama405bMetaFp8 => part.starts_with("mlp") && (1..=124).contains(&layer),
                    _ => false,
                };
                let kind = if is_fp8 { "F8_E4M3" } else { "BF16" };
                all.push((format!("{base}.{part}.weight"), kind, vec![rows, columns]));
                if is_fp8 {
                    all.push((format!("{base}.{part}.weight_scale"), "F32", vec![rows, 1]));
                }
            }
        }
        all
    }

    fn experts(self) -> usize {
        if self == Self::Scout { 16 } else { 128 }
    }

    fn has_experts(self, layer: usize) -> bool {
        self == Self::Scout || self == Self::Maverick && layer % 2 == 1
    }

    /// Name, rows and columns of every matrix of a layer.
    fn matrices(self, layer: usize) -> Vec<(&'static str, usize, usize)> {
        let (hidden, ffn, _, heads) = self.shape();
        let query = heads * 128;
        let attention = [
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", 1024, hidden),
            ("self_attn.v_proj", 1024, hidden),
            ("self_attn.o_proj", hidden, query),
        ];
        let feed_forward = if !self.is_llama4() {
            vec![
                ("mlp.gate_proj", ffn, hidden),
                ("mlp.up_proj", ffn, hidden),
                ("mlp.down_proj", hidden, ffn),
            ]
        } else if self.has_experts(layer) {
            vec![
                ("feed_forward.router", self.experts(), hidden),
                ("feed_forward.shared_expert.gate_proj", ffn, hidden),
                ("feed_forward.shared_expert.up_proj", ffn, hidden),
                ("feed_forward.shared_expert.down_proj", hidden, ffn),
            ]
        } else {
            vec![
                ("feed_forward.gate_proj", 16384, hidden),
                ("feed_forward.up_proj", 16384, hidden),
                ("feed_forward.down_proj", hidden, 16384),
            ]
        };
        attention.into_iter().chain(feed_forward).collect()
    }

    /// Writes headers and holes, in `files` files with an index.
    pub fn write(self, folder: &Path, files: usize) {
        std::fs::write(folder.join("config.json"), self.config().to_string()).expect("writes");
        let tensors = self.tensors();
        let each = tensors.len().div_ceil(files);
        let mut map = serde_json::Map::new();
        for (number, part) in tensors.chunks(each).enumerate() {
            let name = format!("model-{:05}-of-{files:05}.safetensors", number + 1);
            write_file(&folder.join(&name), part);
            for (tensor, ..) in part {
                map.insert(tensor.clone(), Value::String(name.clone()));
            }
        }
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), index).expect("writes");
    }

    pub fn open(self) -> (TempDir, Checkpoint) {
        let folder = TempDir::new().expect("a folder");
        self.write(folder.path(), 5);
        let checkpoint = Checkpoint::open(folder.path(), LoadFormat::Auto).expect("opens");
        (folder, checkpoint)
    }
}

/// A safetensors file with this header and a hole in place of its data.
pub fn write_file(path: &Path, tensors: &[(String, &'static str, Vec<usize>)]) {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, kind, shape) in tensors {
        let size = match *kind {
            "F32" => 4,
            "BF16" => 2,
            _ => 1,
        };
        let start = end;
        end += shape.iter().product::<usize>() * size;
        header.insert(
            name.clone(),
            json!({"dtype": kind, "shape": shape, "data_offsets": [start, end]}),
        );
    }
    let header = Value::Object(header).to_string();
    let mut file = File::create(path).expect("creates");
    file.write_all(&(header.len() as u64).to_le_bytes())
        .expect("writes");
    file.write_all(header.as_bytes()).expect("writes");
    file.set_len((8 + header.len() + end) as u64)
        .expect("grows");
}
