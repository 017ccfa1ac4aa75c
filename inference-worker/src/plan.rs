//! `llama-worker plan`: what memory a model takes in a layout, from its headers.

mod embedding;

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use llama_model::advice::{Advice, Limit, advise};
use llama_model::checkpoint::LoadFormat;
use llama_model::memory::{KvFormat, MemoryPlan, MemoryRequest, Target};
use llama_model::{Checkpoint, EmbeddingCheckpoint, Layout, ModelError};
use serde_json::{Value, json};

pub use self::embedding::EmbeddingReport;
use crate::adapters::{self, AdapterArgs};
use crate::quantity;
use crate::rank::STEP_TOKENS;

/// Lengths for which a plan says how many sequences fit.
const LENGTHS: [usize; 4] = [2048, 8192, 32_768, 131_072];

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LoadFormatArg {
    /// From the files of the checkpoint.
    #[default]
    Auto,
    /// Random numbers in the shape of config.json.
    Dummy,
}

impl From<LoadFormatArg> for LoadFormat {
    fn from(format: LoadFormatArg) -> Self {
        match format {
            LoadFormatArg::Auto => Self::Auto,
            LoadFormatArg::Dummy => Self::Dummy,
        }
    }
}

/// Precision of keys, values and activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// As models are served: keys and values in half precision.
    #[default]
    F16,
    /// Everything in full precision, for comparisons.
    F32,
    /// Keys and values as 8-bit integers with a scale for every 32 of them.
    Int8,
}

impl From<DtypeArg> for KvFormat {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::F16 => Self::F16,
            DtypeArg::F32 => Self::F32,
            DtypeArg::Int8 => Self::Int8,
        }
    }
}

/// A model and how its ranks divide it.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// A GGUF file, or a folder with config.json and safetensors.
    #[arg(long)]
    pub model: PathBuf,
    /// Where weights come from.
    #[arg(long, value_enum, default_value_t)]
    pub load_format: LoadFormatArg,
    /// Ranks that share each layer.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub tensor_parallel: u32,
    /// Stages of consecutive layers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub pipeline_parallel: u32,
}

impl ModelArgs {
    /// How the ranks divide the model.
    pub fn layout(&self) -> Layout {
        Layout {
            tensor: self.tensor_parallel as usize,
            pipeline: self.pipeline_parallel as usize,
        }
    }

    /// Opens the checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open(&self) -> Result<Checkpoint, ModelError> {
        let checkpoint = Checkpoint::open(&self.model, self.load_format.into())?;
        for warning in checkpoint.warnings() {
            tracing::warn!("{warning}");
        }
        Ok(checkpoint)
    }
}

/// Flags of `llama-worker plan`.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// What to plan.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Longest sequence in tokens; the model's own limit when absent.
    #[arg(long)]
    pub max_tokens: Option<usize>,
    /// Precision of keys and values.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeArg,
    /// Memory of all ranks together on CPU cores, such as 16Gi.
    #[arg(long, value_parser = quantity::bytes, conflicts_with = "device_memory")]
    pub memory: Option<u64>,
    /// Threads of each rank on CPU cores.
    #[arg(long, default_value_t = 1)]
    pub threads_per_rank: usize,
    /// Memory of each rank's device, such as 79.65Gi: plans for devices.
    #[arg(long, value_parser = quantity::bytes)]
    pub device_memory: Option<u64>,
    /// Share of a device's memory that may be used.
    #[arg(long, default_value_t = 0.92, value_parser = share)]
    pub device_utilization: f64,
    /// What context, communication and activations take of a device.
    #[arg(long, default_value = "3Gi", value_parser = quantity::bytes)]
    pub device_runtime: u64,
    /// Room for adapters.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// Prints the plan as JSON.
    #[arg(long)]
    pub json: bool,
}

fn share(text: &str) -> Result<f64, String> {
    text.parse::<f64>()
        .ok()
        .filter(|share| *share > 0.0 && *share <= 1.0)
        .ok_or_else(|| "expected a number above 0, up to 1".to_owned())
}

/// The plan of either kind of model.
#[derive(Clone, Debug)]
pub enum Planned {
    /// Of one that writes text.
    Text(Box<Report>),
    /// Of one that makes vectors of texts.
    Embedding(EmbeddingReport),
}

impl Planned {
    /// Plans what `args` ask for.
    ///
    /// # Errors
    /// When the model cannot be opened or split so.
    pub fn new(args: &PlanArgs) -> Result<Self, ModelError> {
        Ok(match EmbeddingCheckpoint::open(&args.model.model)? {
            Some(checkpoint) => Self::Embedding(EmbeddingReport::new(args, &checkpoint)?),
            None => Self::Text(Box::new(Report::new(args)?)),
        })
    }

    /// Whether it fits the memory that was named, if any was.
    pub fn fits(&self) -> bool {
        match self {
            Self::Text(report) => report.fits(),
            Self::Embedding(report) => report.fits(),
        }
    }

    /// The plan as JSON. Sizes are bytes.
    pub fn json(&self) -> Value {
        match self {
            Self::Text(report) => report.json(),
            Self::Embedding(report) => report.json(),
        }
    }

    /// The plan as a table.
    pub fn table(&self) -> String {
        match self {
            Self::Text(report) => report.table(),
            Self::Embedding(report) => report.table(),
        }
    }
}

/// A plan and what it was made for.
#[derive(Clone, Debug)]
pub struct Report {
    model: String,
    layout: Layout,
    plan: MemoryPlan,
    limit: Option<Limit>,
    /// What would fit, where the plan does not.
    advice: Option<Advice>,
}

