//! `quantization_config` of `config.json`: how quantised matrices are stored.

use serde_json::Value;

use super::fields::Fields;
use crate::error::ModelError;

/// Weights packed as 4-bit integers with a scale a group of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedInt4 {
    /// Columns that share a scale.
    pub group: usize,
    /// Whether zero is the middle of the range; otherwise each group has its own.
    pub symmetric: bool,
}

/// What `quantization_config` says. Which matrices are quantised shows in the
/// tensors themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantization {
    /// Parameters of 4-bit weights, where there are any.
    pub packed: Option<PackedInt4>,
}

/// Reads the object of `config.json`, if there is one.
///
/// # Errors
/// `ModelUnsupported` for other methods, widths and granularities, by name.
pub(super) fn parse(fields: Option<&Fields<'_>>) -> Result<Quantization, ModelError> {
    let Some(fields) = fields else {
        return Ok(Quantization::default());
    };
    match fields.text("quant_method")? {
        Some("fbgemm_fp8") => Ok(Quantization::default()),
        Some("compressed-tensors") => compressed_tensors(fields),
        other => Err(fields.unsupported(&format!(
            "quantization_config.quant_method is \"{}\"; \"fbgemm_fp8\" and \"compressed-tensors\" are built in",
            other.unwrap_or_default()
        ))),
    }
}

fn compressed_tensors(fields: &Fields<'_>) -> Result<Quantization, ModelError> {
    fields.expect("kv_cache_scheme", "no quantised KV cache", Value::is_null)?;
    fields.expect("sparsity_config", "dense weights", |value| {
        value.as_object().is_some_and(serde_json::Map::is_empty)
            || value.get("format").and_then(Value::as_str) == Some("dense")
    })?;
    let Some(Value::Object(groups)) = fields.get("config_groups") else {
        return Err(fields.invalid("quantization_config.config_groups is missing"));
    };
    let mut found = Quantization::default();
    for (name, group) in groups {
        let packed = weights_of(fields, name, group)?;
        if found.packed.is_some() && packed.is_some() && found.packed != packed {
            return Err(fields.unsupported(
                "quantization_config.config_groups differ in how they pack 4-bit weights",
            ));
        }
        found.packed = found.packed.or(packed);
    }
    Ok(found)
}

/// The packing of one group's weights; `None` for 8-bit weights, which show their
/// form in their tensors.
fn weights_of(
    fields: &Fields<'_>,
    name: &str,
    group: &Value,
) -> Result<Option<PackedInt4>, ModelError> {
    let weights = &group["weights"];
    let text = |key: &str| weights[key].as_str().unwrap_or_default().to_owned();
    let (kind, strategy) = (text("type"), text("strategy"));
    let bits = weights["num_bits"].as_u64().unwrap_or_default();
    let symmetric = weights["symmetric"].as_bool().unwrap_or(true);
    match (bits, kind.as_str(), strategy.as_str()) {
        (8, "float" | "int", "channel" | "tensor") if symmetric => Ok(None),
        (4, "int", "group" | "channel") => {
            let size = weights["group_size"].as_u64();
            let size = size.and_then(|size| usize::try_from(size).ok());
            match size {
                Some(group) if group > 0 && group.is_multiple_of(crate::format::BLOCK) => {
                    Ok(Some(PackedInt4 { group, symmetric }))
                }
                _ => Err(fields.unsupported(&format!(
                    "quantization_config.config_groups.{name}.weights.group_size is {}; multiples of {} are built in",
                    weights["group_size"],
                    crate::format::BLOCK
                ))),
            }
        }
        _ => Err(fields.unsupported(&format!(
            "quantization_config.config_groups.{name}: {bits}-bit \"{kind}\" weights by \"{strategy}\" \
             (symmetric: {symmetric}); 8-bit float or int by channel or tensor, and 4-bit int by group, are built in"
        ))),
    }
}
