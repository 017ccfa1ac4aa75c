mod ranks;
mod simulation;

use super::*;
use crate::adapters::AdapterUse;
use ranks::{Ranks, STOP, answer};

fn request(id: u64, prompt: usize, max_answer: u32) -> Request {
    Request {
        id,
        prompt: (0..prompt).map(|i| token_at(id, i)).collect(),
        max_answer,
        stop_ids: vec![STOP],
        ..Request::default()
    }
}

fn token_at(id: u64, position: usize) -> u32 {
    1 + u32::try_from((id * 7 + position as u64 * 3) % 39).unwrap()
}

fn limits(slots: u32, step_tokens: u32, queue: usize) -> Limits {
    Limits {
        slots,
        step_tokens,
        queue,
        queue_tokens: 10_000,
        max_tokens: 128,
        blocks: [4 * slots as usize, 0],
        chunk: None,
        prefix_caching: true,
        speculation: 0,
    }
}

/// One step; what was recorded of it.
fn step(scheduler: &mut Scheduler, ranks: &mut Ranks) -> Vec<Recorded> {
    let segments = scheduler.plan();
    let sampled = ranks.step(scheduler, &segments);
    scheduler.record(&sampled)
}

/// A request that no answer ends before its limit.
fn endless(id: u64, prompt: usize, max_answer: u32) -> Request {
    Request {
        stop_ids: Vec::new(),
        ..request(id, prompt, max_answer)
    }
}

#[test]
fn prompts_beside_answers_come_in_small_parts() {
    let limits = Limits {
        max_tokens: 1000,
        blocks: [80, 0],
        ..limits(3, 256, 9)
    };
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    let parts = |scheduler: &mut Scheduler, ranks: &mut Ranks| -> Vec<usize> {
        let segments = scheduler.plan();
        let sampled = ranks.step(scheduler, &segments);
        scheduler.record(&sampled);
        segments
            .iter()
            .map(|segment| segment.tokens.len())
            .collect()
    };
    scheduler.submit(endless(0, 300, 9)).unwrap();
    // Nobody waits for the first.
    assert_eq!(parts(&mut scheduler, &mut ranks), [256]);
    assert_eq!(parts(&mut scheduler, &mut ranks), [44]);
    scheduler.submit(endless(1, 300, 9)).unwrap();
    scheduler.submit(endless(2, 40, 9)).unwrap();
    assert_eq!(parts(&mut scheduler, &mut ranks), [1, 64]);
    assert_eq!(parts(&mut scheduler, &mut ranks), [1, 64]);
    for _ in 0..2 {
        parts(&mut scheduler, &mut ranks);
    }
    assert_eq!(parts(&mut scheduler, &mut ranks), [1, 44, 20]);
    assert_eq!(parts(&mut scheduler, &mut ranks), [1, 1, 20]);
}

#[test]
fn adapters_and_salts_share_no_blocks() {
    let limits = Limits {
        blocks: [40, 0],
        ..limits(1, 64, 9)
    };
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    let adapter = |load| Some(AdapterUse { place: 0, load });
    let mut found = Vec::new();
    for (id, adapter, salt) in [
        (0, None, ""),
        (1, adapter(0), ""),
        (2, adapter(0), ""),
        (3, adapter(1), ""),
        (4, adapter(1), "a"),
        (5, None, "a"),
        (6, None, ""),
    ] {
        let request = Request {
            id,
            prompt: (0..40).map(|at| token_at(0, at)).collect(),
            adapter,
            salt: salt.to_owned(),
            ..endless(id, 1, 1)
        };
        scheduler.submit(request).unwrap();
        found.extend(
            step(&mut scheduler, &mut ranks)
                .iter()
                .map(|end| end.cached_tokens),
        );
    }
    assert_eq!(found, [0, 0, 32, 0, 0, 0, 32]);
}

#[test]
fn answers_go_on_while_a_long_prompt_is_read() {
    let limits = limits(2, 8, 4);
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    scheduler.submit(endless(1, 2, 30)).unwrap();
    step(&mut scheduler, &mut ranks);
    scheduler.submit(endless(2, 20, 5)).unwrap();
    for chunk in [7, 7, 6] {
        let segments = scheduler.plan();
        let lens: Vec<_> = segments
            .iter()
            .map(|segment| segment.tokens.len())
            .collect();
        assert_eq!(lens, [1, chunk]);
        let sampled = ranks.step(&scheduler, &segments);
        scheduler.record(&sampled);
    }
}

/// The requests in the order in which they end.
fn order(scheduler: &mut Scheduler, ranks: &mut Ranks) -> Vec<u64> {
    let mut order = Vec::new();
    while !scheduler.is_idle() {
        let recorded = step(scheduler, ranks);
        let ended = recorded.iter().filter(|recorded| recorded.finish.is_some());
        order.extend(ended.map(|recorded| recorded.id));
    }
    order
}

#[test]
fn requests_are_served_by_priority_and_then_in_the_order_they_came() {
    let limits = limits(1, 64, 8);
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    for (id, priority) in [(1, 0), (2, 0), (3, -1), (4, 5), (5, 0)] {
        let request = Request {
            priority,
            ..endless(id, 3, 1)
        };
        scheduler.submit(request).unwrap();
    }
    assert_eq!(order(&mut scheduler, &mut ranks), [3, 1, 2, 5, 4]);
}

