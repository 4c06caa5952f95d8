// The page over openapi.json: what there is, what it takes and answers, and a form to try it with. Everything
// that is shown is put there as text; nothing is ever parsed as HTML.

const base = new URL(".", location.href);
const find = document.getElementById("find");
const key = document.getElementById("key");
const state = document.getElementById("state");
key.value = new URLSearchParams(location.search).get("api_key") ?? "";

// `backticks` as code, blank lines as paragraphs.
function prose(text) {
  return text.trim().split(/\n\s*\n/).map((paragraph) => make("p", {}, ...inline(paragraph)));
}

function inline(text) {
  return text.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));
}

// A disclosure whose inside is made when it is first opened.
function folded(summary, inside, isOpen = false) {
  const details = make("details", {}, make("summary", {}, ...summary));
  let isMade = false;
  const fill = () => {
    if (details.open && !isMade) {
      isMade = true;
      details.append(...inside());
    }
  };
  details.addEventListener("toggle", fill);
  if (isOpen) {
    details.open = true;
    fill();
  }
  return details;
}

const json = (value) => JSON.stringify(value, null, 2);

// --- Schemas -------------------------------------------------------------------------------------------------

const nameOf = (ref) => ref.split("/").pop();

function typeOf(schema) {
  if (schema === true || !Object.keys(schema).some((word) => word !== "description" && word !== "default"))
    return "any";
  if (schema.$ref) return nameOf(schema.$ref);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return options.map(typeOf).join(" | ");
  if (schema.type === "array") return `[${typeOf(schema.items ?? true)}]`;
  if (schema.type === "object" && !schema.properties && typeof schema.additionalProperties === "object")
    return `{name: ${typeOf(schema.additionalProperties)}}`;
  return [schema.type].flat().join(" | ");
}

const limits = {
  minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<",
  minLength: "characters ≥", maxLength: "characters ≤", minItems: "items ≥", maxItems: "items ≤",
};

function limitsOf(schema) {
  const schemas = [schema, ...(schema.anyOf ?? [])];
  const found = schemas.flatMap((one) =>
    Object.entries(limits).filter(([word]) => one[word] !== undefined).map(([word, sign]) => `${sign} ${one[word]}`));
  return found.length ? ` (${found.join(", ")})` : "";
}

// The named schemas that a schema leads to at once.
function refsIn(schema) {
  if (!schema || typeof schema !== "object") return [];
  if (schema.$ref) return [nameOf(schema.$ref)];
  return [...(schema.anyOf ?? []), ...(schema.oneOf ?? []), schema.items, schema.additionalProperties].flatMap(refsIn);
}

function describe(schema, document) {
  const parts = [];
  if (schema.description) parts.push(...prose(schema.description));
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([name, property]) =>
    make("tr", {},
      make("td", {}, make("code", {}, name), required.has(name) ? make("b", { title: "required" }, " *") : null),
      make("td", {},
        make("span", { className: "type" }, typeOf(property) + limitsOf(property)),
        ...(property.description ? [make("div", { className: "faint" }, ...inline(property.description))] : []),
        ...[...new Set(refsIn(property))].map((ref) => named(ref, document)))));
  if (rows.length) parts.push(make("table", {}, make("tbody", {}, ...rows)));
  else if (!schema.$ref) parts.push(make("p", { className: "type" }, typeOf(schema) + limitsOf(schema)));
  if (!rows.length) parts.push(...[...new Set(refsIn(schema))].map((ref) => named(ref, document)));
  return parts;
}

function named(name, document, isOpen = false) {
  const inside = () => [make("div", { className: "schema" }, ...describe(document.components.schemas[name], document))];
  return folded([make("code", {}, name)], inside, isOpen);
}

function shown(schema, document, isOpen = false) {
  return schema.$ref ? [named(nameOf(schema.$ref), document, isOpen)] : describe(schema, document);
}

// --- One operation -------------------------------------------------------------------------------------------

function examplesOf(content) {
  if (!content) return [];
  if (content.example !== undefined) return [["Example", content.example]];
  return Object.entries(content.examples ?? {}).map(([name, example]) => [example.summary ?? name, example.value]);
}

const written = (value) => (typeof value === "string" ? value : json(value));

function parametersOf(operation, document) {
  const rows = (operation.parameters ?? []).map((parameter) =>
    make("tr", {},
      make("td", {}, make("code", {}, parameter.name), parameter.required ? make("b", { title: "required" }, " *") : null),
      make("td", {},
        make("span", { className: "type" }, `${parameter.in}, ${typeOf(parameter.schema)}${limitsOf(parameter.schema)}`),
        make("div", { className: "faint" }, ...inline(parameter.description ?? "")))));
  return rows.length ? [make("h3", {}, "Parameters"), make("table", {}, make("tbody", {}, ...rows))] : [];
}

