//! Grammars that are wrong, or that would take too much.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::walks::set_bits;
use super::{Constraint, Grammar, GrammarError, MAX_GRAMMAR_BYTES, tokenizers};

fn refused(grammar: &Grammar) -> String {
    let start = Instant::now();
    let error = grammar.check().expect_err("is refused");
    assert!(start.elapsed() < Duration::from_secs(5), "{error}");
    let sentence = error.to_string();
    assert!(
        !sentence.contains('\n') && sentence.len() < 1000,
        "{sentence:?}"
    );
    sentence
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    let schema = |schema: Value| Grammar::JsonSchema(schema);
    for (grammar, word) in [
        (schema(json!({"type": "strin"})), "strin"),
        (schema(json!([])), "object"),
        (schema(json!({"not": {"type": "string"}})), "not"),
        (schema(json!({"type": "string", "pattern": "(a"})), ""),
        (
            schema(json!({"$ref": "https://example.org/x"})),
            "example.org",
        ),
        (schema(json!(false)), "nsatisfiable"),
        (Grammar::Regex("(".to_owned()), "regex"),
        (Grammar::Regex("a\\".to_owned()), "backslash"),
        (Grammar::Regex(String::new()), "empty"),
        (Grammar::Regex("^$".to_owned()), "empty"),
        (Grammar::Lark("start: nothing".to_owned()), "nothing"),
        (Grammar::Lark("begin: \"a\"".to_owned()), "start"),
        (Grammar::Lark(" \n".to_owned()), "empty"),
        (Grammar::Lark("start: <|eot_id|>".to_owned()), "eot_id"),
        (Grammar::Choice(Vec::new()), "choices"),
        (Grammar::Choice(vec![String::new()]), "empty"),
    ] {
        let sentence = refused(&grammar);
        assert!(sentence.contains(word), "{word}: {sentence}");
    }
    let error = Grammar::JsonSchema(json!({"type": 7}))
        .check_field("response_format.json_schema.schema")
        .expect_err("is refused");
    assert_eq!(error.status, 400);
    assert_eq!(
        error.param.as_deref(),
        Some("response_format.json_schema.schema")
    );
}

#[test]
fn options_of_the_compiler_are_not_the_clients() {
    let schema = json!({"type": "object", "x-guidance": {"lenient": true}, "not": {}});
    refused(&Grammar::JsonSchema(schema));
}

#[test]
fn lengths_are_bounded() {
    let long = "a".repeat(MAX_GRAMMAR_BYTES + 1);
    for grammar in [
        Grammar::JsonSchema(json!({"const": long})),
        Grammar::Regex(long.clone()),
        Grammar::Lark(long.clone()),
        Grammar::Choice(vec![long.clone()]),
    ] {
        let error = grammar.check().expect_err("is refused");
        assert!(matches!(error, GrammarError::TooLong { .. }), "{error}");
    }
    let many = Grammar::Choice(vec!["a".to_owned(); 1025]);
    assert!(matches!(many.check(), Err(GrammarError::Choices { .. })));
}

