//! Kubernetes quantities as numbers. Pure.

/// A quantity in thousandths of its unit, rounded up as the API server does; `None`
/// when it does not parse, is negative or does not fit.
pub fn thousandths(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    if fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    // The number is `digits / 10^fraction.len()`, exactly.
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let mut scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let mut factor: u128 = 1000;
    match suffix {
        "" => {}
        "n" => scale = scale.checked_mul(1_000_000_000)?,
        "u" => scale = scale.checked_mul(1_000_000)?,
        "m" => scale = scale.checked_mul(1000)?,
        _ => match suffix
            .strip_prefix(['e', 'E'])
            .and_then(|rest| rest.parse().ok())
        {
            Some(exponent @ i32::MIN..0) => {
                scale = scale.checked_mul(power_of_ten(exponent.unsigned_abs())?)?;
            }
            Some(exponent) => {
                factor = factor.checked_mul(power_of_ten(exponent.unsigned_abs())?)?;
            }
            None => factor = factor.checked_mul(multiple(suffix)?)?,
        },
    }
    u64::try_from(digits.checked_mul(factor)?.div_ceil(scale)).ok()
}

fn multiple(suffix: &str) -> Option<u128> {
    let power = |base: u128, exponent: u32| base.checked_pow(exponent);
    match suffix {
        "k" => power(1000, 1),
        "M" => power(1000, 2),
        "G" => power(1000, 3),
        "T" => power(1000, 4),
        "P" => power(1000, 5),
        "Ki" => power(1024, 1),
        "Mi" => power(1024, 2),
        "Gi" => power(1024, 3),
        "Ti" => power(1024, 4),
        "Pi" => power(1024, 5),
        // Exabytes do not fit thousandths in 64 bits.
        _ => None,
    }
}

fn power_of_ten(exponent: u32) -> Option<u128> {
    10_u128.checked_pow(exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubernetes_writes() {
        for (text, expected) in [
            ("1", 1000),
            ("600m", 600),
            ("1.5", 1500),
            ("0.5m", 1),
            ("100n", 1),
            ("1Gi", 1_073_741_824_000),
            ("1.5Gi", 1_610_612_736_000),
            ("2k", 2_000_000),
            ("1e3", 1_000_000),
            ("1E+3", 1_000_000),
            ("5e-1", 500),
            ("0", 0),
            (".5", 500),
            ("1.", 1000),
        ] {
            assert_eq!(thousandths(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_quantity() {
        for text in [
            "",
            "Gi",
            "-1",
            "1GiB",
            "1 Gi",
            "1.2.3",
            "1e-3x",
            "99999999999999999999P",
        ] {
            assert_eq!(thousandths(text), None, "{text}");
        }
    }
}
