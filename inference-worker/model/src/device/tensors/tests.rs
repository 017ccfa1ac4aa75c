//! Every operation against a plain computation in f64.

#![allow(
    clippy::similar_names,
    clippy::many_single_char_names,
    clippy::struct_field_names,
    clippy::too_many_lines,
    reason = "formulas with their usual letters, and one whole layer written down"
)]

use llama_checkpoint::blocks::KvGroup;
use llama_checkpoint::config::{RopePairs, Temperature};
use proptest::prelude::*;

use super::super::adapters::StepAdapters;
use super::super::cache::CacheShape;
use super::super::collective::Staged;
use super::super::layer::{Experts, FeedForward, Gated, Layer, Pass};
use super::super::matrix::Precision;
use super::*;
use crate::collective::LocalCollective;
use crate::kernels::Format;
use crate::lora::Adapters;
use crate::step::{Segment, Wanted};

/// Random numbers between −1 and 1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn tensor(&mut self, rows: usize, columns: usize) -> Tensor {
        let values = self.values(rows * columns);
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("a tensor")
    }
}

type Rows = Vec<Vec<f64>>;

fn rows_of(x: &Tensor) -> Rows {
    let rows = x.to_vec2::<f32>().expect("a matrix");
    rows.into_iter()
        .map(|row| row.into_iter().map(f64::from).collect())
        .collect()
}

/// `x · weightᵀ`.
fn multiply(x: &Rows, weight: &Rows) -> Rows {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    x.iter()
        .map(|x| weight.iter().map(|w| dot(x, w)).collect())
        .collect()
}

fn norm(x: &[f64], epsilon: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().map(|x| x / (mean + epsilon).sqrt()).collect()
}

/// The largest difference, as a part of the largest value.
fn error(a: &Tensor, b: &Rows) -> f64 {
    let a = rows_of(a);
    assert_eq!((a.len(), a[0].len()), (b.len(), b[0].len()));
    let size = b
        .iter()
        .flatten()
        .fold(0.0_f64, |most, b| most.max(b.abs()));
    let differences = a.iter().flatten().zip(b.iter().flatten());
    let difference = differences.fold(0.0_f64, |most, (a, b)| most.max((a - b).abs()));
    assert!(size > 0.0 && difference.is_finite());
    difference / size
}

fn operations(steps: &[f64]) -> TensorOperations {
    TensorOperations::new(&Device::Cpu, steps.to_vec())
}

#[test]
fn matrices_of_every_format_multiply() {
    use Precision::{Full, Stored};
    let mut noise = Noise(1);
    for (format, precision, limit) in [
        (Format::F32, Stored, 1e-6),
        (Format::F16, Stored, 2e-3),
        (Format::Bf16, Stored, 2e-2),
        (Format::F8E4M3, Stored, 2e-2),
        (Format::F16, Full, 1e-6),
        (Format::Bf16, Full, 1e-6),
        (Format::F8E4M3, Full, 1e-6),
        (Format::Q8_0, Stored, 1e-2),
        (Format::Q4_0, Stored, 1e-2),
        (Format::Q4_1, Full, 1e-2),
    ] {
        let place = (&Device::Cpu, precision);
        for columns in [96, 128] {
            let (rows, scales) = (24, [0.25, 3.0, 0.5].repeat(8));
            let bytes = crate::fixture::random_matrix(format, columns, rows, 7);
            let mut plain: Rows = Vec::new();
            for (row, scale) in bytes.chunks_exact(format.row_bytes(columns)).zip(&scales) {
                let mut values = vec![0.0; columns];
                crate::kernels::unpack(format, row, Some(*scale), &mut values);
                plain.push(values.into_iter().map(f64::from).collect());
            }
            let bytes = (&*bytes, Some(&*scales));
            let matrix = Matrix::from_bytes(bytes, format, (rows, columns), place);
            let matrix = matrix.expect("a matrix");
            for count in [1, 5, 33] {
                let x = noise.tensor(count, columns);
                let product = operations(&[]).linear(&x, &matrix).expect("multiplies");
                let error = error(&product, &multiply(&rows_of(&x), &plain));
                assert!(
                    error < limit,
                    "{format:?}, {count} rows of {columns}: {error}"
                );
            }
        }
    }
}

