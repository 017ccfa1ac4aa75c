//! Numbers that Linux tells of a process.

/// The number behind `field` in a file such as `/proc/self/status`, in bytes where
/// the file counts in kB; `None` where the system has no such file or field.
pub(crate) fn number(file: &str, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut words = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?
        .split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    Some(match words.next() {
        Some("kB") => number * 1024,
        _ => number,
    })
}
