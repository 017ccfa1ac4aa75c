//! One round for one `LlamaModel`: observe → validate → plan → apply → status, as for a
//! `LlamaDeployment`.
//!
//! `validate`, `plan` and `status` are pure: they take no client and no clock.

pub mod plan;
pub mod status;
pub mod validate;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use llama_crds::v1alpha1::{LlamaModel, LlamaModelStatus, Reason};

use self::plan::{Plan, Seen};
use self::validate::ValidModel;
use crate::cluster::object::GuardedModel;
use crate::context::Context;
use crate::labels;
use crate::reconcile::apply::apply_pods;
use crate::reconcile::observe::{read_claim, states};
use crate::reconcile::pods::PodView;
use crate::reconcile::report;
use crate::reconcile::{
    Error, SAFETY_ROUND, SYNC_PAUSE, after_failure, bounded_round, is_paused, now, question,
};

/// One round, bounded in time and measured.
pub async fn reconcile(object: Arc<GuardedModel>, context: Arc<Context>) -> Result<Action, Error> {
    let round = Box::pin(dispatch(&object, &context));
    bounded_round(&context, &key(object.meta()), round).await
}

#[expect(clippy::needless_pass_by_value, reason = "the controller calls it so")]
/// What to do after a round that failed: wait longer each time, each object by itself.
pub fn error_policy(object: Arc<GuardedModel>, error: &Error, context: Arc<Context>) -> Action {
    after_failure(&context, &key(object.meta()), error)
}

/// Names the object among those of all kinds.
fn key(meta: &kube::api::ObjectMeta) -> String {
    let part = |value: &Option<String>| value.clone().unwrap_or_default();
    backoff_key(&part(&meta.namespace), &part(&meta.name))
}

/// Under this the pauses of a model whose rounds fail are kept.
pub fn backoff_key(namespace: &str, name: &str) -> String {
    format!("LlamaModel {namespace}/{name}")
}

async fn dispatch(object: &GuardedModel, context: &Arc<Context>) -> Result<Action, Error> {
    // As for a deployment: no new children, and the garbage collector removes those it has.
    if object.meta().deletion_timestamp.is_some() {
        context.backoff.forget(&key(object.meta()));
        return Ok(Action::await_change());
    }
    let cluster = &context.cluster;
    if !cluster.fetchers.is_synced() || cluster.capacity.is_awaited() {
        return Ok(Action::requeue(SYNC_PAUSE));
    }
    match &object.0 {
        Ok(object) => round(object, context).await,
        Err(invalid) => report_unreadable(invalid, context).await,
    }
}

async fn round(object: &LlamaModel, context: &Arc<Context>) -> Result<Action, Error> {
    let previous = object.status.clone().unwrap_or_default();
    let (generation, now) = (object.metadata.generation, now());
    let target = Target {
        reference: object.object_ref(&()),
        previous: &previous,
    };
    let model = match validate::validate(object) {
        Ok(model) => model,
        Err(error) => {
            let (reason, message) = (error.reason(), error.to_string());
            let status = status::of_invalid(reason, &message, &previous, generation, now);
            target.report(context, None, &status, now).await?;
            return Ok(Action::requeue(SAFETY_ROUND));
        }
    };
    if is_paused(object) {
        let status = status::of_paused(&previous, generation, now);
        target.report(context, None, &status, now).await?;
        return Ok(Action::requeue(SAFETY_ROUND));
    }
    let seen = observe(context, &model).await?;
    let mut plan = plan::plan(&model, &context.settings.worker, &seen, &previous, now);
    let store = &context.cluster.fetchers;
    let namespace = &model.namespace;
    let applied = apply_pods(context, namespace, store, &plan.delete, &plan.create).await?;
    plan.refused = applied.refused.into_iter().next();
    let status = status::of_plan(&model, &plan, &previous, generation, now);
    target.report(context, Some(&plan), &status, now).await?;
    ask_how_far(&seen, context);
    if let Some(refused) = plan.refused {
        return Err(Error::Refused(refused));
    }
    let next = plan.wake_after.unwrap_or(SAFETY_ROUND);
    Ok(Action::requeue(
        next.clamp(Duration::from_secs(1), SAFETY_ROUND),
    ))
}

/// Step 1: what the cluster holds for one model. Reads only.
async fn observe(context: &Context, model: &ValidModel) -> Result<Seen, Error> {
    let cluster = &context.cluster;
    let (namespace, name) = (&model.namespace, &model.name);
    let of = format!("LlamaModel {namespace}/{name}");
    let claim = read_claim(context, namespace, &model.cache.claim, &of).await?;
    let key = (namespace.clone(), name.clone());
    let pods = cluster.fetchers.of(&key).map_err(Error::Encode)?;
    Ok(Seen {
        states: states(context, &pods),
        pods,
        nodes: cluster.capacity.known_nodes(),
        claim,
        users: cluster.users.of(namespace, &model.cache),
    })
}

/// Asks the pods that fetch how far they are, beside the rounds.
fn ask_how_far(seen: &Seen, context: &Arc<Context>) {
    let views = seen.pods.iter();
    let views = views.filter_map(|pod| PodView::alone(pod, labels::REVISION));
    let running = views.filter(|pod| pod.phase() == "Running");
    for question in running.filter_map(|pod| question(&pod)) {
        let context = Arc::clone(context);
        tokio::spawn(async move { context.cluster.states.ask_early(&question).await });
    }
}

/// An object that this version cannot read, for example one written under another schema.
async fn report_unreadable(invalid: &InvalidObject, context: &Context) -> Result<Action, Error> {
    let meta = &invalid.metadata;
    let stored = report::stored_status::<LlamaModel, LlamaModelStatus>(context, meta);
    let Some(previous) = stored.await? else {
        return Ok(Action::await_change());
    };
    let (message, generation, now) = (report::unreadable(invalid), meta.generation, now());
    let status = status::of_invalid(Reason::InvalidSpec, &message, &previous, generation, now);
    let target = Target {
        reference: report::reference::<LlamaModel>(meta),
        previous: &previous,
    };
    target.report(context, None, &status, now).await?;
    Ok(Action::requeue(SAFETY_ROUND))
}

/// The object that is reported on.
struct Target<'a> {
    reference: ObjectReference,
    previous: &'a LlamaModelStatus,
}

impl Target<'_> {
    /// Publishes events, then writes status if it says anything new, as for a deployment.
    async fn report(
        &self,
        context: &Context,
        plan: Option<&Plan>,
        status: &LlamaModelStatus,
        now: Timestamp,
    ) -> Result<(), Error> {
        for notice in status::notices(plan, self.previous, status, now) {
            report::publish(context, &self.reference, &notice, now).await;
        }
        if status != self.previous {
            report::write_status::<LlamaModel>(context, &self.reference, status).await?;
        }
        Ok(())
    }
}
