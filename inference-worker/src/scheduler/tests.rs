use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const STOP: u32 = 999;

fn request(id: u64, prompt: usize, max_answer: u32) -> Request {
    let tokens = (0..prompt).map(|i| token_at(id, i)).collect();
    Request {
        id,
        prompt: tokens,
        max_answer,
        stop_ids: vec![STOP],
    }
}

fn token_at(id: u64, position: usize) -> u32 {
    u32::try_from((id * 7 + position as u64 * 3) % 900).unwrap()
}

fn limits(slots: u32, step_tokens: u32, queue: usize) -> Limits {
    Limits {
        slots,
        step_tokens,
        queue,
        max_tokens: 64,
    }
}

/// A model that keeps what each slot's cache would hold and answers with the
/// number of cached tokens, so that a wrong position shows in the answer.
#[derive(Default)]
struct Cache(BTreeMap<u32, Vec<u32>>);

impl Cache {
    fn step(&mut self, segments: &[Segment]) -> Vec<u32> {
        let mut sampled = Vec::new();
        let mut seen = BTreeSet::new();
        for segment in segments {
            assert!(
                seen.insert(segment.slot),
                "two segments in slot {}",
                segment.slot
            );
            assert!(!segment.tokens.is_empty());
            let slot = self.0.entry(segment.slot).or_default();
            if segment.start == 0 {
                slot.clear();
            }
            assert_eq!(slot.len(), segment.start as usize, "a hole in the cache");
            slot.extend(&segment.tokens);
            if segment.logits == Wanted::Last {
                sampled.push(u32::try_from(slot.len()).unwrap());
            }
        }
        sampled
    }
}

#[derive(Clone, Debug)]
enum Action {
    Submit { prompt: usize, answer: u32 },
    Cancel { nth: usize },
    Step { stop_first: bool },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        3 => (1_usize..40, 1_u32..12).prop_map(|(prompt, answer)| Action::Submit { prompt, answer }),
        1 => (0_usize..30).prop_map(|nth| Action::Cancel { nth }),
        6 => any::<bool>().prop_map(|stop_first| Action::Step { stop_first }),
    ];
    proptest::collection::vec(action, 1..80)
}

/// What must hold of a plan before it is computed.
fn check_plan(scheduler: &Scheduler, limits: Limits, segments: &[Segment]) {
    let tokens: usize = segments.iter().map(|segment| segment.tokens.len()).sum();
    let budget = limits.step_tokens.max(limits.slots + 1) as usize;
    assert!(tokens <= budget, "{tokens} tokens in a step of {budget}");
    assert!(segments.iter().all(|segment| segment.slot < limits.slots));
    let wanted = segments
        .iter()
        .filter(|segment| segment.logits == Wanted::Last)
        .count();
    assert_eq!(wanted, scheduler.awaited().len());
    assert!(scheduler.running() <= limits.slots as usize);
    assert_eq!(
        segments.is_empty(),
        scheduler.is_idle(),
        "idle with work to do"
    );
}

