//! Data for tests of the backends.

/// What rank `rank` brings: magnitudes that make the order of summation visible.
pub(super) fn values(rank: usize, len: usize) -> Vec<f32> {
    const SCALES: [f32; 7] = [1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3];
    (0..len)
        .map(|i| ((i * 31 + rank * 17) % 97) as f32 * SCALES[(i + rank) % 7])
        .collect()
}

/// The sum over `world` ranks, taken in rank order.
pub(super) fn sum_in_rank_order(world: usize, len: usize) -> Vec<f32> {
    let mut sum = values(0, len);
    for rank in 1..world {
        for (sum, value) in sum.iter_mut().zip(values(rank, len)) {
            *sum += value;
        }
    }
    sum
}

/// All parts, in rank order.
pub(super) fn gathered(lens: &[usize]) -> Vec<f32> {
    let parts = lens.iter().enumerate();
    parts.flat_map(|(rank, len)| values(rank, *len)).collect()
}
