//! The plan of an embedding model, which is one process.

use llama_model::embedding::{EmbeddingMemory, EmbeddingRequest};
use llama_model::{EmbeddingCheckpoint, ModelError};
use serde_json::{Value, json};

use super::{DtypeArg, LoadFormatArg, PlanArgs, size};
use crate::embedding::ANSWER_VALUES;

/// A plan and what it was made for.
#[derive(Clone, Debug)]
pub struct EmbeddingReport {
    model: String,
    memory: EmbeddingMemory,
    limit: Option<u64>,
}

impl EmbeddingReport {
    /// Plans `checkpoint` as `args` ask for.
    ///
    /// # Errors
    /// `InvalidLayout` for more than one rank, `ModelUnsupported` for what such a model
    /// does not do.
    pub(super) fn new(
        args: &PlanArgs,
        checkpoint: &EmbeddingCheckpoint,
    ) -> Result<Self, ModelError> {
        let model = checkpoint.path().display().to_string();
        if args.model.layout().world() != 1 {
            return Err(ModelError::Layout(format!(
                "{model} is an embedding model, which is not split: only one rank works"
            )));
        }
        for (flag, set) in [
            ("--device-memory", args.device_memory.is_some()),
            ("--dtype=f32", args.dtype != DtypeArg::F16),
            (
                "--load-format=dummy",
                args.model.load_format != LoadFormatArg::Auto,
            ),
        ] {
            if set {
                return Err(ModelError::Unsupported(format!(
                    "{flag} does not apply to {model}, an embedding model"
                )));
            }
        }
        let request = EmbeddingRequest {
            max_tokens: args
                .max_tokens
                .unwrap_or_else(|| checkpoint.config().max_tokens),
            threads: args.threads_per_rank,
            answer_values: ANSWER_VALUES,
        };
        Ok(Self {
            memory: EmbeddingMemory::new(checkpoint, request)?,
            limit: args.memory,
            model,
        })
    }

    pub(super) fn fits(&self) -> bool {
        self.limit.is_none_or(|limit| self.memory.total() <= limit)
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "model": self.model,
            "plan": self.memory,
            "weights": self.memory.weights,
            "total": self.memory.total(),
            "fits": self.fits(),
        })
    }

    pub(super) fn table(&self) -> String {
        let memory = &self.memory;
        let mut text = format!(
            "{}\nan embedding model: one process, texts of at most {} tokens\n\n\
             weights {}, activations {}, answers {}, reserve {}\nall together: {}\n",
            self.model,
            memory.max_tokens,
            size(memory.weights),
            size(memory.activations),
            size(memory.answers),
            size(memory.reserve),
            size(memory.total()),
        );
        if !self.fits() {
            text.push_str("\ndoes not fit\n");
        }
        text
    }
}
