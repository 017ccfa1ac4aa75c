//! Writes a Llama checkpoint with random BF16 weights in the shape of a `config.json`,
//! as Hugging Face lays it out, so that loading can be measured without a download:
//! `write_checkpoint CONFIG_FOLDER OUT_FOLDER`.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use half::bf16;
use llama_model::checkpoint::{CONFIG, LoadFormat};
use llama_model::{Checkpoint, LlamaConfig};
use serde_json::{Map, Value, json};

/// Headers are padded to multiples of this.
const HEADER_ALIGNMENT: usize = 8;
const VALUE_BYTES: usize = 2;

fn main() -> ExitCode {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [from, to] = paths.as_slice() else {
        eprintln!("usage: write_checkpoint CONFIG_FOLDER OUT_FOLDER");
        return ExitCode::FAILURE;
    };
    match write(from, to) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write_checkpoint: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Name and shape of a tensor.
type Entry = (String, Vec<usize>);

fn write(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(from, LoadFormat::Dummy)?;
    let config = checkpoint.config();
    if config.layers.iter().any(|kind| kind.experts) {
        return Err("the model has experts; only dense models are written".into());
    }
    let entries = entries(config);
    fs::create_dir_all(to)?;
    fs::copy(from.join(CONFIG), to.join(CONFIG))?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(to.join("model.safetensors"))?);
    file.write_all(&header(&entries))?;
    for (number, (_, shape)) in (0_u64..).zip(&entries) {
        write_tensor(&mut file, number, shape)?;
    }
    // What is not written yet cannot leave the page cache.
    file.into_inner()?.sync_all()?;
    Ok(())
}

/// The tensors in the order of their names, which is how they are stored.
fn entries(config: &LlamaConfig) -> Vec<Entry> {
    let hidden = config.hidden;
    let (query, kv) = (
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    );
    let mut all = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![config.vocab, hidden],
        ),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !config.tied {
        all.push(("lm_head.weight".to_owned(), vec![config.vocab, hidden]));
    }
    for layer in 0..config.layers.len() {
        let mut add = |name: &str, shape: &[usize]| {
            all.push((
                format!("model.layers.{layer}.{name}.weight"),
                shape.to_vec(),
            ));
        };
        add("input_layernorm", &[hidden]);
        add("self_attn.q_proj", &[query, hidden]);
        add("self_attn.k_proj", &[kv, hidden]);
        add("self_attn.v_proj", &[kv, hidden]);
        add("self_attn.o_proj", &[hidden, query]);
        add("post_attention_layernorm", &[hidden]);
        add("mlp.gate_proj", &[config.ffn, hidden]);
        add("mlp.up_proj", &[config.ffn, hidden]);
        add("mlp.down_proj", &[hidden, config.ffn]);
    }
    all.sort();
    all
}

fn header(entries: &[Entry]) -> Vec<u8> {
    let mut tensors = Map::new();
    let mut end = 0;
    for (name, shape) in entries {
        let start = end;
        end += shape.iter().product::<usize>() * VALUE_BYTES;
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        tensors.insert(name.clone(), entry);
    }
    let mut text = Value::Object(tensors).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

/// Ones for a norm, and for a matrix random numbers whose products keep about the size
/// of what they multiply.
fn write_tensor(out: &mut impl Write, number: u64, shape: &[usize]) -> std::io::Result<()> {
    let [rows, columns] = shape else {
        return out.write_all(&bf16::ONE.to_le_bytes().repeat(shape.iter().product()));
    };
    let size = (3.0 / *columns as f32).sqrt();
    let mut state = number << 32;
    let mut row = vec![0; columns * VALUE_BYTES];
    for _ in 0..*rows {
        for value in row.chunks_exact_mut(VALUE_BYTES) {
            value.copy_from_slice(&bf16::from_f32(size * uniform(&mut state)).to_le_bytes());
        }
        out.write_all(&row)?;
    }
    Ok(())
}

/// The next number between −1 and 1 (`SplitMix64`).
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}
