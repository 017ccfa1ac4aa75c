//! One round for one `LlamaDeployment`: observe → validate → plan → apply → status.
//!
//! `validate`, `fit`, `groups`, `plan`, `failure`, `waiting`, `status` and `notices` are pure:
//! they take no client and no clock. A round never waits for anything; it writes what it
//! sees and leaves the rest to the next event.

pub mod adapters;
pub mod adopt;
pub mod apply;
pub mod bounds;
pub mod canonical;
pub mod compare;
pub(crate) mod condition;
pub mod failure;
pub mod fit;
pub mod fit_words;
pub mod golden;
pub mod groups;
pub mod kueue;
pub mod measured;
mod no_room;
pub mod notices;
pub mod observe;
pub mod placement;
pub mod plan;
pub mod pods;
pub mod policy;
pub mod progress;
pub mod quantity;
pub(crate) mod report;
pub mod rollout;
pub mod source;
pub mod status;
pub mod template;
pub mod validate;
pub mod waiting;

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::ObjectMeta;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use kube::{Resource, ResourceExt};
use llama_crds::v1alpha1::{LlamaDeployment, LlamaDeploymentStatus, Reason};

use crate::cluster::object::Guarded;
use crate::cluster::states;
use crate::cluster::store::version;
use crate::context::Context;
use crate::labels;

use self::observe::Observed;
use self::pods::PodView;

/// A round without an event, in case one was missed.
pub(crate) const SAFETY_ROUND: Duration = Duration::from_mins(10);

/// Pause before an answer is looked for that was asked for beside the rounds.
const ANSWER_PAUSE: Duration = Duration::from_secs(2);
/// Time after which pods that serve are asked again what they take of memory.
const MEASURED_EVERY: Duration = Duration::from_mins(9);
/// Pause while the caches fill.
pub(crate) const SYNC_PAUSE: Duration = Duration::from_millis(100);

