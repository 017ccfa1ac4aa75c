//! Server-sent events out of bytes that come in pieces. Does no I/O.

/// Most bytes of a line, and of the data of one event.
const MAX_BYTES: usize = 1 << 20;

/// A line or an event has more bytes than any that is meant to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {MAX_BYTES} bytes")]
pub struct EventTooLong;

/// Reads events. How the bytes are cut changes nothing.
#[derive(Debug, Default)]
pub struct EventReader {
    line: Vec<u8>,
    /// Data of the event so far; `None` where it has none.
    data: Option<Vec<u8>>,
    /// Whether the last byte was a carriage return, which ends a line with or without the
    /// line feed behind it.
    returned: bool,
}

impl EventReader {
    /// Takes the next bytes, and hands the data of each event that they complete to
    /// `take`. An event without data is none.
    ///
    /// # Errors
    /// What `take` says, and where an event is too long. Nothing can be read after that.
    pub fn push<E: From<EventTooLong>>(
        &mut self,
        bytes: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for &byte in bytes {
            let returned = std::mem::replace(&mut self.returned, byte == b'\r');
            match byte {
                b'\n' if returned => {}
                b'\n' | b'\r' => {
                    if let Some(data) = self.end_line()? {
                        take(&data)?;
                    }
                }
                _ if self.line.len() == MAX_BYTES => return Err(EventTooLong.into()),
                _ => self.line.push(byte),
            }
        }
        Ok(())
    }

    /// A line is complete; the data of the event, if it ended one.
    fn end_line(&mut self) -> Result<Option<Vec<u8>>, EventTooLong> {
        if self.line.is_empty() {
            return Ok(self.data.take());
        }
        let (name, value) = match self.line.iter().position(|byte| *byte == b':') {
            None => (self.line.as_slice(), b"".as_slice()),
            Some(colon) => (&self.line[..colon], &self.line[colon + 1..]),
        };
        // Comments, and fields that say nothing of the data.
        if name == b"data" {
            let value = value.strip_prefix(b" ").unwrap_or(value);
            let length = self.data.as_ref().map_or(0, |data| data.len() + 1);
            if length + value.len() > MAX_BYTES {
                return Err(EventTooLong);
            }
            match &mut self.data {
                None => self.data = Some(value.to_vec()),
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
            }
        }
        self.line.clear();
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<String>, EventTooLong> {
        let mut reader = EventReader::default();
        let mut events = Vec::new();
        for piece in pieces {
            reader.push(piece, |data| {
                events.push(String::from_utf8_lossy(data).into_owned());
                Ok::<_, EventTooLong>(())
            })?;
        }
        Ok(events)
    }

    #[test]
    fn events_are_their_data() {
        for (text, expected) in [
            ("data: a\n\n", vec!["a"]),
            ("data:a\r\n\r\n", vec!["a"]),
            ("data:  a\r\r", vec![" a"]),
            ("data: a\ndata: b\n\ndata\n\n", vec!["a\nb", ""]),
            (
                ": alive\n\nevent: x\nid: 1\ndata: a\nretry: 3\n\n",
                vec!["a"],
            ),
            ("event: x\n\ndatas: a\n\n data: a\n\n", vec![]),
            ("data: a\n\ndata: never ended\n", vec!["a"]),
        ] {
            assert_eq!(read([text.as_bytes()]).expect("fits"), expected, "{text:?}");
        }
    }

    #[test]
    fn length_is_bounded() {
        let line = [b"data: ".as_slice(), &vec![b'x'; MAX_BYTES - 6], b"\n"].concat();
        let end = b"\n".as_slice();
        assert_eq!(
            read([line.as_slice(), end]).map(|events| events.len()),
            Ok(1)
        );
        assert_eq!(read([line.as_slice(), &line, end]), Err(EventTooLong));
        let endless = vec![b'x'; MAX_BYTES + 1];
        assert_eq!(read([endless.as_slice()]), Err(EventTooLong));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "(data|:|event|\r|\n|\r\n|\n\n| |é){0,20}") {
            let bytes = text.as_bytes();
            let whole = read([bytes]);
            for at in 0..bytes.len() {
                let (head, tail) = bytes.split_at(at);
                prop_assert_eq!(&read([head, tail]), &whole);
            }
            prop_assert_eq!(&read(bytes.chunks(1)), &whole);
        }
    }
}
