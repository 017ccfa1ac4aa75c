//! What is told of any object of ours: events and status.

use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{ApiResource, DynamicObject, ObjectMeta, Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::core::error_boundary::InvalidObject;
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Error;
use crate::cluster::store::version;
use crate::context::Context;
use crate::events::{self, Notice};
use crate::labels::FIELD_MANAGER;

/// Publishes `notice` of `object`. An event that cannot be published must keep nothing from
/// being done.
pub(crate) async fn publish(
    context: &Context,
    object: &ObjectReference,
    notice: &Notice,
    now: Timestamp,
) {
    let reporter = &context.settings.identity;
    tracing::info!(
        object = %format!(
            "{}/{}",
            object.namespace.as_deref().unwrap_or_default(),
            object.name.as_deref().unwrap_or_default()
        ),
        reason = %notice.reason,
        note = %notice.note,
        "event"
    );
    let published = events::publish(&context.client, object, notice, reporter, now).await;
    if let Err(error) = published {
        tracing::warn!(
            reason = %notice.reason,
            error = crate::telemetry::chain(&error),
            "event was not published"
        );
    }
}

/// One server-side apply of `status`, bound to this very object of the kind `K` by its UID.
/// Gives the version that the object has since; `None` when it was deleted meanwhile.
pub(crate) async fn write_status<K>(
    context: &Context,
    object: &ObjectReference,
    status: &impl Serialize,
) -> Result<Option<u64>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    let name = object.name.as_deref().unwrap_or_default();
    let namespace = object.namespace.as_deref().unwrap_or_default();
    // Not the typed API: it could not read the answer of an object that is not valid.
    let objects: Api<PartialObjectMeta<K>> = Api::namespaced(context.client.clone(), namespace);
    let body = serde_json::json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name, "uid": object.uid},
        "status": status,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let written = objects
        .patch_status(name, &params, &Patch::Apply(&body))
        .await;
    match written {
        Ok(object) => Ok(Some(version(&object))),
        // It was deleted meanwhile.
        Err(kube::Error::Api(reply)) if reply.is_not_found() => Ok(None),
        Err(source) => Err(Error::api(
            "status",
            format!("write status of {} {namespace}/{name}", K::kind(&())),
            source,
        )),
    }
}

/// The status of the object that `meta` is of, as far as it can be read; `None` when the
/// object is gone.
pub(crate) async fn stored_status<K, S>(
    context: &Context,
    meta: &ObjectMeta,
) -> Result<Option<S>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    S: DeserializeOwned + Default,
{
    let name = meta.name.as_deref().unwrap_or_default();
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let resource = ApiResource::erase::<K>(&());
    let objects: Api<DynamicObject> =
        Api::namespaced_with(context.client.clone(), namespace, &resource);
    let found = objects.get_opt(name).await.map_err(|source| {
        let attempt = format!("read {} {namespace}/{name}", K::kind(&()));
        Error::api("observe", attempt, source)
    })?;
    let status = found.map(|mut found| found.data["status"].take());
    Ok(status.map(|status| serde_json::from_value(status).unwrap_or_default()))
}

/// What is said of an object that this version cannot read.
pub(crate) fn unreadable(invalid: &InvalidObject) -> String {
    format!(
        "this operator cannot read the object: {}; correct it with kubectl edit, and see that the \
         installed CustomResourceDefinition is the operator's",
        invalid.error
    )
}

/// Names the object of the kind `K` that `meta` is of.
pub(crate) fn reference<K: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        ..ObjectReference::default()
    }
}
