//! A row of logits and where it is high. All passes over whole rows go block by
//! block in independent lanes, so that compilers make vector code of them.

use std::cmp::Ordering;

use super::SampleError;

/// Logits that are looked at together.
pub(super) const BLOCK: usize = 256;
/// Independent running values in a block.
pub(super) const LANES: usize = 16;

/// Logits without a NaN, and the greatest of each block.
#[derive(Clone, Debug)]
pub(super) struct Row<'a> {
    pub(super) logits: &'a [f32],
    maxima: Vec<f32>,
    /// The most likely token; of equals the one with the lowest id.
    pub(super) best: u32,
    /// Its logit.
    pub(super) most: f32,
}

impl<'a> Row<'a> {
    /// Looks at `logits` once.
    ///
    /// # Errors
    /// When there are none or one is NaN.
    pub(super) fn new(logits: &'a [f32]) -> Result<Self, SampleError> {
        let mut maxima = Vec::with_capacity(logits.len().div_ceil(BLOCK));
        let mut highest: Option<(usize, f32)> = None;
        for (index, block) in logits.chunks(BLOCK).enumerate() {
            let (most, has_nan) = greatest_of(block);
            if has_nan {
                let at = block.iter().position(|logit| logit.is_nan());
                let token = index * BLOCK + at.unwrap_or(0);
                return Err(SampleError::NotANumber { token });
            }
            maxima.push(most);
            if highest.is_none_or(|(_, known)| most > known) {
                highest = Some((index, most));
            }
        }
        let (block, most) = highest.ok_or(SampleError::Empty)?;
        let start = block * BLOCK;
        let at = logits[start..].iter().position(|logit| *logit >= most);
        Ok(Self {
            logits,
            maxima,
            best: id(start + at.unwrap_or(0)),
            most,
        })
    }

    /// The `count` most likely tokens with their logits, the likeliest first, of
    /// equals the lowest id.
    pub(super) fn head(&self, count: usize) -> Vec<(u32, f32)> {
        if count == 0 {
            return Vec::new();
        }
        // `count` blocks have a logit that is not below the last of their maxima, so
        // no lower logit can be among the `count` greatest.
        let floor = if count < self.maxima.len() {
            let mut maxima = self.maxima.clone();
            let (_, nth, _) = maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
            *nth
        } else {
            f32::NEG_INFINITY
        };
        let mut head = Vec::new();
        for (index, block) in self.logits.chunks(BLOCK).enumerate() {
            if self.maxima[index] >= floor {
                let numbered = block.iter().enumerate();
                head.extend(
                    numbered
                        .filter(|(_, logit)| **logit >= floor)
                        .map(|(at, logit)| (id(index * BLOCK + at), *logit)),
                );
            }
        }
        if count < head.len() {
            head.select_nth_unstable_by(count, |a, b| order(*a, *b));
            head.truncate(count);
        }
        head.sort_unstable_by(|a, b| order(*a, *b));
        head
    }
}

/// The likelier first, of equals the lowest id.
fn order(a: (u32, f32), b: (u32, f32)) -> Ordering {
    let by_logit = b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal);
    by_logit.then_with(|| a.0.cmp(&b.0))
}

/// A token id; vocabularies are far smaller than its type.
pub(super) fn id(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

/// The greatest logit, and whether one is NaN.
fn greatest_of(block: &[f32]) -> (f32, bool) {
    let mut most = [f32::NEG_INFINITY; LANES];
    let mut odd = [0_u32; LANES];
    let mut look = |lane: usize, logit: f32| {
        most[lane] = if logit > most[lane] {
            logit
        } else {
            most[lane]
        };
        odd[lane] |= u32::from(logit.is_nan());
    };
    let (whole, rest) = block.as_chunks::<LANES>();
    for lanes in whole {
        for (lane, logit) in lanes.iter().enumerate() {
            look(lane, *logit);
        }
    }
    for (lane, logit) in rest.iter().enumerate() {
        look(lane, *logit);
    }
    let greatest = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (greatest, odd.into_iter().any(|odd| odd != 0))
}
