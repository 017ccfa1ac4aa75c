//! What clients send, checked. Every field is honoured or refused by name.

mod adapters;
mod calls;
mod embedding;
mod fields;
mod form;
mod items;
mod json;
mod messages;
mod parts;
mod responses;
#[cfg(test)]
mod tests;
mod text;

use llama_model::sample::SamplingParams;
use llama_model::text::ChatMessage;
use serde_json::{Map, Value};

use self::fields::Fields;
use super::ApiError;
use crate::tools::ToolShape;

pub use adapters::{LoadAdapterRequest, UnloadAdapterRequest};
pub use calls::{ToolChoice, ToolUse};
pub use embedding::{EmbeddingInput, VectorEncoding};
pub use form::Form;
pub use responses::ResponsesRequest;
pub use text::{DetokenizeRequest, TokenizeRequest};

/// Tokens that `/v1/completions` generates unless told otherwise.
const COMPLETION_TOKENS: u32 = 16;
/// Most answers to one prompt.
const MAX_CHOICES: u32 = 128;
/// Longest salt, in bytes.
const MAX_SALT_BYTES: usize = 256;
/// Variables that the server gives to a template itself.
const OWN_VARIABLES: [&str; 9] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "strftime_now",
    "raise_exception",
    "bos_token",
    "eos_token",
];

/// What is to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, to be put through the model's chat template.
    Chat(Vec<ChatMessage>),
    /// Text as it is.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// How a conversation becomes text.
#[derive(Clone, Debug, PartialEq)]
pub struct TemplateOptions {
    /// Whether the prompt ends where an answer begins.
    pub add_generation_prompt: bool,
    /// Whether the answer goes on with the last message.
    pub continue_final_message: bool,
    /// Functions that the model may call, as the client wrote them.
    pub tools: Option<Vec<Value>>,
    /// Texts that the answer may rest on.
    pub documents: Option<Vec<Value>>,
    /// Further variables of the template.
    pub variables: Map<String, Value>,
}

impl Default for TemplateOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: None,
            documents: None,
            variables: Map::new(),
        }
    }
}

impl TemplateOptions {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let continues = fields.flag("continue_final_message")?;
        let opens: Option<bool> = fields.take("add_generation_prompt")?;
        if continues && opens == Some(true) {
            return Err(ApiError::invalid_field(
                "continue_final_message",
                "cannot go with add_generation_prompt",
            ));
        }
        // The chat template decides; only what it does anyway can be asked for.
        if fields.flag("add_special_tokens")? {
            return Err(ApiError::invalid_field(
                "add_special_tokens",
                "is not supported for chats, whose template writes them",
            ));
        }
        let variables: Map<String, Value> =
            fields.take("chat_template_kwargs")?.unwrap_or_default();
        if let Some(name) = OWN_VARIABLES
            .iter()
            .find(|name| variables.contains_key(**name))
        {
            let message = format!("\"{name}\" is given by the server");
            return Err(ApiError::invalid_field("chat_template_kwargs", &message));
        }
        Ok(Self {
            add_generation_prompt: opens.unwrap_or(!continues),
            continue_final_message: continues,
            tools: None,
            documents: fields.take::<Vec<Value>>("documents")?,
            variables,
        })
    }
}

/// What ends an answer besides its length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    /// Strings that end it.
    pub strings: Vec<String>,
    /// Whether the string that ended it is shown.
    pub includes_string: bool,
    /// Tokens that end it.
    pub ids: Vec<u32>,
    /// Whether the model's own end tokens do not.
    pub ignores_end: bool,
}

/// How an answer is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "the API has as many switches"
)]
pub struct Shown {
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whether a stream ends with the token counts.
    pub include_usage: bool,
    /// Whether the prompt stands before the answer.
    pub echo: bool,
    /// Whether control tokens are shown.
    pub control_tokens: bool,
    /// Whether token ids are told.
    pub token_ids: bool,
    /// Whether tokens are shown by their ids where their text would stand beside
    /// their probability.
    pub ids_for_text: bool,
}

/// A request that was understood in every field.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRequest {
    /// The model asked for.
    pub model: String,
    /// What is to be continued; one for a chat.
    pub prompts: Vec<Prompt>,
    /// How a conversation becomes text.
    pub template: TemplateOptions,
    /// Whether text gets the tokens that whole prompts begin with.
    pub adds_lead: bool,
    /// Of a longer prompt, only this many last tokens count.
    pub last_tokens: Option<usize>,
    /// Answers to each prompt.
    pub choices: u32,
    /// How tokens are drawn; without the seed.
    pub sampling: SamplingParams,
    /// The client's seed.
    pub seed: Option<u64>,
    /// Most tokens of the answer; up to the context's end when absent.
    pub max_tokens: Option<u32>,
    /// What ends the answer.
    pub ending: Ending,
    /// What the answer as a whole must be.
    pub form: Option<Form>,
    /// Functions that the model may call.
    pub tool_use: Option<ToolUse>,
    /// How it is shown.
    pub shown: Shown,
    /// Requests with a lower number are computed first.
    pub priority: i32,
    /// Keeps cached prompts apart from those with another salt.
    pub cache_salt: Option<String>,
}

