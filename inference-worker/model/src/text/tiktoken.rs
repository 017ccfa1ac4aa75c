//! The tokenizer of a tiktoken `tokenizer.model`, as Meta gives it out: one line
//! for each token, its bytes in base64 and its rank.

use ahash::AHashMap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::added::AddedToken;
use super::origin::{Origin, excerpt};
use super::ranks::RankedBpe;
use super::settings::Settings;
use super::split::{LLAMA3, LLAMA4, Splitter};
use super::template::MetaFormat;
use super::tokenizer::{Engine, MAX_TOKENS, Parts, Tokenizer};
use crate::error::ModelError;

/// Tokens of Llama 3's file, without control tokens.
const LLAMA3_RANKS: usize = 128_000;
/// Tokens of Llama 4's file.
const LLAMA4_RANKS: usize = 200_000;
/// Control tokens that follow the ranks.
const LLAMA3_CONTROL: usize = 256;
const LLAMA4_CONTROL: usize = 2048;

const BEGIN: &str = "<|begin_of_text|>";
const END: &str = "<|end_of_text|>";

impl Tokenizer {
    /// Builds the tokenizer of a tiktoken file, and tells which chat format the
    /// models with it speak.
    ///
    /// # Errors
    /// `ModelInvalid` with the line that is wrong, `ModelUnsupported` when it is
    /// neither Llama 3's nor Llama 4's.
    pub(super) fn from_tiktoken(
        origin: &Origin,
        file: &[u8],
        settings: &Settings,
    ) -> Result<(Self, MetaFormat), ModelError> {
        let (tokens, ranks) = ranks(origin, file)?;
        let format = family(origin, tokens.len(), settings.model_type.as_deref())?;
        let (pattern, names) = match format {
            MetaFormat::Llama3 => (LLAMA3, llama3_control_tokens()),
            MetaFormat::Llama4 => (LLAMA4, llama4_control_tokens()),
        };
        let first = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        let added: Vec<AddedToken> = names
            .into_iter()
            .zip(first..)
            .map(|(text, id)| AddedToken {
                text,
                id,
                control: true,
            })
            .collect();
        let id_of = |text: &str| added.iter().find(|token| token.text == text);
        let bos = id_of(BEGIN).map(|token| token.id);
        let eos = id_of(END).map(|token| token.id);
        let splitter = Splitter::new(pattern)
            .map_err(|error| origin.unsupported(format!("the split pattern: {error}")))?;
        let mut bytes = tokens;
        bytes.extend(added.iter().map(|token| token.text.clone().into_bytes()));
        let parts = Parts {
            engine: Engine::Ranked(RankedBpe::new(ranks, splitter)),
            bytes,
            added,
            bos,
            eos,
            ends: settings.ends.clone(),
            lead: bos.into_iter().collect(),
        };
        Ok((Self::assemble(origin, parts)?, format))
    }
}

/// Tokens with their ranks.
type Ranks = AHashMap<Vec<u8>, u32>;

/// The tokens in the order of their ranks, and the rank of each.
fn ranks(origin: &Origin, file: &[u8]) -> Result<(Vec<Vec<u8>>, Ranks), ModelError> {
    let text = std::str::from_utf8(file).map_err(|error| {
        let line = file[..error.valid_up_to()].split(|byte| *byte == b'\n').count();
        origin.invalid(format!(
            "line {line} is not text; a tiktoken file has base64 and a rank on each line (SentencePiece files are not read)"
        ))
    })?;
    let mut tokens: Vec<Vec<u8>> = Vec::new();
    let mut ranks = Ranks::new();
    for (number, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
    {
        let wrong = |what: String| origin.invalid(format!("line {}: {what}", number + 1));
        let (token, rank) = entry(line).map_err(wrong)?;
        let next = tokens.len();
        if rank as usize != next {
            let why = if (rank as usize) < next {
                "occurred before"
            } else {
                "leaves a gap"
            };
            return Err(wrong(format!("rank {rank} {why}; {next} is next")));
        }
        if next == MAX_TOKENS {
            return Err(wrong(format!("at most {MAX_TOKENS} tokens are supported")));
        }
        if let Some(before) = ranks.insert(token.clone(), rank) {
            return Err(wrong(format!("the token has rank {before} already")));
        }
        tokens.push(token);
    }
    match (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice())) {
        None => Ok((tokens, ranks)),
        Some(byte) => Err(origin.invalid(format!("there is no token for the byte 0x{byte:02X}"))),
    }
}

