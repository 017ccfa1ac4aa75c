//! What every configuration must hold, wherever it was read.

use super::{
    LlamaConfig, MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_SIZE, MAX_WEIGHTS,
    RopeScaling,
};
use crate::error::ModelError;
use crate::format::BLOCK;

/// Checks `config`, which was read from `file`. Arithmetic on what passes does not
/// overflow.
pub(super) fn check(config: &LlamaConfig, file: &str) -> Result<(), ModelError> {
    sizes(config, file)?;
    shape(config, file)?;
    constants(config, file)
}

fn invalid(file: &str, what: &str) -> Result<(), ModelError> {
    Err(ModelError::Invalid(format!("{file}: {what}")))
}

/// That every size is in range.
fn sizes(config: &LlamaConfig, file: &str) -> Result<(), ModelError> {
    let max = usize::try_from(MAX_SIZE).unwrap_or(usize::MAX);
    let experts = config.experts;
    let of_experts = experts.map_or([1; 3], |experts| {
        [experts.count, experts.ffn, experts.shared_ffn]
    });
    let [expert_count, expert_ffn, shared_ffn] = of_experts;
    for (what, size, most) in [
        ("layers", config.layers.len(), MAX_LAYERS),
        ("attention heads", config.heads, MAX_HEADS),
        ("KV heads", config.kv_heads, MAX_HEADS),
        ("dimensions of a head", config.head_dim, MAX_HEAD_DIM),
        ("hidden dimensions", config.hidden, max),
        ("feed-forward dimensions", config.ffn, max),
        ("experts", expert_count, MAX_EXPERTS),
        ("feed-forward dimensions of an expert", expert_ffn, max),
        ("feed-forward dimensions beside experts", shared_ffn, max),
        ("tokens of context", config.context_length, max),
        (
            "tokens of an attention chunk",
            config.chunk.unwrap_or(1),
            max,
        ),
        ("tokens of vocabulary", config.vocab, max),
    ] {
        if !(1..=most).contains(&size) {
            return invalid(file, &format!("{size} {what}, expected 1 to {most}"));
        }
    }
    let layers = config.layers.iter().filter(|layer| layer.experts).count();
    if layers * expert_count > MAX_EXPERTS {
        return invalid(
            file,
            &format!(
                "{layers} layers of {expert_count} experts, expected at most {MAX_EXPERTS} experts"
            ),
        );
    }
    let weights = weights(config);
    if weights > MAX_WEIGHTS {
        return invalid(
            file,
            &format!("sizes of a model of {weights} weights, expected at most {MAX_WEIGHTS}"),
        );
    }
    Ok(())
}

/// Weights of the matrices; sizes are in range.
fn weights(config: &LlamaConfig) -> u128 {
    let wide = |size: usize| size as u128;
    let hidden = wide(config.hidden);
    let attention = 2 * (wide(config.query_width()) + wide(config.kv_width()));
    let dense = 3 * wide(config.ffn);
    let experts = config.experts.map_or(0, |experts| {
        wide(experts.count) * (1 + 3 * wide(experts.ffn)) + 3 * wide(experts.shared_ffn)
    });
    let layers = config.layers.iter().map(|layer| {
        let feed_forward = if layer.experts { experts } else { dense };
        hidden * (attention + feed_forward)
    });
    layers.sum::<u128>() + 2 * hidden * wide(config.vocab)
}

/// That sizes fit each other and the kernels.
fn shape(config: &LlamaConfig, file: &str) -> Result<(), ModelError> {
    let (heads, kv_heads) = (config.heads, config.kv_heads);
    if !heads.is_multiple_of(kv_heads) {
        return invalid(
            file,
            &format!("{heads} attention heads do not share {kv_heads} KV heads evenly"),
        );
    }
    let dim = config.rope.dim;
    if !(2..=config.head_dim).contains(&dim) || !dim.is_multiple_of(2) {
        return invalid(
            file,
            &format!(
                "rotary embedding of {dim} dimensions in heads of {}",
                config.head_dim
            ),
        );
    }
    if config.layers.iter().any(|layer| layer.experts) && config.experts.is_none() {
        return invalid(file, "layers have experts, but their sizes are missing");
    }
    if config.layers.iter().any(|layer| layer.chunked) && config.chunk.is_none() {
        return invalid(file, "layers attend in chunks, but their size is missing");
    }
    let experts = config.experts.map(|experts| {
        [
            ("expert feed-forward networks", experts.ffn),
            ("feed-forward networks beside experts", experts.shared_ffn),
        ]
    });
    let widths = [
        ("attention heads", config.head_dim),
        ("hidden states", config.hidden),
        ("feed-forward networks", config.ffn),
    ];
    for (what, width) in widths.into_iter().chain(experts.into_iter().flatten()) {
        if !width.is_multiple_of(BLOCK) {
            return Err(ModelError::Unsupported(format!(
                "{file}: {what} are {width} wide; this worker takes multiples of {BLOCK}"
            )));
        }
    }
    Ok(())
}

/// That constants are positive numbers.
fn constants(config: &LlamaConfig, file: &str) -> Result<(), ModelError> {
    let rope = &config.rope;
    let mut constants = vec![
        ("the epsilon of norms", f64::from(config.rms_epsilon)),
        ("the base of rotary frequencies", rope.base),
    ];
    match rope.scaling {
        RopeScaling::None | RopeScaling::Factors => {}
        RopeScaling::Linear(factor) => constants.push(("the factor of rope scaling", factor)),
        RopeScaling::Llama3(scaling) => constants.extend([
            ("the factor of rope scaling", scaling.factor),
            ("the low factor of rope scaling", scaling.low),
            ("the high factor of rope scaling", scaling.high),
            ("the context before rope scaling", scaling.original),
        ]),
    }
    if let Some(temperature) = config.temperature {
        constants.extend([
            ("the step of attention temperature", temperature.floor_scale),
            ("the scale of attention temperature", temperature.scale),
        ]);
    }
    for (what, value) in constants {
        if !(value > 0.0 && value.is_finite()) {
            return invalid(
                file,
                &format!("{what} is {value}, expected a positive number"),
            );
        }
    }
    Ok(())
}
