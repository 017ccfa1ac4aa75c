//! A body of a request, at every endpoint that takes one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llama_worker::openai::{
    ApiError, DetokenizeRequest, Prompt, ResponsesRequest, TokenizeRequest, ValidRequest,
};

/// Longest body of a refusal: what is quoted is short.
const MAX_REFUSAL: usize = 16 << 10;

fuzz_target!(|body: &[u8]| {
    check(ValidRequest::chat(body), body, valid);
    check(ValidRequest::completion(body), body, valid);
    check(ResponsesRequest::read(body), body, |response| {
        valid(&response.request);
        assert_eq!(response.repeated["store"], false);
    });
    check(TokenizeRequest::read(body), body, |_| ());
    check(DetokenizeRequest::read(body, 64), body, |request| {
        assert!(request.tokens.len() <= 64);
    });
});

/// Whatever is refused is refused as the client's fault, shortly, and by the name of a
/// field where the body is an object.
fn check<T>(read: Result<T, ApiError>, body: &[u8], valid: impl FnOnce(&T)) {
    let error = match read {
        Ok(read) => return valid(&read),
        Err(error) => error,
    };
    assert_eq!(error.status, 400, "{error}");
    assert!(error.body().to_string().len() < MAX_REFUSAL);
    let is_object = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(body);
    assert!(is_object.is_err() || error.param.is_some(), "{error}");
}

/// What must hold of a request that was taken.
fn valid(request: &ValidRequest) {
    assert!(!request.prompts.is_empty() && (1..=128).contains(&request.choices));
    assert!((0.0..=2.0).contains(&request.sampling.temperature));
    assert!(request.max_tokens != Some(0));
    assert!(request.ending.strings.iter().all(|stop| !stop.is_empty()));
    for prompt in &request.prompts {
        if let Prompt::Chat(messages) = prompt {
            assert!(messages.iter().all(|message| !message.role().is_empty()));
        }
    }
}
