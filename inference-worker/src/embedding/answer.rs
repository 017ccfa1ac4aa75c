//! From the body of `/v1/embeddings` to its answer.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

use super::{EmbeddingFront, Loaded};
use crate::failure::chain;
use crate::openai::request::VectorEncoding;
use crate::openai::{ApiError, EmbeddingInput, Prompt};
use crate::scheduler::Finish;

/// How long a request may take, others' turns included.
const ANSWER_DEADLINE: Duration = Duration::from_mins(10);
/// Bytes of an answer that are handed on at a time.
const PART_BYTES: usize = 64 << 10;

#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Item>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    #[serde(rename = "embedding")]
    vector: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// Answers one request.
pub(super) async fn answer(
    front: &Arc<EmbeddingFront>,
    request: Request,
) -> Result<Response, ApiError> {
    let begun = Instant::now();
    let loaded = Arc::clone(front.loaded()?);
    let place = front.desk.place()?;
    let body = front.room.read(request).await?;
    let request = EmbeddingInput::read(&body.bytes, front.dimensions, front.max_tokens as usize)?;
    front.check_model(&request.model)?;
    let values = front
        .desk
        .answer_with(request.inputs.len() * front.dimensions)?;
    let encoding = request.encoding;
    let texts = tokens(front, &loaded, request).await?;
    drop(body);
    let count = texts.iter().map(Vec::len).sum();
    let waiting = front.desk.wait_with(count)?;
    front.metrics.prompt(count);
    let vectors = tokio::time::timeout(ANSWER_DEADLINE, front.desk.vectors(&loaded, texts))
        .await
        .map_err(|_late| {
            let seconds = ANSWER_DEADLINE.as_secs();
            ApiError::unavailable(format!("not computed within {seconds} seconds"))
        })??;
    drop((waiting, place));
    let whole = begun.elapsed();
    // All vectors come at once.
    front
        .metrics
        .finished(Finish::Stop, whole, Some(whole), None);
    let data = vectors.into_iter().enumerate();
    let answer = Answer {
        object: "list",
        data: data
            .map(|(index, vector)| Item {
                object: "embedding",
                index,
                vector: written(vector, encoding),
            })
            .collect(),
        model: &front.served_name,
        usage: Usage {
            prompt_tokens: count,
            total_tokens: count,
        },
    };
    let json = serde_json::to_vec(&answer)
        .map_err(|error| ApiError::failed(error.to_string(), "internal"))?;
    let headers = [(header::CONTENT_TYPE, "application/json")];
    Ok((headers, Body::from_stream(parts(json.into(), values))).into_response())
}

fn written(vector: Vec<f32>, encoding: VectorEncoding) -> Vector {
    match encoding {
        VectorEncoding::Float => Vector::Float(vector),
        VectorEncoding::Base64 => {
            let bytes: Vec<u8> = vector
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            Vector::Base64(STANDARD.encode(bytes))
        }
    }
}

/// The parts of a body, which holds its room until the last is taken.
fn parts(
    body: Bytes,
    room: OwnedSemaphorePermit,
) -> impl futures::Stream<Item = Result<Bytes, Infallible>> {
    futures::stream::unfold((body, room), |(mut rest, room)| async move {
        if rest.is_empty() {
            return None;
        }
        let part = rest.split_to(rest.len().min(PART_BYTES));
        Some((Ok(part), (rest, room)))
    })
}

/// The tokens of every input, each within what the model takes.
async fn tokens(
    front: &Arc<EmbeddingFront>,
    loaded: &Arc<Loaded>,
    request: EmbeddingInput,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let (loaded, most) = (Arc::clone(loaded), front.max_tokens as usize);
    front
        .desk
        .on_texts(move || {
            let inputs = request.inputs.into_iter();
            let cut = request.first_tokens;
            inputs
                .enumerate()
                .map(|(number, input)| {
                    let tokens = match input {
                        Prompt::Text(text) => loaded
                            .tokenizer
                            .encode(&text, request.adds_special, cut)
                            .map_err(|error| ApiError::failed(chain(&error), "tokenizer_failed"))?,
                        Prompt::Tokens(mut tokens) => {
                            tokens.truncate(cut.unwrap_or(usize::MAX));
                            tokens
                        }
                        Prompt::Chat(_) => Vec::new(),
                    };
                    check(&loaded, number, &tokens, most)?;
                    Ok(tokens)
                })
                .collect()
        })
        .await
}

/// Refuses what the model does not take, before anything is computed.
fn check(loaded: &Loaded, number: usize, tokens: &[u32], most: usize) -> Result<(), ApiError> {
    if tokens.is_empty() {
        let message = format!("input {number} has no tokens");
        return Err(ApiError::invalid_field("input", &message));
    }
    if tokens.len() > most {
        let message = format!(
            "input {number} has {} tokens, the model takes {most}; truncate_prompt_tokens cuts it",
            tokens.len()
        );
        return Err(ApiError::context_length("input", message));
    }
    let vocabulary = loaded.tokenizer.vocab_size();
    match tokens.iter().find(|id| **id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => {
            let message = format!("token {id} is outside the vocabulary of {vocabulary}");
            Err(ApiError::invalid_field("input", &message))
        }
    }
}