/// Why a round could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to the API server failed.
    #[error("{attempt}")]
    Api {
        /// The step that called.
        step: &'static str,
        /// What was tried.
        attempt: String,
        /// Why it failed.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server refused something that was planned; status says what.
    #[error("{0}")]
    Refused(String),
    /// The spec cannot be done now but may be once another object is gone.
    #[error("{0}")]
    Conflict(String),
    /// The round took too long.
    #[error("the round took more than {0:?}")]
    TimedOut(Duration),
    /// An object could not be written or read as JSON.
    #[error("encode or decode an object")]
    Encode(#[source] serde_json::Error),
    /// A request could not be made.
    #[error("{0}")]
    Request(String, #[source] kube::core::request::Error),
    /// No random numbers.
    #[error("draw a rendezvous token")]
    Random(#[source] getrandom::Error),
}

impl Error {
    pub(crate) fn api(step: &'static str, attempt: String, source: kube::Error) -> Self {
        let source = Box::new(source);
        Self::Api {
            step,
            attempt,
            source,
        }
    }

    /// One of few words, for metrics and logs.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Api { step, .. } => step,
            Self::Refused(_) => "refused",
            Self::Conflict(_) => "conflict",
            Self::TimedOut(_) => "timeout",
            Self::Encode(_) | Self::Request(..) => "encode",
            Self::Random(_) => "random",
        }
    }
}

/// One round, bounded in time and measured.
pub async fn reconcile(object: Arc<Guarded>, context: Arc<Context>) -> Result<Action, Error> {
    let round = Box::pin(dispatch(&object, &context));
    bounded_round(&context, &key(&object), round).await
}

/// `round` of the object that is known as `key`, bounded in time and measured.
pub(crate) async fn bounded_round(
    context: &Context,
    key: &str,
    round: impl Future<Output = Result<Action, Error>>,
) -> Result<Action, Error> {
    let begun = Instant::now();
    let limit = context.settings.reconcile_timeout;
    let result = match tokio::time::timeout(limit, round).await {
        Ok(result) => result,
        Err(_) => Err(Error::TimedOut(limit)),
    };
    let outcome = result.as_ref().map_or_else(Error::category, |_| "success");
    context.metrics.reconciled(outcome, begun.elapsed());
    if result.is_ok() {
        context.backoff.succeeded(key);
    }
    result
}

#[expect(clippy::needless_pass_by_value, reason = "the controller calls it so")]
/// What to do after a round that failed: wait longer each time, each object by itself.
pub fn error_policy(object: Arc<Guarded>, error: &Error, context: Arc<Context>) -> Action {
    after_failure(&context, &key(&object), error)
}

/// The same for the object that is known as `key`.
pub(crate) fn after_failure(context: &Context, key: &str, error: &Error) -> Action {
    let pause = context.backoff.failed(key);
    tracing::warn!(
        object = %key,
        category = error.category(),
        error = crate::telemetry::chain(error),
        retry_seconds = pause.as_secs_f64(),
        "round failed"
    );
    Action::requeue(pause)
}

fn key(object: &Guarded) -> String {
    let meta = object.meta();
    let part = |value: &Option<String>| value.clone().unwrap_or_default();
    format!("{}/{}", part(&meta.namespace), part(&meta.name))
}

async fn dispatch(object: &Guarded, context: &Arc<Context>) -> Result<Action, Error> {
    // An object on its way out is never given new children, and the garbage collector
    // removes those that it has.
    if object.meta().deletion_timestamp.is_some() {
        context.backoff.forget(&key(object));
        context.metrics.forget(&key(object));
        let uid = object.meta().uid.as_deref().unwrap_or_default();
        context.cluster.forget(uid);
        note_user(object.meta(), None, context);
        return Ok(Action::await_change());
    }
    if !context.cluster.is_synced() {
        return Ok(Action::requeue(SYNC_PAUSE));
    }
    match &object.0 {
        Ok(object) => round(object, context).await,
        Err(invalid) => report_unreadable(invalid, context).await,
    }
}

async fn round(object: &LlamaDeployment, context: &Arc<Context>) -> Result<Action, Error> {
    let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
    let previous = latest_status(object, context);
    let mut observed = observe::observe(context, &namespace, &name, object).await?;
    let (generation, now) = (object.metadata.generation, now());
    let target = Target {
        reference: object.object_ref(&()),
        previous: &previous,
    };
    let deployment = match validate::validate(object, &observed) {
        Ok(deployment) => deployment,
        Err(error) => {
            let message = error.to_string();
            let status = status::of_invalid(error.reason(), &message, &previous, generation, now);
            target.report(context, None, &status, now).await?;
            return match error {
                // The name may become free without an event of ours.
                validate::ValidationError::NameConflict { .. } => Err(Error::Conflict(message)),
                _ => Ok(Action::requeue(SAFETY_ROUND)),
            };
        }
    };
    note_user(&object.metadata, deployment.source.cache(), context);
    if is_paused(object) {
        let status = status::of_paused(&previous, generation, now);
        target.report(context, None, &status, now).await?;
        return Ok(Action::requeue(SAFETY_ROUND));
    }
    let adopted = adopt::adopt(context, &deployment, &observed).await?;
    if !adopted.is_empty() {
        observed = observe::observe(context, &namespace, &name, object).await?;
    }
    let step = Step {
        object,
        deployment: &deployment,
        previous: &previous,
        now,
    };
    let (mut plan, mut applied) = Box::pin(step.make(&mut observed, context)).await?;
    if plan.made_gated_pods() && !applied.needs_telling() {
        // What was created is in the caches: nodes are chosen for it without another round.
        observe::refresh(&mut observed, context, &namespace, &name)?;
        let (next, more) = Box::pin(step.make(&mut observed, context)).await?;
        (plan, applied) = (next, more);
    }
    applied.adopted = adopted;
    apply::apply_client_service(context, &namespace, &plan, &observed, &mut applied).await?;
    let status = status::of_plan(&deployment, &plan, &applied, &previous, generation, now);
    let status = bounds::bounded(status);
    count(context, &deployment, &plan, &status);
    let uid = object.metadata.uid.as_deref().unwrap_or_default();
    let pause = context.cluster.status_pause(uid);
    let is_early = !pause.is_zero() && status::is_only_progress(&previous, &status);
    let told = if is_early { &previous } else { &status };
    target
        .report(context, Some((&plan, &applied)), told, now)
        .await?;
    if let Some(refusal) = applied.refused.into_iter().next() {
        return Err(Error::Refused(refusal));
    }
    let mut next = plan.wake_after().unwrap_or(SAFETY_ROUND);
    if *told != status {
        next = next.min(pause);
    }
    let mut asked = golden::unanswered(&plan, &status, &observed);
    asked.extend(unmeasured(&plan, &observed, context));
    let (groups, known) = (&plan.groups, &status.adapters);
    asked.extend(adapters::untold(groups, &plan.templates, &observed, known));
    if tell_adapters(&plan, &observed, context) {
        next = next.min(ANSWER_PAUSE);
    }
    let about = (&observed, deployment.answers_within());
    if ask_later(&asked, about, context) {
        next = next.min(ANSWER_PAUSE);
    }
    ask_how_far(&plan, about, context);
    Ok(Action::requeue(next.min(SAFETY_ROUND)))
}

/// What one pass from the caches to writes is about.
struct Step<'a> {
    object: &'a LlamaDeployment,
    deployment: &'a validate::ValidDeployment,
    previous: &'a LlamaDeploymentStatus,
    now: Timestamp,
}

