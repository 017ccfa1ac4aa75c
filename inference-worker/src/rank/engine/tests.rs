use super::*;
use crate::adapters::AdapterUse;
use crate::comm::board::Board;
use crate::comm::region::Region;
use crate::comm::shm::ShmLink;
use crate::rank::adapters::AdapterDesk;
use crate::scheduler::{Finish, Limits, Refusal};
use crate::structured::Grammar;
use llama_model::lora::{AdapterLoader, LoadedAdapter};
use llama_model::sample::SamplingParams;
use llama_model::{Collective, Layout, LocalCollective, ModelError, Segment, StepModel, Wanted};
use std::sync::Arc;
use std::sync::mpsc;

const END: u32 = 9;
const POISON: u32 = 7;

/// Answers each token with the next one, and sums over all ranks so that
/// every rank must take part.
struct Counting;

impl StepModel for Counting {
    fn vocab_size(&self) -> usize {
        10
    }

    fn kv_cache_bytes(&self) -> u64 {
        0
    }

    fn step(
        &mut self,
        segments: &[Segment],
        collective: &mut dyn Collective,
    ) -> Result<Vec<Vec<f32>>, StepError> {
        let mut rows = Vec::new();
        for segment in segments {
            let wanted = match segment.logits {
                Wanted::None => 0,
                Wanted::Last => 1,
                Wanted::All => segment.tokens.len(),
            };
            for last in &segment.tokens[segment.tokens.len() - wanted..] {
                let mut row = vec![0.0; 10];
                row[*last as usize + 1] = 1.0;
                collective.all_reduce_sum(&mut row)?;
                if *last == POISON {
                    row[0] = f32::NAN;
                }
                rows.push(row);
            }
        }
        Ok(rows)
    }

    fn adapter_loader(&self) -> AdapterLoader {
        Box::new(|folder| {
            Err(ModelError::NotFound(format!(
                "{} is empty",
                folder.display()
            )))
        })
    }

    fn put_adapter(&mut self, _place: u32, _adapter: LoadedAdapter) -> Result<(), StepError> {
        Err(StepError::Invalid("nothing is ever loaded".to_owned()))
    }

    fn drop_adapter(&mut self, _place: u32) {}
}

fn submit(id: u64, first: u32, max_new_tokens: u32) -> ToEngine {
    ToEngine::Submit(Box::new(Submit {
        id,
        tokens: vec![first],
        max_new_tokens,
        stop_ids: vec![END],
        sampling: SamplingParams::GREEDY,
        priority: 0,
        prompt_logprobs: None,
        cache_salt: None,
        adapter: None,
        form: None,
        is_compared: false,
    }))
}

/// What was told of one request.
fn of(told: &[FromEngine], wanted: u64) -> Vec<FromEngine> {
    let is_wanted = |message: &&FromEngine| match message {
        FromEngine::Token { id, .. }
        | FromEngine::Prompt { id, .. }
        | FromEngine::Finished { id, .. }
        | FromEngine::Refused { id, .. }
        | FromEngine::Failed { id, .. } => *id == wanted,
        FromEngine::Adapter { .. } | FromEngine::Stats(_) => false,
    };
    told.iter().filter(is_wanted).cloned().collect()
}

fn plain(id: u64, token: u32) -> FromEngine {
    FromEngine::Token {
        id,
        token,
        cached_tokens: 0,
        logprobs: None,
    }
}

/// Tokens `tokens` and the end.
fn answer(id: u64, tokens: &[u32], reason: Finish) -> Vec<FromEngine> {
    let tokens = tokens.iter().map(|&token| plain(id, token));
    let finished = FromEngine::Finished {
        id,
        reason,
        cached_tokens: 0,
    };
    tokens.chain([finished]).collect()
}

/// A model without tokens for required forms.
fn no_vocabulary() -> Forms {
    Forms::new(|| Err("there are none".to_owned()))
}

fn limits() -> Limits {
    Limits {
        slots: 2,
        step_tokens: 8,
        queue: 1,
        queue_tokens: 1000,
        max_tokens: 16,
        blocks: [2, 0],
        chunk: None,
        prefix_caching: true,
        speculation: 0,
    }
}

