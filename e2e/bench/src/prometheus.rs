//! Reads metrics in the Prometheus and `OpenMetrics` text formats.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// One line of metrics.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Sample {
    /// The value of a label; empty where it has none of that name.
    pub(crate) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// Sums of samples, or how much they grew, by some key.
pub(crate) type Sums = BTreeMap<String, f64>;

/// All lines of one look.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Metrics(Vec<Sample>);

impl Metrics {
    /// Reads a text; what it does not understand is left out.
    pub(crate) fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(sample).collect())
    }

    /// The samples called `name`.
    pub(crate) fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// The sum over all samples called `name`.
    pub(crate) fn total(&self, name: &str) -> f64 {
        self.named(name).map(|sample| sample.value).sum()
    }

    /// Sums of the samples called `name`, by what `key` makes of each; samples without a
    /// key are left out.
    pub(crate) fn sums(&self, name: &str, key: impl Fn(&Sample) -> Option<String>) -> Sums {
        let mut sums = Sums::new();
        for sample in self.named(name) {
            if let Some(key) = key(sample) {
                *sums.entry(key).or_default() += sample.value;
            }
        }
        sums
    }
}

/// How much each entry of `after` is above that of `before`, where it is.
pub(crate) fn growth(before: &Sums, after: &Sums) -> Sums {
    after
        .iter()
        .map(|(key, value)| (key.clone(), value - before.get(key).unwrap_or(&0.0)))
        .filter(|(_, grown)| *grown > 0.0)
        .collect()
}

/// A sum of counters as the whole number that it is.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counters are whole, not negative, and far from the limits"
)]
pub(crate) fn count(sum: f64) -> u64 {
    sum.round() as u64
}

/// Sums of counters as whole numbers.
pub(crate) fn counts(sums: &Sums) -> BTreeMap<String, u64> {
    sums.iter()
        .map(|(key, sum)| (key.clone(), count(*sum)))
        .collect()
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (head, labels, rest) = match line.split_once('{') {
        None => {
            let (head, rest) = line.split_once(' ')?;
            (head, BTreeMap::new(), rest)
        }
        Some((head, rest)) => {
            let (labels, rest) = labels(rest)?;
            (head, labels, rest)
        }
    };
    Some(Sample {
        name: head.to_owned(),
        labels,
        value: rest.split_whitespace().next()?.parse().ok()?,
    })
}

/// The labels up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let (value, behind) = unquoted(quoted)?;
        labels.insert(name.to_owned(), value);
        rest = behind;
    }
}

/// The text up to the closing quote, without its escapes, and what follows it.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match letters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

/// The metrics of a program that serves them without TLS on loopback.
pub(crate) async fn of_loopback(port: u16) -> anyhow::Result<Metrics> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
    let mut answer = Vec::new();
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_end(&mut answer).await
    };
    timeout(ANSWERS_WITHIN, exchange)
        .await
        .with_context(|| format!("no metrics from {address} within {ANSWERS_WITHIN:?}"))?
        .with_context(|| format!("read metrics from {address}"))?;
    let answer = String::from_utf8_lossy(&answer);
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(Metrics::parse(body)),
        _ => bail!("{address} answered {:?}", answer.lines().next()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP x_total Things\n# TYPE x_total counter\n\
        x_total{verb=\"GET\",resource=\"pods\"} 3\n\
        x_total{verb=\"GET\",resource=\"a\\\"b,c}\",} 4.5 1700000000\n\
        x_total{verb=\"PUT\",resource=\"\"} 1e+02\n\
        up 1\nnonsense\n";

    #[test]
    fn samples_are_summed_by_key() {
        let metrics = Metrics::parse(TEXT);
        assert!((metrics.total("x_total") - 107.5).abs() < 1e-9);
        assert!((metrics.total("up") - 1.0).abs() < 1e-9);
        let sums = metrics.sums("x_total", |sample| {
            (sample.label("verb") == "GET").then(|| sample.label("resource").to_owned())
        });
        let expected = [("a\"b,c}".to_owned(), 4.5), ("pods".to_owned(), 3.0)];
        assert_eq!(sums, BTreeMap::from(expected));
    }

    #[test]
    fn growth_leaves_out_what_stayed() {
        let of = |pairs: &[(&str, f64)]| {
            let owned = pairs.iter().map(|(key, value)| ((*key).to_owned(), *value));
            owned.collect::<Sums>()
        };
        let (before, after) = (
            of(&[("a", 1.0), ("b", 2.0)]),
            of(&[("a", 1.0), ("b", 5.0), ("c", 7.0)]),
        );
        assert_eq!(growth(&before, &after), of(&[("b", 3.0), ("c", 7.0)]));
    }
}