impl Report {
    /// Plans what `args` ask for.
    ///
    /// # Errors
    /// When the model cannot be opened or split so.
    pub fn new(args: &PlanArgs) -> Result<Self, ModelError> {
        let checkpoint = args.model.open()?;
        let layout = args.model.layout();
        let context = checkpoint.config().context_length;
        let request = MemoryRequest {
            layout,
            ranks: 0..layout.world(),
            target: match args.device_memory {
                Some(_) => Target::Device {
                    runtime: args.device_runtime,
                },
                None => Target::Cpu {
                    threads: args.threads_per_rank,
                },
            },
            max_tokens: args.max_tokens.unwrap_or(context),
            step_tokens: STEP_TOKENS as usize,
            kv: args.dtype.into(),
            adapters: adapters::room(args.adapters),
        };
        let plan = MemoryPlan::new(&checkpoint, &request)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a u64"
        )]
        let usable = |memory: u64| (memory as f64 * args.device_utilization) as u64;
        let limit = match args.device_memory {
            Some(memory) => Some(Limit::Each(usable(memory))),
            None => args.memory.map(Limit::Together),
        };
        let advice = match limit {
            Some(limit) if limit.sequences(&plan, plan.max_tokens) == 0 => {
                Some(advise(&checkpoint, &request, &plan, limit)?)
            }
            _ => None,
        };
        Ok(Self {
            model: checkpoint.path().display().to_string(),
            layout,
            plan,
            limit,
            advice,
        })
    }

    /// Whether one sequence of the longest length fits, or no memory was named.
    pub fn fits(&self) -> bool {
        self.advice.is_none()
    }

    /// The lengths that are interesting for this plan, with the sequences that fit.
    fn sequences(&self) -> Vec<(usize, usize)> {
        let Some(limit) = self.limit else {
            return Vec::new();
        };
        let longest = self.plan.max_tokens;
        let shorter = LENGTHS.into_iter().filter(|length| *length < longest);
        shorter
            .chain([longest])
            .map(|length| (length, limit.sequences(&self.plan, length)))
            .collect()
    }

    /// The plan as JSON. Sizes are bytes.
    pub fn json(&self) -> Value {
        let plan = &self.plan;
        let sequences: serde_json::Map<String, Value> = self
            .sequences()
            .into_iter()
            .map(|(length, count)| (length.to_string(), count.into()))
            .collect();
        json!({
            "model": self.model,
            "layout": self.layout,
            "plan": plan,
            "weights": plan.weights(),
            "kv_bytes_of_longest": plan.kv_bytes(plan.max_tokens),
            "adapters": plan.adapters(),
            "total_with_one_sequence": plan.total(1),
            "fits": self.fits(),
            "sequences": sequences,
            "advice": self.advice,
        })
    }

    /// The plan as a table.
    pub fn table(&self) -> String {
        let plan = &self.plan;
        let mut text = format!(
            "{}\ntensor parallel {} × pipeline parallel {} = {} ranks; each KV head on {} of a stage; {}\n\n",
            self.model,
            self.layout.tensor,
            self.layout.pipeline,
            self.layout.world(),
            plan.kv_replicas,
            if plan.is_canonical {
                "same bits as one rank"
            } else {
                "sums rounded otherwise than on one rank"
            },
        );
        text.push_str(
            "rank        weights     read once     KV a token   KV of longest       reserve\n",
        );
        for rank in &plan.ranks {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{:>4} {:>14} {:>13} {:>14} {:>15} {:>13}",
                rank.rank,
                size(rank.weights),
                size(rank.read),
                size(rank.kv_bytes_per_token + rank.chunked_kv_bytes_per_token),
                size(rank.kv_bytes(plan.max_tokens, plan.chunk)),
                size(rank.reserve + rank.sequence_overhead),
            );
        }
        let _ = writeln!(
            text,
            "\nall ranks with one sequence of {} tokens: {}",
            plan.max_tokens,
            size(plan.total(1))
        );
        if plan.adapters() > 0 {
            let _ = writeln!(text, "  of it room for adapters: {}", size(plan.adapters()));
        }
        for (length, count) in self.sequences() {
            let _ = writeln!(text, "  fits {count} sequences of {length} tokens");
        }
        if let Some(advice) = &self.advice {
            text.push_str(&refusal(plan, advice));
        }
        text
    }
}

fn refusal(plan: &MemoryPlan, advice: &Advice) -> String {
    let mut text = format!(
        "\ndoes not fit: not one sequence of {} tokens\n",
        plan.max_tokens
    );
    match (advice.max_tokens, advice.layout, advice.sequences) {
        (None, None, _) => text.push_str("  nothing that was tried would fit\n"),
        (shorter, layout, sequences) => {
            if let Some(tokens) = shorter {
                let _ = writeln!(text, "  would fit: --max-tokens={tokens}");
            }
            if let (Some(layout), Some(sequences)) = (layout, sequences) {
                let _ = writeln!(
                    text,
                    "  would fit: --tensor-parallel={} --pipeline-parallel={} ({} ranks, {sequences} sequences)",
                    layout.tensor,
                    layout.pipeline,
                    layout.world()
                );
            }
        }
    }
    text
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in units {
        if bytes >= 1 << shift {
            return format!("{:.2} {unit}", bytes as f64 / f64::from(1 << shift));
        }
    }
    format!("{bytes} B")
}
