// --- Adapters: which there are, where they are, and adding more ---------------------------------------------------

const ADAPTERS_AT_ONCE = 50;
const REFRESH_MS = 2000;
const TIERS = { disk: "on disk", host: "in memory", device: "on the device" };
const UPLOADED = [
  "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
  "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json",
];
const NEEDED = UPLOADED.slice(0, 2);

class Adapters {
  // `onUse(name)`: it is to be talked to.
  constructor(onUse) {
    this.onUse = onUse;
    this.shown = ADAPTERS_AT_ONCE;
    this.files = new Map();
    at("adapter-search").addEventListener("input", () => {
      this.shown = ADAPTERS_AT_ONCE;
      this.refresh();
    });
    at("adapter-more").addEventListener("click", () => {
      this.shown += ADAPTERS_AT_ONCE;
      this.refresh();
    });
    const form = at("upload");
    at("upload-files").addEventListener("change", () => this.take([...at("upload-files").files]));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.upload();
    });
    form.addEventListener("dragover", (event) => {
      event.preventDefault();
      form.classList.add("over");
    });
    form.addEventListener("dragleave", () => form.classList.remove("over"));
    form.addEventListener("drop", async (event) => {
      event.preventDefault();
      form.classList.remove("over");
      this.take(await droppedFiles(event.dataTransfer));
    });
    at("upload-name").addEventListener("input", () => this.drawUpload());
  }

  // Look again and again while the view is shown.
  async show(isShown) {
    clearTimeout(this.timer);
    this.isShown = isShown;
    if (isShown) await this.refresh();
  }

  async refresh() {
    clearTimeout(this.timer);
    const asked = (this.asked = (this.asked ?? 0) + 1);
    try {
      const rows = [];
      let page, after = "";
      do {
        const query = new URLSearchParams({ search: at("adapter-search").value, limit: Math.min(1000, this.shown - rows.length) });
        if (after) query.set("after", after);
        page = await getJson(`v1/adapters?${query}`);
        rows.push(...page.data);
        after = page.last_id;
      } while (page.has_more && rows.length < this.shown);
      if (asked !== this.asked) return;
      this.draw(rows, page);
    } catch (error) {
      at("adapter-count").textContent = error.message;
    }
    if (this.isShown && asked === this.asked) this.timer = setTimeout(() => this.refresh(), REFRESH_MS);
  }

  draw(rows, { total, has_more: hasMore }) {
    const count = `${rows.length} of ${total}`;
    if (at("adapter-count").textContent !== count) at("adapter-count").textContent = count;
    at("adapter-more").hidden = !hasMore;
    const body = at("adapter-rows");
    const known = new Map([...body.children].map((row) => [row.dataset.name, row]));
    const drawn = rows.map((one) => {
      const said = JSON.stringify([one.tier, one.rank, one.kind, one.bytes, one.users, one.pinned, one.error]);
      const row = known.get(one.id);
      if (row?.dataset.said === said) return row; // with the focus that one of its buttons may have
      const fresh = this.row(one);
      Object.assign(fresh.dataset, { name: one.id, said });
      return fresh;
    });
    const held = document.activeElement?.closest?.("tr")?.dataset.name;
    const word = document.activeElement?.dataset?.act;
    if (drawn.length !== body.children.length || drawn.some((row, i) => row !== body.children[i])) body.replaceChildren(...drawn);
    if (held && word) [...body.children].find((row) => row.dataset.name === held)?.querySelector(`[data-act=${word}]`)?.focus();
  }

  row(one) {
    const act = (word, words, todo, more) => {
      const element = button(words, () => this.change(element, todo), more);
      element.dataset.act = word;
      element.setAttribute("aria-label", `${words} ${one.id}`);
      return element;
    };
    const path = `v1/adapters/${encodeURIComponent(one.id)}`;
    const tier = make("span", { className: `tier ${one.tier}` }, TIERS[one.tier] ?? one.tier);
    const talk = button("Talk", () => this.onUse(one.id));
    talk.dataset.act = "talk";
    talk.setAttribute("aria-label", `Talk to ${one.id}`);
    return make("tr", {},
      make("td", {}, one.id, one.error ? make("div", { className: "problem" }, one.error) : null),
      make("td", {}, tier, one.pinned ? " pinned" : ""),
      make("td", {}, String(one.rank)),
      make("td", {}, one.kind),
      make("td", {}, bytes(one.bytes)),
      make("td", {}, String(one.users)),
      make("td", {}, make("span", { className: "row" },
        talk,
        one.tier === "disk" ? act("load", "Load", () => this.load(one.id)) : null,
        one.pinned
          ? act("pin", "Unpin", () => ask(`${path}/unpin`, { method: "POST" }))
          : act("pin", "Pin", () => ask(`${path}/pin`, { method: "POST" })),
        act("remove", "Remove", () => this.remove(one.id, path), { className: "danger" }))));
  }

  async change(element, todo) {
    element.disabled = true;
    try {
      await todo();
    } catch (error) {
      at("upload-state").textContent = error.message;
      element.disabled = false;
      return;
    }
    element.disabled = false;
    await this.refresh();
  }

  // A request reads it into memory; one token is the smallest.
  load(name) {
    return ask("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: name, prompt: "a", max_tokens: 1 }),
    });
  }

  async remove(name, path) {
    const dialog = at("sure");
    at("sure-text").textContent = `Remove ${name} from the server? Answers that use it come to their end.`;
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue === "yes") await ask(`${path}?wait=10`, { method: "DELETE" });
  }

  // --- Adding -------------------------------------------------------------------------------------------------

  take(files) {
    if (files.some((file) => file.name === NEEDED[0])) this.files.clear(); // another adapter: nothing of the one before
    for (const file of files) if (UPLOADED.includes(file.name)) this.files.set(file.name, file);
    const folder = files.find((file) => file.name === NEEDED[0])?.folder;
    if (folder && [undefined, "", this.suggested].includes(at("upload-name").value)) at("upload-name").value = this.suggested = folder;
    const left = files.filter((file) => !UPLOADED.includes(file.name)).length;
    at("upload-state").textContent = left ? `${left} other ${left > 1 ? "files are" : "file is"} not needed and left out.` : "";
    this.drawUpload();
  }

  drawUpload() {
    at("upload-list").replaceChildren(
      ...[...this.files.values()].map((file) => make("li", {}, `${file.name}, ${bytes(file.size)}`)),
      ...NEEDED.filter((name) => this.files.size && !this.files.has(name)).map((name) => make("li", { className: "bad" }, `${name} is missing`)));
    at("upload-send").disabled = !(NEEDED.every((name) => this.files.has(name)) && at("upload-name").value.trim());
  }

  async upload() {
    const form = new FormData();
    form.append("name", at("upload-name").value.trim());
    if (at("upload-replace").checked) form.append("replace", "true");
    for (const [name, file] of this.files) form.append(name, file, name);
    const [state, progress] = [at("upload-state"), at("upload-progress")];
    at("upload-send").disabled = true;
    Object.assign(progress, { hidden: false, value: 0 });
    state.textContent = "Uploading …";
    try {
      const added = await sent(form, (share) => {
        progress.value = share;
        if (share === 1) state.textContent = "The server is checking it …";
      });
      state.textContent = `${added.id} is there: rank ${added.rank}, ${bytes(added.bytes)}.`;
      this.files.clear();
      at("upload-name").value = "";
      at("upload-files").value = "";
    } catch (error) {
      state.textContent = error.message;
    }
    progress.hidden = true;
    this.drawUpload();
    await this.refresh();
  }
}

