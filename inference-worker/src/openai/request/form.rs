//! The form that a client requires of answers, in OpenAI's fields and in vLLM's.

use serde::Deserialize;
use serde_json::Value;

use super::fields::Fields;
use crate::openai::ApiError;
use crate::structured::Grammar;

/// What an answer must be, and the field that says so.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    /// The field.
    pub field: &'static str,
    /// The form.
    pub grammar: Grammar,
}

/// OpenAI's `response_format`.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedSchema {
    #[serde(rename = "name")]
    _name: String,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    #[serde(default)]
    schema: Option<Value>,
    // Answers are held to the schema in any case.
    #[serde(default, rename = "strict")]
    _strict: Option<bool>,
}

/// vLLM's `structured_outputs`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct StructuredOutputs {
    json: Option<Value>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
}

impl StructuredOutputs {
    fn grammars(self) -> Result<Vec<Grammar>, &'static str> {
        let schema = self.json.map(schema_of).transpose()?;
        let object = self.json_object.unwrap_or(false);
        let each = [
            schema.map(Grammar::JsonSchema),
            self.regex.map(Grammar::Regex),
            self.choice.map(Grammar::Choice),
            self.grammar.map(Grammar::Lark),
            object.then_some(Grammar::JsonObject),
        ];
        Ok(each.into_iter().flatten().collect())
    }
}

/// A schema as it is, or written in a string, as vLLM takes it too.
fn schema_of(schema: Value) -> Result<Value, &'static str> {
    match schema {
        Value::String(text) => serde_json::from_str(&text).map_err(|_| "is no JSON schema"),
        schema => Ok(schema),
    }
}

/// The options of the text of a response.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TextOptions {
    #[serde(default)]
    format: Option<TextFormat>,
    #[serde(default)]
    verbosity: Option<String>,
}

/// `response_format`, as the Responses API writes it.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum TextFormat {
    Text {},
    JsonObject {},
    JsonSchema {
        #[serde(rename = "name")]
        _name: String,
        #[serde(default, rename = "description")]
        _description: Option<String>,
        schema: Value,
        #[serde(default, rename = "strict")]
        _strict: Option<bool>,
    },
}

/// Reads the form of a response's text, of which there can be one.
pub(super) fn read_of_text(fields: &mut Fields) -> Result<Option<Form>, ApiError> {
    let mut forms = Vec::new();
    let options: Option<TextOptions> = fields.take("text")?;
    let (format, verbosity) =
        options.map_or((None, None), |options| (options.format, options.verbosity));
    // What OpenAI takes where nothing is sent.
    if verbosity.is_some_and(|verbosity| verbosity != "medium") {
        return Err(ApiError::invalid_field(
            "text.verbosity",
            "is not supported",
        ));
    }
    let grammar = match format {
        None | Some(TextFormat::Text {}) => None,
        Some(TextFormat::JsonObject {}) => Some(Grammar::JsonObject),
        Some(TextFormat::JsonSchema { schema, .. }) => Some(Grammar::JsonSchema(schema)),
    };
    forms.extend(grammar.map(|grammar| Form {
        field: "text.format",
        grammar,
    }));
    add_structured_outputs(fields, &mut forms)?;
    only(forms)
}

/// Reads the form, of which there can be one.
pub(super) fn read(fields: &mut Fields) -> Result<Option<Form>, ApiError> {
    let mut forms = Vec::new();
    let mut add = |field, grammar| forms.push(Form { field, grammar });
    let field = "response_format";
    match fields.take::<ResponseFormat>(field)? {
        None | Some(ResponseFormat::Text) => {}
        Some(ResponseFormat::JsonObject) => add(field, Grammar::JsonObject),
        Some(ResponseFormat::JsonSchema { json_schema }) => {
            let schema = json_schema.schema.ok_or_else(|| {
                ApiError::invalid_field("response_format.json_schema.schema", "is required")
            })?;
            add(field, Grammar::JsonSchema(schema));
        }
    }
    add_structured_outputs(fields, &mut forms)?;
    let mut add = |field, grammar| forms.push(Form { field, grammar });
    if let Some(schema) = fields.take("guided_json")? {
        let schema =
            schema_of(schema).map_err(|message| ApiError::invalid_field("guided_json", message))?;
        add("guided_json", Grammar::JsonSchema(schema));
    }
    if let Some(regex) = fields.take("guided_regex")? {
        add("guided_regex", Grammar::Regex(regex));
    }
    if let Some(choice) = fields.take("guided_choice")? {
        add("guided_choice", Grammar::Choice(choice));
    }
    if let Some(grammar) = fields.take("guided_grammar")? {
        add("guided_grammar", Grammar::Lark(grammar));
    }
    only(forms)
}

fn add_structured_outputs(fields: &mut Fields, forms: &mut Vec<Form>) -> Result<(), ApiError> {
    let field = "structured_outputs";
    let Some(outputs) = fields.take::<StructuredOutputs>(field)? else {
        return Ok(());
    };
    let grammars = outputs
        .grammars()
        .map_err(|message| ApiError::invalid_field(field, message))?;
    if grammars.is_empty() {
        return Err(ApiError::invalid_field(field, "requires nothing"));
    }
    forms.extend(grammars.into_iter().map(|grammar| Form { field, grammar }));
    Ok(())
}

fn only(mut forms: Vec<Form>) -> Result<Option<Form>, ApiError> {
    match forms.as_slice() {
        [_, second, ..] => Err(ApiError::invalid_field(
            second.field,
            "is a second form; an answer can have one",
        )),
        _ => Ok(forms.pop()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn form(body: &Value) -> Result<Option<Form>, ApiError> {
        read(&mut Fields::parse(body.to_string().as_bytes())?)
    }

    #[test]
    fn every_way_to_say_it_is_understood() {
        let schema = json!({"type": "object"});
        let named = json!({"name": "n", "schema": schema, "strict": true});
        for (body, expected) in [
            (json!({"response_format": {"type": "text"}}), None),
            (
                json!({"response_format": {"type": "json_object"}}),
                Some(Grammar::JsonObject),
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": named}}),
                Some(Grammar::JsonSchema(schema.clone())),
            ),
            (
                json!({"structured_outputs": {"regex": "a+"}}),
                Some(Grammar::Regex("a+".to_owned())),
            ),
            (
                json!({"guided_json": schema.to_string()}),
                Some(Grammar::JsonSchema(schema.clone())),
            ),
            (
                json!({"guided_choice": ["a", "b"]}),
                Some(Grammar::Choice(vec!["a".to_owned(), "b".to_owned()])),
            ),
            (
                json!({"guided_grammar": "start: \"a\""}),
                Some(Grammar::Lark("start: \"a\"".to_owned())),
            ),
        ] {
            let found = form(&body).expect("valid");
            assert_eq!(found.map(|form| form.grammar), expected, "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, field) in [
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (
                json!({"structured_outputs": {"xml": 1}}),
                "structured_outputs",
            ),
            (json!({"guided_json": "{"}), "guided_json"),
            (
                json!({"guided_regex": "a", "guided_choice": ["a"]}),
                "guided_choice",
            ),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
                "structured_outputs",
            ),
        ] {
            let error = form(&body).expect_err("is refused");
            assert_eq!(error.param.as_deref(), Some(field));
        }
    }
}
