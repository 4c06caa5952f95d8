// --- Chat -----------------------------------------------------------------------------------------------------

const SAVE_MS = 400;

class Chat {
  constructor() {
    const kept = remembered("chat", {});
    this.turns = kept.turns ?? [];
    this.model = kept.model ?? ""; // "": the base model, whatever its name
    this.settings = remembered("settings", {});
    this.view = null; // of the answer that runs
    this.picker = new Picker(at("chat-model"), "Adapter", (name) => this.choose(name));
    this.drawFields();
    sendOnEnter(at("ask"), at("prompt"), (text) => this.send(text));
    at("stop").addEventListener("click", () => this.view?.stop());
    at("new-chat").addEventListener("click", () => this.clear());
    addEventListener("pagehide", () => this.save());
  }

  // Once the server is known: what a reload interrupted goes on.
  async begin() {
    if (this.model && !(await isServed(this.model))) this.model = "";
    this.choose(this.model || baseModel, false);
    this.draw();
    const last = this.turns.at(-1);
    if (last?.role === "assistant" && last.state === "running") this.follow(this.lastView);
  }

  choose(name, isKept = true) {
    this.model = name === baseModel ? "" : name;
    this.picker.show(name);
    if (isKept) this.save();
  }

  clear() {
    this.view?.stop();
    this.view = null;
    this.turns = [];
    this.save();
    this.draw();
    at("prompt").focus();
  }

  send(text) {
    if (!text.trim() || this.view) return;
    at("prompt").value = "";
    this.turns.push({ role: "user", content: text });
    this.turns.push({ role: "assistant", model: this.model || baseModel, content: "", state: "running", settings: { ...this.settings } });
    this.draw();
    this.follow(this.lastView);
  }

  async follow(view) {
    this.view = view;
    this.drawButtons();
    await view.run();
    if (this.view === view) this.view = null;
    this.drawButtons();
    this.save();
  }

  draw() {
    const place = at("messages");
    place.replaceChildren();
    if (!this.turns.length) place.append(this.hello());
    this.turns.forEach((turn, i) => {
      if (turn.role === "user") return void place.append(make("article", { className: "user" }, turn.content));
      const view = new AnswerView(this.turns.slice(0, i), turn, turn.settings ?? {}, () => this.changed(),
        (again) => this.view || this.follow(again));
      this.lastView = view;
      place.append(view.element);
    });
    place.scrollTop = place.scrollHeight;
    this.drawButtons();
  }

  changed() {
    const place = at("messages");
    if (place.scrollHeight - place.scrollTop - place.clientHeight < 160) place.scrollTop = place.scrollHeight;
    this.saving ??= setTimeout(() => this.save(), SAVE_MS);
  }

  save() {
    clearTimeout(this.saving);
    this.saving = undefined;
    remember("chat", { turns: this.turns, model: this.model });
  }

  drawButtons() {
    at("send").hidden = this.view !== null;
    at("stop").hidden = this.view === null;
  }

  hello() {
    const questions = ["What is an adapter?", "How do I stream tokens?", "What is a prefix cache?"];
    return make("div", { className: "hello" },
      make("p", {}, "Choose an adapter and ask. What you write stays in this browser and goes to this server only."),
      ...questions.map((question) => button(question, () => this.send(question))));
  }

  drawFields() {
    const fields = FIELDS.map(([name, words, limits]) => {
      const { kind, ...more } = limits;
      const field = kind === "text" ? make("textarea", { rows: 3 }) : make("input", kind ? { type: "text" } : { type: "number", ...more });
      field.value = this.settings[name] ?? "";
      field.placeholder = "the server's own";
      field.addEventListener("change", () => {
        if (field.value === "") delete this.settings[name];
        else this.settings[name] = field.value;
        remember("settings", this.settings);
      });
      return make("label", {}, words, field);
    });
    at("fields").replaceChildren(...fields);
  }
}
