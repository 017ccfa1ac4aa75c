//! Amounts of memory on the command line, written as Kubernetes writes them.

/// Suffixes and what they multiply by.
const SUFFIXES: [(&str, f64); 9] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("", 1.0),
];

/// Bytes of a quantity such as `80Gi`, `79.65Gi` or `85520809984`.
///
/// # Errors
/// What was expected, for the user.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let (number, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
        .unwrap_or((text, 1.0));
    let bytes = number.parse::<f64>().map(|number| number * factor);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be in range"
    )]
    match bytes {
        Ok(bytes) if (1.0..1e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err("expected an amount of memory such as 16Gi, 79.65Gi or 500M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("16Gi", 16 << 30),
            ("1.5Gi", 3 << 29),
            ("500M", 500_000_000),
            ("123", 123),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "Gi", "-1Gi", "0", "1e30", "NaN", "12 Gi", "12Xi"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
