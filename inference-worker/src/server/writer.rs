//! From the tokens of one answer to the pieces that a client sees.

use std::sync::Arc;

use llama_model::text::{Detokenizer, Tokenizer};

use crate::engine::TokenLogprobs;
use crate::openai::StopMatcher;
use crate::openai::request::{Ending, Shown};
use crate::openai::response::{Likely, Piece, Told};

/// Writes one answer.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Tokens in which no stop string is looked for.
    unmatched: u32,
    tells_ids: bool,
    ids_for_text: bool,
    /// Characters that the tokens so far stand for, those of a prompt that is shown too.
    characters: usize,
    /// Tokens whose text is not out yet.
    held: Vec<Told>,
}

/// What became of a token, or of the end.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Written {
    /// What may be shown now.
    pub(super) piece: Piece,
    /// Whether a stop string was found, after which nothing comes.
    pub(super) stopped: bool,
}

impl Writer {
    pub(super) fn new(
        tokenizer: Arc<Tokenizer>,
        ending: &Ending,
        shown: Shown,
        min_tokens: u32,
    ) -> Self {
        Self {
            tokenizer,
            detokenizer: detokenizer(shown),
            stops: StopMatcher::new(ending.strings.clone(), ending.includes_string),
            unmatched: min_tokens,
            tells_ids: shown.token_ids,
            ids_for_text: shown.ids_for_text,
            characters: 0,
            held: Vec::new(),
        }
    }

    /// The prompt, which is shown as `text`, with the probabilities of its tokens but the
    /// first. Comes before the answer.
    pub(super) fn prompt(
        &mut self,
        tokens: &[u32],
        text: String,
        logprobs: Vec<TokenLogprobs>,
    ) -> Piece {
        let mut detokenizer = self.detokenizer.clone();
        let mut offset = 0;
        let logprobs = std::iter::once(None).chain(logprobs.into_iter().map(Some));
        let told = tokens.iter().zip(logprobs).map(|(token, logprobs)| {
            let begins = offset;
            offset += detokenizer.push(&self.tokenizer, *token).chars().count();
            Told {
                id: *token,
                offset: begins,
                is_prompt: true,
                likely: Some(match logprobs {
                    Some(logprobs) => self.likeliest(*token, logprobs),
                    None => (self.likely(*token, None), Vec::new()),
                }),
            }
        });
        let tokens = told.collect();
        self.characters = text.chars().count();
        Piece {
            text,
            tokens,
            calls: Vec::new(),
        }
    }

    /// The answer goes on with `token`.
    pub(super) fn push(&mut self, token: u32, logprobs: Option<TokenLogprobs>) -> Written {
        if self.tells_ids || logprobs.is_some() {
            let likely = logprobs.map(|logprobs| self.likeliest(token, logprobs));
            self.held.push(Told {
                id: token,
                offset: self.characters,
                is_prompt: false,
                likely,
            });
        }
        let text = self.detokenizer.push(&self.tokenizer, token);
        self.characters += text.chars().count();
        if self.unmatched > 0 {
            self.unmatched -= 1;
            return self.written(text, false);
        }
        let passed = self.stops.push(&text);
        self.written(passed.text, passed.stopped)
    }

    /// The answer is over: what was held back. A stop string may still be in it.
    pub(super) fn finish(&mut self) -> Written {
        let rest = self.detokenizer.finish();
        let mut passed = self.stops.push(&rest);
        if !passed.stopped {
            passed.text.push_str(&self.stops.finish());
        }
        let tokens = std::mem::take(&mut self.held);
        Written {
            piece: Piece {
                text: passed.text,
                tokens,
                calls: Vec::new(),
            },
            stopped: passed.stopped,
        }
    }

    fn written(&mut self, text: String, stopped: bool) -> Written {
        let tokens = if text.is_empty() && !stopped {
            Vec::new()
        } else {
            std::mem::take(&mut self.held)
        };
        Written {
            piece: Piece {
                text,
                tokens,
                calls: Vec::new(),
            },
            stopped,
        }
    }

    /// A token with its probability, and those that were the likeliest in its place.
    fn likeliest(&self, token: u32, logprobs: TokenLogprobs) -> (Likely, Vec<Likely>) {
        let top = logprobs.top.into_iter();
        let top = top.map(|(token, logprob)| self.likely(token, Some(logprob)));
        (self.likely(token, Some(logprobs.logprob)), top.collect())
    }

    fn likely(&self, token: u32, logprob: Option<f32>) -> Likely {
        let text = if self.ids_for_text {
            format!("token_id:{token}")
        } else {
            self.tokenizer.token_text(token)
        };
        Likely {
            text,
            bytes: self.tokenizer.token_bytes(token).to_vec(),
            logprob,
        }
    }
}

/// The text of `tokens`.
pub(super) fn text_of(tokenizer: &Tokenizer, tokens: &[u32], shown: Shown) -> String {
    let mut detokenizer = detokenizer(shown);
    let mut text = String::new();
    for token in tokens {
        text.push_str(&detokenizer.push(tokenizer, *token));
    }
    text.push_str(&detokenizer.finish());
    text
}

fn detokenizer(shown: Shown) -> Detokenizer {
    if shown.control_tokens {
        Detokenizer::showing_control()
    } else {
        Detokenizer::default()
    }
}
