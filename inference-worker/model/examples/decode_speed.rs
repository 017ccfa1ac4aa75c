//! Measures one process, all of the model: prefill and decode in tokens a second,
//! memory planned (for this process and one that answers requests) and taken, as
//! one line of JSON.
//!
//! `decode_speed MODEL.gguf [THREADS [PROMPT_TOKENS [DECODE_TOKENS]]]`

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use llama_model::checkpoint::LoadFormat;
use llama_model::memory::{KvFormat, Target};
use llama_model::{
    Checkpoint, Layout, Llama, LoadOptions, LocalCollective, MemoryPlan, MemoryRequest, Segment,
    StepModel, Wanted,
};

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
            eprintln!("decode_speed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Result<serde_json::Value, Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let model_path = arguments.first().ok_or("name a GGUF file")?;
    let number = |at: usize, default: usize| {
        arguments
            .get(at)
            .map_or(Ok(default), |text| text.parse::<usize>())
    };
    let (threads, prompt, decode) = (number(1, 1)?, number(2, 512)?, number(3, 128)?);

    let started = Instant::now();
    let checkpoint = Checkpoint::open(Path::new(model_path), LoadFormat::Auto)?;
    let options = LoadOptions {
        layout: Layout::tensor(1),
        rank: 0,
        threads,
        slots: 1,
        blocks: None,
        max_tokens: prompt + decode,
        kv: KvFormat::F16,
        verify: false,
    };
    let plan = MemoryPlan::new(
        &checkpoint,
        &MemoryRequest {
            layout: options.layout,
            ranks: 0..1,
            target: Target::Cpu { threads },
            max_tokens: options.max_tokens,
            step_tokens: prompt,
            kv: options.kv,
        },
    )?;
    let mut model = Llama::load(&checkpoint, &options, &|_, _| {})?;
    let load = started.elapsed();

    let vocab = u32::try_from(model.vocab_size())?;
    let tokens: Vec<u32> = (0..u32::try_from(prompt)?)
        .map(|i| i * 7919 % vocab)
        .collect();
    let mut step = |start: usize, tokens: Vec<u32>| -> Result<(), Box<dyn std::error::Error>> {
        let segment = Segment {
            slot: 0,
            start: u32::try_from(start)?,
            tokens,
            logits: Wanted::Last,
            tables: None,
        };
        model.step(&[segment], &mut LocalCollective)?;
        Ok(())
    };
    // Once through unmeasured, so that every page is there.
    step(0, tokens.clone())?;
    let started = Instant::now();
    step(0, tokens)?;
    let prefill = started.elapsed();
    let started = Instant::now();
    for at in 0..decode {
        step(prompt + at, vec![u32::try_from(at)? % vocab])?;
    }
    let decoding = started.elapsed();
    Ok(serde_json::json!({
        "model": checkpoint.path().file_name().map(|name| name.to_string_lossy()),
        "isa": model.isa().name(),
        "threads": threads,
        "load_seconds": load.as_secs_f64(),
        "prefill_tokens": prompt,
        "prefill_tokens_per_second": prompt as f64 / prefill.as_secs_f64(),
        "decode_tokens": decode,
        "decode_tokens_per_second": decode as f64 / decoding.as_secs_f64(),
        "planned_bytes": plan.total(1),
        "resident_anonymous_bytes": resident_anonymous_bytes(),
    }))
}

/// Memory of this process that is not pages of files, where Linux tells.
fn resident_anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
