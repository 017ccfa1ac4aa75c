//! How many groups of which revision there should be: which to create, which to end, and
//! why nothing moves. Pure.
//!
//! One step at a time: a group is replaced only when every group of the new revision
//! serves. Whether the new one starts before or after the old one ends depends on what is
//! free now.

use std::cmp::Reverse;

use llama_crds::v1alpha1::{DrainReason, RolloutStrategy};

use super::policy::RolloutPolicy;

/// How a group is, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// It will not serve until somebody acts.
    Failed,
    /// It failed and is created again.
    Restarting,
    /// It has yet to serve, and there was no node for its pods.
    Unplaced,
    /// It has yet to serve.
    Starting,
    /// It served and some pod of it answers no longer.
    Unready,
    /// It serves.
    Ready,
}

/// A group that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its index.
    pub index: u32,
    /// Whether it has the revision that is wanted.
    pub is_updated: bool,
    /// How it is.
    pub condition: Condition,
    /// Why it ends, if it does.
    pub leaving: Option<DrainReason>,
    /// Whether it could serve on: none of its pods is being deleted.
    pub can_stay: bool,
    /// Requests that it works on, where that is known.
    pub load: Option<u32>,
    /// A node of it that takes no new pods: the group should move.
    pub evacuate: Option<String>,
    /// Whether a pod of it was deleted by somebody.
    pub was_deleted: bool,
}

/// Whether a further group would find a place now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// It would.
    Fits,
    /// It would not: why, in words.
    Full(String),
    /// The operator may not see the nodes, or has no need to look.
    Unknown,
}

/// Everything that decides.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// Groups that are asked for.
    pub wanted: usize,
    /// Whether that is because of spec.suspend.
    pub suspended: bool,
    /// How they move.
    pub policy: &'a RolloutPolicy,
    /// Whether a further group fits.
    pub room: &'a Room,
    /// Whether the revision that is wanted was given up: nothing moves.
    pub halted: bool,
    /// Why no pods of the revision that is wanted may be created: nothing moves either.
    pub held: Option<&'a str>,
    /// The groups that exist.
    pub members: &'a [Member],
}

/// What should become of the groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Groups to create, by index. They get the revision that is wanted, unless `as_before`.
    pub create: Vec<u32>,
    /// New groups get the revision that the others have.
    pub as_before: bool,
    /// Groups to end.
    pub drain: Vec<(u32, DrainReason)>,
    /// Groups that end and shall not.
    pub keep: Vec<u32>,
    /// How groups are replaced, while they are.
    pub mode: Option<RolloutStrategy>,
    /// What is going on, in a sentence; empty when all groups are as wanted.
    pub message: String,
    /// Whether the next step waits until a node has room, of which no event tells.
    pub waits_for_room: bool,
}

/// Decides the next step.
pub fn decide(question: &Question<'_>) -> Decision {
    let step = Step::new(question);
    let mut decision = Decision::default();
    step.shrink(&mut decision);
    step.grow(&mut decision);
    // A mode by now means that a group in its place is waited for.
    let is_quiet = decision.drain.is_empty() && decision.create.is_empty();
    if is_quiet && decision.mode.is_none() {
        step.replace(&mut decision);
    }
    decision
}

struct Step<'a> {
    question: &'a Question<'a>,
    staying: Vec<&'a Member>,
    /// Groups of another revision that have to move.
    to_move: usize,
}

impl<'a> Step<'a> {
    fn new(question: &'a Question<'a>) -> Self {
        let staying: Vec<_> = question
            .members
            .iter()
            .filter(|member| member.leaving.is_none())
            .collect();
        let outdated = staying.iter().filter(|member| !member.is_updated).count();
        Self {
            question,
            to_move: outdated.saturating_sub(question.policy.partition),
            staying,
        }
    }

    /// Whether one group more than wanted is on its way to take another's place.
    fn surging(&self) -> bool {
        let on_its_way = |member: &&Member| {
            member.is_updated && member.condition != Condition::Ready && member.leaving.is_none()
        };
        let outdated = self.to_move > 0 || self.evacuees().next().is_some();
        outdated && self.staying.iter().any(on_its_way)
    }