fn board(ranks: usize) -> (Arc<Region>, Board) {
    let region = Arc::new(Region::create(ShmLink::bytes(ranks)).unwrap());
    (Arc::clone(&region), Board::new(region, ranks).unwrap())
}

/// Runs an engine of one rank over `messages` until all is answered.
fn run(messages: Vec<ToEngine>) -> Vec<FromEngine> {
    run_until(messages, |_told| true)
}

/// Likewise, and until what was told is enough.
fn run_until(
    messages: Vec<ToEngine>,
    is_enough: impl Fn(&[FromEngine]) -> bool,
) -> Vec<FromEngine> {
    run_with(messages, no_vocabulary(), is_enough)
}

/// Likewise, with these forms.
fn run_with(
    messages: Vec<ToEngine>,
    forms: Forms,
    is_enough: impl Fn(&[FromEngine]) -> bool,
) -> Vec<FromEngine> {
    let (_, board) = board(1);
    let (send, receive) = mpsc::channel();
    for message in messages {
        send.send(message).unwrap();
    }
    let mut told = Vec::new();
    let stop = |told: &[FromEngine]| {
        if is_enough(told) {
            // Twice does no harm.
            send.send(ToEngine::Stop).unwrap();
        }
    };
    stop(&told);
    let stepper = Stepper {
        model: &mut Counting,
        link: &mut LocalCollective,
        board: &board,
        local: 0,
        epoch: 1,
        step: 0,
        desk: AdapterDesk::default(),
        settled: None,
    };
    let tell = |messages: &[FromEngine]| {
        told.extend_from_slice(messages);
        stop(&told);
        Ok(())
    };
    Engine::new(stepper, Scheduler::new(limits()), forms, receive, tell)
        .run()
        .unwrap();
    told
}

#[test]
fn answers_end_at_the_stop_token_or_the_limit() {
    let told = run(vec![submit(1, 8, 10), submit(2, 0, 2)]);
    assert_eq!(of(&told, 1), answer(1, &[], Finish::Stop));
    assert_eq!(of(&told, 2), answer(2, &[1, 2], Finish::Length));
    let Some(FromEngine::Stats(last)) = told.last() else {
        panic!("stats come last: {told:?}");
    };
    assert_eq!((last.running, last.waiting, last.cached_tokens), (0, 0, 0));
}

#[test]
fn logits_that_are_not_numbers_fail_their_request_alone() {
    let told = run(vec![submit(1, 6, 10), submit(2, 0, 5)]);
    let failed = of(&told, 1);
    assert_eq!(failed[0], plain(1, 7));
    assert!(matches!(failed[1], FromEngine::Failed { .. }), "{failed:?}");
    assert_eq!(failed.len(), 2);
    assert_eq!(of(&told, 2), answer(2, &[1, 2, 3, 4, 5], Finish::Length));
}

#[test]
fn penalties_and_logprobs_follow_the_answer() {
    // Token 1 follows the prompt by its logit of 1, until it was said once.
    let ToEngine::Submit(mut penalized) = submit(1, 0, 3) else {
        panic!("a submit")
    };
    penalized.sampling.logit_bias = vec![(5, 1.5)];
    penalized.sampling.presence_penalty = 2.0;
    penalized.sampling.logprobs = Some(1);
    let told = run(vec![ToEngine::Submit(penalized)]);
    let tokens: Vec<_> = of(&told, 1)
        .into_iter()
        .filter_map(|message| match message {
            FromEngine::Token {
                token, logprobs, ..
            } => Some((token, logprobs.expect("asked").top[0].0)),
            _ => None,
        })
        .collect();
    assert_eq!(tokens, [(5, 1), (6, 6), (7, 7)]);
}