#[test]
fn bytes_and_scales_that_make_no_matrix_are_refused() {
    let refused = |bytes: usize, scales: &[f32]| {
        let bytes = (&*vec![0; bytes], Some(scales));
        let place = (&Device::Cpu, Precision::Stored);
        let matrix = Matrix::from_bytes(bytes, Format::Q8_0, (2, 64), place);
        matrix.expect_err("does not fit").to_string()
    };
    let error = refused(68, &[1.0, 1.0]);
    assert!(
        error.starts_with("68 bytes for 2 rows of 64 values in Q8_0, expected 136"),
        "{error}"
    );
    let error = refused(136, &[1.0]);
    assert!(error.starts_with("1 scales for 2 rows"), "{error}");
}

#[test]
fn norms_gates_and_sums_are_those_of_f64() {
    let mut noise = Noise(2);
    let (x, y, weight) = (
        noise.tensor(5, 64),
        noise.tensor(5, 64),
        noise.tensor(1, 64),
    );
    let ops = operations(&[]);
    let (xs, ys, weights) = (rows_of(&x), rows_of(&y), rows_of(&weight).remove(0));
    let normed = ops.rms_norm(&x, &weight.squeeze(0).expect("a row"), 1e-2);
    let expected: Rows = xs
        .iter()
        .map(|row| {
            norm(row, f64::from(1e-2_f32))
                .iter()
                .zip(&weights)
                .map(|(x, w)| x * w)
                .collect()
        })
        .collect();
    assert!(error(&normed.expect("norms"), &expected) < 1e-6);
    let both = |f: &dyn Fn(f64, f64) -> f64| -> Rows {
        let pairs = xs.iter().zip(&ys);
        pairs
            .map(|(x, y)| x.iter().zip(y).map(|(x, y)| f(*x, *y)).collect())
            .collect()
    };
    let gated = ops.silu_mul(&x, &y).expect("gates");
    assert!(error(&gated, &both(&|x, y| x / (1.0 + (-x).exp()) * y)) < 1e-6);
    let sum = ops.add(&x, &y).expect("adds");
    assert!(error(&sum, &both(&|x, y| x + y)) < 1e-6);
}

/// How heads are made up, and how they attend.
#[derive(Clone, Debug)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    width: usize,
    steps: Vec<f64>,
    rules: AttentionRules,
}

impl Heads {
    /// One head after turning, normalizing and sharpening.
    fn prepare(&self, head: &[f64], position: usize, is_query: bool) -> Vec<f64> {
        let mut out = head.to_vec();
        for (pair, step) in self
            .steps
            .iter()
            .enumerate()
            .filter(|_| self.rules.rotary.is_some())
        {
            let (a, b) = match self.rules.rotary {
                Some(RopePairs::Halves) => (pair, pair + self.steps.len()),
                _ => (2 * pair, 2 * pair + 1),
            };
            let (sin, cos) = (position as f64 * step).sin_cos();
            out[a] = head[a] * cos - head[b] * sin;
            out[b] = head[a] * sin + head[b] * cos;
        }
        if let Some(epsilon) = self.rules.qk_norm {
            out = norm(&out, f64::from(epsilon));
        }
        if let Some(Temperature { floor_scale, scale }) =
            self.rules.temperature.filter(|_| is_query)
        {
            let factor = 1.0 + scale * (1.0 + ((position + 1) as f64 / floor_scale).floor()).ln();
            for x in &mut out {
                *x *= factor;
            }
        }
        out
    }

