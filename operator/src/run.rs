//! Runs everything and ends everything: the controllers, the HTTP server, the lease.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Request;
use futures::StreamExt;
use futures::stream::{BoxStream, select_all};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::api::ListParams;
use kube::client::Body;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::{self, Controller};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Client, Config, Resource, ResourceExt};
use llama_crds::v1alpha1::{LlamaDeployment, LlamaModel};
use llama_crds::{GROUP, MODELS_PLURAL, PLURAL};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tower::service_fn;

use crate::args::Args;
use crate::backoff::Backoff;
use crate::cluster::Cluster;
use crate::cluster::object::{Guarded, GuardedModel};
use crate::cluster::release;
use crate::cluster::watch::{self, scoped};
use crate::context::{Context, Settings};
use crate::http::{self, Readiness};
use crate::lease::{Candidate, LeaseError};
use crate::metrics::Metrics;
use crate::models;
use crate::reconcile;
use crate::reconcile::plan::WorkerSettings;
use crate::telemetry::chain;

/// Longest wait for the API server to serve `LlamaDeployments` to us.
const SERVED_WITHIN: Duration = Duration::from_mins(1);
/// Time between two looks, and the longest wait for one answer.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Longest silence on a connection; more than a watch lasts.
const READ_TIMEOUT: Duration = Duration::from_mins(1);
/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Events of one object this close together make one round.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Time that running rounds get to finish at the end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(20);

