//! Measures loading from a cold page cache against reading the file with `dd`: one
//! process with all of the model up to its first token, and two processes with half
//! of it each. One line of JSON.
//!
//! `load_speed MODEL [--repeats N] [--threads N]`

#[path = "../common/kernel.rs"]
mod kernel;
mod measured;
mod rank;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use llama_model::checkpoint::LoadFormat;
use llama_model::{Checkpoint, Layout, Shard, slices::ModelSlices};
use measured::{Loaded, Reading};
use serde_json::{Value, json};

const USAGE: &str = "usage: load_speed MODEL [--repeats N] [--threads N]";
/// After writing the model the disk and the machine are busy for a while.
const SETTLE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let result = match words.first().map(String::as_str) {
        Some(rank::COMMAND) => rank::load(&words[1..]),
        _ => compare(words).map(|report| {
            #[expect(clippy::print_stdout, reason = "the report is this program's output")]
            {
                println!("{report}");
            }
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load_speed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What was measured in one round.
struct Round {
    load_average: f64,
    dd: Reading,
    whole: Loaded,
    halves: [Loaded; 2],
}

fn compare(words: Vec<String>) -> Result<Value, Box<dyn Error>> {
    let (mut repeats, mut threads, mut model) = (3_usize, 2_usize, None);
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let number = match word.as_str() {
            "--repeats" => &mut repeats,
            "--threads" => &mut threads,
            _ => {
                model = Some(PathBuf::from(word));
                continue;
            }
        };
        *number = words.next().ok_or(USAGE)?.parse().map_err(|_| USAGE)?;
    }
    let model = model.ok_or(USAGE)?;
    let checkpoint = Checkpoint::open(&model, LoadFormat::Auto)?;
    let [file] = checkpoint.files() else {
        return Err("name a model of one file, which dd can read".into());
    };
    let shard = Shard::new(checkpoint.config(), Layout::tensor(1), 0)?;
    let weights = ModelSlices::locate(&checkpoint, &shard)?.bytes();

    let mut rounds = Vec::new();
    std::thread::sleep(SETTLE);
    for number in 1..=repeats.max(1) {
        eprintln!("load_speed: round {number} of {repeats}");
        let load_average = measured::load_average();
        measured::drop_pages(&file.path)?;
        let dd = measured::dd(&file.path)?;
        measured::drop_pages(&file.path)?;
        let [whole] = measured::load(&model, threads)?;
        measured::drop_pages(&file.path)?;
        let halves = measured::load(&model, threads.div_ceil(2))?;
        rounds.push(Round {
            load_average,
            dd,
            whole,
            halves,
        });
    }
    Ok(report(&rounds, file.len, weights, threads))
}

fn report(rounds: &[Round], file: u64, weights: u64, threads: usize) -> Value {
    let each = |number: &dyn Fn(&Round) -> f64| rounds.iter().map(number).collect::<Vec<_>>();
    let dd = each(&|round| round.dd.seconds);
    let loaded = each(&|round| round.whole.seconds);
    let first = each(&|round| round.whole.first_token.unwrap_or(f64::NAN));
    let both = each(&|round| round.halves[0].seconds.max(round.halves[1].seconds));
    let of_file = |number: f64| number / file as f64;
    let sum = |round: &Round, bytes: fn(&Loaded) -> u64| {
        round.halves.iter().map(bytes).sum::<u64>() as f64
    };
    let peak = each(&|round| round.whole.peak as f64);
    json!({
        "file_bytes": file,
        "weight_bytes": weights,
        "threads": threads,
        "rounds": rounds.len(),
        "load_average": each(&|round| round.load_average),
        "page_cache": "left by posix_fadvise(POSIX_FADV_DONTNEED) before each",
        "dd": {
            "seconds": median(&dd),
            "each": dd,
            "read_from_disk": median(&each(&|round| of_file(round.dd.from_disk as f64))),
        },
        "one_process": {
            "seconds_to_loaded": median(&loaded),
            "each_to_loaded": loaded,
            "loaded_to_dd": median(&loaded) / median(&dd),
            "seconds_to_first_token": median(&first),
            "each_to_first_token": first,
            "first_token_to_dd": median(&first) / median(&dd),
            "peak_bytes": median(&peak),
            "peak_to_weights": median(&peak) / weights as f64,
            "peak": "VmHWM when loaded",
            "read": median(&each(&|round| of_file(round.whole.read as f64))),
            "read_from_disk": median(&each(&|round| of_file(round.whole.from_disk as f64))),
        },
        "two_processes": {
            "seconds_to_loaded": median(&both),
            "each_to_loaded": both,
            "loaded_to_dd": median(&both) / median(&dd),
            "read": median(&each(&|round| of_file(sum(round, |half| half.read)))),
            "read_from_disk": median(&each(&|round| of_file(sum(round, |half| half.from_disk)))),
        },
    })
}

/// The middle one, or the upper of two.
fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
