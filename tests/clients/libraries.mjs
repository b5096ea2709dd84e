// What each JavaScript library is asked to do; see libraries.py. Run as: node libraries.mjs LIBRARY
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { URL: url, KEY: key, NARROW_KEY: narrowKey, MODEL: model, MODULES: modules } = process.env;
const require = createRequire(`${modules}/package.json`);
const load = async (name) => import(pathToFileURL(require.resolve(name)).href);
const question = "What is the weather in Paris?";
const tokens = 80; // a call in the form of the demo's base has forty
const patience = 40;
const messages = [{ role: "user", content: question }];
const long = [{ role: "user", content: "word ".repeat(4000) }];
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};

function check(condition, what) {
  if (!condition) throw new Error(`not as expected: ${JSON.stringify(what)?.slice(0, 300)}`);
}

function cityOf(given) {
  const found = typeof given === "string" ? JSON.parse(given) : given;
  check(["Paris", "Rome"].includes(found.city), found);
}

async function refused(work, word) {
  try {
    await work;
  } catch (error) {
    check(`${error.name} ${error.code} ${error.message} ${error.responseBody}`.includes(word), String(error));
    return;
  }
  throw new Error("nothing was refused");
}

const libraries = {
  "openai (JS)": async () => {
    const { default: OpenAI } = await load("openai");
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
    const create = (more) => client.chat.completions.create({ model, messages, max_tokens: tokens, temperature: 0, ...more });
    const tools = [{ type: "function", function: { name: "weather", description: "The weather.", parameters } }];
    const calls = async (choice, more) => (await create({ tools, tool_choice: choice, ...more })).choices[0].message.tool_calls ?? [];
    return {
      chat: async () => check((await create({})).choices[0].message.content, "no text"),
      stream: async () => {
        let text = "";
        for await (const chunk of await create({ stream: true })) text += chunk.choices[0]?.delta?.content ?? "";
        check(text, text);
      },
      "tools: auto": async () => calls("auto"),
      "tools: required": async () => cityOf((await calls("required", { parallel_tool_calls: false }))[0].function.arguments),
      "tools: named": async () => cityOf((await calls({ type: "function", function: { name: "weather" } }))[0].function.arguments),
      "tools: parallel": async () => (await calls("required", { parallel_tool_calls: true })).forEach((c) => cityOf(c.function.arguments)),
      "structured output": async () => {
        const schema = { name: "place", schema: parameters };
        cityOf((await create({ response_format: { type: "json_schema", json_schema: schema } })).choices[0].message.content);
      },
      responses: async () => check((await client.responses.create({ model, input: question, max_output_tokens: 8 })).output_text, "no text"),
      embeddings: async () => check((await client.embeddings.create({ model, input: ["one", "two"] })).data.length === 2, "not two"),
      errors: async () => refused(client.chat.completions.create({ model, messages: long }), "context_length_exceeded"),
      retries: async () => {
        const narrow = new OpenAI({ baseURL: `${url}/v1`, apiKey: narrowKey, maxRetries: patience });
        await Promise.all([1, 2, 3].map(() => narrow.chat.completions.create({ model, messages, max_tokens: tokens })));
      },
    };
  },
  "anthropic (JS)": async () => {
    const { default: Anthropic } = await load("@anthropic-ai/sdk");
    const client = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0 });
    const tools = [{ name: "weather", description: "The weather.", input_schema: parameters }];
    const create = (more) => client.messages.create({ model, messages, max_tokens: tokens, ...more });
    const used = async (choice) => (await create({ tools, tool_choice: choice })).content.filter((b) => b.type === "tool_use");
    return {
      chat: async () => check((await create({})).content.length, "no content"),
      stream: async () => check((await client.messages.stream({ model, messages, max_tokens: tokens }).finalMessage()).content.length, "none"),
      "tools: auto": async () => used({ type: "auto" }),
      "tools: required": async () => cityOf((await used({ type: "any", disable_parallel_tool_use: true }))[0].input),
      "tools: named": async () => cityOf((await used({ type: "tool", name: "weather" }))[0].input),
      "tools: parallel": async () => (await used({ type: "any" })).forEach((block) => cityOf(block.input)),
      retries: async () => {
        const narrow = new Anthropic({ baseURL: url, apiKey: narrowKey, maxRetries: patience });
        await Promise.all([1, 2, 3].map(() => narrow.messages.create({ model, messages, max_tokens: tokens })));
      },
      "structured output": async () => {
        const made = await create({ output_config: { format: { type: "json_schema", schema: parameters } } });
        cityOf(made.content.map((block) => block.text ?? "").join(""));
      },
      errors: async () => refused(create({ messages: long }), "prompt is too long"),
    };
  },
  "Vercel AI SDK": async () => {
    const { generateText, streamText, Output, tool, jsonSchema } = await load("ai");
    const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
    const provider = createOpenAICompatible({ name: "loraplex", baseURL: `${url}/v1`, apiKey: key, supportsStructuredOutputs: true });
    const narrow = createOpenAICompatible({ name: "narrow", baseURL: `${url}/v1`, apiKey: narrowKey });
    const options = { model: provider(model), prompt: question, maxOutputTokens: tokens, temperature: 0, maxRetries: 0 };
    const tools = { weather: tool({ description: "The weather.", inputSchema: jsonSchema(parameters) }) };
    const calls = async (toolChoice, more) => (await generateText({ ...options, tools, toolChoice, ...more })).toolCalls;
    return {
      chat: async () => check((await generateText(options)).text, "no text"),
      stream: async () => {
        let text = "";
        for await (const part of streamText(options).textStream) text += part;
        check(text, text);
      },
      "tools: auto": async () => calls("auto"),
      "tools: required": async () => cityOf((await calls("required"))[0].input),
      "tools: named": async () => cityOf((await calls({ type: "tool", toolName: "weather" }))[0].input),
      "tools: parallel": async () => {
        const made = await calls("required", { providerOptions: { loraplex: { parallel_tool_calls: true } } });
        check(made.length, "no call");
        made.forEach((call) => cityOf(call.input));
      },
      "structured output": async () => {
        const made = await generateText({ ...options, output: Output.object({ schema: jsonSchema(parameters) }) });
        cityOf(made.output);
      },
      // By @ai-sdk/openai, in two steps: told to keep nothing, it sends the call itself and no reference to it.
      responses: async () => {
        const { createOpenAI } = await load("@ai-sdk/openai");
        const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: key });
        const asked = { ...options, model: openai.responses(model), providerOptions: { openai: { store: false } } };
        const first = await generateText({ ...asked, tools, toolChoice: "required" });
        const called = first.toolCalls[0];
        cityOf(called.input);
        const output = { type: "text", value: "Sunny." };
        const result = { type: "tool-result", toolCallId: called.toolCallId, toolName: called.toolName, output };
        const turns = [{ role: "user", content: question }, ...first.response.messages.slice(0, 1), { role: "tool", content: [result] }];
        const made = await generateText({ ...asked, prompt: undefined, messages: turns });
        // The demo's base may have nothing to say to that; the items were taken, and it was asked.
        check(made.usage.inputTokens > first.usage.inputTokens / 2 && made.finishReason !== "error", made.finishReason);
      },
      embeddings: async () => {
        const { embedMany } = await load("ai");
        const embedder = provider.embeddingModel ? provider.embeddingModel(model) : provider.textEmbeddingModel(model);
        check((await embedMany({ model: embedder, values: ["one", "two"], maxRetries: 0 })).embeddings.length === 2, "not two");
      },
      errors: async () => refused(generateText({ ...options, prompt: undefined, messages: long }), "context length"),
      retries: async () => {
        const again = { ...options, model: narrow(model), maxRetries: patience };
        await Promise.all([1, 2, 3].map(() => generateText(again)));
      },
    };
  },
};

const packages = { "openai (JS)": "openai", "anthropic (JS)": "@anthropic-ai/sdk", "Vercel AI SDK": "ai" };
const name = process.argv[2];
const { readFileSync } = await import("node:fs");
const version = JSON.parse(readFileSync(`${modules}/node_modules/${packages[name]}/package.json`)).version;
console.log(JSON.stringify({ version }));
for (const [what, run] of Object.entries(await libraries[name]())) {
  if ((what === "embeddings") !== (process.argv[3] === "embeddings")) continue;
  let error = null;
  try {
    await Promise.race([run(), new Promise((_, no) => setTimeout(() => no(new Error("120 s are over")), 120_000).unref())]);
  } catch (exc) {
    error = `${exc.name}: ${exc.message}`.slice(0, 500);
  }
  console.log(JSON.stringify({ check: what, error }));
}
process.exit(0);