#[test]
fn cancelled_and_refused_requests_get_no_tokens() {
    let told = run(vec![
        submit(1, 0, 3),
        submit(2, 0, 3),
        submit(3, 0, 3),
        submit(4, 0, 3),
        ToEngine::Cancel { id: 2 },
        submit(5, 0, 100),
    ]);
    assert_eq!(of(&told, 2), []);
    let refusal = Refusal::QueueFull { waiting: 3 };
    assert_eq!(of(&told, 4), [FromEngine::Refused { id: 4, refusal }]);
    let refusal = Refusal::Length {
        prompt: 1,
        answer: 100,
        max_tokens: 16,
    };
    assert_eq!(of(&told, 5), [FromEngine::Refused { id: 5, refusal }]);
    assert_eq!(of(&told, 3), answer(3, &[1, 2, 3], Finish::Length));
}

#[test]
fn followers_compute_what_rank_0_plans_until_the_last_step() {
    let (region, board) = board(3);
    let layout = Layout::tensor(3);
    let (send, receive) = mpsc::channel();
    send.send(submit(1, 0, 4)).unwrap();
    send.send(ToEngine::Stop).unwrap();
    let told = std::thread::scope(|scope| {
        let followers: Vec<_> = [1, 2]
            .map(|rank| {
                let mut link =
                    ShmLink::new(Arc::clone(&region), board.clone(), layout, rank, false).unwrap();
                let board = board.clone();
                scope.spawn(move || {
                    let mut stepper = Stepper {
                        model: &mut Counting,
                        link: &mut link,
                        board: &board,
                        local: rank,
                        epoch: 1,
                        step: 0,
                        desk: AdapterDesk::default(),
                        settled: None,
                    };
                    while !stepper.follow().unwrap() {}
                    stepper.step
                })
            })
            .into_iter()
            .collect();
        let mut link = ShmLink::new(Arc::clone(&region), board.clone(), layout, 0, false).unwrap();
        let mut told = Vec::new();
        let stepper = Stepper {
            model: &mut Counting,
            link: &mut link,
            board: &board,
            local: 0,
            epoch: 1,
            step: 0,
            desk: AdapterDesk::default(),
            settled: None,
        };
        let tell = |messages: &[FromEngine]| {
            told.extend_from_slice(messages);
            Ok(())
        };
        let mut engine = Engine::new(
            stepper,
            Scheduler::new(limits()),
            no_vocabulary(),
            receive,
            tell,
        );
        engine.run().unwrap();
        for follower in followers {
            assert_eq!(follower.join().unwrap(), board.step(0));
        }
        told
    });
    assert_eq!(of(&told, 1), answer(1, &[1, 2, 3, 4], Finish::Length));
}

#[test]
fn a_rank_of_another_epoch_is_a_plan_mismatch() {
    let (region, board) = board(2);
    let layout = Layout::tensor(2);
    let results: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> = [0_usize, 1]
            .map(|rank| {
                let mut link =
                    ShmLink::new(Arc::clone(&region), board.clone(), layout, rank, false).unwrap();
                let board = board.clone();
                scope.spawn(move || {
                    let mut stepper = Stepper {
                        model: &mut Counting,
                        link: &mut link,
                        board: &board,
                        local: rank,
                        epoch: 1 + rank as u64,
                        step: 0,
                        desk: AdapterDesk::default(),
                        settled: None,
                    };
                    if rank == 0 {
                        stepper.lead(NextStep::default()).map(|_| ())
                    } else {
                        stepper.follow().map(|_| ())
                    }
                })
            })
            .into_iter()
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for (rank, result) in (0..).zip(results) {
        let failure = crate::failure::Failure::of_step(rank, 1, &result.unwrap_err()).unwrap();
        assert_eq!(
            failure.category,
            llama_contract::FailureCategory::PlanMismatch
        );
        assert_eq!(failure.rank, Some(1), "{failure}");
    }
}

/// What was told of adapters, with the number of tokens told before.
fn of_adapters(told: &[FromEngine]) -> Vec<(usize, u32, AdapterOutcome)> {
    let mut tokens = 0;
    let mut found = Vec::new();
    for message in told {
        match message {
            FromEngine::Token { .. } => tokens += 1,
            FromEngine::Adapter { place, outcome } => found.push((tokens, *place, outcome.clone())),
            _ => {}
        }
    }
    found
}