/// Each of these either compiles or is refused, soon and without a crash.
#[test]
fn hard_grammars_end_soon() {
    use std::fmt::Write;
    let mut chain = String::from("start: a0\n");
    let mut tokens = String::from("start: A0\n");
    let mut wide = String::from("start: \"x\"\n");
    for index in 0.. {
        if chain.len() > MAX_GRAMMAR_BYTES - 40 {
            break;
        }
        let _ = writeln!(chain, "a{index}:a{}", index + 1);
        let _ = writeln!(tokens, "A{index}:A{}", index + 1);
        wide.push_str("|\"x\"");
        if wide.len() > MAX_GRAMMAR_BYTES - 40 {
            wide.truncate(MAX_GRAMMAR_BYTES - 44);
        }
    }
    let last = chain.lines().count() - 1;
    let _ = writeln!(chain, "a{last}:\"x\"");
    let _ = writeln!(tokens, "A{last}:\"x\"");
    let nested = |open: &str, close: &str, count: usize| {
        format!("start: {}\"x\"{}", open.repeat(count), close.repeat(count))
    };
    let mut deep = json!({"type": "null"});
    for _ in 0..120 {
        deep = json!({"type": "array", "items": deep});
    }
    let branches: Vec<Value> = (0..2000)
        .map(|index| json!({"type": "object", "properties": {format!("p{index}"): {}}}))
        .collect();
    for grammar in [
        Grammar::Lark(chain),
        Grammar::Lark(tokens),
        Grammar::Lark(wide),
        Grammar::Lark(nested("(", ")", 20_000)),
        Grammar::Lark(nested("[", "]", 20_000)),
        Grammar::Lark("start: \"a\"{1,2000000000}".to_owned()),
        Grammar::Lark("start: (start start)* | \"a\"".to_owned()),
        Grammar::Lark("start: a{1,60000}\na: b{1,60000}\nb: \"x\" | \"y\" b".to_owned()),
        Grammar::Regex("(".repeat(30_000) + "x" + &")".repeat(30_000)),
        Grammar::Regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}b".to_owned()),
        Grammar::Regex("(a?){3000}a{3000}".to_owned()),
        Grammar::Regex("(.*a.*){100}".to_owned()),
        Grammar::Regex("\\PC{1,60000}".to_owned()),
        Grammar::Regex("(x+x+)+y".to_owned()),
        Grammar::JsonSchema(deep),
        Grammar::JsonSchema(json!({"anyOf": branches})),
        Grammar::JsonSchema(json!({"allOf": branches[..60]})),
        Grammar::JsonSchema(
            json!({"type": "string", "minLength": 900_000, "maxLength": 1_000_000}),
        ),
        Grammar::JsonSchema(json!({"type": "array", "minItems": 1_000_000_000})),
        Grammar::JsonSchema(json!({"$ref": "#"})),
        Grammar::JsonSchema(json!({"type": "integer", "multipleOf": 999_999_937})),
    ] {
        let start = Instant::now();
        let outcome = grammar.check();
        let took = start.elapsed();
        let what: String = format!("{grammar:?}").chars().take(60).collect();
        eprintln!("{took:?} {what}: {outcome:?}");
        assert!(took < Duration::from_secs(5), "{what} took {took:?}");
        if outcome.is_ok() {
            go_on(&grammar, &what);
        }
    }
}

/// The check gives up such a grammar; whoever did without it can stop the mask.
#[test]
fn a_mask_that_takes_long_can_be_cancelled() {
    let grammar = Grammar::Regex("(a?){3000}a{3000}".to_owned());
    let mut constraint = tokenizers()[0].constraint(&grammar);
    let canceller = constraint.canceller();
    let start = Instant::now();
    let clock = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        canceller.cancel();
    });
    constraint.mask().expect_err("is cancelled");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    clock.join().expect("ends");
    constraint.may_end().expect_err("was cancelled");
    constraint.fork().mask().expect_err("was cancelled");
}

/// Draws some tokens, on a stack of the usual size. The grammar may say that it
/// cannot go on.
fn go_on(grammar: &Grammar, what: &str) {
    for tokens in tokenizers() {
        let mut constraint = match Constraint::new(&tokens.vocabulary, grammar) {
            Ok(constraint) => constraint,
            Err(error) => panic!("{what} passed the check: {error}"),
        };
        for step in 0..12 {
            let start = Instant::now();
            let Ok(mask) = constraint.mask().map(<[u32]>::to_vec) else {
                break;
            };
            let took = start.elapsed();
            assert!(took < Duration::from_secs(1), "{what}: {took:?} for a mask");
            let ends = tokens.vocabulary.ends();
            let mut allowed = set_bits(&mask).filter(|id| !ends.contains(id));
            let Some(token) = allowed.by_ref().nth(step * 7).or_else(|| allowed.next()) else {
                break;
            };
            if constraint.accept(token).is_err() {
                break;
            }
        }
    }
}