    fn evacuees(&self) -> impl Iterator<Item = &&'a Member> {
        self.staying
            .iter()
            .filter(|member| member.evacuate.is_some())
    }

    /// Ends groups beyond those that are wanted.
    fn shrink(&self, decision: &mut Decision) {
        let most = self.question.wanted + usize::from(self.surging());
        let surplus = self.staying.len().saturating_sub(most);
        let mut victims = self.staying.clone();
        victims.sort_by_key(|member| {
            let moves = !member.is_updated && self.to_move > 0;
            (
                member.condition,
                !moves,
                member.evacuate.is_none(),
                member.load.unwrap_or(0),
                Reverse(member.index),
            )
        });
        for victim in victims.into_iter().take(surplus) {
            let replaced = (!victim.is_updated && self.to_move > 0) || victim.evacuate.is_some();
            let reason = match self.question.suspended {
                true => DrainReason::Suspended,
                false if replaced => DrainReason::Replaced,
                false => DrainReason::ScaleDown,
            };
            decision.drain.push((victim.index, reason));
        }
    }

    /// Creates groups that are missing.
    fn grow(&self, decision: &mut Decision) {
        let missing = self.question.wanted.saturating_sub(self.staying.len());
        if missing == 0 {
            return;
        }
        let mut back: Vec<_> = self
            .question
            .members
            .iter()
            .filter(|member| {
                let wanted_less = matches!(
                    member.leaving,
                    Some(DrainReason::ScaleDown | DrainReason::Suspended)
                );
                wanted_less && member.can_stay && member.is_updated
            })
            .map(|member| member.index)
            .collect();
        back.truncate(missing);
        let missing = missing - back.len();
        decision.keep = back;
        if let (Some(ending), true) = (self.replaced(), missing > 0)
            && *self.question.room != Room::Fits
        {
            decision.mode = Some(RolloutStrategy::DrainThenReplace);
            decision.message = format!(
                "a new group starts once group {} has ended: there is no room for both",
                ending.index
            );
            return;
        }
        decision.as_before = self.stands_still() && self.staying.iter().any(|it| !it.is_updated);
        decision.create = self.free_indices(missing);
    }

    /// A group that ends to make room for another.
    fn replaced(&self) -> Option<&'a Member> {
        let members = self.question.members.iter();
        members
            .into_iter()
            .find(|member| member.leaving == Some(DrainReason::Replaced))
    }

    fn stands_still(&self) -> bool {
        let Question {
            halted,
            held,
            policy,
            ..
        } = self.question;
        *halted || held.is_some() || policy.paused
    }

    fn free_indices(&self, count: usize) -> Vec<u32> {
        let taken = |index: &u32| self.question.members.iter().any(|it| it.index == *index);
        (0_u32..)
            .filter(|index| !taken(index))
            .take(count)
            .collect()
    }

    /// Moves one group to the revision that is wanted, or off a node that is to be freed.
    fn replace(&self, decision: &mut Decision) {
        if self.question.wanted == 0 {
            return;
        }
        if self.to_move == 0 {
            let kept = self.outdated().count();
            if kept > 0 {
                decision.message = format!(
                    "{} stay on the old revision: spec.rollout.partition is {}",
                    groups(kept),
                    self.question.policy.partition
                );
            }
            return self.evacuate(decision);
        }
        if let Some(why) = self.question.held {
            why.clone_into(&mut decision.message);
            return;
        }
        if self.question.halted {
            decision.message = String::from("halted");
            return;
        }
        if self.question.policy.paused {
            decision.message = format!(
                "paused by spec.rollout.paused with {} to move",
                groups(self.to_move)
            );
            return;
        }
        let on_its_way = self
            .staying
            .iter()
            .find(|member| member.is_updated && member.condition != Condition::Ready);
        match on_its_way {
            None => self.next(decision),
            Some(member) => self.wait(member, decision),
        }
    }

    /// A group of the new revision has yet to serve.
    fn wait(&self, member: &Member, decision: &mut Decision) {
        let surges = self.staying.len() > self.question.wanted;
        let strategy = self.question.policy.strategy;
        decision.mode = Some(if surges {
            RolloutStrategy::Surge
        } else {
            RolloutStrategy::DrainThenReplace
        });
        decision.message = format!(
            "waiting for group {} of the new revision to serve, {} left to move",
            member.index,
            groups(self.to_move)
        );
        let stuck = member.condition == Condition::Unplaced
            && matches!(self.question.room, Room::Full(_) | Room::Unknown);
        if surges && stuck && strategy == RolloutStrategy::Auto {
            self.make_room(decision, "its place was taken meanwhile");
        }
    }

    /// Every group of the new revision serves: the next one.
    fn next(&self, decision: &mut Decision) {
        let broken = self
            .outdated()
            .find(|member| !matches!(member.condition, Condition::Ready | Condition::Unready));
        let strategy = self.question.policy.strategy;
        if strategy == RolloutStrategy::OnDelete {
            decision.mode = Some(strategy);
            decision.message = format!(
                "{} to move, each when its pods are deleted (spec.rollout.strategy OnDelete)",
                groups(self.to_move)
            );
            let deleted = self.outdated().find(|member| member.was_deleted);
            if let Some(member) = deleted {
                decision.drain.push((member.index, DrainReason::Replaced));
            }
            return;
        }
        if let Some(member) = broken {
            decision.mode = Some(RolloutStrategy::DrainThenReplace);
            decision.message = format!(
                "replacing group {} first, which does not serve",
                member.index
            );
            decision.drain.push((member.index, DrainReason::Replaced));
            return;
        }
        if let (RolloutStrategy::Auto, Room::Full(_), Some(ending)) =
            (strategy, self.question.room, self.replaced())
        {
            decision.mode = Some(RolloutStrategy::Surge);
            decision.message = format!(
                "waiting for group {} to end, {} to move: the next one needs its room",
                ending.index,
                groups(self.to_move)
            );
            return;
        }
        match (strategy, self.question.room) {
            (RolloutStrategy::Surge, _) | (RolloutStrategy::Auto, Room::Fits) => {
                decision.mode = Some(RolloutStrategy::Surge);
                decision.create = self.free_indices(1);
                decision.message = format!(
                    "starting a further group of the new revision before an old one ends, {} to \
                     move",
                    groups(self.to_move)
                );
            }
            (RolloutStrategy::Auto, Room::Full(why)) => self.make_room(decision, why),
            (RolloutStrategy::Auto, Room::Unknown) => {
                self.make_room(decision, "the operator may not see what nodes have free");
            }
            _ => self.make_room(decision, "spec.rollout.strategy is DrainThenReplace"),
        }
    }

    /// Ends the least busy group of the old revision, if enough others serve.
    fn make_room(&self, decision: &mut Decision, why: &str) {
        let serving = self
            .staying
            .iter()
            .filter(|member| member.condition == Condition::Ready)
            .count();
        let least = self.question.policy.min_available;
        let victim = self
            .outdated()
            .min_by_key(|member| (member.load.unwrap_or(0), Reverse(member.index)));
        let Some(victim) = victim else {
            return;
        };
        if serving <= least && victim.condition == Condition::Ready {
            decision.mode = None;
            decision.waits_for_room = true;
            decision.message = format!(
                "waiting for room: a further group does not fit now ({why}), and ending one of \
                 {serving} that serve would leave fewer than minAvailable {least}"
            );
            return;
        }
        decision.mode = Some(RolloutStrategy::DrainThenReplace);
        decision.message = format!(
            "replacing group {}, {} to move; an old group ends before a new one starts ({why})",
            victim.index,
            groups(self.to_move)
        );
        decision.drain.push((victim.index, DrainReason::Replaced));
    }

    fn outdated(&self) -> impl Iterator<Item = &&'a Member> {
        self.staying.iter().filter(|member| !member.is_updated)
    }

    /// A node is to be freed: start a group elsewhere first. Where there is no room the
    /// group stays, and its `PodDisruptionBudget` keeps it.
    fn evacuate(&self, decision: &mut Decision) {
        let Some((index, node)) = self
            .evacuees()
            .find_map(|member| Some((member.index, member.evacuate.as_ref()?)))
        else {
            return;
        };
        let starting = self
            .staying
            .iter()
            .any(|member| member.evacuate.is_none() && member.condition != Condition::Ready);
        if starting {
            return;
        }
        match self.question.room {
            Room::Fits => {
                decision.create = self.free_indices(1);
                decision.message = format!(
                    "node {node} takes no new pods: starting a group elsewhere before group \
                     {index} ends"
                );
            }
            Room::Full(why) => {
                decision.waits_for_room = true;
                decision.message = format!(
                    "node {node} takes no new pods, and no other has room for group {index} \
                     ({why}); it stays where it is"
                );
            }
            Room::Unknown => {}
        }
    }
}

fn groups(count: usize) -> String {
    match count {
        1 => "1 group".to_owned(),
        count => format!("{count} groups"),
    }
}
