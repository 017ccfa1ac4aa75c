//! What a worker tells of the answers that it gave.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test may end on what it did not expect"
)]

mod harness;

use harness::{Worker, chat, model};
use llama_contract::{ANSWERS_WITHIN, AnswersReport, STATE_PATH, StateReport};

fn answers(worker: &Worker) -> AnswersReport {
    let path = format!("{STATE_PATH}?{ANSWERS_WITHIN}=600");
    let (status, body) = worker.internal(&path).expect("a state");
    assert_eq!(status, 200);
    let state: StateReport = serde_json::from_str(&body).unwrap();
    state.answers.expect("it was asked about answers")
}

#[test]
fn answers_are_counted_with_their_times() {
    let Some((model, _turn)) = model() else {
        return;
    };
    let worker = Worker::serving(&model, &["--tensor-parallel=3"]);
    assert_eq!(answers(&worker), AnswersReport::default(), "no self-test");
    assert_eq!(worker.state().answers, None, "nobody asked");
    for _ in 0..3 {
        worker.chat("Count from one to five.", 8);
    }
    let mut refused = chat("hi", 8);
    refused["model"] = "other".into();
    assert_eq!(worker.post("/v1/chat/completions", &refused).0, 404);
    let told = answers(&worker);
    assert_eq!((told.finished, told.failed), (3, 0));
    for times in [told.first_token, told.between_tokens] {
        assert_eq!(times.count(), 3);
        let average = times.average_micros();
        assert!((10..60_000_000).contains(&average), "{told:?}");
    }
    assert!(told.first_token.average_micros() > told.between_tokens.average_micros());
}