impl Step<'_> {
    /// Plans by what was observed and applies the plan.
    async fn make(
        &self,
        observed: &mut Observed,
        context: &Context,
    ) -> Result<(plan::Plan, apply::Applied), Error> {
        let Self {
            deployment,
            previous,
            now,
            ..
        } = *self;
        let revision = plan::revision(deployment);
        let closed = !observed.closed_nodes.is_empty();
        if groups::needs_room(previous, &revision, observed.has_gated(), closed) {
            observed.nodes = context.cluster.capacity.nodes();
        }
        if groups::needs_loads(previous, &revision, deployment.wanted_groups()) {
            ask_leaders((observed, deployment.answers_within()), context).await;
            observed.states = observe::states(context, &observed.pods);
        }
        observe::workloads(observed, context, &deployment.namespace).await;
        let settings = &context.settings.worker;
        let mut plan = plan::plan(self.object, deployment, settings, observed, previous, now);
        hurry(&plan, observed, context).await;
        let applied = apply::apply(context, &deployment.namespace, &plan, observed, now).await?;
        plan.note_places(&applied);
        Ok((plan, applied))
    }
}

/// Counts failures and groups for the metrics.
fn count(
    context: &Context,
    deployment: &validate::ValidDeployment,
    plan: &plan::Plan,
    status: &LlamaDeploymentStatus,
) {
    let failures = plan
        .groups
        .iter()
        .filter_map(|group| group.failure.as_ref());
    for failure in failures {
        context.metrics.group_failed(&failure.cause.reason);
    }
    let wanted = i64::from(deployment.wanted_groups());
    let serving = i64::from(status.ready_replicas);
    let key = format!("{}/{}", deployment.namespace, deployment.name);
    context.metrics.groups(&key, wanted, serving);
}

/// The status of `object`, or a later one that we wrote and the watch has yet to tell of.
fn latest_status(object: &LlamaDeployment, context: &Context) -> LlamaDeploymentStatus {
    let uid = object.metadata.uid.as_deref().unwrap_or_default();
    let newer = context.cluster.newer_status(uid, version(object));
    newer.or_else(|| object.status.clone()).unwrap_or_default()
}

/// Notes which cached model the object that `meta` is of uses.
fn note_user(meta: &ObjectMeta, cache: Option<&source::Cache>, context: &Context) {
    if let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) {
        let key = (namespace.clone(), name.clone());
        context.cluster.users.note(key, cache);
    }
}

/// Whether somebody asked the operator to leave the object alone.
pub(crate) fn is_paused<K: ResourceExt>(object: &K) -> bool {
    let value = object.annotations().get(labels::PAUSE);
    value.is_some_and(|value| value == labels::TRUE)
}

/// Tells first pods whose answers have had their time how little they get now.
async fn hurry(plan: &plan::Plan, observed: &Observed, context: &Context) {
    let told = |pod: &PodView<'_>| {
        let mut groups = plan.groups.iter();
        groups.any(|group| group.hurry.as_deref() == Some(pod.uid))
    };
    let seconds = groups::HURRIED_SECONDS;
    let pods: Vec<_> = questions((observed, None), told).collect();
    let tellings = pods
        .iter()
        .map(|pod| context.cluster.states.hurry(pod, seconds));
    futures::future::join_all(tellings).await;
}

/// Asks the first pods of groups how busy they are.
async fn ask_leaders(about: About<'_>, context: &Context) {
    let questions: Vec<_> = questions(about, serves).collect();
    let asked = questions
        .iter()
        .map(|question| context.cluster.states.ask(question));
    futures::future::join_all(asked).await;
}

/// Asks the pods with these UIDs beside the rounds; whether there is one to ask.
fn ask_later(uids: &[String], about: About<'_>, context: &Arc<Context>) -> bool {
    let states = &context.cluster.states;
    let worth_it =
        |pod: &PodView<'_>| uids.iter().any(|known| known == pod.uid) && !states.is_silent(pod.uid);
    let questions: Vec<_> = questions(about, worth_it).collect();
    let any = !questions.is_empty();
    for question in questions {
        let context = Arc::clone(context);
        tokio::spawn(async move { context.cluster.states.ask(&question).await });
    }
    any
}