/// Why the operator ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no cluster to talk to.
    #[error("find the cluster: neither a kubeconfig nor a service account")]
    Config(#[source] Box<kube::config::InferConfigError>),
    /// The client cannot be made.
    #[error("make the client of the API server")]
    Client(#[source] Box<kube::Error>),
    /// The address of the HTTP server is not to be had.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The HTTP server ended.
    #[error("serve HTTP")]
    Http(#[source] std::io::Error),
    /// The HTTP server ended without being asked to.
    #[error("the HTTP server ended")]
    HttpEnded,
    /// There is no such resource, or it may not be read.
    #[error(
        "list {plural}.{GROUP} in {scope} for {SERVED_WITHIN:?}: see that the \
         CustomResourceDefinition is installed and that this account may list them"
    )]
    NotServed {
        /// What.
        plural: &'static str,
        /// Which namespaces.
        scope: String,
        /// The last answer; none if there was no answer.
        #[source]
        source: Option<Box<kube::Error>>,
    },
    /// Signals cannot be received.
    #[error("receive signals")]
    Signals(#[source] std::io::Error),
    /// The lease went to another process or could not be renewed.
    #[error("lead")]
    Lease(#[source] LeaseError),
    /// No random numbers.
    #[error("draw a name for this process")]
    Random(#[source] getrandom::Error),
    /// The controllers ended without being asked to.
    #[error("the watch of LlamaDeployments ended")]
    WatchEnded,
}

/// Runs against the cluster of the kubeconfig or the service account.
///
/// # Errors
/// Whatever ended it, unless that was SIGTERM or SIGINT.
pub async fn run(args: Args) -> Result<(), RunError> {
    let client = client().await?;
    run_with(client, args).await
}

/// Runs until a signal, or until something that must run has ended.
///
/// # Errors
/// Whatever ended it, unless that was SIGTERM or SIGINT.
pub async fn run_with(client: Client, args: Args) -> Result<(), RunError> {
    let identity = format!("{}_{}", args.identity, unique()?);
    let metrics = Arc::new(Metrics::new());
    let client = counted(client, &metrics);
    let context = Arc::new(Context {
        client: client.clone(),
        metrics,
        cluster: Cluster::default(),
        backoff: Backoff::default(),
        settings: Settings {
            worker: WorkerSettings {
                image: args.worker_image.clone(),
                pull_policy: args.worker_image_pull_policy.clone(),
                drain_seconds: args.drain_seconds,
            },
            reconcile_timeout: Duration::from_secs(args.reconcile_timeout.into()),
            identity: args.identity.clone(),
        },
    });
    let address = args.listen;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| RunError::Listen { address, source })?;
    let (stop, readiness) = (CancellationToken::new(), Readiness::default());
    let mut candidate = args
        .lease_namespace
        .as_deref()
        .map(|namespace| Candidate::new(client, namespace, &args.lease_name, &identity));

    let server = http::serve(listener, Arc::clone(&context), readiness.clone());
    let duty = lead(&args, &context, &readiness, candidate.as_mut(), &stop);
    let result = tokio::select! {
        result = server => result.map_err(RunError::Http).and(Err(RunError::HttpEnded)),
        result = duty => result,
        result = ended_by_signal(&stop) => result,
    };
    stop.cancel();
    let lost = matches!(result, Err(RunError::Lease(_)));
    if let Some(candidate) = candidate.as_mut().filter(|_| !lost) {
        candidate.release().await;
    }
    result
}

async fn client() -> Result<Client, RunError> {
    let mut config = Config::infer()
        .await
        .map_err(|error| RunError::Config(Box::new(error)))?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    // It would hold a call for minutes. Rounds, watches and the lease try again themselves.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| RunError::Client(Box::new(error)))
}

/// `client`, with what it writes counted.
fn counted(client: Client, metrics: &Arc<Metrics>) -> Client {
    let metrics = Arc::clone(metrics);
    let namespace = client.default_namespace().to_owned();
    let valid_until = *client.valid_until();
    let service = service_fn(move |request: Request<Body>| {
        metrics.requested(request.method(), request.uri().path());
        let client = client.clone();
        async move { client.send(request).await }
    });
    Client::new(service, namespace).with_valid_until(valid_until)
}

/// Tells processes of one name apart.
fn unique() -> Result<String, RunError> {
    let mut bytes = [0_u8; 4];
    getrandom::fill(&mut bytes).map_err(RunError::Random)?;
    Ok(format!("{:08x}", u32::from_ne_bytes(bytes)))
}

/// Asks everything to stop at the first signal, and leaves running rounds some time.
async fn ended_by_signal(stop: &CancellationToken) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("asked to stop");
    stop.cancel();
    sleep(SHUTDOWN_TIMEOUT).await;
    tracing::warn!("stopping although rounds are still running");
    Ok(())
}

/// Waits for the lease, if there is one, and then runs the controllers while it lasts.
async fn lead(
    args: &Args,
    context: &Arc<Context>,
    readiness: &Readiness,
    candidate: Option<&mut Candidate>,
    stop: &CancellationToken,
) -> Result<(), RunError> {
    tokio::select! {
        result = served(args, &context.client) => result?,
        () = stop.cancelled() => return Ok(()),
    }
    // Standing by is a duty too: a second replica is ready.
    readiness.set();
    let Some(candidate) = candidate else {
        context.metrics.set_leader(true);
        return control(args, context, stop).await;
    };
    let acquired = tokio::select! {
        acquired = candidate.acquire() => acquired,
        () = stop.cancelled() => return Ok(()),
    };
    context.metrics.set_leader(true);
    let result = tokio::select! {
        result = control(args, context, stop) => result,
        lost = candidate.keep(acquired) => Err(RunError::Lease(lost)),
    };
    context.metrics.set_leader(false);
    result
}

/// What to watch: each namespace once, or all.
fn scopes(args: &Args) -> Vec<Option<&str>> {
    let names: BTreeSet<&str> = args.watch_namespace.iter().map(String::as_str).collect();
    if names.is_empty() {
        vec![None]
    } else {
        names.into_iter().map(Some).collect()
    }
}

/// Waits until our kinds can be listed. A watch of what is not served would only fail again
/// and again, and nothing would be ready or say why.
async fn served(args: &Args, client: &Client) -> Result<(), RunError> {
    let deadline = Instant::now() + SERVED_WITHIN;
    for namespace in scopes(args) {
        listed::<LlamaDeployment>(client, namespace, PLURAL, deadline).await?;
        listed::<LlamaModel>(client, namespace, MODELS_PLURAL, deadline).await?;
    }
    Ok(())
}

async fn listed<K>(
    client: &Client,
    namespace: Option<&str>,
    plural: &'static str,
    deadline: Instant,
) -> Result<(), RunError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let objects = scoped::<K>(client, namespace);
    let scope = match namespace {
        None => "all namespaces".to_owned(),
        Some(name) => format!("namespace {name}"),
    };
    let one = ListParams::default().limit(1);
    loop {
        let source = match timeout(LOOK_EVERY, objects.list_metadata(&one)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(source)) => Some(Box::new(source)),
            Err(_) => None,
        };
        if Instant::now() >= deadline {
            return Err(RunError::NotServed {
                plural,
                scope,
                source,
            });
        }
        let error = source
            .as_deref()
            .map_or_else(|| "no answer".to_owned(), |source| chain(source));
        tracing::warn!(%error, %scope, plural, "cannot list them yet");
        sleep(LOOK_EVERY).await;
    }
}

