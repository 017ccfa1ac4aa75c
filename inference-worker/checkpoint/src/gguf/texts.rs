//! A list of texts that takes little more than its letters.

use std::fmt;

/// Texts of a list of the metadata, one behind the other. A vocabulary and its merges are
/// a hundred thousand of a few bytes each, and each rank reads them on its way to the
/// tensors: apart, they would take ten times as much.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Texts {
    joined: String,
    /// Where each ends in `joined`. A header has at most 64 MiB.
    ends: Vec<u32>,
}

impl Texts {
    /// Puts `text` at the end. Whether it had room: all together may have 4 GiB.
    pub(super) fn push(&mut self, text: &str) -> bool {
        let Ok(end) = u32::try_from(self.joined.len() + text.len()) else {
            return false;
        };
        self.joined.push_str(text);
        self.ends.push(end);
        true
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes that they take, without room to grow.
    pub fn bytes(&self) -> usize {
        self.joined.len() + self.ends.len() * size_of::<u32>()
    }

    /// The texts in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let end = end as usize;
            &self.joined[std::mem::replace(&mut start, end)..end]
        })
    }

    /// Gives back what is kept for texts to come.
    pub(super) fn shrink(&mut self) {
        self.joined.shrink_to_fit();
        self.ends.shrink_to_fit();
    }
}

impl<T: AsRef<str>> FromIterator<T> for Texts {
    /// Those that have room.
    fn from_iter<I: IntoIterator<Item = T>>(texts: I) -> Self {
        let mut list = Self::default();
        for text in texts {
            if !list.push(text.as_ref()) {
                break;
            }
        }
        list
    }
}

impl fmt::Debug for Texts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
