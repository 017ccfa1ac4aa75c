"""Asks for responses through the official openai client, streaming and not, and prints what
came as JSON.

Usage: openai_responses.py BASE_URL MODEL
"""

import json
import sys

import openai
import pydantic


class Cat(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=30)


TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


def main() -> None:
    base_url, model = sys.argv[1:]
    client = openai.OpenAI(
        base_url=base_url,
        api_key="unused",
        timeout=120,
        max_retries=0,
        _strict_response_validation=True,
    )
    question = "What is the capital of France? Answer in one sentence."
    options = dict(model=model, input=question, max_output_tokens=32, temperature=0)

    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    # The client's own accumulator follows the same events.
    with client.responses.stream(**options) as stream:
        accumulated = stream.get_final_response()
    cut = client.responses.create(**{**options, "max_output_tokens": 2})
    told = client.responses.create(
        **options, include=["message.output_text.logprobs"], top_logprobs=2
    )

    calling = dict(
        model=model,
        input="What is the weather in Paris?",
        max_output_tokens=120,
        temperature=0,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    called = client.responses.create(**calling)
    call_events = list(client.responses.create(**calling, stream=True))
    call = called.output[0]
    # The next turn: the call as it came, and its result.
    answered = client.responses.create(
        model=model,
        input=[
            {"role": "user", "content": calling["input"]},
            *[item.to_dict() for item in called.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ],
        max_output_tokens=16,
        temperature=0,
    )
    cat = client.responses.parse(
        model=model,
        input="Describe a cat.",
        max_output_tokens=100,
        temperature=0,
        text_format=Cat,
    ).output_parsed
    refusals = []
    for field, value in [("background", True), ("previous_response_id", "resp_1")]:
        try:
            client.responses.create(**options, **{field: value})
        except openai.BadRequestError as error:
            refusals.append(error.param)

    def joined(events, kind):
        return "".join(event.delta for event in events if event.type == kind)

    json.dump(
        {
            "whole": whole.output_text,
            "status": whole.status,
            "store": whole.to_dict()["store"],
            "usage": whole.usage.model_dump(),
            "events": [event.type for event in events],
            "numbers": [event.sequence_number for event in events],
            "pieces": joined(events, "response.output_text.delta"),
            "stream_usage": events[-1].response.usage.model_dump(),
            "accumulated": accumulated.output_text,
            "cut": [cut.status, cut.incomplete_details and cut.incomplete_details.reason],
            "told": "".join(one.token for one in told.output[0].content[0].logprobs),
            "call": [call.type, call.name, json.loads(call.arguments)],
            "call_pieces": joined(call_events, "response.function_call_arguments.delta")
            == call.arguments,
            "answered": answered.output_text,
            "cat": cat.model_dump(),
            "refusals": refusals,
        },
        sys.stdout,
    )


main()
