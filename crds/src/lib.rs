//! Types of the `llmops.dev` API, from which its `CustomResourceDefinition`s are generated.
//!
//! Only types: what the fields mean is enforced by the schema (ranges, CEL rules) and
//! by the operator. The generated YAML stands in `crds`, a file for each kind.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray,
};

pub mod reference;
pub mod schema;
pub mod v1alpha1;

/// API group.
pub const GROUP: &str = "llmops.dev";
/// Plural name of [`v1alpha1::LlamaDeployment`] in URLs and RBAC rules.
pub const PLURAL: &str = "llamadeployments";

/// Plural name of [`v1alpha1::LlamaModel`] in URLs and RBAC rules.
pub const MODELS_PLURAL: &str = "llamamodels";

/// The `CustomResourceDefinition` of [`v1alpha1::LlamaDeployment`].
pub fn crd() -> CustomResourceDefinition {
    tidied::<v1alpha1::LlamaDeployment>()
}

/// The `CustomResourceDefinition` of [`v1alpha1::LlamaModel`].
pub fn model_crd() -> CustomResourceDefinition {
    tidied::<v1alpha1::LlamaModel>()
}

/// Every `CustomResourceDefinition` that the operator needs.
pub fn crds() -> [CustomResourceDefinition; 2] {
    [crd(), model_crd()]
}

/// Optional fields are absent and never `null`, and descriptions have no line breaks
/// of the source.
fn tidied<K: kube::CustomResourceExt>() -> CustomResourceDefinition {
    let mut crd = K::crd();
    for version in &mut crd.spec.versions {
        if let Some(validation) = &mut version.schema
            && let Some(root) = &mut validation.open_api_v3_schema
        {
            tidy(root);
        }
    }
    crd
}

fn tidy(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if let Some(text) = &mut schema.description {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    for field in schema
        .properties
        .iter_mut()
        .flat_map(|fields| fields.values_mut())
    {
        tidy(field);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &mut schema.items {
        tidy(item);
    }
}