fn entry(line: &str) -> Result<(Vec<u8>, u32), String> {
    let (token, rank) = line.split_once(' ').ok_or_else(|| {
        format!(
            "{} is not a token and a rank; a tiktoken file has both on each line",
            excerpt(line)
        )
    })?;
    let bytes = STANDARD
        .decode(token)
        .ok()
        .filter(|bytes| !bytes.is_empty())
        .ok_or_else(|| format!("{} is not base64", excerpt(token)))?;
    let rank = rank
        .parse()
        .map_err(|_not_a_number| format!("{} is not a rank", excerpt(rank)))?;
    Ok((bytes, rank))
}

/// Which family the file belongs to: by its size, and where that is neither's by
/// the model beside it.
fn family(
    origin: &Origin,
    ranks: usize,
    model_type: Option<&str>,
) -> Result<MetaFormat, ModelError> {
    let by_size = match ranks {
        LLAMA3_RANKS => Some(MetaFormat::Llama3),
        LLAMA4_RANKS => Some(MetaFormat::Llama4),
        _ => None,
    };
    let by_model = match model_type {
        Some("llama" | "mllama" | "mllama_text_model") => Some(MetaFormat::Llama3),
        Some("llama4" | "llama4_text") => Some(MetaFormat::Llama4),
        _ => None,
    };
    match (by_size, by_model) {
        (Some(size), Some(model)) if size != model => Err(origin.invalid(format!(
            "{ranks} tokens do not fit the model type {} of config.json",
            excerpt(model_type.unwrap_or_default())
        ))),
        (Some(format), _) | (None, Some(format)) => Ok(format),
        (None, None) => Err(origin.unsupported(format!(
            "{ranks} tokens are neither Llama 3's {LLAMA3_RANKS} nor Llama 4's {LLAMA4_RANKS}, and no config.json names the model"
        ))),
    }
}

fn numbered(name: &str, numbers: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    numbers.map(move |number| format!("<|{name}_{number}|>"))
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| format!("<|{name}|>")).collect()
}

/// Control tokens of Llama 3 to 3.3, in the order of their ids.
fn llama3_control_tokens() -> Vec<String> {
    let mut names = owned(&[
        "begin_of_text",
        "end_of_text",
        "reserved_special_token_0",
        "reserved_special_token_1",
        "finetune_right_pad_id",
        "step_id",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
        "image",
    ]);
    let rest = LLAMA3_CONTROL - names.len();
    names.extend(numbered("reserved_special_token", 2..2 + rest));
    names
}

