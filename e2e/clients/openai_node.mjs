// Speaks to a server through the official openai package for Node, and prints what came
// as one line of JSON. Exits 1 with a message where an answer is not what it should be.
//
// Usage: openai_node.mjs BASE_URL MODEL [EMBEDDING_BASE_URL]

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model, embeddingURL] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", timeout: 120_000, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const shown = {};

const models = [];
for await (const known of client.models.list()) models.push(known.id);
assert.deepEqual(models, [model]);

const whole = await client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0 });
shown.chat = whole.choices[0].message.content;
assert.ok(shown.chat.length > 0);

const stream = await client.chat.completions.create({
  model, messages, max_tokens: 24, temperature: 0, stream: true, stream_options: { include_usage: true },
});
let text = "";
let usage = null;
for await (const part of stream) {
  text += part.choices[0]?.delta?.content ?? "";
  usage = part.usage ?? usage;
}
assert.equal(text, shown.chat);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const echoed = await client.completions.create({
  model, prompt: "The capital of France is", max_tokens: 1, echo: true, logprobs: 1, temperature: 0,
});
const { tokens, token_logprobs: values } = echoed.choices[0].logprobs;
assert.equal(tokens.length, values.length);
assert.equal(values[0], null);
assert.ok(values.slice(1).every((value) => value <= 0));
shown.echo = echoed.choices[0].text;
assert.equal(shown.echo, "The capital of France is Paris");

const schema = {
  type: "object", additionalProperties: false, required: ["city"],
  properties: { city: { type: "string", maxLength: 16 } },
};
const formed = await client.chat.completions.create({
  model, messages, max_tokens: 48, temperature: 0,
  response_format: { type: "json_schema", json_schema: { name: "city", strict: true, schema } },
});
shown.form = JSON.parse(formed.choices[0].message.content);
assert.equal(typeof shown.form.city, "string");

await assert.rejects(client.chat.completions.create({ model, messages, n: 1000 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "n");
  return true;
});
await assert.rejects(client.embeddings.create({ model, input: "a" }), OpenAI.BadRequestError);

if (embeddingURL) {
  const other = new OpenAI({ baseURL: embeddingURL, apiKey: "none", timeout: 120_000, maxRetries: 0 });
  const [name] = (await other.models.list()).data.map((known) => known.id);
  const input = ["A cat sits on the mat.", "A kitten is resting on a rug.", "The stock market fell sharply today."];
  // The client asks for base64 by itself and reads it back.
  const vectors = (await other.embeddings.create({ model: name, input })).data.map((item) => item.embedding);
  const plain = await other.embeddings.create({ model: name, input, encoding_format: "float" });
  vectors.forEach((vector, at) =>
    vector.forEach((value, index) => assert.equal(value, Math.fround(plain.data[at].embedding[index]))),
  );
  const alike = (a, b) => a.reduce((sum, value, at) => sum + value * b[at], 0);
  shown.alike = alike(vectors[0], vectors[1]);
  shown.unlike = alike(vectors[0], vectors[2]);
  assert.ok(shown.alike > 0.5 && shown.unlike < 0.2);
}
console.log(JSON.stringify(shown));