    /// What the token at `position` attends to, of a whole sequence.
    fn attend(&self, [q, k, v]: [&Rows; 3], position: usize) -> Vec<f64> {
        let mut out = Vec::new();
        let of =
            |row: &[f64], head: usize| row[head * self.width..(head + 1) * self.width].to_vec();
        for head in 0..self.heads {
            let kv = head * self.kv_heads / self.heads;
            let query = self.prepare(&of(&q[position], head), position, true);
            let sees = |key: &usize| {
                let chunk = self.rules.chunk.unwrap_or(usize::MAX);
                key / chunk == position / chunk
            };
            let seen: Vec<usize> = (0..=position).filter(sees).collect();
            let powers: Vec<f64> = seen
                .iter()
                .map(|key| {
                    let key = self.prepare(&of(&k[*key], kv), *key, false);
                    let score: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                    (score / (self.width as f64).sqrt()).exp()
                })
                .collect();
            let total: f64 = powers.iter().sum();
            for i in 0..self.width {
                let parts = seen.iter().zip(&powers);
                out.push(
                    parts
                        .map(|(key, power)| power / total * of(&v[*key], kv)[i])
                        .sum(),
                );
            }
        }
        out
    }

    fn cache(&self, slots: usize, max_tokens: usize) -> TensorCache {
        let shape = CacheShape {
            slots,
            max_tokens,
            kv_heads: self.kv_heads,
            head_dim: self.width,
            blocks: None,
            chunk: self.rules.chunk,
            layers: vec![match self.rules.chunk {
                Some(_) => KvGroup::Chunk,
                None => KvGroup::All,
            }],
        };
        TensorCache::new(shape, DType::F32, &Device::Cpu).expect("small")
    }
}

/// Two sequences in steps of the lengths `cuts`, both in every step, against all
/// of each at once in f64.
fn attention_is_exact(heads: &Heads, cuts: &[usize]) {
    let tokens: usize = cuts.iter().sum();
    let mut noise = Noise(3);
    let mut projection = |count: usize| noise.tensor(tokens, count * heads.width);
    let sequences: Vec<[Tensor; 3]> = (0..2)
        .map(|_| [heads.heads, heads.kv_heads, heads.kv_heads].map(&mut projection))
        .collect();
    let plain: Vec<[Rows; 3]> = sequences
        .iter()
        .map(|qkv| qkv.each_ref().map(rows_of))
        .collect();
    let ops = operations(&heads.steps);
    let mut cache = heads.cache(2, tokens);
    let mut start = 0;
    for len in cuts {
        let places = [1, 0].map(|slot| Sequence {
            slot,
            start,
            len: *len,
        });
        for place in &places {
            cache.extend(&segment(place));
        }
        let rows = ops.rows(&places).expect("rows");
        let part = |which: usize| {
            let parts = sequences
                .iter()
                .map(|qkv| qkv[which].narrow(0, start, *len));
            let parts: Vec<Tensor> = parts.collect::<Result<_>>().expect("rows");
            Tensor::cat(&parts, 0).expect("one width")
        };
        let (q, k, v) = (part(0), part(1), part(2));
        let attended = ops.attend((0, &heads.rules), [&q, &k, &v], &rows, &mut cache);
        let expected: Rows = plain
            .iter()
            .flat_map(|qkv| (start..start + len).map(|at| heads.attend(qkv.each_ref(), at)))
            .collect();
        let error = error(&attended.expect("attends"), &expected);
        assert!(error < 2e-6, "{heads:?} from {start}: {error}");
        start += len;
    }
}

fn segment(place: &Sequence) -> Segment {
    Segment {
        slot: u32::try_from(place.slot).expect("small"),
        start: u32::try_from(place.start).expect("small"),
        tokens: vec![0; place.len],
        logits: Wanted::None,
        adapter: None,
        tables: None,
    }
}

fn steps(pairs: usize) -> Vec<f64> {
    (0..pairs)
        .map(|pair| 10_000_f64.powf(-(pair as f64) / pairs as f64))
        .collect()
}

