// OpenAI's JavaScript library: a conversation with a tool, streams, several choices, log-probabilities,
// stop strings, errors.

import OpenAI from "openai";

const client = new OpenAI(); // reads OPENAI_BASE_URL and OPENAI_API_KEY

const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Current weather of a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

function getWeather({ city }) {
  return { Paris: "sunny, 21 degrees", Oslo: "rain, 4 degrees" }[city];
}

async function ask(messages, question) {
  messages.push({ role: "user", content: question });
  for (;;) {
    const answer = await client.chat.completions.create({ model: "gpt-oss-20b", messages, tools });
    const { message } = answer.choices[0];
    messages.push(message); // with the reasoning in it, which the model needs while it calls tools
    if (!message.tool_calls) return message.content;
    for (const call of message.tool_calls) {
      const content = getWeather(JSON.parse(call.function.arguments));
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
}

const messages = [];
const answers = [await ask(messages, "What is the weather in Paris?"), await ask(messages, "And in Oslo?")];
// The documentation shows all of the above.

import assert from "node:assert/strict";

const MODEL = "gpt-oss-20b";
const user = (content) => [{ role: "user", content }];
const say = (content, options = {}) =>
  client.chat.completions.create({ model: MODEL, messages: user(content), ...options });

assert.deepEqual(answers, ["The weather: sunny, 21 degrees.", "The weather: rain, 4 degrees."]);
assert.equal(messages[1].reasoning, "I should look up the weather.");

const whole = await say("Say hello.");
const stream = client.chat.completions.stream({
  model: MODEL,
  messages: user("Say hello."),
  stream_options: { include_usage: true },
});
let text = "";
stream.on("content", (delta) => (text += delta));
const streamed = await stream.finalChatCompletion();
assert.equal(text, "Hello! How can I help?");
assert.equal(streamed.choices[0].message.content, text);
assert.deepEqual(await stream.totalUsage(), {
  completion_tokens: whole.usage.completion_tokens,
  prompt_tokens: whole.usage.prompt_tokens,
  total_tokens: whole.usage.total_tokens,
});
let reasoning = "";
for await (const chunk of await say("Say hello.", { stream: true })) {
  reasoning += chunk.choices[0].delta.reasoning ?? "";
}
assert.equal(reasoning, "A greeting.");
const runner = client.chat.completions.runTools({
  model: MODEL,
  messages: user("What is the weather in Oslo?"),
  stream: true,
  tools: [
    {
      type: "function",
      function: { ...tools[0].function, function: getWeather, parse: JSON.parse },
    },
  ],
});
assert.equal(await runner.finalContent(), "The weather: rain, 4 degrees.");

const numbers = await say("Pick a number.", { n: 3, seed: 4 });
assert.deepEqual(numbers.choices.map((choice) => choice.message.content), ["4", "5", "6"]);
const low = await say("Say hello.", { reasoning_effort: "low", temperature: 0.2 });
assert.equal(low.choices[0].message.content, "Hello! How can I help?");
assert.equal((await say("Count.", { stop: [" four"] })).choices[0].message.content, "one two three");
const { content } = (await say("Count.", { logprobs: true, top_logprobs: 2 })).choices[0].logprobs;
assert.equal(content.map((token) => token.token).join(""), "one two three four five");
assert.deepEqual((await client.models.list()).data.map((model) => model.id), [MODEL]);
// Refused once with 429 and Retry-After, which the client obeys.
assert.equal((await say("Are you busy?")).choices[0].message.content, "Hello! How can I help?");

const refused = (call, kind, param, code) =>
  assert.rejects(call, (error) => {
    assert(error instanceof kind, error);
    assert.deepEqual([error.param, error.code], [param, code]);
    return true;
  });
await refused(say("", { model: "gpt-4o" }), OpenAI.NotFoundError, "model", "model_not_found");
await refused(say("word ".repeat(5_000)), OpenAI.BadRequestError, "messages", "context_length_exceeded");
await refused(say("", { tool_choice: "required" }), OpenAI.BadRequestError, "tool_choice", null);
await refused(
  client.withOptions({ apiKey: "wrong" }).models.list(),
  OpenAI.AuthenticationError,
  null,
  "invalid_api_key",
);
let seen = "";
await refused(
  (async () => {
    for await (const chunk of await say("Break off.", { stream: true })) {
      seen += chunk.choices[0].delta.content ?? "";
    }
  })(),
  OpenAI.APIError,
  null,
  "engine_unavailable",
);
assert.equal(seen, "This sentence has no");
const leaving = await say("Count.", { stream: true });
for await (const chunk of leaving) {
  assert.equal(chunk.choices[0].delta.role, "assistant");
  break; // which ends the request
}
