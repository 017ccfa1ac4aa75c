//! Lengths of time as Kubernetes writes them: `90s`, `1h30m`.

use serde::{Deserialize, Serialize};

/// A length of time as the user wrote it, such as `10m` or `1h30m`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Duration(pub String);

impl Duration {
    /// The time itself; `None` when the text is none.
    pub fn parse(&self) -> Option<std::time::Duration> {
        let mut rest = self.0.as_str();
        let mut total = std::time::Duration::ZERO;
        if rest.is_empty() {
            return None;
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit())?;
            let number: u64 = rest[..digits].parse().ok()?;
            rest = &rest[digits..];
            let end = rest
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(rest.len());
            let unit = match &rest[..end] {
                "ms" => std::time::Duration::from_millis(number),
                "s" => std::time::Duration::from_secs(number),
                "m" => std::time::Duration::from_secs(number.checked_mul(60)?),
                "h" => std::time::Duration::from_secs(number.checked_mul(3600)?),
                _ => return None,
            };
            total = total.checked_add(unit)?;
            rest = &rest[end..];
        }
        Some(total)
    }

    fn of(text: &str) -> Self {
        Self(text.to_owned())
    }

    pub(super) fn second() -> Self {
        Self::of("1s")
    }

    pub(super) fn minute() -> Self {
        Self::of("1m")
    }

    pub(super) fn five_minutes() -> Self {
        Self::of("5m")
    }

    pub(super) fn hour() -> Self {
        Self::of("1h")
    }

    pub(super) fn day() -> Self {
        Self::of("24h")
    }

    pub(super) fn rollout() -> Self {
        Self::of("45m")
    }

    pub(super) fn ten_minutes() -> Self {
        Self::of("10m")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, millis) in [
            ("90s", Some(90_000)),
            ("1h30m", Some(5_400_000)),
            ("250ms", Some(250)),
            ("0s", Some(0)),
            ("", None),
            ("10", None),
            ("m", None),
            ("5d", None),
            ("-1s", None),
            ("1.5h", None),
            ("99999999999999999999h", None),
        ] {
            let found = Duration::of(text).parse();
            assert_eq!(found.map(|time| time.as_millis()), millis, "{text:?}");
        }
    }
}