function responsesOf(operation, document) {
  const blocks = Object.entries(operation.responses).map(([status, response]) =>
    folded(
      [make("code", { className: status < 400 ? "" : "bad" }, status), " ", ...inline(response.description)],
      () => [make("div", { className: "schema" },
        ...Object.entries(response.content ?? {}).flatMap(([mediaType, content]) => [
          make("p", {}, make("code", {}, mediaType), content["x-itemSchema"] ? " · one of these to a frame" : "",
            content["x-end"] ? ` · ends with ${content["x-end"]}` : ""),
          ...shown(content["x-itemSchema"] ?? content.schema ?? {}, document),
          ...examplesOf(content).map(([, value]) => make("pre", { tabIndex: 0 }, written(value))),
        ]),
        ...headersOf(response, document))]));
  return [make("h3", {}, "Answers"), ...blocks];
}

function headersOf(response, document) {
  const names = Object.keys(response.headers ?? {});
  if (!names.length) return [];
  return [folded(["Headers"], () => [make("table", {}, make("tbody", {}, ...names.map((name) =>
    make("tr", {}, make("td", {}, make("code", {}, name)),
      make("td", {}, ...inline(document.components.headers[name].description))))))])];
}

function inside(method, path, operation, document) {
  const body = operation.requestBody?.content["application/json"];
  return [make("div", { className: "inside" },
    ...prose(operation.description ?? ""),
    ...parametersOf(operation, document),
    ...(body ? [make("h3", {}, "Body"), ...shown(body.schema, document, true)] : []),
    ...responsesOf(operation, document),
    tryIt(method, path, operation, body))];
}

// --- Trying --------------------------------------------------------------------------------------------------

