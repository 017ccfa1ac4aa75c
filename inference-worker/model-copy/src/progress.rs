//! Words for how far a copy is.

use std::time::Duration;

/// `bytes` with a binary unit and one digit after the point.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// One line: bytes copied and to copy, share, rate since the start.
pub fn line(done: u64, total: u64, elapsed: Duration) -> String {
    let percent = if total == 0 {
        100
    } else {
        u128::from(done) * 100 / u128::from(total)
    };
    let seconds = elapsed.as_secs_f64().max(1e-3);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate, not negative; the cast saturates"
    )]
    let rate = (done as f64 / seconds) as u64;
    format!("{done} of {total} bytes ({percent} %), {}/s", size(rate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_fitting_units() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(5 << 30), "5.0 GiB");
        assert_eq!(size(u64::MAX), "16777216.0 TiB");
    }

    #[test]
    fn a_line_tells_share_and_rate() {
        let text = line(3 << 20, 4 << 20, Duration::from_secs(2));
        assert_eq!(text, "3145728 of 4194304 bytes (75 %), 1.5 MiB/s");
    }

    #[test]
    fn nothing_to_copy_is_all_copied() {
        assert_eq!(line(0, 0, Duration::ZERO), "0 of 0 bytes (100 %), 0 B/s");
    }
}
