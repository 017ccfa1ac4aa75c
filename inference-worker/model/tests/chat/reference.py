#!/usr/bin/env python3
"""Writes what the references make of cases.json to expected.json: transformers of Jinja
templates, and Meta's chat_format of its own two formats. Run with transformers 5.23.0,
jinja2 3.1.6, llama-models 0.3.0 and tiktoken 0.14.0 installed, and with the folder that
e2e/fetch-tokenizers.sh filled as argument. No test needs this. Of templates that may not
be copied into this repository, only hashes of the outcome are kept."""

import datetime
import importlib
import json
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
NOW = datetime.datetime(2026, 3, 7, 8, 9, 10)
MASK = (1 << 64) - 1

import jinja2
import transformers.utils.chat_template_utils as chat_template_utils
from llama_models.datatypes import RawMessage, RawTextItem, ToolCall
from transformers import PreTrainedTokenizerFast

# Meta's code imports this for pictures only.
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules.setdefault(name, types.ModuleType(name)).__getattr__ = lambda _name: None


class FixedDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


chat_template_utils.datetime = FixedDatetime


def fnv(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return f"{value:016x}"


def rendered(tokenizer, template, case):
    try:
        text = tokenizer.apply_chat_template(
            case["messages"],
            tools=case.get("tools"),
            documents=case.get("documents"),
            chat_template=template,
            add_generation_prompt=case.get("add_generation_prompt", True),
            tokenize=False,
            **case.get("variables", {}),
        )
        return {"text": text}
    except jinja2.exceptions.UndefinedError:
        return {"fails": True}
    except jinja2.exceptions.TemplateError as error:
        return {"raised": str(error)}
    except TypeError:
        return {"fails": True}


def hashed(outcome):
    return {key: fnv(value) if isinstance(value, str) else value for key, value in outcome.items()}


def raw(message):
    def call(tool_call):
        function = tool_call["function"]
        return ToolCall(call_id="c", tool_name=function["name"], arguments=function["arguments"])

    content = message["content"]
    if isinstance(content, list):
        content = [RawTextItem(text=part["text"]) for part in content]
    return RawMessage(
        role=message["role"],
        content=content,
        stop_reason=message.get("stop_reason"),
        tool_calls=[call(tool_call) for tool_call in message.get("tool_calls", [])],
    )


def metas(family, cases):
    tokenizer = importlib.import_module(f"llama_models.{family}.tokenizer").Tokenizer.get_instance()
    chat = importlib.import_module(f"llama_models.{family}.chat_format").ChatFormat(tokenizer)
    outcomes = {}
    for name, case in cases.items():
        if case.keys() - {"messages"} or name in ("image", "null content", "reasoning"):
            continue
        ids = chat.encode_dialog_prompt([raw(message) for message in case["messages"]]).tokens
        outcomes[name] = {"text": tokenizer.decode(ids), "ids": ids}
    return outcomes


def main():
    fetched = Path(sys.argv[1])
    cases = json.loads((HERE / "cases.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(fetched / "llama3-json")
    own, others, ids = {}, {}, {}
    for path in sorted(HERE.glob("*.jinja")):
        own[path.name] = {name: rendered(tokenizer, path.read_text(), case) for name, case in cases.items()}
    templates = {path.name: path.read_text() for path in sorted((fetched / "templates").glob("*.jinja"))}
    templates["llama3-json"] = tokenizer.chat_template
    for file, template in templates.items():
        others[file] = {name: hashed(rendered(tokenizer, template, case)) for name, case in cases.items()}
    for name, case in cases.items():
        if "text" in others["llama3-json"][name] and not case.keys() - {"messages"}:
            encoded = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True, return_dict=False)
            ids[name] = fnv(" ".join(map(str, encoded)))
    expected = {
        "now": int(NOW.replace(tzinfo=datetime.timezone.utc).timestamp()),
        "own": own,
        "fetched": others,
        "fetched ids": ids,
        "built in": {family: metas(family, cases) for family in ("llama3", "llama4")},
    }
    text = json.dumps(expected, ensure_ascii=False, indent=1, sort_keys=True)
    (HERE / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
