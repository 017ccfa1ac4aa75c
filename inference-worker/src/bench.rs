//! `llama-worker bench`: how fast this machine computes a model, without a server.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use llama_contract::FailureCategory;
use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::KvFormat;
use llama_model::sample::{Sampler, SamplingParams};
use llama_model::{
    Checkpoint, Layout, Llama, LoadOptions, LocalCollective, Segment, StepModel, Wanted,
};
use serde_json::{Value, json};

use crate::cgroup::{Cgroup, usable_cores};
use crate::failure::{Failure, of_model};
use crate::plan::LoadFormatArg;
use crate::rank::STEP_TOKENS;

/// Most tokens of a sequence that a bench computes.
const MOST_TOKENS: u32 = 1 << 20;

/// Flags of `llama-worker bench`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// A GGUF file, or a folder with config.json and safetensors.
    #[arg(long)]
    pub model: PathBuf,
    /// Where weights come from.
    #[arg(long, value_enum, default_value_t)]
    pub load_format: LoadFormatArg,
    /// Threads that compute; all usable cores when absent.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Tokens of the prompt whose speed is measured.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_TOKENS)))]
    pub prompt_tokens: u32,
    /// Tokens that each sequence generates.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_TOKENS)))]
    pub generate_tokens: u32,
    /// Tokens that are in the KV cache before.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=i64::from(MOST_TOKENS)))]
    pub depth: u32,
    /// Sequences that generate together.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub sequences: u32,
    /// How often each is measured; the medians are told.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeats: u32,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchReport {
    model: String,
    instructions: &'static str,
    threads: usize,
    args: [u32; 4],
    load_average: Option<f64>,
    /// Tokens a second, one number a repeat.
    prompt: Vec<f64>,
    generate: Vec<f64>,
}

/// Loads the model and measures it.
///
/// # Errors
/// When the model cannot be loaded, or the sequences are longer than it takes.
pub fn run(args: &BenchArgs) -> Result<BenchReport, Failure> {
    let checkpoint = Checkpoint::open(&args.model, LoadFormat::from(args.load_format))
        .map_err(|error| of_model(&error))?;
    let threads = args.threads.map_or_else(
        || usable_cores(&Cgroup::default()),
        |threads| threads as usize,
    );
    let max_tokens = args.depth as usize + args.prompt_tokens.max(args.generate_tokens) as usize;
    let options = LoadOptions {
        layout: Layout::tensor(1),
        rank: 0,
        threads,
        slots: args.sequences as usize,
        blocks: None,
        max_tokens,
        kv: KvFormat::F16,
        verify: false,
        adapters: AdapterRoom::NONE,
    };
    let mut model =
        Llama::load(&checkpoint, &options, &|_, _| {}).map_err(|error| of_model(&error))?;
    let instructions = model.isa().name();
    let load_average = load_average();
    let mut bench = Bench {
        model: &mut model,
        args,
    };
    // Once through unmeasured, so that every page is there.
    bench.prompt()?;
    let mut prompt = Vec::new();
    let mut generate = Vec::new();
    for _ in 0..args.repeats {
        prompt.push(f64::from(args.prompt_tokens) / bench.prompt()?);
        let tokens = f64::from(args.generate_tokens) * f64::from(args.sequences);
        generate.push(tokens / bench.generate()?);
    }
    Ok(BenchReport {
        model: args
            .model
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        instructions,
        threads,
        args: [
            args.prompt_tokens,
            args.generate_tokens,
            args.depth,
            args.sequences,
        ],
        load_average,
        prompt,
        generate,
    })
}

struct Bench<'a> {
    model: &'a mut Llama,
    args: &'a BenchArgs,
}

