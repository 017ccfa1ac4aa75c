use super::*;
use crate::openai::response::Likely;

fn response(logprobs: bool) -> GrowingResponse {
    let repeated = json!({"store": false, "tools": []});
    GrowingResponse::new(ResponseParts {
        name: "x".to_owned(),
        created: 1,
        model: "m".to_owned(),
        repeated: repeated.as_object().expect("an object").clone(),
        logprobs,
    })
}

fn text(text: &str) -> Piece {
    Piece {
        text: text.to_owned(),
        ..Piece::default()
    }
}

fn calls(calls: Vec<ToolDelta>) -> Piece {
    Piece {
        calls,
        ..Piece::default()
    }
}

fn start(index: usize) -> ToolDelta {
    ToolDelta::Start {
        index,
        id: format!("call_{index}"),
        name: "f".to_owned(),
    }
}

fn arguments(index: usize, json: &str) -> ToolDelta {
    let json = json.to_owned();
    ToolDelta::Arguments { index, json }
}

fn token(text: &str) -> Told {
    let likely = Likely {
        text: text.to_owned(),
        bytes: text.as_bytes().to_vec(),
        logprob: Some(-1.0),
    };
    Told {
        id: 1,
        is_prompt: false,
        offset: 0,
        likely: Some((likely, Vec::new())),
    }
}

const USAGE: Usage = Usage {
    prompt_tokens: 5,
    completion_tokens: 3,
    cached_tokens: 2,
};

/// Names of events without what all begin with.
fn names(events: &[Value]) -> Vec<&str> {
    let names = events.iter().filter_map(|event| event["type"].as_str());
    names
        .map(|name| name.trim_start_matches("response."))
        .collect()
}

#[test]
fn text_grows_in_one_part_of_one_message() {
    let mut growing = response(false);
    growing.grow(text("Hé"));
    growing.grow(text("llo"));
    let whole = growing.finish(Finish::Stop, USAGE);
    let events = growing.events();
    assert_eq!(
        names(&events),
        [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
    );
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    assert_eq!(events[0]["response"]["status"], "in_progress");
    assert_eq!(events[2]["item"]["content"], json!([]));
    for event in &events[3..8] {
        assert_eq!(event["item_id"], events[2]["item"]["id"]);
        assert_eq!(
            (&event["output_index"], &event["content_index"]),
            (&json!(0), &json!(0))
        );
    }
    assert_eq!(events[5]["delta"], "llo");
    assert_eq!(events[6]["text"], "Héllo");
    assert_eq!(events[9]["response"], whole);
    assert_eq!(
        whole["output"],
        json!([{
            "id": "msg_x_0", "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "Héllo", "annotations": [], "logprobs": []}],
        }])
    );
    assert_eq!(
        whole["usage"],
        json!({
            "input_tokens": 5, "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
            "output_tokens": 3, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 8,
        })
    );
    assert_eq!(
        (&whole["store"], &whole["status"]),
        (&json!(false), &json!("completed"))
    );
    assert!(growing.events().is_empty());
}

#[test]
fn calls_are_items_of_their_own() {
    let mut growing = response(false);
    growing.grow(Piece {
        text: "so".to_owned(),
        calls: vec![start(0), arguments(0, "{\"a\"")],
        ..Piece::default()
    });
    let end = |index, complete| ToolDelta::End { index, complete };
    growing.grow(calls(vec![
        arguments(0, ":1}"),
        end(0, true),
        start(1),
        end(1, true),
    ]));
    growing.grow(text("x"));
    growing.grow(calls(vec![start(2), arguments(2, "{\"b"), end(2, false)]));
    let whole = growing.finish(Finish::Length, USAGE);
    let output = whole["output"].as_array().expect("items");
    let seen: Vec<_> = output
        .iter()
        .map(|item| {
            (
                item["type"].as_str(),
                item["arguments"].as_str(),
                item["status"].as_str(),
            )
        })
        .collect();
    let (message, call) = (Some("message"), Some("function_call"));
    let completed = Some("completed");
    assert_eq!(
        seen,
        [
            (message, None, completed),
            (call, Some("{\"a\":1}"), completed),
            (call, Some(""), completed),
            (message, None, completed),
            (call, Some("{\"b"), Some("incomplete")),
        ]
    );
    assert_eq!(
        (&output[1]["call_id"], &output[1]["name"]),
        (&json!("call_0"), &json!("f"))
    );
    assert_eq!(
        whole["incomplete_details"],
        json!({"reason": "max_output_tokens"})
    );
    let events = growing.events();
    assert_eq!(names(&events).last(), Some(&"incomplete"));
    let of_first: Vec<_> = events
        .iter()
        .filter(|event| event["output_index"] == 1)
        .cloned()
        .collect();
    assert_eq!(
        names(&of_first),
        [
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ]
    );
    assert_eq!(of_first[3]["arguments"], "{\"a\":1}");
}

#[test]
fn answers_are_cut_empty_or_broken() {
    let mut growing = response(false);
    growing.grow(text("a"));
    let whole = growing.finish(Finish::Length, USAGE);
    assert_eq!(
        (&whole["status"], &whole["output"][0]["status"]),
        (&json!("incomplete"), &json!("incomplete"))
    );

    let whole = response(false).finish(Finish::Stop, USAGE);
    assert_eq!(whole["output"][0]["content"][0]["text"], "");

    let mut growing = response(false);
    growing.grow(text("a"));
    growing.fail(&ApiError::failed("rank 1 died", "generation_failed"));
    let events = growing.events();
    let last = events.last().expect("events");
    assert_eq!(last["type"], "response.failed");
    let response = &last["response"];
    assert_eq!(response["status"], "failed");
    assert_eq!(
        response["error"],
        json!({"code": "generation_failed", "message": "rank 1 died"})
    );
    assert_eq!(response["output"][0]["content"][0]["text"], "a");
}

#[test]
fn probabilities_stand_beside_the_text_they_belong_to() {
    let mut growing = response(true);
    let piece = |text: &str, tokens: &[&str]| Piece {
        text: text.to_owned(),
        tokens: tokens.iter().map(|text| token(text)).collect(),
        calls: Vec::new(),
    };
    growing.grow(piece("", &["a"]));
    growing.grow(piece("ab", &["b"]));
    growing.grow(piece("", &["end"]));
    growing.grow(Piece {
        calls: vec![start(0)],
        ..piece("", &["call"])
    });
    growing.grow(piece("", &["call"]));
    growing.grow(calls(vec![ToolDelta::End {
        index: 0,
        complete: true,
    }]));
    growing.grow(piece("c", &["c"]));
    let whole = growing.finish(Finish::Stop, USAGE);
    let told = |item: usize| {
        let logprobs = whole["output"][item]["content"][0]["logprobs"].as_array();
        let tokens = logprobs.expect("a list").iter();
        tokens.map(|one| one["token"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(told(0), ["a", "b", "end"]);
    assert_eq!(told(2), ["c"]);
    let one = &whole["output"][2]["content"][0]["logprobs"][0];
    assert_eq!(
        *one,
        json!({"token": "c", "logprob": -1.0, "bytes": [99], "top_logprobs": []})
    );
    let deltas: Vec<Value> = growing
        .events()
        .into_iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event["logprobs"].clone())
        .collect();
    assert_eq!(
        deltas
            .iter()
            .map(|list| list.as_array().map(Vec::len))
            .collect::<Vec<_>>(),
        [Some(2), Some(1), Some(1)]
    );
}
