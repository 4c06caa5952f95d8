// Speaks to a server with OpenAI's package for Node; prints what it saw as JSON. Run as `node openai.mjs URL`.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "any", maxRetries: 0 });
const greedy = {
  model: "pirate",
  temperature: 0,
  max_tokens: 20,
  messages: [{ role: "user", content: "How do I stream tokens?" }],
};
const input = { model: "pirate", temperature: 0, input: "How do I stream tokens?" };

async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

async function refusal(wish) {
  try {
    await client.chat.completions.create({ ...greedy, ...wish });
    return null;
  } catch (error) {
    return { status: error.status, code: error.code, param: error.param, request_id: Boolean(error.requestID) };
  }
}

const whole = await client.chat.completions.create(greedy);
const chunks = await collect(
  await client.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } }),
);
const helper = client.chat.completions.stream(greedy);
const completion = await client.completions.create({ model: "pirate", prompt: "Motet is", temperature: 0, max_tokens: 6 });
const pieces = await collect(
  await client.completions.create({ model: "pirate", prompt: "Motet is", temperature: 0, max_tokens: 6, stream: true }),
);

const stopped = await client.chat.completions.create({ ...greedy, max_tokens: 1000, ignore_eos: true, stream: true });
let read = 0;
for await (const _ of stopped) if (++read === 3) break; // leaving the loop closes the connection

const response = await client.responses.create(input);
const events = await collect(
  await client.responses.create({ ...input, input: "And then?", previous_response_id: response.id, stream: true }),
);
const last = events.at(-1).response;
const final = await client.responses.stream(input).finalResponse();
const again = await client.responses.retrieve(response.id);
const items = await collect(client.responses.inputItems.list(last.id, { order: "asc", limit: 1 }));
await client.responses.delete(response.id);
const gone = await client.responses.retrieve(response.id).catch((error) => error.status);

const { response: head } = await client.chat.completions.create(greedy).withResponse();

console.log(
  JSON.stringify({
    models: (await collect(client.models.list())).map((model) => model.id),
    model: (await client.models.retrieve("pirate")).id,
    whole: whole.choices[0].message.content,
    pieces: chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.delta.content ?? ""),
    usage: chunks.at(-1).usage.completion_tokens,
    helper: await helper.finalContent(),
    completion: completion.choices[0].text,
    completion_pieces: pieces.map((chunk) => chunk.choices[0].text),
    read,
    response: response.output_text,
    deltas: events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta),
    types: [...new Set(events.map((event) => event.type))],
    last: last.output[0].content[0].text,
    final: final.output_text,
    again: again.output_text,
    items: items.map((item) => item.role),
    gone,
    adapter: head.headers.get("x-adapter-id"),
    unknown_model: await refusal({ model: "no-such-adapter" }),
    bad_value: await refusal({ temperature: 5 }),
  }),
);