impl Bench<'_> {
    /// Computes `count` tokens from `start` on of one sequence, in steps as the engine
    /// makes them; the logits behind the last.
    fn read(&mut self, slot: u32, start: u32, count: u32) -> Result<Vec<f32>, Failure> {
        let vocabulary = u32::try_from(self.model.vocab_size()).unwrap_or(u32::MAX);
        let mut rows = Vec::new();
        let (mut at, end) = (start, start + count);
        while at < end {
            let next = end.min(at + STEP_TOKENS);
            let segment = Segment {
                slot,
                start: at,
                tokens: (at..next)
                    .map(|position| position.wrapping_mul(7919) % vocabulary)
                    .collect(),
                logits: if next == end {
                    Wanted::Last
                } else {
                    Wanted::None
                },
                adapter: None,
                tables: None,
            };
            rows = self.step(&[segment])?;
            at = next;
        }
        Ok(rows.pop().unwrap_or_default())
    }

    fn step(&mut self, segments: &[Segment]) -> Result<Vec<Vec<f32>>, Failure> {
        self.model
            .step(segments, &mut LocalCollective)
            .map_err(|error| Failure::from_error(FailureCategory::Internal, &error))
    }

    /// Seconds for a prompt behind `depth` tokens.
    fn prompt(&mut self) -> Result<f64, Failure> {
        self.read(0, 0, self.args.depth)?;
        let started = Instant::now();
        self.read(0, self.args.depth, self.args.prompt_tokens)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Seconds for the answers of all sequences, drawn and fed back, behind `depth`
    /// tokens of each.
    fn generate(&mut self) -> Result<f64, Failure> {
        let slots = 0..self.args.sequences;
        for slot in slots.clone() {
            self.read(slot, 0, self.args.depth)?;
        }
        let mut samplers: Vec<Sampler> = slots
            .clone()
            .map(|_| Sampler::new(SamplingParams::GREEDY, &[]))
            .collect();
        let mut tokens: Vec<u32> = slots.clone().map(|slot| slot + 1).collect();
        let started = Instant::now();
        for index in 0..self.args.generate_tokens {
            let segments = slots.clone().zip(&tokens).map(|(slot, token)| Segment {
                slot,
                start: self.args.depth + index,
                tokens: vec![*token],
                logits: Wanted::Last,
                adapter: None,
                tables: None,
            });
            let rows = self.step(&segments.collect::<Vec<_>>())?;
            for ((sampler, row), token) in samplers.iter_mut().zip(&rows).zip(&mut tokens) {
                let drawn = sampler.sample(row, index, None);
                let failed = |error| Failure::from_error(FailureCategory::Internal, &error);
                *token = drawn.map_err(failed)?.token;
            }
        }
        Ok(started.elapsed().as_secs_f64())
    }
}

impl BenchReport {
    /// For programs.
    pub fn json(&self) -> Value {
        let [prompt_tokens, generate_tokens, depth, sequences] = self.args;
        json!({
            "model": self.model,
            "instructions": self.instructions,
            "threads": self.threads,
            "prompt_tokens": prompt_tokens,
            "generate_tokens": generate_tokens,
            "depth": depth,
            "sequences": sequences,
            "repeats": self.prompt.len(),
            "load_average": self.load_average,
            "prompt_tokens_per_second": median(&self.prompt),
            "prompt_each": self.prompt,
            "generate_tokens_per_second": median(&self.generate),
            "generate_each": self.generate,
        })
    }

    /// For people.
    pub fn table(&self) -> String {
        let [prompt_tokens, generate_tokens, depth, sequences] = self.args;
        let load = self
            .load_average
            .map_or_else(String::new, |load| format!(", load average {load}"));
        let mut text = format!(
            "{}\n{} threads, {}{load}; medians of {}\n\n{:<32}{:>12}{:>12}{:>12}\n",
            self.model,
            self.threads,
            self.instructions,
            self.prompt.len(),
            "tokens a second",
            "median",
            "least",
            "most",
        );
        let behind = match depth {
            0 => String::new(),
            depth => format!(" behind {depth}"),
        };
        let together = match sequences {
            1 => String::new(),
            sequences => format!(" × {sequences}"),
        };
        for (what, each) in [
            (format!("prompt of {prompt_tokens}{behind}"), &self.prompt),
            (
                format!("answer of {generate_tokens}{together}{behind}"),
                &self.generate,
            ),
        ] {
            let (least, most) = each
                .iter()
                .fold((f64::INFINITY, 0.0_f64), |(least, most), number| {
                    (least.min(*number), most.max(*number))
                });
            let median = median(each);
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{what:<32}{median:>12.1}{least:>12.1}{most:>12.1}");
        }
        text
    }
}

/// The middle one, or the lower of two.
fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().saturating_sub(1) / 2;
    sorted.get(middle).copied().unwrap_or_default()
}

/// What else the machine does, where Linux tells.
fn load_average() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_extremes_are_told() {
        let report = BenchReport {
            model: "m.gguf".to_owned(),
            instructions: "avx2",
            threads: 2,
            args: [512, 128, 0, 4],
            load_average: Some(0.5),
            prompt: vec![300.0, 100.0, 200.0],
            generate: vec![50.0],
        };
        let json = report.json();
        assert_eq!(json["prompt_tokens_per_second"], 200.0);
        assert_eq!(json["generate_tokens_per_second"], 50.0);
        let table = report.table();
        let lines: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[4], ["prompt", "of", "512", "200.0", "100.0", "300.0"]);
        assert_eq!(
            lines[5],
            ["answer", "of", "128", "×", "4", "50.0", "50.0", "50.0"]
        );
    }
}
