//! `quantization_config` of `config.json`: how quantised matrices are stored.

use serde_json::{Map, Value};

use super::fields::Fields;
use crate::error::ModelError;
use crate::foreign::shown;
use crate::format::BLOCK;

/// Ways to pack weights whose tensors this crate knows.
const PACKINGS: [&str; 5] = [
    "dense",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
];
/// Orders of columns that leave each group's columns side by side.
const PLAIN_ORDERS: [&str; 2] = ["static", "weight"];
/// Fields that do not change what a forward pass computes. Which matrices are
/// left as they are shows in their tensors.
const HARMLESS: [&str; 7] = [
    "activation_scale_ub",
    "global_compression_ratio",
    "ignore",
    "modules_to_not_convert",
    "quantization_status",
    "run_compressed",
    "version",
];

/// Weights packed as 4-bit integers around zero, with a scale a group of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedInt4 {
    /// Columns that share a scale.
    pub group: usize,
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
    let found = match fields.text("quant_method")? {
        Some("fbgemm_fp8") => Quantization::default(),
        Some("compressed-tensors") => compressed_tensors(fields)?,
        other => {
            return Err(fields.unsupported(&format!(
                "quantization_config.quant_method is \"{}\"; \"fbgemm_fp8\" and \"compressed-tensors\" are built in",
                shown(other.unwrap_or_default())
            )));
        }
    };
    fields.refuse_unknown(&HARMLESS)?;
    Ok(found)
}

fn compressed_tensors(fields: &Fields<'_>) -> Result<Quantization, ModelError> {
    fields.expect("kv_cache_scheme", "no quantised KV cache", is_empty)?;
    fields.expect("transform_config", "no transformed weights", is_empty)?;
    fields.expect("sparsity_config", "dense weights", |value| {
        is_empty(value) || value["format"] == "dense"
    })?;
    expect_packing(fields)?;
    let Some(groups) = fields.object("config_groups")? else {
        return Err(fields.invalid("quantization_config.config_groups is missing"));
    };
    let mut found = Quantization::default();
    for group in groups.objects()? {
        let packed = weights_of(&group)?;
        if found.packed.is_some() && packed.is_some() && found.packed != packed {
            return Err(fields.unsupported(
                "quantization_config.config_groups differ in how they pack 4-bit weights",
            ));
        }
        found.packed = found.packed.or(packed);
    }
    Ok(found)
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty)
}

fn expect_packing(fields: &Fields<'_>) -> Result<(), ModelError> {
    fields.expect("format", &PACKINGS.join(", "), |value| {
        value.as_str().is_some_and(|name| PACKINGS.contains(&name))
    })
}

/// The packing of one group's weights; `None` for 8-bit weights, which show their
/// form in their tensors.
fn weights_of(group: &Fields<'_>) -> Result<Option<PackedInt4>, ModelError> {
    expect_packing(group)?;
    group.expect("output_activations", "exact outputs", |_| false)?;
    if let Some(inputs) = group.object("input_activations")? {
        // Missing means fixed.
        if inputs.get("dynamic") != Some(&Value::Bool(true)) {
            let dynamic = inputs.named("dynamic");
            return Err(inputs.unsupported(&format!(
                "{dynamic} is not true; inputs of a fixed scale are not built in"
            )));
        }
    }
    let Some(weights) = group.object("weights")? else {
        return Err(group.invalid(&format!("{} is missing", group.named("weights"))));
    };
    weights.expect("symmetric", "weights around zero", |value| {
        value == &Value::Bool(true)
    })?;
    weights.expect("actorder", "columns in their own order", |value| {
        value == &Value::Bool(false)
            || value
                .as_str()
                .is_some_and(|order| PLAIN_ORDERS.contains(&order))
    })?;
    let bits = weights.size("num_bits")?;
    let kind = weights.text("type")?.unwrap_or("int");
    let strategy = weights.text("strategy")?.unwrap_or_default();
    match (bits, kind, strategy) {
        (8, "float" | "int", "channel" | "tensor") => Ok(None),
        (4, "int", "group") => {
            let group = weights.size("group_size")?;
            weights.expect("group_size", "groups of multiples of 32", |_| {
                group.is_multiple_of(BLOCK)
            })?;
            Ok(Some(PackedInt4 { group }))
        }
        _ => Err(weights.unsupported(&format!(
            "{} are {bits}-bit \"{}\" by \"{}\"; \
             8-bit float or int by channel or tensor, and 4-bit int by group, are built in",
            group.named("weights"),
            shown(kind),
            shown(strategy)
        ))),
    }
}