const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function tryIt(method, path, operation, body) {
  const id = operation.operationId;
  const fields = (operation.parameters ?? []).map((parameter) => {
    const input = make("input", { value: parameter.example ?? "", autocomplete: "off" });
    return { parameter, input, label: make("label", {}, `${parameter.name} `, input) };
  });
  const examples = examplesOf(body);
  const first = examples[0] ? json(examples[0][1]) : "{}";
  const rows = Math.min(20, first.split("\n").length + 1);
  const text = make("textarea", { rows, spellcheck: false, "aria-label": "Body", value: first });
  const choice = make("select", {}, ...examples.map(([name], i) => make("option", { value: i }, name)));
  choice.addEventListener("change", () => { text.value = json(examples[choice.value][1]); });
  const send = make("button", { type: "submit", className: "send" }, "Send");
  const stop = make("button", { type: "button", className: "stop", disabled: true }, "Stop");
  const command = make("button", { type: "button" }, "As curl");
  const status = make("p", { className: "status", role: "status" });
  const headers = make("div");
  const output = make("pre", { className: "output", tabIndex: 0, hidden: true, "aria-label": "Answer" });
  let stopping = null;

  function request() {
    let address = path.slice(1);
    const query = new URLSearchParams();
    const extra = {};
    for (const { parameter, input } of fields) {
      if (parameter.in === "path") address = address.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
      else if (input.value && parameter.in === "query") query.set(parameter.name, input.value);
      else if (input.value && parameter.in === "header") extra[parameter.name] = input.value;
    }
    const url = new URL(address || ".", base);
    url.search = query.toString();
    if (key.value) extra.Authorization = `Bearer ${key.value}`;
    if (body) extra["Content-Type"] = "application/json";
    return { url, options: { method: method.toUpperCase(), headers: extra, body: body ? text.value : undefined } };
  }

  async function run() {
    stopping?.abort();
    const mine = (stopping = new AbortController());
    const { url, options } = request();
    const began = performance.now();
    const since = () => `${Math.round(performance.now() - began)} ms`;
    output.replaceChildren();
    headers.replaceChildren();
    output.hidden = stop.disabled = false;
    output.ariaBusy = "true";
    status.className = "status";
    status.textContent = "sent …";
    try {
      const response = await fetch(url, { ...options, signal: mine.signal, cache: "no-store" });
      const head = `${response.status} ${response.statusText} after ${since()}`;
      status.className = response.ok ? "status" : "status bad";
      status.textContent = head;
      headers.append(folded(["Headers of the answer"], () =>
        [make("pre", { tabIndex: 0 }, [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n"))]));
      let numReads = 0;
      const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = reader ? await reader.read() : { done: true };
        if (done) break;
        numReads += 1;
        output.append(value);
        status.textContent = `${head}, ${numReads} ${numReads === 1 ? "read" : "reads"} so far`;
      }
      if (response.headers.get("content-type")?.startsWith("application/json")) pretty(output);
      status.textContent = `${head}, ${numReads} ${numReads === 1 ? "read" : "reads"}, complete after ${since()}`;
    } catch (error) {
      status.className = "status bad";
      status.textContent = error.name === "AbortError" ? `stopped after ${since()}` : `${error}`;
    } finally {
      if (stopping === mine) {
        stop.disabled = true;
        output.ariaBusy = "false";
      }
    }
  }

  command.addEventListener("click", () => {
    const { url, options } = request();
    if (key.value) options.headers.Authorization = "Bearer $MOTET_KEY";
    const parts = ["curl -N", options.method === "GET" ? null : `-X ${options.method}`, shellQuoted(`${url}`)];
    for (const [name, value] of Object.entries(options.headers))
      parts.push(name === "Authorization" ? `-H "${name}: ${value}"` : `-H ${shellQuoted(`${name}: ${value}`)}`);
    if (options.body !== undefined) parts.push(`-d ${shellQuoted(options.body)}`);
    output.hidden = false;
    output.textContent = parts.filter(Boolean).join(" ");
    status.textContent = "";
  });
  stop.addEventListener("click", () => stopping?.abort());
  const form = make("form", { className: "try", "aria-label": `Try ${id}` },
    make("h3", {}, "Try it"),
    fields.length ? make("div", { className: "row" }, ...fields.map(({ label }) => label)) : null,
    examples.length > 1 ? make("div", { className: "row" }, make("label", {}, "Example ", choice)) : null,
    body ? text : null,
    make("div", { className: "row" }, send, stop, command),
    status, headers, output);
  form.addEventListener("submit", (event) => { event.preventDefault(); run(); });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  return form;
}

function pretty(output) {
  try {
    output.textContent = json(JSON.parse(output.textContent));
  } catch {
    // shown as it came
  }
}

// --- The page ------------------------------------------------------------------------------------------------

function show(document_) {
  const contents = document.getElementById("contents");
  const main = document.getElementById("operations");
  document.getElementById("version").textContent = document_.info.version;
  main.replaceChildren(...prose(document_.info.description ?? ""));
  const groups = [];
  for (const tag of document_.tags ?? []) {
    const section = make("section", {}, make("h2", {}, tag.name), ...prose(tag.description ?? ""));
    const list = make("ul");
    const entries = [];
    for (const [path, methods] of Object.entries(document_.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        if (!operation.tags.includes(tag.name)) continue;
        const label = () => [make("span", { className: `method ${method}` }, method.toUpperCase()),
          make("span", { className: "path" }, path)];
        const details = folded([...label(), " ", make("span", { className: "faint" }, operation.summary)],
          () => inside(method, path, operation, document_));
        const article = make("article", { id: operation.operationId }, details);
        const link = make("a", { href: `#${operation.operationId}` }, ...label());
        link.addEventListener("click", () => { details.open = true; });
        const item = make("li", {}, link);
        list.append(item);
        section.append(article);
        entries.push({ words: `${method} ${path} ${operation.summary} ${tag.name}`.toLowerCase(), parts: [article, item] });
      }
    }
    const heading = make("h2", {}, tag.name);
    contents.append(heading, list);
    main.append(section);
    groups.push({ entries, parts: [section, heading, list] });
  }
  const schemas = Object.keys(document_.components.schemas).map((name) => named(name, document_));
  main.append(make("section", { id: "schemas" }, make("h2", {}, "Schemas"), ...schemas));
  find.addEventListener("input", () => filter(groups, find.value.toLowerCase().split(/\s+/)));
  open(location.hash.slice(1));
}

function filter(groups, words) {
  for (const { entries, parts } of groups) {
    let numShown = 0;
    for (const entry of entries) {
      const isShown = words.every((word) => entry.words.includes(word));
      numShown += isShown;
      for (const part of entry.parts) part.hidden = !isShown;
    }
    for (const part of parts) part.hidden = !numShown;
  }
}

function open(id) {
  const article = id && document.getElementById(id);
  const details = article?.querySelector("details");
  if (!details) return;
  details.open = true;
  article.scrollIntoView();
}

addEventListener("hashchange", () => open(location.hash.slice(1)));
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    event.preventDefault();
    find.focus();
  }
});

try {
  const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
  const response = await fetch(new URL("openapi.json", base), { headers });
  if (!response.ok) throw new Error(`openapi.json: ${response.status}`);
  show(await response.json());
} catch (error) {
  state.className = "bad";
  state.textContent = `The description cannot be had: ${error.message}`;
}