impl ValidRequest {
    /// Reads the body of `/v1/chat/completions`.
    ///
    /// # Errors
    /// 400, naming the field that is wrong, unknown or not supported.
    pub fn chat(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let prompt = Prompt::Chat(messages::read(fields.required("messages")?)?);
        let mut template = TemplateOptions::read(&mut fields)?;
        let (tool_use, tools) = ToolUse::read(&mut fields, ToolShape::Nested)?.unzip();
        template.tools = tools;
        let newer = fields.number("max_completion_tokens", 1, u32::MAX)?;
        let older = fields.number("max_tokens", 1, u32::MAX)?;
        if newer.is_some() && older.is_some() && newer != older {
            return Err(ApiError::invalid_field(
                "max_tokens",
                "differs from max_completion_tokens; send one of them",
            ));
        }
        let logprobs = chat_logprobs(&mut fields)?;
        let form = form::read(&mut fields)?;
        let mut request = Self::read(&mut fields, vec![prompt], newer.or(older), form)?;
        request.template = template;
        request.sampling.logprobs = logprobs;
        request.offer(tool_use)?;
        fields.refuse_rest()?;
        Ok(request)
    }

    /// Offers functions to the model.
    fn offer(&mut self, tool_use: Option<ToolUse>) -> Result<(), ApiError> {
        let requires_call = tool_use
            .as_ref()
            .is_some_and(|tool_use| tool_use.choice != ToolChoice::Auto);
        if requires_call && self.form.is_some() {
            return Err(ApiError::invalid_field(
                "tool_choice",
                "requires a call, which cannot go with another required form",
            ));
        }
        if requires_call && self.ending.ignores_end {
            return Err(ApiError::invalid_field(
                "ignore_eos",
                "cannot go with a required call, which says where an answer ends",
            ));
        }
        self.tool_use = tool_use;
        Ok(())
    }

    /// Reads the body of `/v1/completions`.
    ///
    /// # Errors
    /// As [`ValidRequest::chat`].
    pub fn completion(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let prompts = fields.prompts()?;
        let echo = fields.flag("echo")?;
        // Without an answer there is still the prompt to show.
        let least = u32::from(!echo);
        let max_tokens = fields.number("max_tokens", least, u32::MAX)?;
        let max_tokens = max_tokens.unwrap_or(COMPLETION_TOKENS);
        let form = form::read(&mut fields)?;
        let mut request = Self::read(&mut fields, prompts, Some(max_tokens), form)?;
        request.adds_lead = fields.take("add_special_tokens")?.unwrap_or(true);
        request.shown.echo = echo;
        request.sampling.logprobs = fields.number("logprobs", 0, parts::MAX_TOP_LOGPROBS)?;
        fields.refuse_rest()?;
        Ok(request)
    }

    /// Reads what all endpoints know.
    fn read(
        fields: &mut Fields,
        prompts: Vec<Prompt>,
        max_tokens: Option<u32>,
        form: Option<Form>,
    ) -> Result<Self, ApiError> {
        let sampling = parts::sampling(fields)?;
        if max_tokens.is_some_and(|most| sampling.min_tokens > most) {
            return Err(ApiError::invalid_field(
                "min_tokens",
                "is more than max_tokens",
            ));
        }
        let choices = fields.number("n", 1, MAX_CHOICES)?.unwrap_or(1);
        if fields.take("best_of")?.unwrap_or(choices) != choices {
            return Err(ApiError::invalid_field(
                "best_of",
                "is supported only where it equals n",
            ));
        }
        let ending = parts::ending(fields)?;
        if ending.ignores_end && form.is_some() {
            return Err(ApiError::invalid_field(
                "ignore_eos",
                "cannot go with a required form, which says where an answer ends",
            ));
        }
        Ok(Self {
            model: fields.required("model")?,
            prompts,
            template: TemplateOptions::default(),
            adds_lead: true,
            last_tokens: fields.number("truncate_prompt_tokens", 1, usize::MAX)?,
            choices,
            sampling,
            seed: fields.take::<i64>("seed")?.map(i64::cast_unsigned),
            max_tokens,
            ending,
            form,
            tool_use: None,
            shown: parts::shown(fields)?,
            priority: fields.take("priority")?.unwrap_or(0),
            cache_salt: cache_salt(fields)?,
        })
    }

    /// Likely tokens that are told at each place of the prompts, where their
    /// probabilities are.
    pub fn prompt_logprobs(&self) -> Option<u32> {
        self.sampling.logprobs.filter(|_| self.shown.echo)
    }

    /// How the tokens of a prompt's answer `choice` are drawn, with `fallback_seed`
    /// where the client named none.
    pub fn sampling(&self, choice: u32, fallback_seed: u64) -> SamplingParams {
        SamplingParams {
            seed: self
                .seed
                .map_or(fallback_seed, |seed| seed.wrapping_add(u64::from(choice))),
            ..self.sampling.clone()
        }
    }
}

/// The switch and the number of a chat become one number, which counts only where
/// the switch is on.
fn chat_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let asked = fields.flag("logprobs")?;
    let top = fields.number("top_logprobs", 0, parts::MAX_TOP_LOGPROBS)?;
    match (asked, top) {
        (false, Some(1..)) => Err(ApiError::invalid_field(
            "top_logprobs",
            "needs logprobs to be true",
        )),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

fn cache_salt(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let salt: Option<String> = fields.take("cache_salt")?;
    match &salt {
        Some(salt) if salt.is_empty() || salt.len() > MAX_SALT_BYTES => {
            let message = format!("must have 1 to {MAX_SALT_BYTES} bytes");
            Err(ApiError::invalid_field("cache_salt", &message))
        }
        _ => Ok(salt),
    }
}
