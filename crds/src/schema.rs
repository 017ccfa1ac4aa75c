//! Schemas of fields whose Rust type is a Kubernetes type, with our own bounds and
//! words: the built-in ones carry forty lines of text and no limits.

use schemars::{Schema, SchemaGenerator, json_schema};

/// A quantity written as a number or a string (`2`, `600m`, `1Gi`).
///
/// The API server's CEL library has the last word on what parses.
pub fn quantity(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "maxLength": 32,
        "pattern": r"^[0-9]+(\.[0-9]*)?([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$",
    })
}

/// A length of time such as `90s` or `1h30m`.
pub fn duration(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 16,
        "pattern": r"^([0-9]{1,6}(h|m|s|ms))+$",
    })
}

/// Node labels that a pod asks for.
pub fn node_selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 32,
        "additionalProperties": {
            "type": "string",
            "maxLength": 63,
        },
    })
}

/// A list of tolerations.
pub fn tolerations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 32,
        "x-kubernetes-list-type": "atomic",
        "items": {
            "type": "object",
            "description": "One taint, or a family of taints, that the pods may run on.",
            "properties": {
                "key": {
                    "type": "string",
                    "maxLength": 317,
                    "description": "Key of the taint. Empty with operator Exists tolerates every taint.",
                },
                "operator": {
                    "type": "string",
                    "enum": ["Exists", "Equal"],
                    "description": "How value is compared: Equal (the default) or Exists, which ignores it.",
                },
                "value": {
                    "type": "string",
                    "maxLength": 63,
                    "description": "Value of the taint, for operator Equal.",
                },
                "effect": {
                    "type": "string",
                    "enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"],
                    "description": "Effect of the taint. Absent tolerates every effect.",
                },
                "tolerationSeconds": {
                    "type": "integer",
                    "format": "int64",
                    "description": "How long a pod stays on a node after a NoExecute taint appears. Absent means for ever.",
                },
            },
        },
    })
}
