// OpenAI's client for Node against a running system: node openai_node.mjs FOLDER URL
// FOLDER has `openai` and `zod` in its node_modules; URL serves the models `tiny`, `first` and `second`.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { test } from "node:test";

const [folder, url] = process.argv.slice(2);
const require = createRequire(`${folder}/package.json`);
const OpenAI = require("openai").default;
const { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } = require("openai/helpers/zod");
const { z } = require("zod");

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0, timeout: 60_000 });
const model = "tiny";
const prompt = "The quick brown fox";
const messages = [{ role: "user", content: "Hello" }];
const greedy = { temperature: 0, max_tokens: 6 };
const Answer = z.object({ name: z.string().max(6), kind: z.enum(["big", "small"]) }).strict();

async function itemsOf(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

test("models are listed on one page and looked up", async () => {
  const page = await client.models.list();
  assert.equal(page.hasNextPage(), false);
  const ids = (await itemsOf(client.models.list())).map((one) => one.id);
  assert.equal(ids[0], model);
  assert.ok(["first", "second"].every((name) => ids.includes(name)));
  const first = await client.models.retrieve("first@1");
  assert.deepEqual([first.id, first.object], ["first@1", "model"]);
});

test("a completion is streamed as it is whole", async () => {
  const whole = await client.completions.create({ model, prompt: [prompt, "Hello"], logprobs: 1, ...greedy });
  assert.equal(whole.choices.length, 2);
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  const stream = await client.completions.create({
    model,
    prompt,
    stream: true,
    stream_options: { include_usage: true },
    ...greedy,
  });
  const chunks = await itemsOf(stream);
  const text = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.text).join("");
  assert.equal(text, whole.choices[0].text);
  assert.ok(chunks.at(-1).usage.completion_tokens > 0);
});

test("a conversation is streamed as it is whole", async () => {
  const whole = await client.chat.completions.create({ model, messages, logprobs: true, top_logprobs: 2, ...greedy });
  const [choice] = whole.choices;
  assert.equal(choice.message.role, "assistant");
  assert.equal(choice.logprobs.content[0].top_logprobs.length, 2);
  const stream = client.chat.completions.stream({ model, messages, ...greedy });
  const told = [];
  stream.on("content", (delta) => told.push(delta));
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, choice.message.content);
  assert.equal(told.join(""), choice.message.content);
});

test("an answer is parsed, whole and streamed", async () => {
  const asked = {
    model,
    messages,
    response_format: zodResponseFormat(Answer, "answer"),
    temperature: 0,
    max_tokens: 80,
  };
  const whole = await client.chat.completions.parse(asked);
  const { parsed } = whole.choices[0].message;
  assert.deepEqual(Answer.parse(parsed), parsed);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.parsed, parsed);
});

test("a call is parsed, whole and streamed", async () => {
  const asked = {
    model,
    messages,
    tools: [zodFunction({ name: "answer", parameters: Answer })],
    tool_choice: { type: "function", function: { name: "answer" } },
    temperature: 0,
    max_tokens: 80,
  };
  const whole = await client.chat.completions.parse(asked);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(Answer.parse(call.function.parsed_arguments), call.function.parsed_arguments);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  const [streamed] = final.choices[0].message.tool_calls;
  assert.equal(streamed.function.arguments, call.function.arguments);
});

test("a response of the Responses API is streamed as it is whole", async () => {
  const asked = { model, input: messages, temperature: 0, max_output_tokens: 6 };
  const whole = await client.responses.create(asked);
  assert.deepEqual([whole.status, whole.incomplete_details.reason], ["incomplete", "max_output_tokens"]);
  const stream = client.responses.stream(asked);
  const told = [];
  stream.on("response.output_text.delta", (event) => told.push(event.delta));
  const final = await stream.finalResponse();
  assert.equal(told.join(""), whole.output_text);
  assert.equal(final.output_text, whole.output_text);
  assert.equal(final.usage.output_tokens, 6);
});

test("a response of the Responses API is parsed, and so are its calls", async () => {
  const asked = { model, input: messages, temperature: 0, max_output_tokens: 80 };
  const text = { format: zodTextFormat(Answer, "answer") };
  const { output_parsed: parsed } = await client.responses.parse({ ...asked, text });
  assert.deepEqual(Answer.parse(parsed), parsed);
  const tools = [zodResponsesFunction({ name: "answer", parameters: Answer })];
  const called = await client.responses.parse({ ...asked, tools, tool_choice: { type: "function", name: "answer" } });
  const [call] = called.output;
  assert.equal(call.type, "function_call");
  assert.deepEqual(Answer.parse(call.parsed_arguments), call.parsed_arguments);
});

test("a response has its headers", async () => {
  const asked = { model: "second", prompt, ...greedy };
  const { data, response, request_id } = await client.completions
    .create(asked, { headers: { "x-request-id": "mine" } })
    .withResponse();
  assert.equal(response.headers.get("x-softprompt-adapter"), "second@1");
  assert.equal(request_id, "mine");
  assert.equal(data._request_id, "mine");
  assert.equal(data.usage.prompt_tokens_details.virtual_tokens, 16);
});

test("what is refused raises its error", async () => {
  const expected = [
    [{ model: "secnd" }, OpenAI.NotFoundError, "model_not_found", "model"],
    [{ temperature: 3 }, OpenAI.BadRequestError, "invalid_value", "temperature"],
    [{ suffix: "!" }, OpenAI.BadRequestError, "unsupported_parameter", "suffix"],
    [{ nonsense: 1 }, OpenAI.BadRequestError, "unknown_parameter", "nonsense"],
  ];
  for (const [body, kind, code, param] of expected) {
    await assert.rejects(client.completions.create({ model, prompt, ...greedy, ...body }), (error) => {
      assert.ok(error instanceof kind, String(error));
      assert.deepEqual([error.code, error.param, error.type], [code, param, "invalid_request_error"]);
      assert.ok(error.requestID);
      return true;
    });
  }
});

test("a stream can be left", async () => {
  const stream = await client.completions.create({ model, prompt, stream: true, max_tokens: 100, ignore_eos: true });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "text_completion");
    break;
  }
  assert.ok(stream.controller.signal.aborted);
});
