//! Random answers of required forms: whatever allowed tokens are drawn, the answer
//! is of the form.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use llama_model::text::{ModelText, Special, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Constraint, ConstraintError, Grammar, Vocabulary, allows};

/// Tokens of an answer at most.
const MAX_TOKENS: usize = 4000;
/// From here on an answer is brought to an end.
const LONG: usize = 25;

/// A tokenizer and its vocabulary.
pub(crate) struct Tokens {
    pub(crate) name: &'static str,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) vocabulary: Arc<Vocabulary>,
    /// Tokens that close something, or go on to the next.
    closing: Vec<u32>,
}

impl Tokens {
    fn new(name: &'static str, path: &std::path::Path) -> Self {
        let tokenizer = Arc::new(ModelText::open(path).expect("opens").tokenizer);
        // Some models have more logits than tokens.
        let width = tokenizer.vocab_size() + 7;
        let start = Instant::now();
        let vocabulary = Vocabulary::new(Arc::clone(&tokenizer), width).expect("is made");
        eprintln!("the vocabulary of {name} was made in {:?}", start.elapsed());
        let closing = (0..u32::try_from(width).expect("fits"))
            .filter(|&id| {
                let bytes = tokenizer.token_bytes(id);
                !bytes.is_empty() && bytes.iter().all(|byte| b"\"}]),:".contains(byte))
            })
            .collect();
        Self {
            name,
            tokenizer,
            vocabulary: Arc::new(vocabulary),
            closing,
        }
    }

    pub(crate) fn constraint(&self, grammar: &Grammar) -> Constraint {
        Constraint::new(&self.vocabulary, grammar).expect("compiles")
    }

    pub(crate) fn text(&self, tokens: &[u32]) -> String {
        let bytes: Vec<&[u8]> = tokens
            .iter()
            .map(|&id| self.tokenizer.token_bytes(id))
            .collect();
        String::from_utf8(bytes.concat()).expect("is text")
    }
}

/// Tokens that a mask allows.
pub(super) fn set_bits(mask: &[u32]) -> impl Iterator<Item = u32> {
    mask.iter()
        .zip((0..).step_by(32))
        .filter(|(word, _)| **word != 0)
        .flat_map(|(word, first)| {
            (0..32)
                .filter(move |bit| word >> bit & 1 == 1)
                .map(move |bit| first + bit)
        })
}

fn tiny_tokenizer() -> Tokens {
    let mut spare = (256..).filter_map(char::from_u32);
    let mut vocabulary: Vec<String> = (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => spare.next().expect("enough"),
        })
        .map(String::from)
        .collect();
    let first = vocabulary.len();
    vocabulary.extend(["\":".to_owned(), "\"}".to_owned(), "tr".to_owned()]);
    let map: serde_json::Map<String, Value> = vocabulary
        .iter()
        .zip(0..)
        .map(|(token, id): (_, u32)| (token.clone(), id.into()))
        .collect();
    let added = |id: usize, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false})
    };
    let file = json!({
        "version": "1.0",
        "added_tokens": [added(first + 3, "<|eot_id|>"), added(first + 4, "<|python_tag|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "model": {"type": "BPE", "vocab": map, "merges": [["\"", ":"], ["\"", "}"], ["t", "r"]], "ignore_merges": false},
    });
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, file.to_string()).expect("writes");
    Tokens::new("tiny", &path)
}

/// A small tokenizer of our own, and those real ones that the machine has.
pub(crate) fn tokenizers() -> &'static [Tokens] {
    static ALL: LazyLock<Vec<Tokens>> = LazyLock::new(|| {
        let mut all = vec![tiny_tokenizer()];
        let mut open = |name, path: Option<PathBuf>| match path {
            Some(path) if path.exists() => all.push(Tokens::new(name, &path)),
            _ => eprintln!("not run with the tokenizer of {name}: it is not there"),
        };
        let folder = std::env::var_os("LLAMA_TEST_TOKENIZERS").map(PathBuf::from);
        let file = |name: &str| folder.as_ref().map(|folder| folder.join(name));
        let model = std::env::var_os("LLAMA_TEST_MODEL").map(PathBuf::from);
        open("SmolLM2", model);
        open("Llama 3", file("llama3-json/tokenizer.json"));
        open("Llama 4", file("llama4/tokenizer.model"));
        all
    });
    &ALL
}

