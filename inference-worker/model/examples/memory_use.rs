//! Compares the memory plan of one rank with the memory that a process of it takes,
//! with one sequence of the longest length, as one line of JSON.
//!
//! `memory_use MODEL [--dummy 1] [--tokens N] [--threads N]`

#[path = "common/kernel.rs"]
mod kernel;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::{KvFormat, Target};
use llama_model::sample::{Sampler, SamplingParams};
use llama_model::{
    Checkpoint, Layout, Llama, LoadOptions, LocalCollective, MemoryPlan, MemoryRequest, Segment,
    StepModel, Wanted,
};
use serde_json::{Value, json};

const USAGE: &str = "usage: memory_use MODEL [--dummy 1] [--tokens N] [--threads N]";
/// Tokens that one step computes, as the worker's steps do.
const STEP_TOKENS: usize = 256;
/// Tokens that are drawn one by one at the end of the sequence.
const DRAWN: usize = 32;
/// How often memory is looked at while the model loads and computes.
const GLANCE: Duration = Duration::from_millis(2);

fn main() -> ExitCode {
    match measure() {
        Ok(report) => {
            #[expect(clippy::print_stdout, reason = "the report is this program's output")]
            {
                println!("{report}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("memory_use: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<Value, Box<dyn Error>> {
    let (mut dummy, mut tokens, mut threads, mut model) = (0, 4096, 1, None);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let number = match word.as_str() {
            "--dummy" => &mut dummy,
            "--tokens" => &mut tokens,
            "--threads" => &mut threads,
            _ => {
                model = Some(PathBuf::from(word));
                continue;
            }
        };
        *number = words
            .next()
            .ok_or(USAGE)?
            .parse::<usize>()
            .map_err(|_| USAGE)?;
    }
    let model = model.ok_or(USAGE)?;
    let format = if dummy > 0 {
        LoadFormat::Dummy
    } else {
        LoadFormat::Auto
    };
    let options = LoadOptions {
        layout: Layout::tensor(1),
        rank: 0,
        threads,
        slots: 1,
        blocks: None,
        max_tokens: tokens,
        kv: KvFormat::F16,
        verify: false,
        adapters: AdapterRoom::NONE,
    };
    let name = model
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());

    // The plan is made by another process than the rank.
    let start = resident();
    let glances = Glances::start();
    let checkpoint = Checkpoint::open(&model, format)?;
    let opened = resident();
    let mut model = Llama::load(&checkpoint, &options, &|_, _| {})?;
    let peak_loading = glances.highest();
    let plan = planned(&checkpoint, &options)?;
    drop(checkpoint);
    let loaded = resident();
    run(&mut model, tokens)?;
    let end = resident();
    let peak = glances.highest();

    let [rank] = plan.ranks.as_slice() else {
        return Err("a plan of one rank has one".into());
    };
    let kv = rank.kv_bytes(tokens, plan.chunk);
    let planned = plan.total(1) - plan.supervisor;
    Ok(json!({
        "model": name,
        "tokens": tokens,
        "threads": threads,
        "planned_bytes": planned,
        "planned": {
            "weights": rank.weights,
            "kv": kv,
            "sequence_overhead": rank.sequence_overhead,
            "reserve": rank.reserve,
        },
        "supervisor_bytes": plan.supervisor,
        "measured_bytes": end,
        "measured": {
            "start": start,
            "opened": opened,
            "peak_loading": peak_loading,
            "loaded": loaded,
            "end": end,
            "peak": peak,
        },
        "measured_is": "RssAnon; the peak as seen every 2 ms",
        "planned_to_measured": planned as f64 / end as f64,
        "planned_to_peak": planned as f64 / peak as f64,
    }))
}

fn planned(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<MemoryPlan, Box<dyn Error>> {
    let request = MemoryRequest {
        adapters: AdapterRoom::NONE,
        layout: options.layout,
        ranks: 0..1,
        target: Target::Cpu {
            threads: options.threads,
        },
        max_tokens: options.max_tokens,
        step_tokens: STEP_TOKENS,
        kv: options.kv,
    };
    Ok(MemoryPlan::new(checkpoint, &request)?)
}

/// Computes a sequence of `tokens`, the last of them one by one.
fn run(model: &mut Llama, tokens: usize) -> Result<(), Box<dyn Error>> {
    let vocab = u32::try_from(model.vocab_size())?;
    let params = SamplingParams {
        temperature: 1.0,
        top_p: 0.9,
        seed: 1,
        ..SamplingParams::GREEDY
    };
    let mut sampler = Sampler::new(params, &[]);
    let (mut done, mut next) = (0, 1);
    while done < tokens {
        let prompt = tokens.saturating_sub(DRAWN + done);
        let count = if prompt == 0 {
            1
        } else {
            prompt.min(STEP_TOKENS)
        };
        let mut ids = vec![next];
        ids.extend((1..u32::try_from(count)?).map(|at| at * 7919 % vocab));
        let segment = Segment {
            slot: 0,
            start: u32::try_from(done)?,
            tokens: ids,
            logits: Wanted::Last,
            adapter: None,
            tables: None,
        };
        let rows = model.step(&[segment], &mut LocalCollective)?;
        let row = rows.first().ok_or("no logits")?;
        next = sampler.sample(row, u32::try_from(done)?, None)?.token;
        done += count;
    }
    Ok(())
}

/// Memory of this process that is not pages of files.
fn resident() -> u64 {
    kernel::number("/proc/self/status", "RssAnon").unwrap_or(0)
}

/// A thread that looks at the memory again and again.
struct Glances {
    shared: std::sync::Arc<(AtomicBool, AtomicU64)>,
}

impl Glances {
    fn start() -> Self {
        let shared = std::sync::Arc::new((AtomicBool::new(false), AtomicU64::new(0)));
        let looking = std::sync::Arc::clone(&shared);
        std::thread::spawn(move || {
            while !looking.0.load(Ordering::Relaxed) {
                looking.1.fetch_max(resident(), Ordering::Relaxed);
                std::thread::sleep(GLANCE);
            }
        });
        Self { shared }
    }

    /// The most that was seen.
    fn highest(&self) -> u64 {
        self.shared.1.load(Ordering::Relaxed).max(resident())
    }
}

impl Drop for Glances {
    fn drop(&mut self) {
        self.shared.0.store(true, Ordering::Relaxed);
    }
}