/// Pods of a group that serves whose memory is to stand beside the plan, each once in a while.
fn unmeasured(plan: &plan::Plan, observed: &Observed, context: &Context) -> Vec<String> {
    let serving = groups::serving(&plan.groups, &plan.course);
    let Some(group) = serving.filter(|_| plan.fit.plan.is_some()) else {
        return Vec::new();
    };
    let states = &context.cluster.states;
    groups::pods_of(group, observed)
        .filter(|pod| !states.was_measured(pod.uid, MEASURED_EVERY))
        .map(|pod| pod.uid.to_owned())
        .collect()
}

/// Tells first pods which adapters to have, beside the rounds; whether there is one to tell.
fn tell_adapters(plan: &plan::Plan, observed: &Observed, context: &Arc<Context>) -> bool {
    let orders = adapters::orders(&plan.groups, &plan.templates, observed);
    let any = !orders.is_empty();
    for (uid, list) in orders {
        for question in questions((observed, None), |pod| pod.uid == uid) {
            let (context, list) = (Arc::clone(context), list.clone());
            tokio::spawn(async move { context.cluster.states.tell(&question, &list).await });
        }
    }
    any
}

/// Asks the pods that others wait for how far they are, beside the rounds.
fn ask_how_far(plan: &plan::Plan, about: About<'_>, context: &Arc<Context>) {
    let asked = |pod: &PodView<'_>| {
        let mut groups = plan.groups.iter();
        groups.any(|group| group.waits_for.as_deref() == Some(pod.uid))
    };
    for question in questions(about, asked) {
        let context = Arc::clone(context);
        tokio::spawn(async move { context.cluster.states.ask_early(&question).await });
    }
}

/// Whether the worker of a first pod runs.
fn serves(pod: &PodView<'_>) -> bool {
    pod.node == 0 && pod.phase() == "Running"
}

/// Whose pods are asked, and of which last time they tell how answers did.
type About<'a> = (&'a Observed, Option<Duration>);

fn questions(
    (observed, answers_within): About<'_>,
    about: impl Fn(&PodView<'_>) -> bool,
) -> impl Iterator<Item = states::Question> {
    observed.pods.iter().filter_map(move |pod| {
        let view = PodView::read(pod)?;
        let question = about(&view).then(|| question(&view)).flatten()?;
        Some(states::Question {
            answers_within,
            ..question
        })
    })
}

/// The question to `pod`, once it has an address.
pub(crate) fn question(pod: &PodView<'_>) -> Option<states::Question> {
    let address = pod.pod.status.pod_ip.as_deref()?.parse().ok()?;
    let uid = pod.uid.to_owned();
    Some(states::Question {
        uid,
        address,
        answers_within: None,
    })
}

/// An object that this version cannot read, for example one written under another schema.
async fn report_unreadable(invalid: &InvalidObject, context: &Context) -> Result<Action, Error> {
    let meta = &invalid.metadata;
    let stored = report::stored_status::<LlamaDeployment, LlamaDeploymentStatus>(context, meta);
    let Some(previous) = stored.await? else {
        return Ok(Action::await_change());
    };
    let now = now();
    let message = report::unreadable(invalid);
    let status = status::of_invalid(
        Reason::InvalidSpec,
        &message,
        &previous,
        meta.generation,
        now,
    );
    let target = Target {
        reference: report::reference::<LlamaDeployment>(meta),
        previous: &previous,
    };
    target.report(context, None, &status, now).await?;
    Ok(Action::requeue(SAFETY_ROUND))
}

/// The object that is reported on.
struct Target<'a> {
    reference: ObjectReference,
    previous: &'a LlamaDeploymentStatus,
}

impl Target<'_> {
    /// Publishes events, then writes status if it says anything new. In this order, since
    /// a failure counts as told once status has it, and an event told twice is one event.
    async fn report(
        &self,
        context: &Context,
        made: Option<(&plan::Plan, &apply::Applied)>,
        status: &LlamaDeploymentStatus,
        now: Timestamp,
    ) -> Result<(), Error> {
        let name = self.reference.name.as_deref().unwrap_or_default();
        for notice in notices::notices(name, made, self.previous, status, now) {
            report::publish(context, &self.reference, &notice, now).await;
        }
        if status == self.previous {
            return Ok(());
        }
        let object = &self.reference;
        let written = report::write_status::<LlamaDeployment>(context, object, status).await?;
        if let Some(version) = written {
            let uid = object.uid.as_deref().unwrap_or_default();
            context.cluster.wrote_status(uid, version, status.clone());
        }
        Ok(())
    }
}

/// The time, in whole seconds as Kubernetes keeps it.
pub(crate) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}