/// An answer that is drawn token by token.
pub(crate) struct Walk<'a> {
    tokens: &'a Tokens,
    pub(crate) constraint: Constraint,
    pub(crate) ids: Vec<u32>,
    state: u64,
    /// Time that masks took.
    masks: Vec<Duration>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(tokens: &'a Tokens, grammar: &Grammar, seed: u64) -> Self {
        Self {
            tokens,
            constraint: tokens.constraint(grammar),
            ids: Vec::new(),
            state: seed,
            masks: Vec::new(),
        }
    }

    fn draw(&mut self, below: usize) -> usize {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % below as u64).expect("fits")
    }

    /// Draws a token; `false` when the answer ended.
    pub(crate) fn step(&mut self) -> bool {
        let start = Instant::now();
        let mask = self.constraint.mask().expect("goes on").to_vec();
        self.masks.push(start.elapsed());
        assert_eq!(mask.len(), self.tokens.vocabulary.mask_words());
        let may_end = self.constraint.may_end().expect("goes on");
        for &end in self.tokens.vocabulary.ends() {
            assert_eq!(allows(&mask, end), may_end, "end token {end}");
        }
        let long = self.ids.len() > LONG;
        if may_end && (long || self.draw(4) == 0 || self.constraint.is_finished()) {
            let end = self.tokens.vocabulary.ends()[0];
            self.constraint.accept(end).expect("is allowed");
            assert!(self.constraint.is_finished());
            return false;
        }
        let token = self.choose(&mask, long);
        self.constraint.accept(token).expect("is allowed");
        self.ids.push(token);
        assert!(self.ids.len() < MAX_TOKENS, "no end: {:?}", self.text());
        true
    }

    fn choose(&mut self, mask: &[u32], long: bool) -> u32 {
        let closing = self.tokens.closing.iter().copied();
        let closing: Vec<u32> = closing.filter(|&id| allows(mask, id)).collect();
        if !closing.is_empty() && (long || self.draw(3) == 0) {
            return closing[self.draw(closing.len())];
        }
        let ends = self.tokens.vocabulary.ends();
        let allowed: Vec<u32> = set_bits(mask).filter(|id| !ends.contains(id)).collect();
        assert!(!allowed.is_empty(), "nothing goes on: {:?}", self.text());
        allowed[self.draw(allowed.len())]
    }

    pub(crate) fn run(mut self) -> (String, Vec<Duration>) {
        while self.step() {}
        (self.text(), self.masks)
    }

    fn text(&self) -> String {
        self.tokens.text(&self.ids)
    }
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
            "required": ["name", "age"], "additionalProperties": false}),
        json!({"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4}),
        json!({"type": "object", "properties": {"unit": {"enum": ["celsius", "fahrenheit", "ü\"\\"]}, "at": {"type": "string", "format": "date"},
            "tags": {"type": "array", "items": {"type": ["string", "null"], "maxLength": 5}}}, "required": ["unit"]}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[A-F]{3}-[0-9]+$"}, {"const": {"a": [1, null]}}]}),
        json!({"$defs": {"node": {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"], "additionalProperties": false}}, "$ref": "#/$defs/node"}),
        json!({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}),
        json!({}),
    ]
}

proptest! {
    // Seeds do not shrink to anything simpler.
    #![proptest_config(ProptestConfig { cases: 5, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_of_a_schema_is_valid_by_it(seed: u64) {
        for schema in schemas() {
            let validator = jsonschema::validator_for(&schema).expect("a schema");
            let grammar = Grammar::JsonSchema(schema.clone());
            for tokens in tokenizers() {
                let (text, _) = Walk::new(tokens, &grammar, seed).run();
                let valid = json_of(&text).is_none_or(|value| validator.is_valid(&value));
                prop_assert!(valid, "{}: {text} by {schema}", tokens.name);
            }
        }
    }

    #[test]
    fn every_object_is_one(seed: u64) {
        for tokens in tokenizers() {
            let (text, _) = Walk::new(tokens, &Grammar::JsonObject, seed).run();
            let object = json_of(&text).is_none_or(|value| value.is_object());
            prop_assert!(object, "{}: {text}", tokens.name);
        }
    }

    #[test]
    fn every_answer_of_a_regex_matches(seed: u64) {
        for (regex, whole) in [
            ("^[a-z]{2,9}@(ex|test)\\.org$", "^[a-z]{2,9}@(ex|test)\\.org$"),
            ("(yes|no)( /[0-9]+)?\\n?", "^((yes|no)( /[0-9]+)?\\n?)$"),
            ("[äöü€]+\\$", "^[äöü€]+\\$$"),
        ] {
            let judge = matcher_of(whole);
            for tokens in tokenizers() {
                let grammar = Grammar::Regex(regex.to_owned());
                let (text, _) = Walk::new(tokens, &grammar, seed).run();
                prop_assert!(judge(&text), "{}: {text:?} by {regex}", tokens.name);
            }
        }
    }

    #[test]
    fn tokens_that_are_taken_back_leave_no_trace(seed: u64, steps in 1_usize..30, back in 0_usize..30) {
        let schema = schemas().swap_remove(2);
        for tokens in tokenizers() {
            let mut walk = Walk::new(tokens, &Grammar::JsonSchema(schema.clone()), seed);
            let mut masks = Vec::new();
            let mut accepted = Vec::new();
            for _ in 0..steps {
                masks.push(walk.constraint.mask().expect("goes on").to_vec());
                if !walk.step() {
                    accepted.push(tokens.vocabulary.ends()[0]);
                    break;
                }
                accepted.push(*walk.ids.last().expect("came"));
            }
            let back = back.min(accepted.len());
            let kept = accepted.len() - back;
            walk.constraint.rollback(back).expect("came");
            let mut fork = walk.constraint.fork();
            for constraint in [&mut walk.constraint, &mut fork] {
                if back > 0 {
                    prop_assert_eq!(constraint.mask().expect("goes on"), masks[kept].as_slice());
                }
                prop_assert_eq!(constraint.accepted(&accepted[kept..]).expect("goes on"), back);
                for &token in &accepted[kept..] {
                    constraint.accept(token).expect("came before");
                }
            }
            let error = walk.constraint.rollback(accepted.len() + 1).expect_err("is refused");
            prop_assert_eq!(error, ConstraintError::NotHeld { asked: accepted.len() + 1, held: accepted.len() });
        }
    }
}

/// What `text` says; nothing where it is JSON with a number too great for a float.
fn json_of(text: &str) -> Option<Value> {
    match serde_json::from_str(text) {
        Ok(value) => Some(value),
        Err(error) if error.to_string().starts_with("number out of range") => None,
        Err(error) => panic!("{error} in {text:?}"),
    }
}

/// Whether a text matches, by the engine that JSON schemas are checked with.
fn matcher_of(whole: &str) -> impl Fn(&str) -> bool {
    let schema = json!({"type": "string", "pattern": whole});
    let validator = jsonschema::validator_for(&schema).expect("a pattern");
    move |text| validator.is_valid(&Value::String(text.to_owned()))
}

#[test]
fn choices_and_rules_are_kept() {
    let choices = ["a b", "a\u{7f}\n\"c\\", "ünï"].map(str::to_owned).to_vec();
    for tokens in tokenizers() {
        for seed in 0..20 {
            let grammar = Grammar::Choice(choices.clone());
            let (text, _) = Walk::new(tokens, &grammar, seed).run();
            assert!(choices.contains(&text), "{}: {text:?}", tokens.name);
            let grammar = Grammar::Lark("start: \"(\" start \")\" | /[xy]/".to_owned());
            let (text, _) = Walk::new(tokens, &grammar, seed).run();
            let inner = text.trim_start_matches('(').trim_end_matches(')');
            assert!(matches!(inner, "x" | "y"), "{text}");
            assert_eq!(text.matches('(').count(), text.matches(')').count());
        }
    }
}

#[test]
fn a_token_that_may_not_come_changes_nothing() {
    for tokens in tokenizers() {
        let token = |text: &str| {
            tokens
                .tokenizer
                .encode(text, Special::Plain)
                .expect("tokens")[0]
        };
        let mut constraint = tokens.constraint(&Grammar::Regex("[ab]{2}".to_owned()));
        let (a, z, end) = (token("a"), token("z"), tokens.vocabulary.ends()[0]);
        for wrong in [z, end, u32::MAX] {
            assert_eq!(constraint.accepted(&[wrong]), Ok(0));
            let error = constraint.accept(wrong);
            assert_eq!(error, Err(ConstraintError::NotAllowed(wrong)));
        }
        constraint.accept(a).expect("is allowed");
        constraint.accept(a).expect("is allowed");
        assert!(constraint.is_finished() && constraint.may_end().expect("ends"));
        assert_eq!(constraint.accepted(&[end, a]), Ok(1));
        assert_eq!(constraint.accept(a), Err(ConstraintError::NotAllowed(a)));
        constraint.accept(end).expect("is allowed");
        assert_eq!(
            constraint.accept(end),
            Err(ConstraintError::NotAllowed(end))
        );
        constraint.rollback(2).expect("came");
        assert!(!constraint.is_finished());
        constraint.accept(a).expect("is allowed");
    }
}

#[test]
fn what_must_come_is_forced_as_the_model_would_write_it() {
    for tokens in tokenizers() {
        let grammar = Grammar::Lark("start: \"the answer is \" /[0-9]/".to_owned());
        let mut constraint = tokens.constraint(&grammar);
        let forced = constraint.forced();
        let whole = tokens
            .tokenizer
            .encode("the answer is 1", Special::Plain)
            .expect("tokens");
        assert!(
            !forced.is_empty() && whole.starts_with(&forced),
            "{}",
            tokens.name
        );
    }
}

/// `cargo nextest run … --run-ignored only --no-capture` prints what masks cost.
#[test]
#[ignore = "prints times, for people"]
fn time_of_masks() {
    for tokens in tokenizers() {
        let mut grammars: Vec<_> = schemas().into_iter().map(Grammar::JsonSchema).collect();
        grammars.push(Grammar::JsonObject);
        for grammar in grammars {
            let start = Instant::now();
            let constraint = tokens.constraint(&grammar);
            let compile = start.elapsed();
            drop(constraint);
            let mut masks: Vec<Duration> = (0..10)
                .flat_map(|seed| Walk::new(tokens, &grammar, seed).run().1)
                .collect();
            masks.sort();
            let of = |share: usize| masks[(masks.len() - 1) * share / 100];
            eprintln!(
                "{}: compiled in {compile:?}; {} masks, median {:?}, 99 % {:?}, most {:?}",
                tokens.name,
                masks.len(),
                of(50),
                of(99),
                of(100)
            );
        }
    }
}
