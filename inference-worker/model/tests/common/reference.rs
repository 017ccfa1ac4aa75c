//! Small random models with the logits of Hugging Face's implementation
//! (`tests/reference/make_fixtures.py` writes both).

use std::path::{Path, PathBuf};

use llama_model::Checkpoint;
use llama_model::checkpoint::LoadFormat;
use safetensors::SafeTensors;

/// What the reference computes.
pub struct Reference {
    pub tokens: Vec<u32>,
    pub logits: Vec<Vec<f32>>,
    pub greedy: Vec<u32>,
}

/// Where a model and its reference lie.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(name)
}

/// What lies beside a model.
pub fn reference(name: &str) -> Reference {
    let bytes = std::fs::read(folder(name).join("reference.safetensors")).expect("is there");
    let tensors = SafeTensors::deserialize(&bytes).expect("reads");
    let ids = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).expect("is there");
        data.data()
            .as_chunks()
            .0
            .iter()
            .map(|id| u32::try_from(i64::from_le_bytes(*id)).expect("a token"))
            .collect()
    };
    let logits = tensors.tensor("logits").expect("is there");
    let values: Vec<f32> = logits
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect();
    Reference {
        tokens: ids("tokens"),
        logits: values
            .chunks(logits.shape()[1])
            .map(<[f32]>::to_vec)
            .collect(),
        greedy: ids("greedy"),
    }
}

/// A model.
pub fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&folder(name), LoadFormat::Auto).expect("opens")
}
