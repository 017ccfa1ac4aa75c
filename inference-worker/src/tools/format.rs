//! The two notations of calls.

/// Control tokens around calls. They are never content.
pub const MARKERS: [&str; 3] = ["<|python_tag|>", "<|python_start|>", "<|python_end|>"];

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `{"name": "f", "parameters": {"a": 1}}`, several behind each other, between
    /// `;`, or as a list.
    Json,
    /// `[f(a=1), g()]`.
    Pythonic,
}

impl ToolFormat {
    /// The notation that a chat template teaches; that of JSON where it teaches none
    /// or there is no template.
    pub fn of_template(template: Option<&str>) -> Self {
        let Some(template) = template else {
            return Self::Json;
        };
        let has = |part: &str| template.contains(part);
        let json = has("\"parameters\":") || has("\\\"parameters\\\":");
        // The function's name and a parenthesis behind it, or an example of that.
        let call = [
            "func_name1(",
            "name + \"(\"",
            "name + '('",
            "name ~ '('",
            "name ~ \"(\"",
        ];
        if !json && call.into_iter().any(has) {
            Self::Pythonic
        } else {
            Self::Json
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_says_how_calls_are_written() {
        for (template, format) in [
            (
                "{{ '{\"name\": \"' + call.name + '\", ' }}{{ '\"parameters\": ' }}",
                ToolFormat::Json,
            ),
            (
                "call functions as [func_name1(a=value), func_name2()]",
                ToolFormat::Pythonic,
            ),
            ("{{- tool_call.name + \"(\" }}", ToolFormat::Pythonic),
            ("{{ messages }}", ToolFormat::Json),
        ] {
            assert_eq!(
                ToolFormat::of_template(Some(template)),
                format,
                "{template}"
            );
        }
        assert_eq!(ToolFormat::of_template(None), ToolFormat::Json);
    }

    #[test]
    fn the_real_templates_teach_json() {
        let Some(folder) = std::env::var_os("LLAMA_TEST_TOKENIZERS") else {
            eprintln!("not run: LLAMA_TEST_TOKENIZERS names no folder");
            return;
        };
        let folder = std::path::Path::new(&folder).join("templates");
        for name in ["llama4.jinja", "meta-llama-Llama-3.1-8B-Instruct.jinja"] {
            let template = std::fs::read_to_string(folder.join(name)).expect("reads");
            assert_eq!(ToolFormat::of_template(Some(&template)), ToolFormat::Json);
        }
    }
}