#[test]
fn who_has_waited_for_long_comes_first() {
    let limits = limits(1, 64, 8);
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    let low = Request {
        priority: 1,
        ..endless(1, 3, 1)
    };
    let mut first_steps = None;
    scheduler.submit(endless(2, 3, 1)).unwrap();
    scheduler.submit(low).unwrap();
    // There is always one of a higher priority.
    for id in 3..2 * PATIENCE_STEPS {
        scheduler.submit(endless(id, 3, 1)).unwrap();
        let recorded = step(&mut scheduler, &mut ranks);
        if recorded.iter().any(|recorded| recorded.id == 1) {
            first_steps = Some(id - 3);
            break;
        }
    }
    let steps = first_steps.expect("never came first");
    assert!(
        (PATIENCE_STEPS - 1..=PATIENCE_STEPS + 1).contains(&steps),
        "{steps}"
    );
}

#[test]
fn a_full_queue_and_wrong_lengths_are_refused() {
    let mut scheduler = Scheduler::new(limits(1, 64, 1));
    for (prompt, answer) in [(0, 1), (1, 0), (124, 5), (1, u32::MAX)] {
        let refused = scheduler.submit(request(9, prompt, answer));
        assert!(
            matches!(refused, Err(Refusal::Length { .. })),
            "{prompt} {answer}"
        );
    }
    scheduler.submit(request(1, 124, 4)).unwrap();
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

#[test]
fn too_many_waiting_tokens_are_refused() {
    let mut scheduler = Scheduler::new(Limits {
        queue_tokens: 100,
        ..limits(1, 64, 9)
    });
    // One alone may be as long as a sequence.
    scheduler.submit(request(1, 120, 1)).unwrap();
    let refused = scheduler.submit(request(2, 1, 1));
    let (waiting, limit) = (120, 100);
    assert_eq!(refused, Err(Refusal::QueueTokens { waiting, limit }));
    scheduler.plan();
    for id in 3..5 {
        scheduler.submit(request(id, 50, 1)).unwrap();
    }
    assert!(scheduler.submit(request(5, 1, 1)).is_err());
}

#[test]
fn a_prefix_is_found_under_the_same_salt_only() {
    let limits = Limits {
        step_tokens: 256,
        ..limits(2, 256, 9)
    };
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    let mut ask = |id, len, salt: &str| {
        let request = Request {
            id,
            salt: salt.to_owned(),
            ..endless(1, len, 2)
        };
        let (expected, _) = answer(&request.prompt, 2, None);
        scheduler.submit(request).unwrap();
        let mut recorded = Vec::new();
        while !scheduler.is_idle() {
            recorded.extend(step(&mut scheduler, &mut ranks));
        }
        let tokens: Vec<u32> = recorded
            .iter()
            .filter_map(|recorded| recorded.token)
            .collect();
        assert_eq!(tokens, expected);
        recorded[0].cached_tokens
    };
    assert_eq!(ask(1, 70, ""), 0);
    assert_eq!(ask(2, 70, ""), 64);
    // The last token is computed in any case.
    assert_eq!(ask(3, 64, ""), 32);
    assert_eq!(ask(4, 65, ""), 64);
    assert_eq!(ask(5, 70, "other"), 0);
    assert_eq!(ask(6, 70, "other"), 64);
    let (queried, found) = (70 + 70 + 64 + 65 + 70 + 70, 64 + 32 + 64 + 64);
    let usage = scheduler.cache_use();
    assert_eq!((usage.queried_tokens, usage.found_tokens), (queried, found));
}

#[test]
fn the_last_in_order_gives_its_blocks_up_and_answers_the_same() {
    let limits = Limits {
        blocks: [5, 0],
        ..limits(2, 256, 9)
    };
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    let requests = [request(1, 40, 80), request(2, 30, 60)];
    for request in &requests {
        scheduler.submit(request.clone()).unwrap();
    }
    let mut answers = [Vec::new(), Vec::new()];
    while !scheduler.is_idle() {
        for recorded in step(&mut scheduler, &mut ranks) {
            let index = usize::try_from(recorded.id).unwrap() - 1;
            answers[index].extend(recorded.token);
        }
    }
    for (request, given) in requests.iter().zip(answers) {
        assert_eq!(given, answer(&request.prompt, request.max_answer, None).0);
    }
    assert!(scheduler.cache_use().preemptions > 0);
}

#[test]
fn right_guesses_save_steps() {
    let count = |speculation| {
        let limits = Limits {
            speculation,
            max_tokens: 300,
            blocks: [10, 0],
            ..limits(1, 64, 1)
        };
        let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
        scheduler.submit(endless(1, 20, 200)).unwrap();
        let (mut steps, mut tokens) = (0, Vec::new());
        while !scheduler.is_idle() {
            let recorded = step(&mut scheduler, &mut ranks);
            tokens.extend(recorded.iter().filter_map(|recorded| recorded.token));
            steps += 1;
        }
        (steps, tokens)
    };
    let (plain, guessing) = (count(0), count(4));
    assert_eq!(plain.1, guessing.1);
    assert!(
        guessing.0 * 5 < plain.0 * 4,
        "{} of {}",
        guessing.0,
        plain.0
    );
}

#[test]
fn a_private_request_is_computed_anew_and_leaves_nothing() {
    let limits = limits(2, 256, 9);
    let (mut scheduler, mut ranks) = (Scheduler::new(limits), Ranks::new(limits));
    let mut cached = |id: u64, is_private: bool| {
        let request = Request {
            id,
            is_private,
            prompt: request(1, 100, 1).prompt,
            ..endless(1, 100, 1)
        };
        scheduler.submit(request).unwrap();
        let recorded = step(&mut scheduler, &mut ranks);
        assert!(scheduler.is_idle());
        let (total, free) = scheduler.blocks();
        assert_eq!(total, free);
        recorded[0].cached_tokens
    };
    assert_eq!(cached(1, true), 0);
    assert_eq!(cached(2, false), 0, "nothing was left to be found");
    assert_eq!(cached(3, false), 96);
    assert_eq!(cached(4, true), 0, "what is there is not used");
    assert_eq!(scheduler.cache_use().queried_tokens, 200);
}
