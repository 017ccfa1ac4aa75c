//! Stop strings in text that comes in pieces.

/// Lets text through up to the stop string that is complete first. A piece that may be the
/// beginning of one is held back until it is known.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    includes: bool,
    held: String,
}

/// What became of a piece of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Text that may be shown.
    pub text: String,
    /// Whether a stop string was found; nothing after it may be shown.
    pub stopped: bool,
}

impl StopMatcher {
    /// A matcher of `stops`, none of them empty. What was found is shown too where it
    /// `includes` that.
    pub fn new(stops: Vec<String>, includes: bool) -> Self {
        Self {
            stops,
            includes,
            held: String::new(),
        }
    }

    /// Takes the next piece.
    pub fn push(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        if let Some((end, start)) = first_complete(&self.stops, &self.held) {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.includes { end } else { start });
            return Passed {
                text,
                stopped: true,
            };
        }
        let safe = self.held.len() - self.longest_beginning();
        let rest = self.held.split_off(safe);
        Passed {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// What is still held back when the text ends.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest tail of the held text that begins a stop string.
    fn longest_beginning(&self) -> usize {
        self.stops
            .iter()
            .filter_map(|stop| {
                (1..stop.len().min(self.held.len() + 1))
                    .rev()
                    .find(|&len| stop.is_char_boundary(len) && self.held.ends_with(&stop[..len]))
            })
            .max()
            .unwrap_or(0)
    }
}

/// Where the stop string ends and begins that is complete first, the longest of those
/// that are complete at once; how the text was cut does not change it.
fn first_complete(stops: &[String], text: &str) -> Option<(usize, usize)> {
    stops
        .iter()
        .filter_map(|stop| {
            text.find(stop.as_str())
                .map(|start| (start + stop.len(), start))
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_beginning_is_held_back_and_given_up() {
        let mut matcher = StopMatcher::new(vec!["END".to_owned()], false);
        assert_eq!(
            matcher.push("a E"),
            Passed {
                text: "a ".to_owned(),
                stopped: false
            }
        );
        assert_eq!(
            matcher.push("N"),
            Passed {
                text: String::new(),
                stopped: false
            }
        );
        assert_eq!(
            matcher.push("x"),
            Passed {
                text: "ENx".to_owned(),
                stopped: false
            }
        );
        assert_eq!(
            matcher.push("yENDz"),
            Passed {
                text: "y".to_owned(),
                stopped: true
            }
        );
    }

    proptest! {
        /// Any cut of the text gives what a search in the whole text gives.
        #[test]
        fn cuts_do_not_matter(
            text in "[abé]{0,30}",
            stops in proptest::collection::vec("[abé]{1,3}", 0..3),
            cuts in proptest::collection::vec(1_usize..4, 0..30),
            includes in any::<bool>(),
        ) {
            let found = first_complete(&stops, &text);
            let end = found.map(|(end, start)| if includes { end } else { start });
            let mut matcher = StopMatcher::new(stops, includes);
            let mut shown = String::new();
            let mut stopped = false;
            let mut chars = text.chars();
            for cut in cuts.into_iter().chain([100]) {
                let piece: String = chars.by_ref().take(cut).collect();
                let passed = matcher.push(&piece);
                shown += &passed.text;
                stopped = passed.stopped;
                if stopped {
                    break;
                }
            }
            if !stopped {
                shown += &matcher.finish();
            }
            prop_assert_eq!(stopped, end.is_some());
            prop_assert_eq!(shown.as_str(), &text[..end.unwrap_or(text.len())]);
        }
    }
}
