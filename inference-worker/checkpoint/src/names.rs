//! How checkpoints call the parts of a model.

use serde::{Deserialize, Serialize};

/// A part of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    AttentionNorm,
    Query,
    Key,
    Value,
    Output,
    FeedForwardNorm,
    Gate,
    Up,
    Down,
    Router,
    SharedGate,
    SharedUp,
    SharedDown,
}

/// A matrix of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpertPart {
    Gate,
    Up,
    Down,
}

/// Whose names a checkpoint uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Names {
    /// ggml's.
    Gguf,
    /// Hugging Face's for `LlamaForCausalLM`.
    Llama,
    /// Hugging Face's for `Llama4ForCausalLM`.
    Llama4,
    /// Hugging Face's for `Llama4ForConditionalGeneration`.
    Llama4Conditional,
}

impl Names {
    /// What stands before the names of the text model.
    fn prefix(self) -> &'static str {
        match self {
            Self::Llama4Conditional => "language_model.",
            Self::Gguf | Self::Llama | Self::Llama4 => "",
        }
    }

    /// Names that begin so belong to parts that are not text.
    pub(crate) fn other_parts(self) -> &'static [&'static str] {
        match self {
            Self::Llama4Conditional => &["vision_model.", "multi_modal_projector."],
            Self::Gguf | Self::Llama | Self::Llama4 => &[],
        }
    }

    pub(crate) fn embedding(self) -> String {
        match self {
            Self::Gguf => "token_embd.weight".to_owned(),
            _ => format!("{}model.embed_tokens.weight", self.prefix()),
        }
    }

    pub(crate) fn norm(self) -> String {
        match self {
            Self::Gguf => "output_norm.weight".to_owned(),
            _ => format!("{}model.norm.weight", self.prefix()),
        }
    }

    pub(crate) fn head(self) -> String {
        match self {
            Self::Gguf => "output.weight".to_owned(),
            _ => format!("{}lm_head.weight", self.prefix()),
        }
    }

    /// The name of `part` of a layer.
    pub(crate) fn layer(self, layer: usize, part: Part) -> String {
        let feed_forward = match self {
            Self::Gguf => return format!("blk.{layer}.{}.weight", gguf_part(part)),
            Self::Llama => "mlp",
            Self::Llama4 | Self::Llama4Conditional => "feed_forward",
        };
        let part = hugging_face_part(part, feed_forward);
        format!("{}model.layers.{layer}.{part}.weight", self.prefix())
    }

    /// The tensor that holds a matrix of every expert of a layer.
    pub(crate) fn fused_experts(self, layer: usize, part: ExpertPart) -> String {
        if self == Self::Gguf {
            let part = match part {
                ExpertPart::Gate => "gate",
                ExpertPart::Up => "up",
                ExpertPart::Down => "down",
            };
            return format!("blk.{layer}.ffn_{part}_exps.weight");
        }
        let part = match part {
            ExpertPart::Gate | ExpertPart::Up => "gate_up_proj",
            ExpertPart::Down => "down_proj",
        };
        format!(
            "{}model.layers.{layer}.feed_forward.experts.{part}",
            self.prefix()
        )
    }

    /// The tensor that holds a matrix of one expert, as quantised exports have it.
    pub(crate) fn expert(self, layer: usize, expert: usize, part: ExpertPart) -> String {
        let part = match part {
            ExpertPart::Gate => "gate_proj",
            ExpertPart::Up => "up_proj",
            ExpertPart::Down => "down_proj",
        };
        match self {
            Self::Gguf => format!("blk.{layer}.expert.{expert}.{part}.weight"),
            _ => format!(
                "{}model.layers.{layer}.feed_forward.experts.{expert}.{part}.weight",
                self.prefix()
            ),
        }
    }
}

fn gguf_part(part: Part) -> &'static str {
    match part {
        Part::AttentionNorm => "attn_norm",
        Part::Query => "attn_q",
        Part::Key => "attn_k",
        Part::Value => "attn_v",
        Part::Output => "attn_output",
        Part::FeedForwardNorm => "ffn_norm",
        Part::Gate => "ffn_gate",
        Part::Up => "ffn_up",
        Part::Down => "ffn_down",
        Part::Router => "ffn_gate_inp",
        Part::SharedGate => "ffn_gate_shexp",
        Part::SharedUp => "ffn_up_shexp",
        Part::SharedDown => "ffn_down_shexp",
    }
}

fn hugging_face_part(part: Part, feed_forward: &str) -> String {
    match part {
        Part::AttentionNorm => "input_layernorm".to_owned(),
        Part::Query => "self_attn.q_proj".to_owned(),
        Part::Key => "self_attn.k_proj".to_owned(),
        Part::Value => "self_attn.v_proj".to_owned(),
        Part::Output => "self_attn.o_proj".to_owned(),
        Part::FeedForwardNorm => "post_attention_layernorm".to_owned(),
        Part::Gate => format!("{feed_forward}.gate_proj"),
        Part::Up => format!("{feed_forward}.up_proj"),
        Part::Down => format!("{feed_forward}.down_proj"),
        Part::Router => format!("{feed_forward}.router"),
        Part::SharedGate => format!("{feed_forward}.shared_expert.gate_proj"),
        Part::SharedUp => format!("{feed_forward}.shared_expert.up_proj"),
        Part::SharedDown => format!("{feed_forward}.shared_expert.down_proj"),
    }
}
