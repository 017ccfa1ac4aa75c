//! A process that loads the part of one rank and, where that is all of the model,
//! computes a first token.

use std::error::Error;
use std::path::Path;

use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::KvFormat;
use llama_model::sample::{Sampler, SamplingParams};
use llama_model::{
    Checkpoint, Layout, Llama, LoadOptions, LocalCollective, Segment, StepModel, Wanted,
};

use crate::kernel;
use crate::measured::Told;

/// Asks this program to be such a process.
pub(crate) const COMMAND: &str = "rank";
const CONTEXT: usize = 128;
const PROMPT: [u32; 8] = [1, 15, 7, 30, 2, 11, 90, 4];

/// Loads for `[model, rank, ranks, threads]`. Prints a line when that is done, and one
/// when there is a token.
pub(crate) fn load(words: &[String]) -> Result<(), Box<dyn Error>> {
    let [model, numbers @ ..] = words else {
        return Err("no model".into());
    };
    let numbers = numbers.iter().map(|word| word.parse::<usize>());
    let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
    let [rank, ranks, threads] = <[usize; 3]>::try_from(numbers).map_err(|_| "three numbers")?;
    let checkpoint = Checkpoint::open(Path::new(model), LoadFormat::Auto)?;
    let options = LoadOptions {
        layout: Layout::tensor(ranks),
        rank,
        threads,
        slots: 1,
        blocks: None,
        max_tokens: CONTEXT,
        kv: KvFormat::F16,
        verify: false,
        adapters: AdapterRoom::NONE,
    };
    let mut model = Llama::load(&checkpoint, &options, &|_, _| {})?;
    let told = Told {
        peak: told("/proc/self/status", "VmHWM")?,
        read: told("/proc/self/io", "rchar")?,
        from_disk: told("/proc/self/io", "read_bytes")?,
    };
    say(&serde_json::to_string(&told)?);
    if ranks > 1 {
        return Ok(());
    }
    let prompt = Segment {
        slot: 0,
        start: 0,
        tokens: PROMPT.to_vec(),
        logits: Wanted::Last,
        adapter: None,
        tables: None,
    };
    let rows = model.step(&[prompt], &mut LocalCollective)?;
    let row = rows.first().ok_or("no logits")?;
    let drawn = Sampler::new(SamplingParams::GREEDY, &PROMPT).sample(row, 0, None)?;
    say(&drawn.token.to_string());
    Ok(())
}

fn told(file: &str, field: &str) -> Result<u64, String> {
    kernel::number(file, field).ok_or_else(|| format!("{file} does not tell {field}"))
}

#[expect(
    clippy::print_stdout,
    reason = "the process that started this one reads it"
)]
fn say(line: &str) {
    println!("{line}");
}
