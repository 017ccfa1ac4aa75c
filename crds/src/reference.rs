//! The reference page, written from the schema.

use std::fmt::Write as _;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionVersion, JSONSchemaProps,
    JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

use crate::MODELS_PLURAL;
use crate::v1alpha1::{ConditionType, GroupPhase, ModelNodePhase, ModelReason, Reason};

/// Markdown page of every field, column, condition and reason of `crd`.
///
/// # Errors
/// None that can happen: writing to a string does not fail.
pub fn page(crd: &CustomResourceDefinition) -> Result<String, std::fmt::Error> {
    let mut page = String::from("<!-- Written by crdgen from crds/src; do not edit. -->\n");
    let names = &crd.spec.names;
    for version in &crd.spec.versions {
        writeln!(
            page,
            "# {}\n\n`{}/{}`, namespaced, short name `{}`.\n",
            names.kind,
            crd.spec.group,
            version.name,
            names
                .short_names
                .as_deref()
                .unwrap_or_default()
                .join("`, `")
        )?;
        let short = names.short_names.iter().flatten().next();
        let short = short.unwrap_or(&names.plural);
        columns(&mut page, short, version)?;
        let Some(root) = version
            .schema
            .as_ref()
            .and_then(|schema| schema.open_api_v3_schema.as_ref())
        else {
            continue;
        };
        page.push_str(root.description.as_deref().unwrap_or_default());
        page.push_str("\n\n");
        rules(&mut page, "the object", root)?;
        for part in ["spec", "status"] {
            let Some(schema) = root.properties.as_ref().and_then(|fields| fields.get(part)) else {
                continue;
            };
            write!(
                page,
                "\n## {part}\n\n| field | type | limits | meaning |\n|---|---|---|---|\n"
            )?;
            fields(&mut page, part, schema)?;
            let mut all = String::new();
            nested_rules(&mut all, part, schema)?;
            if !all.is_empty() {
                write!(page, "\n### Rules of {part}\n\n{all}")?;
            }
        }
    }
    if names.plural == MODELS_PLURAL {
        model_vocabulary(&mut page)?;
    } else {
        vocabulary(&mut page)?;
    }
    Ok(page)
}

fn columns(
    page: &mut String,
    short: &str,
    version: &CustomResourceDefinitionVersion,
) -> std::fmt::Result {
    write!(
        page,
        "`kubectl get {short}` shows:\n\n| column | meaning |\n|---|---|\n"
    )?;
    for column in version.additional_printer_columns.iter().flatten() {
        let wide = if column.priority.unwrap_or(0) > 0 {
            " (`-o wide`)"
        } else {
            ""
        };
        let meaning = column.description.as_deref().unwrap_or_default();
        writeln!(page, "| {}{wide} | {meaning} |", column.name)?;
    }
    page.push('\n');
    Ok(())
}

fn fields(page: &mut String, path: &str, schema: &JSONSchemaProps) -> std::fmt::Result {
    let required = schema.required.as_deref().unwrap_or_default();
    for (name, field) in schema.properties.iter().flatten() {
        let path = format!("{path}.{name}");
        let item = item_of(field);
        let shown = if item.is_some() {
            format!("{path}[]")
        } else {
            path.clone()
        };
        writeln!(
            page,
            "| `{shown}` | {} | {} | {} |",
            kind(field),
            limits(field, required.contains(name)),
            field
                .description
                .as_deref()
                .unwrap_or_default()
                .replace('\n', " ")
                .replace('|', "\\|")
        )?;
        fields(page, &shown, item.unwrap_or(field))?;
    }
    Ok(())
}

fn item_of(schema: &JSONSchemaProps) -> Option<&JSONSchemaProps> {
    match schema.items.as_ref()? {
        JSONSchemaPropsOrArray::Schema(item) => Some(item),
        JSONSchemaPropsOrArray::Schemas(items) => items.first(),
    }
}

