//! What one line of a streamed chat says. Pure.

use serde::Deserialize;

/// What one line of a streamed chat says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Text of the answer.
    Text,
    /// Tokens of prompt and answer, at the end.
    Usage {
        /// Of the prompt.
        prompt: u64,
        /// Of the answer.
        answer: u64,
    },
    /// Nothing follows.
    Done,
    /// The answer failed.
    Failed(String),
    /// Nothing that is measured.
    Other,
}

#[derive(Deserialize)]
struct Data {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Problem>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Delta,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

#[derive(Deserialize)]
struct Problem {
    message: String,
}

/// What an answer with the HTTP status `status` and not 200 says: the worker's error, the
/// API server's, or any other text, in one line.
pub fn refusal(status: u16, body: &str) -> String {
    let value: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    let message = value["error"]["message"].as_str();
    let message = message.or_else(|| value["message"].as_str());
    let words = message.unwrap_or(body).split_whitespace();
    format!("{status}: {}", words.collect::<Vec<_>>().join(" "))
}

/// Reads one line of a stream of server-sent events.
pub fn read(line: &str) -> Chunk {
    let Some(data) = line.strip_prefix("data:").map(str::trim) else {
        return Chunk::Other;
    };
    if data == "[DONE]" {
        return Chunk::Done;
    }
    let data: Data = match serde_json::from_str(data) {
        Ok(data) => data,
        Err(error) => return Chunk::Failed(format!("an event is no JSON: {error}")),
    };
    if let Some(error) = data.error {
        return Chunk::Failed(error.message);
    }
    let has_text = |choice: &Choice| {
        let content = choice.delta.content.as_deref();
        content.is_some_and(|text| !text.is_empty())
    };
    if data.choices.iter().any(has_text) {
        return Chunk::Text;
    }
    data.usage.map_or(Chunk::Other, |usage| Chunk::Usage {
        prompt: usage.prompt_tokens,
        answer: usage.completion_tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_line_is_told() {
        let failed = Chunk::Failed("rank 1 died".to_owned());
        for (line, chunk) in [
            (
                r#"data: {"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
                Chunk::Other,
            ),
            (
                r#"data: {"choices":[{"delta":{"content":" a"}}]}"#,
                Chunk::Text,
            ),
            (
                r#"data:{"choices":[{"delta":{},"finish_reason":"length"}]}"#,
                Chunk::Other,
            ),
            (
                r#"data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}"#,
                Chunk::Usage {
                    prompt: 9,
                    answer: 3,
                },
            ),
            (
                r#"data: {"error":{"message":"rank 1 died","code":500}}"#,
                failed,
            ),
            ("data: [DONE]", Chunk::Done),
            (": comment", Chunk::Other),
            ("", Chunk::Other),
        ] {
            assert_eq!(read(line), chunk, "{line}");
        }
        assert!(matches!(read("data: {"), Chunk::Failed(_)));
    }
}
