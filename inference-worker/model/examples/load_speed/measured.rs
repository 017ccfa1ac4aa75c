//! Starting processes and timing them from the outside.

use std::error::Error;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::fs::{Advice, fadvise};
use serde::Deserialize;

use crate::{kernel, rank};

/// A file was read with `dd`.
pub(crate) struct Reading {
    pub(crate) seconds: f64,
    pub(crate) from_disk: u64,
}

/// A process has loaded its part. Times are from before its start.
pub(crate) struct Loaded {
    pub(crate) seconds: f64,
    pub(crate) first_token: Option<f64>,
    /// The most memory that it had until it was loaded.
    pub(crate) peak: u64,
    /// Bytes that it asked the system for until then, and those of them that came from
    /// the disk.
    pub(crate) read: u64,
    pub(crate) from_disk: u64,
}

/// What a process says of itself when it has loaded.
#[derive(Deserialize, serde::Serialize)]
pub(crate) struct Told {
    pub(crate) peak: u64,
    pub(crate) read: u64,
    pub(crate) from_disk: u64,
}

/// Makes the kernel forget the pages of the file at `path`.
pub(crate) fn drop_pages(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // Pages that are not on the disk yet would stay.
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// The load average of the last minute.
pub(crate) fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let word = text.split_whitespace().next();
    word.and_then(|word| word.parse().ok()).unwrap_or(f64::NAN)
}

/// Reads the file at `path` from end to end.
pub(crate) fn dd(path: &Path) -> Result<Reading, Box<dyn Error>> {
    let mut input = std::ffi::OsString::from("if=");
    input.push(path);
    let started = Instant::now();
    let mut child = Command::new("dd")
        .arg(input)
        .args(["of=/dev/null", "bs=4M"])
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("dd: {error}"))?;
    let mut said = String::new();
    if let Some(errors) = &mut child.stderr {
        errors.read_to_string(&mut said)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    // Until somebody waits for it, the kernel tells what it did.
    let io = format!("/proc/{}/io", child.id());
    let from_disk = kernel::number(&io, "read_bytes").unwrap_or(0);
    if !child.wait()?.success() {
        return Err(format!("dd: {said}").into());
    }
    Ok(Reading { seconds, from_disk })
}

/// Loads `model` in `N` processes at once, one rank each.
pub(crate) fn load<const N: usize>(
    model: &Path,
    threads: usize,
) -> Result<[Loaded; N], Box<dyn Error>> {
    let program = std::env::current_exe()?;
    let started = Instant::now();
    let mut children = Vec::new();
    for number in 0..N {
        let child = Command::new(&program)
            .arg(rank::COMMAND)
            .arg(model)
            .args([number, N, threads].map(|number| number.to_string()))
            .stdout(Stdio::piped())
            .spawn()?;
        children.push(child);
    }
    let listening: Vec<_> = children
        .into_iter()
        .map(|child| std::thread::spawn(move || listen(child, started)))
        .collect();
    let mut all = Vec::new();
    for child in listening {
        let heard = child.join().map_err(|_| "a listening thread ended")?;
        all.push(heard?);
    }
    <[Loaded; N]>::try_from(all).map_err(|_| "a process is missing".into())
}

/// Notes when the process says that it has loaded, and that it has a token.
fn listen(mut child: Child, started: Instant) -> Result<Loaded, String> {
    let output = child.stdout.take().ok_or("a process without output")?;
    let mut lines = BufReader::new(output).lines();
    let mut next = || {
        let line = lines.next().and_then(Result::ok);
        (line, started.elapsed().as_secs_f64())
    };
    let (told, seconds) = next();
    let (token, first_token) = next();
    let status = child.wait().map_err(|error| error.to_string())?;
    let told = told.filter(|_| status.success());
    let told = told.ok_or_else(|| format!("a loading process ended with {status}"))?;
    let told: Told = serde_json::from_str(&told).map_err(|error| error.to_string())?;
    Ok(Loaded {
        seconds,
        first_token: token.map(|_| first_token),
        peak: told.peak,
        read: told.read,
        from_disk: told.from_disk,
    })
}