fn kind(schema: &JSONSchemaProps) -> String {
    if schema.x_kubernetes_int_or_string == Some(true) {
        return "quantity".to_owned();
    }
    let of = schema.type_.as_deref().unwrap_or("any");
    match (of, schema.format.as_deref()) {
        ("string", Some("date-time")) => "time".to_owned(),
        ("array", _) => {
            let item = item_of(schema).map_or_else(|| "any".to_owned(), kind);
            format!("list of {item}")
        }
        ("object", _)
            if matches!(
                schema.additional_properties,
                Some(JSONSchemaPropsOrBool::Schema(_))
            ) =>
        {
            "map".to_owned()
        }
        _ => of.to_owned(),
    }
}

fn limits(schema: &JSONSchemaProps, required: bool) -> String {
    let mut all = Vec::new();
    if required {
        all.push("required".to_owned());
    }
    if let Some(default) = &schema.default {
        all.push(format!("default `{}`", default.0));
    }
    if let Some(values) = &schema.enum_ {
        let values: Vec<_> = values.iter().filter_map(|value| value.0.as_str()).collect();
        all.push(format!("`{}`", values.join("`, `")));
    }
    match (schema.minimum, schema.maximum) {
        (Some(least), Some(most)) => all.push(format!("{least} to {most}")),
        (Some(least), None) => all.push(format!("at least {least}")),
        (None, Some(most)) => all.push(format!("at most {most}")),
        (None, None) => {}
    }
    if let Some(most) = schema.max_length {
        all.push(format!("at most {most} characters"));
    }
    if let Some(most) = schema.max_items.or(schema.max_properties) {
        all.push(format!("at most {most} entries"));
    }
    all.join(", ")
}

fn nested_rules(page: &mut String, path: &str, schema: &JSONSchemaProps) -> std::fmt::Result {
    rules(page, &format!("`{path}`"), schema)?;
    for (name, field) in schema.properties.iter().flatten() {
        nested_rules(
            page,
            &format!("{path}.{name}"),
            item_of(field).unwrap_or(field),
        )?;
    }
    Ok(())
}

fn rules(page: &mut String, of: &str, schema: &JSONSchemaProps) -> std::fmt::Result {
    for rule in schema.x_kubernetes_validations.iter().flatten() {
        let says = rule.message.as_deref().unwrap_or(&rule.rule);
        writeln!(page, "- {of}: {says}")?;
    }
    Ok(())
}

fn vocabulary(page: &mut String) -> std::fmt::Result {
    page.push_str("\n## Conditions\n\n| type | meaning |\n|---|---|\n");
    for condition in ConditionType::ALL {
        writeln!(page, "| {} | {} |", condition.as_str(), condition.meaning())?;
    }
    page.push_str(
        "\n## Reasons\n\nA group that failed for good has the worker's failure category as the \
         reason (for example `ModelNotFound`, `ModelTruncated`, `InvalidLayout`, \
         `InsufficientMemory`).\n\n| reason | meaning |\n|---|---|\n",
    );
    for reason in Reason::ALL {
        writeln!(page, "| {reason} | {} |", reason.meaning())?;
    }
    let phases: Vec<_> = GroupPhase::ALL.iter().map(|phase| phase.as_str()).collect();
    writeln!(page, "\nPhases of a group: {}.", phases.join(", "))?;
    Ok(())
}

fn model_vocabulary(page: &mut String) -> std::fmt::Result {
    page.push_str(
        "\n## Condition Ready\n\nEvery copy that there should be is whole. Its reasons are \
         these, those of a LlamaDeployment that speak of claims, pods, images and the spec, and \
         the failure category of a fetch (for example `DigestMismatch`, `SourceUnreachable`).\n\n\
         | reason | meaning |\n|---|---|\n",
    );
    for reason in ModelReason::ALL {
        writeln!(page, "| {} | {} |", reason.as_str(), reason.meaning())?;
    }
    let phases: Vec<_> = ModelNodePhase::ALL
        .iter()
        .map(|phase| phase.as_str())
        .collect();
    writeln!(page, "\nPhases of a node: {}.", phases.join(", "))?;
    Ok(())
}