proptest! {
    #[test]
    fn every_request_gets_its_own_answer_whole(
        slots in 1_u32..5,
        step_tokens in 1_u32..20,
        queue in 0_usize..6,
        actions in actions(),
    ) {
        let limits = limits(slots, step_tokens, queue);
        let mut scheduler = Scheduler::new(limits);
        let mut cache = Cache::default();
        let mut open: BTreeMap<u64, (Request, Vec<u32>)> = BTreeMap::new();
        let mut ids = 0;
        let drain = std::iter::repeat_n(Action::Step { stop_first: false }, 800);
        for action in actions.into_iter().chain(drain) {
            match action {
                Action::Submit { prompt, answer } => {
                    ids += 1;
                    let request = request(ids, prompt, answer);
                    let room = queue + slots as usize;
                    let taken = scheduler.submit(request.clone()).is_ok();
                    prop_assert!(taken || open.len() >= room.min(queue + 1));
                    if taken {
                        open.insert(ids, (request, Vec::new()));
                        prop_assert!(open.len() <= room);
                    }
                }
                Action::Cancel { nth } => {
                    let id = open.keys().nth(nth).copied();
                    if let Some(id) = id {
                        prop_assert!(scheduler.cancel(id));
                        open.remove(&id);
                    }
                }
                Action::Step { stop_first } => {
                    let segments = scheduler.plan();
                    check_plan(&scheduler, limits, &segments);
                    let mut sampled = cache.step(&segments);
                    if let Some(first) = sampled.first_mut().filter(|_| stop_first) {
                        *first = STOP;
                    }
                    for recorded in scheduler.record(&sampled) {
                        let (request, answer) = open.get_mut(&recorded.id).unwrap();
                        if let Some(token) = recorded.token {
                            // The token says how much of its own sequence was cached.
                            let cached = request.prompt.len() + answer.len();
                            prop_assert_eq!(token as usize, cached);
                            answer.push(token);
                        }
                        match recorded.finish {
                            Some(Finish::Length) => {
                                prop_assert_eq!(answer.len(), request.max_answer as usize);
                                open.remove(&recorded.id);
                            }
                            Some(Finish::Stop) => {
                                prop_assert_eq!(recorded.token, None);
                                open.remove(&recorded.id);
                            }
                            None => prop_assert!(answer.len() < request.max_answer as usize),
                        }
                    }
                }
            }
        }
        prop_assert!(open.is_empty(), "never finished: {:?}", open.keys());
        prop_assert!(scheduler.is_idle());
    }

    #[test]
    fn the_cache_receives_the_prompt_and_then_the_answer(
        prompt in 1_usize..50,
        step_tokens in 1_u32..9,
    ) {
        let mut scheduler = Scheduler::new(limits(1, step_tokens, 1));
        let mut cache = Cache::default();
        scheduler.submit(request(1, prompt, 5)).unwrap();
        while !scheduler.is_idle() {
            let sampled = cache.step(&scheduler.plan());
            scheduler.record(&sampled);
        }
        let mut expected: Vec<u32> = (0..prompt).map(|i| token_at(1, i)).collect();
        // The last answered token is never taken in.
        expected.extend((0..4).map(|i| u32::try_from(prompt + i).unwrap()));
        prop_assert_eq!(&cache.0[&0], &expected);
    }
}

#[test]
fn answers_go_on_while_a_long_prompt_is_read() {
    let mut scheduler = Scheduler::new(limits(2, 8, 4));
    let mut cache = Cache::default();
    scheduler.submit(request(1, 2, 30)).unwrap();
    let sampled = cache.step(&scheduler.plan());
    scheduler.record(&sampled);
    scheduler.submit(request(2, 20, 5)).unwrap();
    for chunk in [7, 7, 6] {
        let segments = scheduler.plan();
        let lens: Vec<_> = segments
            .iter()
            .map(|segment| segment.tokens.len())
            .collect();
        assert_eq!(lens, [1, chunk]);
        let sampled = cache.step(&segments);
        scheduler.record(&sampled);
    }
}

#[test]
fn requests_are_served_in_the_order_they_came() {
    let mut scheduler = Scheduler::new(limits(1, 64, 8));
    let mut cache = Cache::default();
    for id in 1..=4 {
        scheduler.submit(request(id, 3, 1)).unwrap();
    }
    let mut order = Vec::new();
    while !scheduler.is_idle() {
        let sampled = cache.step(&scheduler.plan());
        order.extend(
            scheduler
                .record(&sampled)
                .into_iter()
                .map(|recorded| recorded.id),
        );
    }
    assert_eq!(order, [1, 2, 3, 4]);
}

#[test]
fn a_full_queue_and_wrong_lengths_are_refused() {
    let mut scheduler = Scheduler::new(limits(1, 64, 1));
    for (prompt, answer) in [(0, 1), (1, 0), (60, 5), (1, u32::MAX)] {
        let refused = scheduler.submit(request(9, prompt, answer));
        assert!(
            matches!(refused, Err(Refusal::Length { .. })),
            "{prompt} {answer}"
        );
    }
    scheduler.submit(request(1, 60, 4)).unwrap();
    scheduler.submit(request(2, 3, 1)).unwrap();
    let refused = scheduler.submit(request(3, 3, 1));
    assert_eq!(refused, Err(Refusal::QueueFull { waiting: 2 }));
    scheduler.plan();
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
    let refused = scheduler.submit(request(3, 3, 1));
    assert_eq!(refused, Err(Refusal::QueueFull { waiting: 1 }));
    assert!(scheduler.cancel(1));
    assert!(!scheduler.cancel(1));
    scheduler.submit(request(3, 3, 1)).unwrap();
}
