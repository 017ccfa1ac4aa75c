//! What travels on a connection between two ranks.

use std::io::Write;

/// Longest payload of one frame; longer ones are taken for garbage.
pub(super) const FRAME_LIMIT: usize = 8 << 20;
/// Bytes before the payload.
pub(super) const HEADER: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Beat = 0,
    Reduce = 1,
    Gather = 2,
    Broadcast = 3,
    Words = 4,
    Cause = 5,
    Next = 6,
    Taken = 7,
}

impl Kind {
    fn from_u32(value: u32) -> Option<Self> {
        [
            Self::Beat,
            Self::Reduce,
            Self::Gather,
            Self::Broadcast,
            Self::Words,
            Self::Cause,
            Self::Next,
            Self::Taken,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == value)
    }
}

#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    /// Number of the piece among those of its kind of operation.
    pub(super) sequence: u64,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    /// A sign of life of a rank that waits for another or does not.
    pub(super) fn beat(waits: bool) -> Self {
        Self {
            kind: Kind::Beat,
            sequence: waits.into(),
            payload: Vec::new(),
        }
    }

    /// Kind, payload length and sequence number, little-endian.
    fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let len = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        header[..4].copy_from_slice(&(self.kind as u32).to_le_bytes());
        header[4..8].copy_from_slice(&len.to_le_bytes());
        header[8..].copy_from_slice(&self.sequence.to_le_bytes());
        header
    }

    pub(super) fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        to.write_all(&self.header())?;
        to.write_all(&self.payload)?;
        to.flush()
    }

    /// Kind, sequence number and length of the payload that follows `header`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn read_header(header: [u8; HEADER]) -> Result<(Kind, u64, usize), String> {
        let [k0, k1, k2, k3, l0, l1, l2, l3, sequence @ ..] = header;
        let number = u32::from_le_bytes([k0, k1, k2, k3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        match (Kind::from_u32(number), usize::try_from(len)) {
            (Some(kind), Ok(len)) if len <= FRAME_LIMIT => {
                Ok((kind, u64::from_le_bytes(sequence), len))
            }
            _ => Err(format!("it sent a frame of kind {number} and {len} bytes")),
        }
    }
}

/// Values as little-endian bytes.
pub(super) fn floats_to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values)];
    for (to, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *to = value.to_le_bytes();
    }
    bytes
}

/// Fills `values` with those that `bytes` hold.
pub(super) fn copy_floats(bytes: &[u8], values: &mut [f32]) {
    for (value, from) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_written_and_hostile_ones_refused() {
        let frame = Frame {
            kind: Kind::Next,
            sequence: u64::MAX - 3,
            payload: vec![1; 40],
        };
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        let header = *bytes.first_chunk().unwrap();
        assert_eq!(
            Frame::read_header(header),
            Ok((Kind::Next, u64::MAX - 3, 40))
        );
        let mut large = header;
        large[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut unknown = header;
        unknown[0] = 99;
        for (header, word) in [(large, "4294967295 bytes"), (unknown, "kind 99")] {
            let error = Frame::read_header(header).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn values_keep_their_bits() {
        let values = [1.5, -0.0, f32::MIN_POSITIVE, f32::INFINITY];
        let mut read = [7.0; 4];
        copy_floats(&floats_to_bytes(&values), &mut read);
        assert_eq!(read.map(f32::to_bits), values.map(f32::to_bits));
    }
}
