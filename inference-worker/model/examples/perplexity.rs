//! Perplexity of a GGUF model on a text, counted as llama.cpp's `llama-perplexity`
//! counts it, as one line of JSON; what it is after each window goes to the error
//! output.
//!
//! The text, less one newline at its end, becomes tokens once; these are cut into
//! windows, of which a last one that is not full is left out. Each window begins with
//! an empty KV cache, and in its second half each token is scored by what the model
//! says after those before it.
//!
//! `perplexity MODEL.gguf TEXT [--chunks N] [--threads N] [--context N]`

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use llama_model::adapter::AdapterRoom;
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::KvFormat;
use llama_model::text::{Special, Tokenizer};
use llama_model::{
    Checkpoint, Layout, Llama, LoadOptions, LocalCollective, Segment, StepModel, Wanted,
};

const USAGE: &str =
    "usage: perplexity MODEL.gguf TEXT [--chunks N] [--threads N] [--context N] [--int8-cache]";
/// Tokens of a window, as llama-perplexity has them.
const CONTEXT: usize = 512;

fn main() -> ExitCode {
    match Arguments::parse().and_then(|arguments| measure(&arguments)) {
        Ok(report) => {
            #[expect(clippy::print_stdout, reason = "the report is this program's output")]
            {
                println!("{report}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("perplexity: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Arguments {
    model: PathBuf,
    text: PathBuf,
    /// Windows at most.
    chunks: usize,
    threads: usize,
    context: usize,
    /// The form of keys and values.
    kv: KvFormat,
}

impl Arguments {
    fn parse() -> Result<Self, Box<dyn Error>> {
        let mut paths = Vec::new();
        let (mut chunks, mut threads, mut context) = (usize::MAX, 1, CONTEXT);
        let mut kv = KvFormat::F16;
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let number = match word.as_str() {
                "--chunks" => &mut chunks,
                "--threads" => &mut threads,
                "--context" => &mut context,
                "--int8-cache" => {
                    kv = KvFormat::Int8;
                    continue;
                }
                _ => {
                    paths.push(PathBuf::from(word));
                    continue;
                }
            };
            let value = words.next().ok_or(USAGE)?;
            *number = value
                .parse()
                .map_err(|_| format!("{word} {value}: {USAGE}"))?;
        }
        let [model, text] = <[PathBuf; 2]>::try_from(paths).map_err(|_| USAGE)?;
        if context < 4 {
            return Err(format!("a window of {context} tokens has none to score").into());
        }
        Ok(Self {
            model,
            text,
            chunks,
            threads,
            context,
            kv,
        })
    }
}

fn measure(arguments: &Arguments) -> Result<serde_json::Value, Box<dyn Error>> {
    let checkpoint = Checkpoint::open(&arguments.model, LoadFormat::Auto)?;
    let (tokens, begin) = tokens_of(&checkpoint, &arguments.text)?;
    let options = LoadOptions {
        layout: Layout::tensor(1),
        rank: 0,
        threads: arguments.threads,
        slots: 1,
        blocks: None,
        max_tokens: arguments.context,
        kv: arguments.kv,
        verify: false,
        adapters: AdapterRoom::NONE,
    };
    let mut model = Llama::load(&checkpoint, &options, &|_, _| {})?;

    let started = Instant::now();
    let mut score = Score::default();
    let windows = tokens.chunks_exact(arguments.context);
    let mut chunks = 0;
    for window in windows.take(arguments.chunks) {
        score_window(&mut model, window, begin, &mut score)?;
        chunks += 1;
        eprintln!("[{chunks}] {:.4}", score.perplexity());
    }
    if chunks == 0 {
        return Err(format!(
            "the text has {} tokens, one window has {}",
            tokens.len(),
            arguments.context
        )
        .into());
    }
    let seconds = started.elapsed().as_secs_f64();
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    Ok(serde_json::json!({
        "model": name(checkpoint.path()),
        "text": name(&arguments.text),
        "isa": model.isa().name(),
        "threads": arguments.threads,
        "tokens": tokens.len(),
        "context": arguments.context,
        "chunks": chunks,
        "scored_tokens": score.count,
        "perplexity": score.perplexity(),
        "standard_error": score.standard_error(),
        "seconds": seconds,
        "tokens_per_second": (chunks * arguments.context) as f64 / seconds,
    }))
}

/// The text's tokens, and the token that every window begins with, if the model wants
/// one.
fn tokens_of(
    checkpoint: &Checkpoint,
    text: &Path,
) -> Result<(Vec<u32>, Option<u32>), Box<dyn Error>> {
    let gguf = checkpoint
        .gguf()
        .ok_or("name a GGUF file: its tokenizer is read")?;
    let tokenizer = Tokenizer::from_gguf(gguf)?;
    let name = text.display();
    let text = std::fs::read_to_string(text).map_err(|error| format!("{name}: {error}"))?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let begin = tokenizer
        .encode_prompt("", Special::Plain)?
        .first()
        .copied();
    Ok((tokenizer.encode_prompt(text, Special::Plain)?, begin))
}

/// Scores the second half of `window`.
fn score_window(
    model: &mut Llama,
    window: &[u32],
    begin: Option<u32>,
    score: &mut Score,
) -> Result<(), Box<dyn Error>> {
    let mut tokens = window.to_vec();
    if let Some(begin) = begin {
        tokens[0] = begin;
    }
    let scored_from = window.len() / 2;
    let context = Segment {
        slot: 0,
        start: 0,
        tokens: tokens[..scored_from].to_vec(),
        logits: Wanted::None,
        adapter: None,
        tables: None,
    };
    // Nothing is scored by what follows the last token.
    let scored = Segment {
        slot: 0,
        start: u32::try_from(scored_from)?,
        tokens: tokens[scored_from..window.len() - 1].to_vec(),
        logits: Wanted::All,
        adapter: None,
        tables: None,
    };
    model.step(&[context], &mut LocalCollective)?;
    let rows = model.step(&[scored], &mut LocalCollective)?;
    for (logits, token) in rows.iter().zip(&window[scored_from + 1..]) {
        score.add(negative_log_likelihood(logits, *token as usize));
    }
    Ok(())
}

/// What it costs, in nats, that `token` follows.
fn negative_log_likelihood(logits: &[f32], token: usize) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from(logit - largest).exp())
        .sum();
    sum.ln() - f64::from(logits[token] - largest)
}

/// The sum of costs, and that of their squares.
#[derive(Default)]
struct Score {
    sum: f64,
    squares: f64,
    count: usize,
}

impl Score {
    fn add(&mut self, cost: f64) {
        self.sum += cost;
        self.squares += cost * cost;
        self.count += 1;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    fn standard_error(&self) -> f64 {
        let variance = self.squares / self.count as f64 - self.mean() * self.mean();
        (variance / (self.count.max(2) - 1) as f64).sqrt() * self.perplexity()
    }
}
