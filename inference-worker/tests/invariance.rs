//! What a request is answered does not depend on what else is computed, on how, or on
//! what the cache still knows: every logit of every token is the same to the bit.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "tests may fail"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use llama_model::adapter::AdapterRoom;
use llama_model::blocks::BlockGeometry;
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::KvFormat;
use llama_model::{Checkpoint, Layout, Llama, LoadOptions, LocalCollective, StepModel};
use llama_worker::scheduler::{Limits, Request, Scheduler};

const MAX_TOKENS: usize = 400;

/// Tokens of each answer, and the logits that each was drawn from.
type Answers = BTreeMap<u64, Vec<(u32, Vec<u32>)>>;

/// One way to compute the same.
#[derive(Clone, Copy, Debug)]
struct Way {
    slots: u32,
    step_tokens: u32,
    prefix_caching: bool,
    speculation: u32,
    /// Blocks beyond those of one longest sequence.
    spare: usize,
}

const PLAIN: Way = Way {
    slots: 1,
    step_tokens: 512,
    prefix_caching: false,
    speculation: 0,
    spare: 0,
};

struct Served<'a> {
    checkpoint: &'a Checkpoint,
    requests: &'a [Request],
}

impl Served<'_> {
    fn limits(&self, way: Way) -> Limits {
        let chunk = self.checkpoint.config().chunk;
        let step = way.step_tokens.max(way.slots + 1) as usize;
        let needed = BlockGeometry::new(chunk).needed(MAX_TOKENS, step);
        Limits {
            slots: way.slots,
            step_tokens: way.step_tokens,
            queue: 100,
            queue_tokens: 100_000,
            max_tokens: u32::try_from(MAX_TOKENS).unwrap(),
            blocks: needed.map(|needed| needed + way.spare),
            chunk,
            prefix_caching: way.prefix_caching,
            speculation: way.speculation,
        }
    }

    /// Answers all requests; how often a sequence gave its blocks up, and how many
    /// tokens were found.
    fn answer(&self, way: Way) -> (Answers, [u64; 2]) {
        let limits = self.limits(way);
        let options = LoadOptions {
            layout: Layout::tensor(1),
            rank: 0,
            threads: 2,
            slots: limits.slots as usize,
            blocks: Some(limits.blocks),
            max_tokens: MAX_TOKENS,
            kv: KvFormat::F16,
            verify: false,
            adapters: AdapterRoom::NONE,
        };
        let mut model = Llama::load(self.checkpoint, &options, &|_, _| {}).expect("loads");
        let mut scheduler = Scheduler::new(limits);
        for request in self.requests {
            scheduler.submit(request.clone()).expect("is taken");
        }
        let mut answers = Answers::new();
        while !scheduler.is_idle() {
            let segments = scheduler.plan();
            let rows = model.step(&segments, &mut LocalCollective).expect("steps");
            let sampled = draw(&scheduler, &rows, &mut answers);
            scheduler.record(&sampled);
        }
        let usage = scheduler.cache_use();
        (answers, [usage.preemptions, usage.found_tokens])
    }
}

fn draw(scheduler: &Scheduler, rows: &[Vec<f32>], answers: &mut Answers) -> Vec<Vec<u32>> {
    let mut rest = rows;
    let each = scheduler.awaited().map(|awaited| {
        let (rows, behind) = rest.split_at(awaited.guesses.len() + 1);
        rest = behind;
        let mut tokens = Vec::new();
        for (number, row) in rows.iter().enumerate() {
            let bits = row.iter().map(|logit| logit.to_bits()).collect();
            let token = best(row);
            tokens.push(token);
            answers.entry(awaited.id).or_default().push((token, bits));
            if awaited.guesses.get(number) != Some(&token) {
                break;
            }
        }
        tokens
    });
    each.collect()
}

fn best(row: &[f32]) -> u32 {
    let best = (0..row.len()).reduce(|best, next| if row[next] > row[best] { next } else { best });
    u32::try_from(best.unwrap()).unwrap()
}

/// Prompts of several lengths, of which some begin alike and some repeat themselves.
fn requests(vocabulary: usize) -> Vec<Request> {
    let vocabulary = u64::try_from(vocabulary).unwrap();
    let token = |seed: u64, i: usize| {
        u32::try_from((seed * 7919 + i as u64 * 104_729 + 11) % vocabulary).unwrap()
    };
    let lens = [3, 40, 100, 129, 70, 200];
    let prompts = lens.iter().zip(0_u64..).map(|(len, id)| {
        let common = if id % 2 == 0 { 64.min(*len) } else { 0 };
        let own = (0..*len).map(|i| token(1 + id, i % 17));
        let common = (0..common).map(|i| token(0, i));
        Request {
            id,
            prompt: common.chain(own).take(*len).collect(),
            // The first grow beyond what they had when they were let in.
            max_answer: [130, 90, 60, 20, 20, 20][usize::try_from(id).unwrap()],
            ..Request::default()
        }
    });
    prompts.collect()
}

/// Every way of answering gives the same bits as each request alone.
fn all_ways_agree(path: &Path) {
    let checkpoint = Checkpoint::open(path, LoadFormat::Auto).expect("opens");
    let requests = requests(checkpoint.config().vocab);
    let mut expected = Answers::new();
    for request in &requests {
        let alone = Served {
            checkpoint: &checkpoint,
            requests: std::slice::from_ref(request),
        };
        expected.extend(alone.answer(PLAIN).0);
    }
    let served = Served {
        checkpoint: &checkpoint,
        requests: &requests,
    };
    let together = Way {
        slots: 6,
        spare: 100,
        ..PLAIN
    };
    let ways = [
        together,
        Way {
            step_tokens: 7,
            ..together
        },
        Way {
            prefix_caching: true,
            slots: 2,
            ..together
        },
        Way {
            step_tokens: 50,
            spare: 0,
            ..together
        },
        Way {
            speculation: 4,
            prefix_caching: true,
            step_tokens: 64,
            spare: 2,
            ..together
        },
    ];
    let is_aligned = BlockGeometry::new(checkpoint.config().chunk).is_aligned();
    for way in ways {
        let (answers, [preemptions, found]) = served.answer(way);
        for (id, expected) in &expected {
            let tokens = |answer: &[(u32, Vec<u32>)]| {
                answer.iter().map(|(token, _)| *token).collect::<Vec<_>>()
            };
            assert_eq!(
                tokens(&answers[id]),
                tokens(expected),
                "request {id}, {way:?}"
            );
            assert!(&answers[id] == expected, "logits of request {id}, {way:?}");
        }
        // Blocks of chunks let fewer begin at once than there are blocks for.
        let is_tight = way.spare < 10 && checkpoint.config().chunk.is_none();
        assert!(preemptions > 0 || !is_tight, "{way:?}");
        assert!(found > 0 || !way.prefix_caching || !is_aligned, "{way:?}");
    }
}

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("model/tests/reference")
        .join(name)
}

#[test]
fn llama_3() {
    all_ways_agree(&reference("llama-plain"));
}

#[test]
fn llama_4_with_chunks_and_experts() {
    all_ways_agree(&reference("llama4-scout"));
}

#[test]
fn a_real_model() {
    match std::env::var_os("LLAMA_TEST_MODEL") {
        Some(model) => all_ways_agree(Path::new(&model)),
        None => eprintln!("skipped: LLAMA_TEST_MODEL names no model"),
    }
}
