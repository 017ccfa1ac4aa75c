//! The forward pass written down once more, in f64 and without any cleverness.

use llama_model::LlamaConfig;
use llama_model::config::RopeScaling;
use llama_model::fixture::GgufWriter;

struct Weights<'a>(&'a GgufWriter);

impl Weights<'_> {
    fn get(&self, name: &str) -> Vec<f64> {
        let found = self.0.tensors.iter().find(|tensor| tensor.0 == name);
        let (.., bytes) = found.unwrap_or_else(|| panic!("no {name}"));
        bytes
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect()
    }

    fn multiply(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.get(name);
        let rows = weight.chunks_exact(x.len());
        rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum())
            .collect()
    }

    fn normalize(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(1e-5_f32)).sqrt();
        let weight = self.get(name);
        x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
    }
}

fn rotate(config: &LlamaConfig, factors: Option<&[f64]>, heads: &mut [f64], position: usize) {
    let scale = match config.rope.scaling {
        RopeScaling::Linear(scale) => scale,
        _ => 1.0,
    };
    for head in heads.chunks_exact_mut(config.head_dim) {
        for pair in 0..config.rope.dim / 2 {
            let exponent = -2.0 * pair as f64 / config.rope.dim as f64;
            let factor = factors.map_or(1.0, |factors| factors[pair]);
            let angle = position as f64 / scale * config.rope.base.powf(exponent) / factor;
            let (x, y) = (head[2 * pair], head[2 * pair + 1]);
            head[2 * pair] = x * angle.cos() - y * angle.sin();
            head[2 * pair + 1] = x * angle.sin() + y * angle.cos();
        }
    }
}

/// Logits after the last of `tokens`.
pub(super) fn logits(writer: &GgufWriter, config: &LlamaConfig, tokens: &[u32]) -> Vec<f64> {
    let weights = Weights(writer);
    let has = |name: &str| writer.tensors.iter().any(|tensor| tensor.0 == name);
    let factors = has("rope_freqs.weight").then(|| weights.get("rope_freqs.weight"));
    let embedding = weights.get("token_embd.weight");
    let mut stream: Vec<Vec<f64>> = tokens
        .iter()
        .map(|token| embedding[*token as usize * config.hidden..][..config.hidden].to_vec())
        .collect();
    let group = config.heads / config.kv_heads;
    for layer in 0..config.layers.len() {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (position, x) in stream.iter_mut().enumerate() {
            let n = weights.normalize(&name("attn_norm"), x);
            let mut q = weights.multiply(&name("attn_q"), &n);
            let mut k = weights.multiply(&name("attn_k"), &n);
            rotate(config, factors.as_deref(), &mut q, position);
            rotate(config, factors.as_deref(), &mut k, position);
            keys.push(k);
            values.push(weights.multiply(&name("attn_v"), &n));
            let mut attended = vec![0.0; config.query_width()];
            for head in 0..config.heads {
                let of_kv = |x: &[f64]| -> Vec<f64> {
                    x[head / group * config.head_dim..][..config.head_dim].to_vec()
                };
                let q = &q[head * config.head_dim..][..config.head_dim];
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|k| q.iter().zip(of_kv(k)).map(|(q, k)| q * k).sum::<f64>())
                    .map(|score| (score / (config.head_dim as f64).sqrt()).exp())
                    .collect();
                let total: f64 = scores.iter().sum();
                for (score, v) in scores.iter().zip(&values) {
                    for (i, v) in of_kv(v).into_iter().enumerate() {
                        attended[head * config.head_dim + i] += score / total * v;
                    }
                }
            }
            for (x, o) in x
                .iter_mut()
                .zip(weights.multiply(&name("attn_output"), &attended))
            {
                *x += o;
            }
        }
        for x in &mut stream {
            let n = weights.normalize(&name("ffn_norm"), x);
            let gate = weights.multiply(&name("ffn_gate"), &n);
            let up = weights.multiply(&name("ffn_up"), &n);
            let inner: Vec<f64> = gate
                .iter()
                .zip(up)
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            for (x, d) in x
                .iter_mut()
                .zip(weights.multiply(&name("ffn_down"), &inner))
            {
                *x += d;
            }
        }
    }
    let last = weights.normalize("output_norm.weight", stream.last().expect("tokens"));
    let output = if has("output.weight") {
        "output.weight"
    } else {
        "token_embd.weight"
    };
    weights.multiply(output, &last)
}
