// Speaks to a server with Ollama's package for Node; prints what it saw as JSON. Run as `node ollama.mjs URL`.
import { Ollama } from "ollama";

const client = new Ollama({ host: process.argv[2] });
const options = { temperature: 0, num_predict: 20 };
const prompt = "How do I stream tokens?";
const messages = [{ role: "user", content: prompt }];

async function collect(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

async function refusal(call) {
  try {
    await call();
    return [200, ""];
  } catch (error) {
    return [error.status_code, error.error ?? error.message];
  }
}

const generated = await client.generate({ model: "pirate", prompt, options });
const pieces = await collect(await client.generate({ model: "pirate", prompt, options, stream: true }));
const chat = await client.chat({ model: "pirate", messages, options });
const chatPieces = await collect(await client.chat({ model: "pirate", messages, options, stream: true }));

const endless = await client.chat({ model: "pirate", messages, options: { ...options, num_predict: -1 }, stream: true });
let read = 0;
let left = null;
try {
  for await (const _ of endless) if (++read === 3) endless.abort();
} catch (error) {
  left = error.name;
}

const embedded = await client.embed({ model: "pirate", input: ["one text", "another"] });
const shown = await client.show({ model: "pirate" });

console.log(
  JSON.stringify({
    generated: generated.response,
    pieces: pieces.map((part) => part.response),
    last: pieces.at(-1),
    chat: chat.message.content,
    chatPieces: chatPieces.map((part) => part.message.content),
    reason: chat.done_reason,
    left,
    tags: (await client.list()).models.map((model) => [model.name, model.details.parent_model]),
    ps: (await client.ps()).models.map((model) => model.name),
    vectors: embedded.embeddings.map((vector) => Math.hypot(...vector)),
    family: shown.details.family,
    capabilities: shown.capabilities,
    version: (await client.version()).version,
    pull: (await client.pull({ model: "pirate" })).status,
    load: (await client.generate({ model: "pirate", prompt: "" })).done_reason,
    unknown: await refusal(() => client.generate({ model: "nobody", prompt, options })),
    unknownStream: await refusal(() => client.chat({ model: "nobody", messages, stream: true })),
    format: await refusal(() => client.chat({ model: "pirate", messages, format: "json" })),
    delete: await refusal(() => client.delete({ model: "pirate" })),
  }),
);
