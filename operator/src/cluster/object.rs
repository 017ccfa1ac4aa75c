//! `LlamaDeployment`s and `LlamaModel`s as they are cached.

use std::borrow::Cow;

use kube::Resource;
use kube::api::ObjectMeta;
use kube::core::error_boundary::{DeserializeGuard, InvalidObject};
use llama_crds::v1alpha1::{
    LlamaDeployment, LlamaDeploymentSpec, LlamaDeploymentStatus, LlamaModel,
};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::kinds::lean;

/// A `LlamaDeployment`, or why this version cannot read it. Without `managedFields`, which
/// decide nothing and take more memory than everything else.
#[derive(Clone, Debug)]
pub struct Guarded(pub Result<LlamaDeployment, InvalidObject>);

/// A `LlamaModel`, or why this version cannot read it. There are few of them.
pub type GuardedModel = DeserializeGuard<LlamaModel>;

impl<'de> Deserialize<'de> for Guarded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Parts {
            metadata,
            spec,
            status,
        } = Parts::deserialize(deserializer)?;
        let read = || -> Result<_, serde_json::Error> {
            Ok((
                LlamaDeploymentSpec::deserialize(spec)?,
                Option::<LlamaDeploymentStatus>::deserialize(status)?,
            ))
        };
        Ok(Self(match read() {
            Ok((spec, status)) => Ok(LlamaDeployment {
                metadata,
                spec,
                status,
            }),
            Err(error) => Err(InvalidObject {
                error: error.to_string(),
                metadata,
            }),
        }))
    }
}

/// What any object has, whatever version wrote it.
#[derive(Deserialize)]
struct Parts {
    #[serde(deserialize_with = "lean")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
    #[serde(default)]
    status: Value,
}

impl Resource for Guarded {
    type DynamicType = ();
    type Scope = <LlamaDeployment as Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        LlamaDeployment::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        LlamaDeployment::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        LlamaDeployment::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        LlamaDeployment::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        match &self.0 {
            Ok(object) => &object.metadata,
            Err(invalid) => &invalid.metadata,
        }
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match &mut self.0 {
            Ok(object) => &mut object.metadata,
            Err(invalid) => &mut invalid.metadata,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(tensor: &Value) -> Guarded {
        serde_json::from_value(json!({
            "apiVersion": "llmops.dev/v1alpha1",
            "kind": "LlamaDeployment",
            "metadata": {
                "name": "m",
                "namespace": "team",
                "managedFields": [{"manager": "kubectl", "operation": "Update"}],
            },
            "spec": {
                "model": {"source": {"pvc": {"claimName": "c", "path": "m.gguf"}}},
                "parallelism": {"tensor": tensor},
                "resources": {"accelerator": "Cpu", "cpu": "1", "memory": "1Gi"},
            },
        }))
        .expect("reads")
    }

    #[test]
    fn what_decides_nothing_is_not_kept() {
        let object = read(&json!(2));
        assert_eq!(object.meta().managed_fields, None);
        let valid = object.0.expect("valid");
        assert_eq!(valid.spec.parallelism.tensor, 2);
        assert_eq!(valid.metadata.name.as_deref(), Some("m"));
    }

    #[test]
    fn one_that_cannot_be_read_has_a_name_and_a_reason() {
        let object = read(&json!("two"));
        assert_eq!(object.meta().name.as_deref(), Some("m"));
        assert_eq!(object.meta().managed_fields, None);
        let invalid = object.0.expect_err("not valid");
        assert!(invalid.error.contains("two"), "{}", invalid.error);
    }
}