// fetch does not tell how far an upload has come.
async function sent(form, onProgress) {
  for (;;) {
    const asked = apiKey;
    const request = new XMLHttpRequest();
    request.open("POST", new URL("v1/adapters", home));
    for (const [name, value] of Object.entries(headersFor())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", ({ loaded, total }) => onProgress(loaded / total));
    await new Promise((resolve, reject) => {
      request.addEventListener("load", resolve);
      request.addEventListener("error", () => reject(new Error("The connection to the server is lost.")));
      request.send(form);
    });
    let body = {};
    try {
      body = JSON.parse(request.responseText);
    } catch {
      // what stands between may answer in words of its own
    }
    if (request.status < 300) return body;
    const message = body.error?.message ?? `${request.status} ${request.statusText}`;
    if (request.status !== 401 || !(apiKey !== asked || (await askForKey(message)))) throw new Refused(request.status, message);
  }
}

// A reader gives some at a time.
async function entriesOf(reader) {
  const all = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return all;
    all.push(...some);
  }
}

// Files that were dropped, or lie in the folders that were.
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  for (const entry of entries) {
    const inside = entry.isDirectory
      ? await entriesOf(entry.createReader())
      : [entry];
    for (const one of inside.filter((each) => each.isFile)) {
      const file = await new Promise((resolve, reject) => one.file(resolve, reject));
      found.push(Object.assign(file, { folder: entry.isDirectory ? entry.name : "" }));
    }
  }
  return found;
}
