//! Writes a small random Llama model: `write_fixture OUT.gguf`.

use std::path::Path;
use std::process::ExitCode;

use llama_model::fixture::TinyLlama;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: write_fixture OUT.gguf");
        return ExitCode::FAILURE;
    };
    match TinyLlama::default().gguf().write(Path::new(&path)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write_fixture: {error}");
            ExitCode::FAILURE
        }
    }
}