/// Runs one controller for each watched namespace, or one for all.
async fn control(
    args: &Args,
    context: &Arc<Context>,
    stop: &CancellationToken,
) -> Result<(), RunError> {
    tracing::info!(namespaces = ?args.watch_namespace, "watching LlamaDeployments and LlamaModels");
    // Who may see only some namespaces may not see nodes.
    let _capacity = args.watch_namespace.is_empty().then(|| {
        context.cluster.capacity.expect();
        AbortOnDropHandle::new(tokio::spawn(watch::capacity(Arc::clone(context))))
    });
    let _releases: Vec<_> = scopes(args)
        .into_iter()
        .map(|namespace| {
            let context = Arc::clone(context);
            let namespace = namespace.map(str::to_owned);
            AbortOnDropHandle::new(tokio::spawn(release::run(context, namespace)))
        })
        .collect();
    let rounds = scopes(args).into_iter().flat_map(|namespace| {
        [
            deployments(args, context, namespace, stop),
            models(args, context, namespace, stop),
        ]
    });
    select_all(rounds).collect::<()>().await;
    if stop.is_cancelled() {
        Ok(())
    } else {
        Err(RunError::WatchEnded)
    }
}

/// Rounds of `LlamaDeployments`, until all have ended.
fn deployments(
    args: &Args,
    context: &Arc<Context>,
    namespace: Option<&str>,
    stop: &CancellationToken,
) -> BoxStream<'static, ()> {
    let context = Arc::clone(context);
    let rounds = controller(&context, namespace, args.concurrency)
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(
            reconcile::reconcile,
            reconcile::error_policy,
            Arc::clone(&context),
        );
    rounds
        .map(move |round| {
            ended(&context, round, |namespace, name| {
                let key = format!("{namespace}/{name}");
                context.metrics.forget(&key);
                context.backoff.forget(&key);
                context.cluster.users.note((namespace, name), None);
            });
        })
        .boxed()
}

/// Rounds of `LlamaModels`, until all have ended.
fn models(
    args: &Args,
    context: &Arc<Context>,
    namespace: Option<&str>,
    stop: &CancellationToken,
) -> BoxStream<'static, ()> {
    let context = Arc::clone(context);
    let objects = scoped::<GuardedModel>(&context.client, namespace);
    let cluster = &context.cluster;
    let rounds = Controller::new(objects, watch::all())
        .with_config(config(args.concurrency))
        .reconcile_on(watch::fetchers(&context, namespace))
        .reconcile_all_on(watch::rings(&cluster.node_changes))
        .reconcile_all_on(watch::rings(&cluster.users.changes))
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(
            models::reconcile,
            models::error_policy,
            Arc::clone(&context),
        );
    rounds
        .map(move |round| {
            ended(&context, round, |namespace, name| {
                let key = models::backoff_key(&namespace, &name);
                context.backoff.forget(&key);
            });
        })
        .boxed()
}

/// What a round came to; of an object that is gone `gone` gets namespace and name. Failed
/// rounds were logged by the error policy.
fn ended<K: Resource<DynamicType = ()>>(
    context: &Context,
    round: Result<
        (ObjectRef<K>, controller::Action),
        controller::Error<reconcile::Error, watcher::Error>,
    >,
    gone: impl FnOnce(String, String),
) {
    match round {
        Ok(_) | Err(controller::Error::ReconcilerFailed(..)) => {}
        Err(controller::Error::ObjectNotFound(object)) => {
            gone(object.namespace.unwrap_or_default(), object.name);
        }
        Err(error) => {
            context.metrics.watch_failed();
            tracing::warn!(error = chain(&error), "watch failed, opening it again");
        }
    }
}

fn config(concurrency: u16) -> controller::Config {
    controller::Config::default()
        .concurrency(concurrency)
        .debounce(DEBOUNCE)
}

fn controller(
    context: &Arc<Context>,
    namespace: Option<&str>,
    concurrency: u16,
) -> Controller<Guarded> {
    let client = &context.client;
    let controller = Controller::new(scoped::<Guarded>(client, namespace), watch::all())
        .with_config(config(concurrency));
    let store = controller.store();
    controller
        .reconcile_on(watch::children(context, namespace))
        .reconcile_all_on(watch::rings(&context.cluster.closings))
        .watches(
            scoped::<PartialObjectMeta<PersistentVolumeClaim>>(client, namespace),
            watch::all(),
            move |claim| users_of(&claim, &store),
        )
}

/// Which deployments have their model on `claim`.
fn users_of(
    claim: &PartialObjectMeta<PersistentVolumeClaim>,
    store: &Store<Guarded>,
) -> Vec<ObjectRef<Guarded>> {
    let (name, namespace) = (claim.name_any(), claim.namespace());
    let uses = |object: &LlamaDeployment| {
        let source = object.spec.model.source.pvc.as_ref();
        object.namespace() == namespace && source.is_some_and(|pvc| pvc.claim_name == name)
    };
    store
        .state()
        .iter()
        .filter(|object| object.0.as_ref().is_ok_and(uses))
        .map(|object| ObjectRef::from_obj(object.as_ref()))
        .collect()
}