#[test]
fn attention_of_llama_3_and_4_is_that_of_f64() {
    let all = Heads {
        heads: 6,
        kv_heads: 2,
        width: 8,
        steps: steps(4),
        rules: AttentionRules::causal(RopePairs::Neighbours),
    };
    let with = |change: &dyn Fn(&mut Heads)| {
        let mut heads = all.clone();
        change(&mut heads);
        attention_is_exact(&heads, &[5, 1, 1, 9, 4]);
    };
    with(&|_| {});
    with(&|heads| heads.kv_heads = 6);
    with(&|heads| heads.steps = steps(3));
    with(&|heads| heads.rules.rotary = Some(RopePairs::Halves));
    with(&|heads| heads.rules.chunk = Some(4));
    with(&|heads| heads.rules.chunk = Some(7));
    with(&|heads| {
        heads.rules.chunk = Some(6);
        heads.rules.qk_norm = Some(1e-2);
    });
    with(&|heads| {
        heads.rules.rotary = None;
        heads.rules.temperature = Some(Temperature {
            floor_scale: 3.0,
            scale: 0.7,
        });
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn attention_does_not_depend_on_how_a_prompt_is_cut(
        cuts in proptest::collection::vec(1_usize..9, 1..5),
        chunk in proptest::option::of(1_usize..12),
    ) {
        let rules = AttentionRules { chunk, ..AttentionRules::causal(RopePairs::Halves) };
        let heads = Heads { heads: 4, kv_heads: 2, width: 4, steps: steps(2), rules };
        attention_is_exact(&heads, &cuts);
    }
}

#[test]
fn far_positions_turn_by_the_right_angle() {
    let ops = operations(&[1.0, 1e-3]);
    let start = 10_000_001;
    let rows = ops
        .rows(&[Sequence {
            slot: 0,
            start,
            len: 1,
        }])
        .expect("rows");
    let x = Tensor::new(&[[[1_f32, 0.0, 1.0, 0.0]]], &Device::Cpu).expect("a head");
    let turned = rows
        .turn(&x, RopePairs::Neighbours)
        .and_then(|x| x.squeeze(0));
    let (a, b) = (start as f64, start as f64 * 1e-3);
    let expected = vec![vec![a.cos(), a.sin(), b.cos(), b.sin()]];
    assert!(error(&turned.expect("turns"), &expected) < 1e-6);
}

#[test]
fn the_first_of_the_best_experts_is_chosen() {
    let scores = Tensor::new(&[[0_f32, 2.0, 2.0], [-1.0, -3.0, -2.0]], &Device::Cpu);
    let choices = operations(&[])
        .choose(&scores.expect("scores"))
        .expect("chooses");
    assert_eq!(choices.iter().map(|c| c.expert).collect::<Vec<_>>(), [1, 0]);
    assert!((choices[0].weight - 0.880_797).abs() < 1e-6);
    assert!((choices[1].weight - 0.268_941_42).abs() < 1e-6);
}

/// A network of `ffn` inner values over `hidden`.
fn gated(noise: &mut Noise, hidden: usize, ffn: usize) -> [Tensor; 3] {
    [(ffn, hidden), (ffn, hidden), (hidden, ffn)].map(|(rows, columns)| noise.tensor(rows, columns))
}

fn matrices([gate, up, down]: &[Tensor; 3]) -> Gated<Matrix> {
    let dense = |tensor: &Tensor| Matrix::from(tensor.clone());
    Gated {
        gate: dense(gate),
        up: dense(up),
        down: dense(down),
    }
}

fn through([gate, up, down]: &[Tensor; 3], x: &[f64]) -> Vec<f64> {
    let x = vec![x.to_vec()];
    let (g, u) = (multiply(&x, &rows_of(gate)), multiply(&x, &rows_of(up)));
    let inner = g[0]
        .iter()
        .zip(&u[0])
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u);
    multiply(&vec![inner.collect()], &rows_of(down)).remove(0)
}

#[test]
fn a_layer_with_experts_is_that_of_f64() {
    let (hidden, ffn, count) = (32, 48, 4);
    let mut noise = Noise(5);
    let heads = Heads {
        heads: 2,
        kv_heads: 1,
        width: 16,
        steps: steps(8),
        rules: AttentionRules {
            qk_norm: Some(1e-5),
            ..AttentionRules::causal(RopePairs::Neighbours)
        },
    };
    let [q, k, v, o] = [(32, 32), (16, 32), (16, 32), (32, 32)].map(|(r, c)| noise.tensor(r, c));
    let router = noise.tensor(count, hidden);
    let experts: Vec<_> = (0..count).map(|_| gated(&mut noise, hidden, ffn)).collect();
    let shared = gated(&mut noise, hidden, ffn);
    let norms = [noise.tensor(1, hidden), noise.tensor(1, hidden)];
    let weight = |tensor: &Tensor| Matrix::from(tensor.clone());
    let layer = Layer {
        attn_norm: norms[0].squeeze(0).expect("a row"),
        q: weight(&q),
        k: weight(&k),
        v: weight(&v),
        o: weight(&o),
        attention: heads.rules,
        ffn_norm: norms[1].squeeze(0).expect("a row"),
        feed_forward: FeedForward::Experts(Experts {
            router: weight(&router),
            experts: experts.iter().map(matrices).collect(),
            shared: matrices(&shared),
        }),
    };
    let x = noise.tensor(7, hidden);
    let ops = operations(&heads.steps);
    let place = Sequence {
        slot: 0,
        start: 0,
        len: 7,
    };
    let rows = ops.rows(&[place]).expect("rows");
    let none = Adapters::new();
    let mut pass = Pass {
        operations: &ops,
        rows: &rows,
        cache: &mut {
            let mut cache = heads.cache(1, 7);
            cache.extend(&segment(&place));
            cache
        },
        epsilon: 1e-5,
        adapters: &StepAdapters::new(&none, &[]),
        collective: &mut Staged(&mut LocalCollective),
    };
    let out = layer.forward(0, &x, &mut pass).expect("computes");

    let scaled = |x: &[f64], weight: &Tensor| -> Vec<f64> {
        let weight = rows_of(weight).remove(0);
        norm(x, f64::from(1e-5_f32))
            .iter()
            .zip(weight)
            .map(|(x, w)| x * w)
            .collect()
    };
    let plain = rows_of(&x);
    let normed: Rows = plain.iter().map(|x| scaled(x, &norms[0])).collect();
    let qkv = [&q, &k, &v].map(|weight| multiply(&normed, &rows_of(weight)));
    let mut chosen = std::collections::BTreeSet::new();
    let expected: Rows = (0..7)
        .map(|at| {
            let attended = vec![heads.attend(qkv.each_ref(), at)];
            let part = multiply(&attended, &rows_of(&o)).remove(0);
            let x: Vec<f64> = plain[at]
                .iter()
                .zip(part)
                .map(|(x, part)| x + part)
                .collect();
            let normed = scaled(&x, &norms[1]);
            let scores = multiply(&vec![normed.clone()], &rows_of(&router)).remove(0);
            let best = (0..count)
                .max_by(|a, b| scores[*a].total_cmp(&scores[*b]))
                .expect("experts");
            chosen.insert(best);
            let weight = 1.0 / (1.0 + (-scores[best]).exp());
            let input: Vec<f64> = normed.iter().map(|x| x * weight).collect();
            let routed = through(&experts[best], &input);
            let all = through(&shared, &normed);
            x.iter()
                .zip(routed)
                .zip(all)
                .map(|((x, r), s)| x + r + s)
                .collect()
        })
        .collect();
    assert!(chosen.len() > 1, "tokens go to different experts");
    let error = error(&out, &expected);
    assert!(error < 1e-5, "{error}");
}