#[test]
fn an_adapter_that_cannot_be_read_is_refused_and_steps_go_on() {
    let load = |place: u32| {
        ToEngine::Adapter(AdapterOrder::Load {
            place,
            folder: format!("/adapters/{place}").into(),
        })
    };
    let messages = vec![load(3), load(4), submit(0, 1, 6)];
    let told = run_until(messages, |told| of_adapters(told).len() == 2);
    let refused = |place: u32| AdapterOutcome::Refused {
        message: format!("/adapters/{place} is empty"),
    };
    let found: Vec<_> = of_adapters(&told)
        .into_iter()
        .map(|(_, place, outcome)| (place, outcome))
        .collect();
    assert_eq!(found, [(3, refused(3)), (4, refused(4))]);
    assert_eq!(of(&told, 0), answer(0, &[2, 3, 4, 5, 6, 7], Finish::Length));
}

#[test]
fn an_adapter_is_forgotten_once_no_sequence_uses_it() {
    let mut adapted = submit(0, 1, 4);
    if let ToEngine::Submit(submit) = &mut adapted {
        submit.adapter = Some(AdapterUse { place: 2, load: 7 });
    }
    let forget = |place: u32| ToEngine::Adapter(AdapterOrder::Drop { place });
    let told = run(vec![adapted, forget(2), forget(1)]);
    assert_eq!(
        of_adapters(&told),
        [
            (0, 1, AdapterOutcome::Dropped),
            (4, 2, AdapterOutcome::Dropped)
        ]
    );
}

#[test]
fn the_probabilities_of_a_prompt_come_before_its_answer() {
    let asked = |id, tokens: &[u32]| {
        let ToEngine::Submit(mut submit) = submit(id, 0, 2) else {
            unreachable!("it is a submit");
        };
        submit.tokens = tokens.to_vec();
        submit.prompt_logprobs = Some(1);
        ToEngine::Submit(submit)
    };
    let told = run(vec![
        asked(1, &[1, 2, 5, 6]),
        asked(2, &[3]),
        asked(3, &[1, POISON, 3]),
    ]);
    let mut first = Vec::new();
    for message in of(&told, 1) {
        match message {
            FromEngine::Prompt { logprobs, .. } => first.extend(logprobs),
            rest => {
                assert_eq!(rest, plain(1, 7));
                break;
            }
        }
    }
    let likely: Vec<u32> = first.iter().map(|logprobs| logprobs.top[0].0).collect();
    assert_eq!(likely, [2, 3, 6]);
    let ln = |logit: f32| logit - (1_f32.exp() + 9.0).ln();
    for (logprobs, logit) in first.iter().zip([1.0, 0.0, 1.0]) {
        assert!((logprobs.logprob - ln(logit)).abs() < 1e-5, "{logprobs:?}");
    }
    // Of one token nothing is told.
    assert_eq!(of(&told, 2), answer(2, &[4, 5], Finish::Length));
    let failed = of(&told, 3).pop().unwrap();
    assert!(matches!(failed, FromEngine::Failed { .. }), "{failed:?}");
}

#[test]
fn answers_go_on_while_a_form_is_prepared() {
    let mut held = submit(0, 1, 3);
    if let ToEngine::Submit(submit) = &mut held {
        submit.form = Some(Grammar::JsonObject);
    }
    // The vocabulary is made only after the other answer is there.
    let (answered, is_answered) = mpsc::channel();
    let forms = Forms::new(move || {
        is_answered.recv().map_err(|error| error.to_string())?;
        Err("there are none".to_owned())
    });
    let told = run_with(vec![held, submit(1, 1, 3)], forms, |told| {
        let is_done = of(told, 1).len() == 4;
        if is_done {
            // Once is enough.
            let _ = answered.send(());
        }
        is_done
    });
    assert_eq!(of(&told, 1), answer(1, &[2, 3, 4], Finish::Length));
    let failed = FromEngine::Failed {
        id: 0,
        message: "the tokens for required forms: there are none".to_owned(),
    };
    assert_eq!(of(&told, 0), [failed]);
}
