//! Types of the `llmops.dev` API, from which its `CustomResourceDefinition` is generated.
//!
//! Only types: what the fields mean is enforced by the schema (ranges, CEL rules) and
//! by the operator. The generated YAML stands in `crds/llamadeployments.yaml`.

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

/// The `CustomResourceDefinition` of [`v1alpha1::LlamaDeployment`].
///
/// Optional fields are absent and never `null`, and descriptions have no line breaks
/// of the source.
pub fn crd() -> CustomResourceDefinition {
    let mut crd = <v1alpha1::LlamaDeployment as kube::CustomResourceExt>::crd();
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
