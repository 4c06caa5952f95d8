// --- Compare: one prompt, several voices, one batch -------------------------------------------------------------

const MOST_VOICES = 6;

class Compare {
  constructor() {
    this.voices = remembered("voices", []);
    this.views = [];
    this.picker = new Picker(at("compare-model"), "Add a voice", (name) => {
      this.picker.show("");
      if (!this.voices.includes(name) && this.voices.length < MOST_VOICES) this.set([...this.voices, name]);
    });
    sendOnEnter(at("compare-ask"), at("compare-prompt"), (text) => this.send(text));
    at("compare-stop").addEventListener("click", () => this.views.forEach((view) => view.stop()));
  }

  async begin() {
    const served = await Promise.all(this.voices.map((name) => name === baseModel || isServed(name)));
    this.voices = this.voices.filter((_, i) => served[i]);
    if (this.voices.length) return this.draw();
    const found = await getJson(`v1/adapters?limit=${MOST_VOICES - 1}`);
    this.set([baseModel, ...found.data.map((one) => one.id)]);
  }

  set(voices) {
    this.voices = voices;
    remember("voices", voices);
    this.draw();
  }

  draw() {
    at("voices").replaceChildren(...this.voices.map((name) => {
      const away = button("×", () => this.set(this.voices.filter((one) => one !== name)));
      away.setAttribute("aria-label", `Without ${name}`);
      return make("li", {}, name, away);
    }));
    at("compare-model").hidden = this.voices.length >= MOST_VOICES;
  }

  async send(text) {
    if (!text.trim() || !this.voices.length || this.views.some((view) => view.isRunning)) return;
    const turns = [{ role: "user", content: text }];
    const settings = remembered("settings", {});
    this.views = this.voices.map((model) =>
      new AnswerView(turns, { model, content: "", state: "running" }, settings, () => this.sum(), (view) => this.run([view])));
    at("stage").replaceChildren(...this.views.map((view) => view.element));
    await this.run(this.views);
  }

  async run(views) {
    this.toggle(true);
    await Promise.all(views.map((view) => view.run()));
    this.toggle(this.views.some((view) => view.isRunning));
    this.sum();
  }

  toggle(isRunning) {
    at("compare-send").hidden = isRunning;
    at("compare-stop").hidden = !isRunning;
  }

  sum() {
    const figures = this.views.map((view) => view.answer.figures ?? {});
    const together = figures.reduce((total, one) => total + (one.rate ?? 0), 0);
    const first = figures.map((one) => one.first).filter((ms) => ms !== undefined);
    const running = this.views.filter((view) => view.isRunning).length;
    at("compare-sum").textContent = first.length
      ? `${running ? `${running} of ${this.views.length} are speaking` : `${this.views.length} have spoken`} · ${rate(together)} tokens/s together · first tokens after ${milliseconds(Math.min(...first))} to ${milliseconds(Math.max(...first))}`
      : "";
  }
}
