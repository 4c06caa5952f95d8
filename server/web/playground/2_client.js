// --- The server -----------------------------------------------------------------------------------------------

const home = new URL(".", location.href);
let apiKey = remembered("key", "");
let baseModel = "";

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headersFor(more = {}) {
  return apiKey ? { ...more, Authorization: `Bearer ${apiKey}` } : more;
}

// Asks for a key, once for all who wait, if the server wants one.
async function ask(path, options = {}) {
  for (;;) {
    const asked = apiKey;
    const response = await fetch(new URL(path, home), { ...options, headers: headersFor(options.headers) });
    if (response.ok) return response;
    const error = new Refused(response.status, await reasonOf(response));
    if (response.status !== 401 || !(apiKey !== asked || (await askForKey(error.message)))) throw error;
  }
}

async function reasonOf(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? body.error ?? `${response.status} ${response.statusText}`;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

const getJson = async (path) => (await ask(path)).json();

let askingForKey = null;

function askForKey(problem) {
  askingForKey ??= new Promise((resolve) => {
    const dialog = at("key-dialog");
    at("key-problem").textContent = apiKey ? problem : "";
    at("key").value = apiKey;
    at("key-kept").checked = remembered("key", "") !== "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      askingForKey = null;
      const isGiven = dialog.returnValue === "save" && at("key").value !== "";
      if (isGiven) {
        apiKey = at("key").value;
        remember("key", at("key-kept").checked ? apiKey : null);
        at("key-button").hidden = false;
      }
      resolve(isGiven);
    }, { once: true });
    dialog.showModal();
  });
  return askingForKey;
}

// Whether an adapter of this name may be asked for.
const isServed = (name) => getJson(`v1/models/${encodeURIComponent(name)}`).then(() => true, () => false);

// The data of server-sent events, as text, up to the end of the body.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (buffer + value).split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// --- Requests -------------------------------------------------------------------------------------------------

const FIELDS = [
  ["system", "System prompt", { kind: "text" }],
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top k", { min: 0, step: 1 }],
  ["max_tokens", "Most tokens", { min: 1, step: 1 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.1, max: 100, step: 0.05 }],
  ["seed", "Seed", { step: 1 }],
  ["stop", "Stop at", { kind: "line" }],
];

// `partial`: how the answer begins that is to be gone on with.
function bodyOf(model, turns, settings, partial = "") {
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const [name, , { kind }] of FIELDS) {
    const value = settings[name];
    if (name === "system" || value === undefined || value === "") continue;
    body[name] = kind ? value : Number(value);
  }
  if (partial) {
    messages.push({ role: "assistant", content: partial });
    Object.assign(body, { add_generation_prompt: false, continue_final_message: true });
  }
  return body;
}

function asCurl(body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = apiKey ? " \\\n  -H \"Authorization: Bearer $MOTET_API_KEY\"" : "";
  return `curl -N ${new URL("v1/chat/completions", home)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'`;
}

const OF_OPENAI = new Set(["model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed", "stop"]);

function asPython(body) {
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OF_OPENAI.has(name)));
  const given = Object.entries(body).filter(([name]) => OF_OPENAI.has(name));
  const words = { true: "True", false: "False", null: "None" };
  const python = (value) => JSON.stringify(value).replaceAll(/"(?:[^"\\]|\\.)*"|\b(?:true|false|null)\b/g, (found) => words[found] ?? found);
  const lines = given.map(([name, value]) => `    ${name}=${python(value)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra)},`);
  const key = apiKey ? "os.environ[\"MOTET_API_KEY\"]" : "\"any\"";
  return [
    ...(apiKey ? ["import os", ""] : []),
    "from openai import OpenAI", "",
    `client = OpenAI(base_url="${new URL("v1", home)}", api_key=${key})`,
    "stream = client.chat.completions.create(", ...lines, ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    "        print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)",
  ].join("\n");
}

function asJavaScript(body) {
  const key = apiKey ? ", Authorization: `Bearer ${apiKey}`" : "";
  return [
    `const response = await fetch("${new URL("v1/chat/completions", home)}", {`,
    "  method: \"POST\",",
    `  headers: { "Content-Type": "application/json"${key} },`,
    `  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),`,
    "});",
    "const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();",
    "let buffer = \"\";",
    "for (;;) {",
    "  const { done, value } = await reader.read();",
    "  if (done) break;",
    "  const events = (buffer + value).split(\"\\n\\n\");",
    "  buffer = events.pop();",
    "  for (const event of events) {",
    "    if (!event.startsWith(\"data: {\")) continue;",
    "    console.log(JSON.parse(event.slice(6)).choices[0]?.delta.content ?? \"\");",
    "  }",
    "}",
  ].join("\n");
}
