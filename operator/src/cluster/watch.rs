//! Watches that fill the caches, and tell which deployments to look at.

use std::fmt::Debug;
use std::sync::Arc;

use futures::future::ready;
use futures::stream::{BoxStream, select_all};
use futures::{Stream, StreamExt};
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::kinds::{ClusterNode, PlacedPod};
use super::object::{Guarded, GuardedModel};
use super::store::{Key, Store};
use super::{Bell, Cluster};
use crate::context::Context;
use crate::labels;
use crate::telemetry::chain;

/// The server ends a watch after this long, so that a dead connection shows soon.
pub const WATCH_SECONDS: u32 = 45;

/// Objects of one namespace, or of all.
pub fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match namespace {
        None => Api::all(client.clone()),
        Some(namespace) => Api::namespaced(client.clone(), namespace),
    }
}

/// Objects of one answer while all are listed: each is read as a whole before it is reduced.
const PAGE: u32 = 50;

/// What to watch, of all objects.
pub fn all() -> watcher::Config {
    watcher::Config::default()
        .timeout(WATCH_SECONDS)
        .page_size(PAGE)
}

/// Watches what belongs to deployments of `namespace`, or of all: gives the deployments
/// that something happened to.
pub fn children(
    context: &Arc<Context>,
    namespace: Option<&str>,
) -> impl Stream<Item = ObjectRef<Guarded>> + Send + use<> {
    context.cluster.expect(namespace.unwrap_or_default());
    select_all([
        told(context, namespace, |cluster| &cluster.pods),
        told(context, namespace, |cluster| &cluster.services),
        told(context, namespace, |cluster| &cluster.budgets),
        told(context, namespace, |cluster| &cluster.revisions),
    ])
}

/// Watches the pods of models of `namespace`, or of all: gives the models that something
/// happened to.
pub fn fetchers(
    context: &Arc<Context>,
    namespace: Option<&str>,
) -> impl Stream<Item = ObjectRef<GuardedModel>> + Send + use<> {
    context
        .cluster
        .fetchers
        .expect(namespace.unwrap_or_default());
    let selector = labels::of_models();
    happened(context, namespace, &selector, |cluster| &cluster.fetchers)
        .map(|(namespace, name)| ObjectRef::new(&name).within(&namespace))
}

fn told<K>(
    context: &Arc<Context>,
    namespace: Option<&str>,
    store: fn(&Cluster) -> &Store<K>,
) -> BoxStream<'static, ObjectRef<Guarded>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    K: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static,
{
    happened(context, namespace, &labels::managed(), store)
        .map(|(namespace, name)| ObjectRef::new(&name).within(&namespace))
        .boxed()
}

/// Whom something happened to, among what `selector` selects.
fn happened<K>(
    context: &Arc<Context>,
    namespace: Option<&str>,
    selector: &str,
    store: fn(&Cluster) -> &Store<K>,
) -> impl Stream<Item = Key> + Send + use<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    K: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static,
{
    let api = scoped::<K>(&context.client, namespace);
    let scope = namespace.unwrap_or_default().to_owned();
    let context = Arc::clone(context);
    watcher(api, all().labels(selector))
        .default_backoff()
        .filter_map(move |event| {
            let about = match event {
                Ok(event) => store(&context.cluster).take(&scope, event),
                Err(error) => {
                    failed(&context, &error);
                    None
                }
            };
            ready(about)
        })
}

/// Watches nodes and all pods, to know what is free. Never ends.
pub async fn capacity(context: Arc<Context>) {
    let nodes: Api<ClusterNode> = Api::all(context.client.clone());
    let pods: Api<PlacedPod> = Api::all(context.client.clone());
    let alive = "status.phase!=Succeeded,status.phase!=Failed";
    let nodes = watcher(nodes, all()).default_backoff().for_each(|event| {
        match event {
            Ok(event) => {
                let cluster = &context.cluster;
                let before = cluster.capacity.closed();
                if cluster.capacity.take_node(event) {
                    cluster.node_changes.send_modify(|count| *count += 1);
                }
                if cluster.capacity.closed() != before {
                    cluster.closings.send_modify(|count| *count += 1);
                }
            }
            Err(error) => failed(&context, &error),
        }
        ready(())
    });
    let pods = watcher(pods, all().fields(alive))
        .default_backoff()
        .for_each(|event| {
            match event {
                Ok(event) => context.cluster.capacity.take_pod(event),
                Err(error) => failed(&context, &error),
            }
            ready(())
        });
    tokio::join!(nodes, pods);
}

/// Tells each time that `bell` counted one more.
pub fn rings(bell: &Bell) -> impl Stream<Item = ()> + Send + use<> {
    let told = bell.subscribe();
    futures::stream::unfold(told, async |mut told| {
        told.changed().await.ok()?;
        Some(((), told))
    })
}

fn failed(context: &Context, error: &watcher::Error) {
    context.metrics.watch_failed();
    tracing::warn!(error = chain(error), "watch failed, opening it again");
}
