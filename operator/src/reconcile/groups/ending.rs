//! The end of a group: clients are sent elsewhere first, its answers finish, and only
//! then its pods are deleted.

use std::time::Duration;

use llama_crds::v1alpha1::{GroupPhase, GroupStatus};

use super::{
    FAILED_GRACE_SECONDS, Group, GroupPlan, Hook, OVERDUE_GRACE_SECONDS, deletions, ending_message,
    nodes,
};
use crate::reconcile::pods::PodView;

/// Time until every node has heard that clients are to be sent elsewhere.
const UNHOOKED_WITHIN: Duration = Duration::from_secs(3);
/// Time between two looks at what is still under way.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Group<'_> {
    /// The next step of the end; `None` when it is over.
    pub(super) fn end(&self, mut status: GroupStatus) -> Option<GroupPlan> {
        if self.pods.is_empty() {
            return None;
        }
        status.nodes = nodes(&self.pods);
        let since = status.drain.as_ref().map(|drain| self.since(&drain.since));
        let mut plan = GroupPlan::new(status, &self.pods);
        let leader = self.pods.iter().find(|pod| pod.node == 0);
        let serves = leader.is_some_and(|pod| pod.ready_since().is_some());
        if !plan.can_stay || !serves {
            // Nobody is being answered, or the deletion has begun.
            let grace = (!serves && plan.can_stay).then_some(FAILED_GRACE_SECONDS);
            plan.delete = deletions(&self.pods, grace);
            plan.wake_after = Some(Duration::from_mins(1));
            let message = ending_message(&self.pods, self.situation.now);
            return Some(plan.in_phase(GroupPhase::Draining, message));
        }
        if let Some(pod) = leader.filter(|pod| pod.is_hooked()) {
            plan.hook = Some(hook(pod, false));
        }
        Some(self.finish_answers(plan, since.unwrap_or_default()))
    }

    /// Waits for what is under way, and then deletes the pods. What is left when the time
    /// is up gets a short grace to end in, and an error if it does not.
    fn finish_answers(&self, mut plan: GroupPlan, since: Duration) -> GroupPlan {
        if plan.hook.is_some() || since < UNHOOKED_WITHIN {
            plan.wake_after = Some(UNHOOKED_WITHIN.saturating_sub(since).max(LOOK_EVERY));
            return plan.in_phase(
                GroupPhase::Draining,
                "takes no new requests; clients are being sent elsewhere",
            );
        }
        let limit = self.situation.deployment.change.drain;
        let state = self.leader().filter(|state| state.age < since);
        plan.load = state.map(|state| state.load);
        if let (Some(state), Some(limit)) = (state, limit)
            && state.load > 0
            && since < limit
        {
            plan.wake_after = Some(LOOK_EVERY);
            let left = limit.saturating_sub(since).as_secs();
            // In steps of ten seconds: each new text is a write.
            let left = left.div_ceil(10) * 10;
            let message = format!(
                "takes no new requests; answers under way have {left} s to finish \
                 (spec.drain.timeout)"
            );
            return plan.in_phase(GroupPhase::Draining, message);
        }
        // Where the spec sets no time, the pods' own grace is the time.
        let overdue = limit.is_some() && plan.load.is_some_and(|load| load > 0);
        plan.delete = deletions(&self.pods, overdue.then_some(OVERDUE_GRACE_SECONDS));
        let leader = self.pods.iter().find(|pod| pod.node == 0 && overdue);
        plan.hurry = leader.map(|pod| pod.uid.to_owned());
        plan.wake_after = Some(Duration::from_mins(1));
        let message = ending_message(&self.pods, self.situation.now);
        plan.in_phase(GroupPhase::Draining, message)
    }
}

/// Sends clients to `pod`, or not any more.
pub(super) fn hook(pod: &PodView<'_>, on: bool) -> Hook {
    Hook {
        pod: pod.name.to_owned(),
        uid: pod.uid.to_owned(),
        on,
    }
}
