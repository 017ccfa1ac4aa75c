"""Chats through the official openai client, streaming and not, and prints what came as JSON.

Usage: openai_chat.py BASE_URL MODEL
"""

import json
import sys

import openai


def main() -> None:
    base_url, model = sys.argv[1:]
    client = openai.OpenAI(base_url=base_url, api_key="unused", timeout=120, max_retries=0)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    options = dict(model=model, messages=messages, max_tokens=32, temperature=0, seed=1)

    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    pieces, usage = [], None
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    completion = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    try:
        client.chat.completions.create(**{**options, "model": "no-such-model"})
        refusal = None
    except openai.NotFoundError as error:
        refusal = error.message

    json.dump(
        {
            "models": [card.id for card in client.models.list()],
            "whole": whole.choices[0].message.content,
            "finish_reason": whole.choices[0].finish_reason,
            "usage": whole.usage.model_dump(),
            "pieces": pieces,
            "stream_usage": usage and usage.model_dump(),
            "completion": completion.choices[0].text,
            "refusal": refusal,
        },
        sys.stdout,
    )


main()
