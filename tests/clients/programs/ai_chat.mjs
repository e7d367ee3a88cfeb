// Vercel's AI SDK: a conversation with a tool, streams with reasoning and usage, stop strings, errors; with
// its provider for servers with OpenAI's API, and with OpenAI's own provider.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, tool } from "ai";
import { z } from "zod";

const cantata = createOpenAICompatible({
  name: "cantata",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true, // in streams, too
});
const model = cantata("gpt-oss-20b");

const tools = {
  get_weather: tool({
    description: "Current weather of a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => ({ Paris: "sunny, 21 degrees", Oslo: "rain, 4 degrees" })[city],
  }),
};

async function ask(messages, question) {
  messages.push({ role: "user", content: question });
  const answer = await generateText({ model, messages, tools, stopWhen: stepCountIs(5) });
  messages.push(...answer.response.messages); // with the reasoning in them
  return answer.text;
}

const messages = [];
const answers = [await ask(messages, "What is the weather in Paris?"), await ask(messages, "And in Oslo?")];
// The documentation shows all of the above.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, streamText } from "ai";

assert.deepEqual(answers, ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."]);
assert.deepEqual(
  messages[1].content.map((part) => [part.type, part.text ?? part.input]),
  [
    ["reasoning", "I should look up the weather."],
    ["tool-call", { city: "Paris" }],
  ],
);

// OpenAI's own provider talks to /v1/responses unless told to chat.
const chat = createOpenAI().chat("gpt-oss-20b");

async function stream(model, prompt, options = {}) {
  const errors = [];
  const run = streamText({ model, prompt, onError: ({ error }) => errors.push(error), ...options });
  let text = "";
  let reasoning = "";
  for await (const part of run.fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "reasoning-delta") reasoning += part.text;
  }
  return { text, reasoning, errors, run };
}

const whole = await generateText({ model, prompt: "Say hello." });
assert.equal(whole.reasoningText, "A greeting.");
assert.equal(whole.finishReason, "stop");
for (const [provider, thought] of [
  [model, "A greeting."],
  [chat, ""], // it does not read reasoning from chat
]) {
  const { text, reasoning, errors, run } = await stream(provider, "Say hello.");
  assert.deepEqual([text, reasoning, errors], ["Hello! How can I help?", thought, []]);
  const usage = await run.totalUsage;
  assert.equal(usage.inputTokens, whole.usage.inputTokens);
  assert.equal(usage.outputTokens, whole.usage.outputTokens);
  assert(usage.outputTokenDetails.reasoningTokens > 0);
  const called = await stream(provider, "What is the weather in Oslo?", { tools, stopWhen: stepCountIs(5) });
  assert.equal(await called.run.text, "The weather: rain, 4 degrees.");
  assert.equal((await called.run.steps).length, 2);
  assert.equal((await called.run.totalUsage).inputTokenDetails.cacheReadTokens, 16);

  const say = async (prompt, options = {}) =>
    (await generateText({ model: provider, prompt, ...options })).text;
  assert.equal(await say("Pick a number.", { seed: 7, temperature: 0.3, maxOutputTokens: 60 }), "7");
  assert.equal(await say("Count.", { stopSequences: [" four"] }), "one two three");
  assert.equal(await say("Are you busy?"), "Hello! How can I help?"); // after a 429 with Retry-After
  const broken = await stream(provider, "Break off.");
  assert.equal(broken.text, "This sentence has no");
  assert.equal(broken.errors.length, 1);
}

const low = { cantata: { reasoningEffort: "low" } };
assert.equal((await generateText({ model, prompt: "Say hello.", providerOptions: low })).text, whole.text);

const refused = (options, status, code, param) =>
  assert.rejects(generateText({ model, prompt: "Say hello.", ...options }), (error) => {
    assert(APICallError.isInstance(error), error);
    const { error: body } = JSON.parse(error.responseBody);
    assert.deepEqual([error.statusCode, body.code, body.param], [status, code, param]);
    assert.equal(error.message, body.message);
    return true;
  });
await refused({ model: cantata("gpt-4o") }, 404, "model_not_found", "model");
await refused({ prompt: "word ".repeat(5_000) }, 400, "context_length_exceeded", "messages");
