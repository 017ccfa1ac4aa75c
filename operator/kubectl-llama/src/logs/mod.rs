//! `kubectl llama logs`: logs of the worker pods, each line with its group and pod.

pub mod choose;

use std::io::Write;

use futures::{AsyncBufRead, AsyncBufReadExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, LogParams};
use llama_operator::labels;
use tokio::sync::mpsc;

use choose::Source;

use crate::Health;
use crate::args::LogsFlags;
use crate::cluster::Cluster;
use crate::error::Error;

/// Longest line that is shown whole, in bytes.
const LINE: usize = 64 << 10;
/// Most bytes of one pod's log, unless it is followed.
const LOG: i64 = 64 << 20;
/// Lines that wait to be written while logs are followed.
const QUEUE: usize = 1024;

/// Writes the logs that `flags` ask for.
pub async fn run(
    cluster: &Cluster,
    flags: &LogsFlags,
    out: &mut (dyn Write + Send),
) -> Result<Health, Error> {
    let deployment = cluster.deployment(&flags.name).await?;
    let selector = ListParams::default().labels(&labels::of_deployment(&flags.name));
    let attempt = format!("list the pods of LlamaDeployment {}", flags.name);
    let pods: Api<Pod> = cluster.api(false);
    let all = cluster.list(&attempt, &pods, &selector).await?;
    let chosen = choose::choose(&deployment, &all, flags.group, flags.rank);
    let chosen = chosen.map_err(Error::Unexpected)?;
    for sentence in &chosen.without {
        eprintln!("{sentence}");
    }
    if chosen.sources.is_empty() && chosen.without.is_empty() {
        eprintln!("LlamaDeployment {} has no pods.", flags.name);
    }
    if flags.follow {
        follow(cluster, &pods, flags, chosen.sources, out).await?;
    } else {
        for source in &chosen.sources {
            show(cluster, &pods, flags, source, out).await?;
        }
    }
    Ok(Health::Good)
}

fn params(flags: &LogsFlags, source: &Source) -> LogParams {
    LogParams {
        container: Some(source.container.clone()),
        follow: flags.follow,
        limit_bytes: (!flags.follow).then_some(LOG),
        since_seconds: flags
            .since
            .and_then(|since| i64::try_from(since.as_secs().max(1)).ok()),
        tail_lines: Some(flags.tail.into()),
        ..LogParams::default()
    }
}

/// Writes what there is of the log of `source`.
async fn show(
    cluster: &Cluster,
    pods: &Api<Pod>,
    flags: &LogsFlags,
    source: &Source,
    out: &mut (dyn Write + Send),
) -> Result<(), Error> {
    let attempt = format!("read the log of pod {}", source.pod);
    let params = params(flags, source);
    let opened = pods.log_stream(&source.pod, &params);
    let mut log = std::pin::pin!(cluster.ask(&attempt, opened).await?);
    let limit = cluster.deadline();
    loop {
        let next = tokio::time::timeout(limit, line(&mut log)).await;
        let next = next.map_err(|_| Error::NoAnswer {
            attempt: attempt.clone(),
            limit,
        })?;
        match next {
            Ok(Some(line)) => write_line(out, &source.prefix, &line)?,
            Ok(None) => return Ok(()),
            Err(error) => return Err(Error::Unexpected(format!("cannot {attempt}: {error}"))),
        }
    }
}

/// Writes the logs of `sources` as their lines come, until all have ended.
async fn follow(
    cluster: &Cluster,
    pods: &Api<Pod>,
    flags: &LogsFlags,
    sources: Vec<Source>,
    out: &mut (dyn Write + Send),
) -> Result<(), Error> {
    let (lines, mut queue) = mpsc::channel(QUEUE);
    for source in sources {
        let attempt = format!("read the log of pod {}", source.pod);
        let params = params(flags, &source);
        // One after the other: the failed rank's lines are the first in the queue.
        let log = cluster
            .ask(&attempt, pods.log_stream(&source.pod, &params))
            .await?;
        let lines = lines.clone();
        tokio::spawn(async move {
            let mut log = std::pin::pin!(log);
            loop {
                match line(&mut log).await {
                    Ok(Some(line)) => {
                        if lines.send((source.prefix.clone(), line)).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => return eprintln!("the log of pod {} has ended", source.pod),
                    Err(error) => return eprintln!("cannot {attempt}: {error}"),
                }
            }
        });
    }
    drop(lines);
    while let Some((prefix, line)) = queue.recv().await {
        write_line(out, &prefix, &line)?;
        if queue.is_empty() {
            out.flush()?;
        }
    }
    Ok(())
}

fn write_line(out: &mut (dyn Write + Send), prefix: &str, line: &[u8]) -> Result<(), Error> {
    writeln!(out, "{prefix}{}", String::from_utf8_lossy(line))?;
    Ok(())
}

/// The next line without its end, cut after [`LINE`] bytes; `None` at the end of `log`.
async fn line<R: AsyncBufRead + Unpin>(log: &mut R) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut begun = false;
    loop {
        let chunk = log.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(begun.then_some(line));
        }
        begun = true;
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let (text, used) = match end {
            Some(end) => (&chunk[..end], end + 1),
            None => (chunk, chunk.len()),
        };
        let room = LINE.saturating_sub(line.len());
        line.extend_from_slice(&text[..text.len().min(room)]);
        log.consume_unpin(used);
        if end.is_some() {
            return Ok(Some(line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(text: &[u8]) -> Vec<Vec<u8>> {
        let mut log = futures::io::BufReader::with_capacity(3, futures::io::Cursor::new(text));
        let mut all = Vec::new();
        while let Some(line) = line(&mut log).await.expect("memory can be read") {
            all.push(line);
        }
        all
    }

    #[tokio::test]
    async fn lines_are_whole_and_bounded() {
        assert_eq!(
            lines(b"first\n\nlast").await,
            [&b"first"[..], b"", b"last"].map(<[u8]>::to_vec)
        );
        assert!(lines(b"").await.is_empty());
        let long = [vec![b'a'; LINE + 10], b"\nnext\n".to_vec()].concat();
        let all = lines(&long).await;
        assert_eq!((all[0].len(), &*all[1]), (LINE, &b"next"[..]));
    }
}
