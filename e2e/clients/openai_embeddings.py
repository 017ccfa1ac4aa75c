"""Asks for vectors through the official openai client and prints what came as JSON.

Usage: openai_embeddings.py BASE_URL
"""

import json
import sys

import openai


def main() -> None:
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none", timeout=120, max_retries=0)
    model = client.models.list().data[0].id
    texts = ["A cat sits on the mat.", "A kitten is resting on a rug.", "The stock market fell sharply today."]
    # The client asks for base64 by itself and reads it back.
    answer = client.embeddings.create(model=model, input=texts)
    vectors = [item.embedding for item in answer.data]
    plain = client.embeddings.create(model=model, input=texts, encoding_format="float")
    for vector, item in zip(vectors, plain.data):
        assert max(abs(a - b) for a, b in zip(vector, item.embedding)) < 1e-7
    alone = client.embeddings.create(model=model, input=texts[1])
    assert alone.data[0].embedding == vectors[1], "a text's vector depends on its company"
    alike = [sum(a * b for a, b in zip(vectors[0], vector)) for vector in vectors]
    assert alike[1] > 0.5 > alike[2], alike
    for wrong in ({"dimensions": 128}, {"input": "word " * 600}, {"encoding_format": "int8"}):
        try:
            client.embeddings.create(**{"model": model, "input": "a", **wrong})
        except openai.BadRequestError as error:
            assert error.param == next(iter(wrong)), error
        else:
            raise AssertionError(f"{wrong} was taken")
    print(json.dumps({"dimensions": len(vectors[0]), "alike": alike, "tokens": answer.usage.total_tokens}))


main()