/// Control tokens of Llama 4, in the order of their ids.
fn llama4_control_tokens() -> Vec<String> {
    let text = "text_post_train_reserved_special_token";
    let vision = "vision_reserved_special_token";
    let mut names = owned(&[
        "begin_of_text",
        "end_of_text",
        "fim_prefix",
        "fim_middle",
        "fim_suffix",
        "header_start",
        "header_end",
        "eom",
        "eot",
        "step",
    ]);
    names.extend(numbered(text, 0..6));
    names.extend(owned(&["python_start", "python_end", "finetune_right_pad"]));
    names.extend(numbered(text, 8..69));
    names.extend(owned(&["image_start", "image_end"]));
    names.extend(numbered(vision, 0..2));
    names.extend(owned(&["tile_x_separator", "tile_y_separator"]));
    names.extend(numbered(vision, 2..6));
    names.extend(owned(&["image"]));
    names.extend(numbered(vision, 6..7));
    names.extend(owned(&["patch"]));
    names.extend(numbered(vision, 7..1048));
    names.extend(numbered("reasoning_reserved_special_token", 0..8));
    names.extend(owned(&[
        "reasoning_thinking_start",
        "reasoning_thinking_end",
    ]));
    let rest = LLAMA4_CONTROL - names.len();
    names.extend(numbered("reserved_special_token", 0..rest));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_tokens_have_metas_ids() {
        let llama3 = llama3_control_tokens();
        let id = |names: &[String], first: usize, name: &str| {
            first
                + names
                    .iter()
                    .position(|known| known == name)
                    .expect("is known")
        };
        assert_eq!(llama3.len(), 256);
        assert_eq!(id(&llama3, 128_000, "<|eot_id|>"), 128_009);
        assert_eq!(id(&llama3, 128_000, "<|image|>"), 128_011);
        assert_eq!(
            id(&llama3, 128_000, "<|reserved_special_token_245|>"),
            128_255
        );

        let llama4 = llama4_control_tokens();
        assert_eq!(llama4.len(), 2048);
        assert_eq!(id(&llama4, 200_000, "<|header_start|>"), 200_005);
        assert_eq!(id(&llama4, 200_000, "<|eot|>"), 200_008);
        assert_eq!(id(&llama4, 200_000, "<|python_start|>"), 200_016);
        assert_eq!(id(&llama4, 200_000, "<|image_start|>"), 200_080);
        assert_eq!(id(&llama4, 200_000, "<|patch|>"), 200_092);
        assert_eq!(id(&llama4, 200_000, "<|reasoning_thinking_end|>"), 201_143);
        assert_eq!(
            id(&llama4, 200_000, "<|reserved_special_token_0|>"),
            201_144
        );
    }

    fn refused(change: impl FnOnce(&mut Vec<String>)) -> String {
        let mut lines: Vec<String> = (0..=u8::MAX)
            .map(|byte| format!("{} {byte}", STANDARD.encode([byte])))
            .collect();
        change(&mut lines);
        let origin = Origin::new("m/tokenizer.model".as_ref());
        ranks(&origin, lines.join("\n").as_bytes())
            .expect_err("is refused")
            .to_string()
    }

    #[test]
    fn a_wrong_line_is_named() {
        for (line, wrong, words) in [
            (7, "!!!! 7", "line 8: \"!!!!\" is not base64"),
            (7, "AAE=", "line 8: \"AAE=\" is not a token and a rank"),
            (7, "AAE= x7", "line 8: \"x7\" is not a rank"),
            (7, "AAE= -7", "line 8: \"-7\" is not a rank"),
            (7, "AAE= 6", "line 8: rank 6 occurred before; 7 is next"),
            (
                7,
                "AAE= 4294967295",
                "line 8: rank 4294967295 leaves a gap; 7 is next",
            ),
            (7, "AA== 7", "line 8: the token has rank 0 already"),
            (7, " 7", "line 8: \"\" is not base64"),
            (255, "", "there is no token for the byte 0xFF"),
        ] {
            let message = refused(|lines| lines[line] = wrong.to_owned());
            assert!(message.starts_with("m/tokenizer.model: "), "{message}");
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn the_family_follows_from_size_and_model() {
        let origin = Origin::new("tokenizer.model".as_ref());
        let of = |ranks, model| family(&origin, ranks, model);
        assert_eq!(of(128_000, None).ok(), Some(MetaFormat::Llama3));
        assert_eq!(of(200_000, Some("llama4")).ok(), Some(MetaFormat::Llama4));
        assert_eq!(of(300, Some("llama4_text")).ok(), Some(MetaFormat::Llama4));
        for (ranks, model, word) in [
            (200_000, Some("llama"), "model type \"llama\""),
            (32_000, None, "32000 tokens"),
        ] {
            let error = of(ranks, model).expect_err("is refused").to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
