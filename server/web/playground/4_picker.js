// --- A box to find a model among thousands: a combobox over the server's own search -----------------------------

const PICKED_AT_ONCE = 50;
let numPickers = 0;

class Picker {
  // `onPick(name)`; `label` says what is picked.
  constructor(place, label, onPick) {
    const id = `picker-${(numPickers += 1)}`;
    this.onPick = onPick;
    this.value = "";
    this.names = [];
    this.active = -1;
    this.asked = 0;
    this.listed = null; // the text that the list was made for
    this.list = make("ul", { id: `${id}-list`, role: "listbox", hidden: true });
    this.list.setAttribute("aria-label", label);
    this.input = make("input", { id, type: "text", autocomplete: "off", spellcheck: false });
    for (const [name, value] of Object.entries({
      role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": `${id}-list`,
    })) this.input.setAttribute(name, value);
    place.append(make("label", { htmlFor: id }, label), this.input, this.list);
    this.input.addEventListener("focus", () => {
      this.input.select();
      this.search("");
    });
    this.input.addEventListener("input", () => this.search(this.input.value));
    this.input.addEventListener("keydown", (event) => this.key(event));
    this.input.addEventListener("blur", () => this.close());
    this.list.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the box keeps the focus
      const item = event.target.closest("[role=option]");
      if (item?.dataset.name !== undefined) this.pick(item.dataset.name);
    });
  }

  show(name) {
    this.value = name;
    this.input.value = name;
  }

  // [[name, what it is]] of those with this text in their names, and what else there is to say.
  async find(text) {
    const query = new URLSearchParams({ search: text, limit: PICKED_AT_ONCE });
    const base = baseModel.toLowerCase().includes(text.toLowerCase()) ? [[baseModel, "base model"]] : [];
    try {
      const { data, total } = await getJson(`v1/adapters?${query}`);
      const rows = [...base, ...data.map((one) => [one.id, `rank ${one.rank} · ${one.tier}`])];
      const left = total - data.length;
      return { rows, note: !rows.length ? "nothing has such a name" : left > 0 ? `${left} more: type to find them` : "" };
    } catch (error) {
      return { rows: base, note: error.message };
    }
  }

  async search(text) {
    const asked = (this.asked += 1);
    const { rows, note } = await this.find(text);
    if (asked !== this.asked || document.activeElement !== this.input) return;
    this.names = rows.map(([name]) => name);
    this.listed = text;
    this.active = -1;
    const items = rows.map(([name, about], i) => {
      const item = make("li", { id: `${this.list.id}-${i}`, role: "option" }, make("span", {}, name), make("small", {}, about));
      item.setAttribute("aria-selected", "false");
      item.dataset.name = name;
      return item;
    });
    this.list.replaceChildren(...items, ...(note ? [make("li", { role: "presentation", className: "faint" }, note)] : []));
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
  }

  // What is marked, or named in full, or comes first: of what is typed, not of the list that was there before.
  // A name that was seen is picked at once: whoever writes and sends meanwhile means it.
  async enter() {
    const text = this.input.value;
    const isListed = this.listed === text && !this.list.hidden;
    if (isListed && this.active >= 0) return this.pick(this.names[this.active]);
    if (this.names.includes(text)) return this.pick(text);
    const names = isListed ? this.names : (await this.find(text)).rows.map(([name]) => name);
    const name = names.includes(text) ? text : names[0];
    if (name !== undefined) this.pick(name);
  }

  key(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) return void this.search("");
      const step = event.key === "ArrowDown" ? 1 : -1;
      const from = this.active < 0 && step < 0 ? 0 : this.active;
      if (this.names.length) this.mark((from + step + this.names.length) % this.names.length);
    } else if (event.key === "Enter" && !(this.list.hidden && this.input.value === this.value)) {
      event.preventDefault();
      this.enter();
    } else if (event.key === "Escape") this.close();
  }

  mark(number) {
    this.active = number;
    [...this.list.querySelectorAll("[role=option]")].forEach((item, i) => {
      item.setAttribute("aria-selected", String(i === number));
      if (i === number) {
        item.scrollIntoView({ block: "nearest" });
        this.input.setAttribute("aria-activedescendant", item.id);
      }
    });
  }

  pick(name) {
    this.show(name);
    this.close();
    this.onPick(name);
  }

  close() {
    this.asked += 1;
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
    this.input.value = this.value;
  }
}
