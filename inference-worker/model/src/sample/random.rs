//! Numbers that look random and depend on nothing but their names.

/// The `index`-th number in [0, 1) of the sequence that `seed` names: `SplitMix64`
/// (Steele, Lea, Flood 2014), which needs no state but its counter.
pub(super) fn uniform(seed: u64, index: u32) -> f64 {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    let steps = (u64::from(index) + 1).wrapping_mul(STEP);
    // The seed is mixed first, so that neighbouring seeds do not share numbers.
    let mixed = mix(mix(seed).wrapping_add(steps));
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
