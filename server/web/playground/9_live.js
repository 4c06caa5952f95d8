// --- Live: what the server is doing, from /metrics -------------------------------------------------------------

const LOOK_MS = 1000;
const LOOKS = 120;
const NAMED = 7; // adapters with a colour of their own
const COLOURS = ["#0b57d0", "#c2410c", "#0a7d4f", "#8b2fc9", "#b8860b", "#c2185b", "#0e7490", "#64748b"];

// [{name, labels, value}] of the text format of Prometheus.
function samplesOf(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^([\w:]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found || line.startsWith("#")) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g))
      labels[name] = value.replaceAll(/\\(.)/g, (_, one) => (one === "n" ? "\n" : one));
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

class Live {
  constructor() {
    this.looks = [];
    new ResizeObserver(() => this.isShown && this.draw()).observe(at("chart-tokens"));
  }

  async show(isShown) {
    clearTimeout(this.timer);
    this.isShown = isShown;
    if (isShown) await this.look();
  }

  async look() {
    clearTimeout(this.timer);
    try {
      const samples = samplesOf(await (await ask("metrics")).text());
      this.take(samples, performance.now());
      at("live-state").textContent = "";
      this.draw();
    } catch (error) {
      at("live-state").textContent = error.message;
    }
    if (this.isShown) this.timer = setTimeout(() => this.look(), LOOK_MS);
  }

  take(samples, now) {
    const sum = (name, wanted = {}) => samples
      .filter((one) => one.name === name && Object.entries(wanted).every(([label, value]) => one.labels[label] === value))
      .reduce((total, one) => total + one.value, 0);
    const by = (name, label) => Object.fromEntries(
      samples.filter((one) => one.name === name && one.value).map((one) => [one.labels[label], one.value]));
    const look = {
      now,
      generated: sum("vllm:generation_tokens_total"),
      running: sum("vllm:num_requests_running"),
      waiting: sum("vllm:num_requests_waiting"),
      kv: sum("vllm:kv_cache_usage_perc"),
      hits: sum("vllm:prefix_cache_hits_total"),
      queries: sum("vllm:prefix_cache_queries_total"),
      batch: by("motet_adapter_running", "adapter"),
      parts: by("motet_step_part_seconds_total", "part"),
      adapters: by("motet_adapters", "tier"),
      bytes: by("motet_adapter_bytes", "tier"),
      resident: sum("process_resident_memory_bytes"),
    };
    const named = Object.values(look.batch).reduce((total, number) => total + number, 0);
    if (look.running > named) look.batch["base model"] = look.running - named;
    if (this.looks.length && look.generated < this.looks.at(-1).generated) this.looks = []; // another server by now
    const before = this.looks.at(-1);
    look.rate = before ? Math.max(0, (look.generated - before.generated) / ((now - before.now) / 1000)) : 0;
    this.looks.push(look);
    this.looks.splice(0, Math.max(0, this.looks.length - LOOKS));
  }

  draw() {
    const look = this.looks.at(-1);
    if (!look) return;
    const rows = {
      "Tokens a second": rate(look.rate),
      Running: look.running,
      Waiting: look.waiting,
      "KV memory in use": `${(look.kv * 100).toFixed(1)} %`,
      "Prefix cache hits": look.queries ? `${((100 * look.hits) / look.queries).toFixed(0)} %` : "–",
      "Adapters": look.adapters.disk ?? 0,
      "… in memory": `${look.adapters.host ?? 0} · ${bytes(look.bytes.host ?? 0)}`,
      "… on the device": `${look.adapters.device ?? 0} · ${bytes(look.bytes.device ?? 0)}`,
      "Server's memory": look.resident ? bytes(look.resident) : "–",
    };
    at("numbers").replaceChildren(...Object.entries(rows).map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
    const names = this.names();
    stack(at("chart-tokens"), this.looks.map((one) => [one.rate]), [COLOURS[0]], (top) => `${rate(look.rate)} tokens a second now, ${rate(top)} at most`);
    stack(at("chart-waiting"), this.looks.map((one) => [one.waiting]), [COLOURS[1]], (top) => `${look.waiting} waiting now, ${top} at most`);
    const layers = this.looks.map((one) => {
      const others = Object.entries(one.batch).filter(([name]) => !names.includes(name));
      return [...names.map((name) => one.batch[name] ?? 0), others.reduce((total, [, n]) => total + n, 0)];
    });
    const shares = Object.entries(look.batch).map(([name, n]) => `${name} ${n}`).join(", ");
    stack(at("chart-batch"), layers, COLOURS, (top) => `In the batch now: ${shares || "nobody"}; ${top} at most`);
    at("legend").replaceChildren(...names.map((name, i) => make("li", {}, swatch(i), `${name} ${look.batch[name] ?? 0}`)),
      ...(layers.some((row) => row.at(-1)) ? [make("li", {}, swatch(NAMED), `others ${layers.at(-1).at(-1)}`)] : []));
    this.drawParts();
  }

  // Whoever was seen most, by name.
  names() {
    const seen = new Map();
    for (const one of this.looks) for (const [name, n] of Object.entries(one.batch)) seen.set(name, (seen.get(name) ?? 0) + n);
    const most = [...seen].sort((a, b) => b[1] - a[1]).slice(0, NAMED).map(([name]) => name);
    return most.sort();
  }

  // Over the looks that are there: since the server started where there is but one.
  drawParts() {
    const first = this.looks.length > 1 ? this.looks[0].parts : {};
    const spent = Object.entries(this.looks.at(-1).parts).map(([part, s]) => [part, s - (first[part] ?? 0)]).filter(([, s]) => s > 0);
    const total = spent.reduce((sum, [, s]) => sum + s, 0);
    if (!total) return void at("parts").replaceChildren(make("p", { className: "faint" }, "No steps while this view was open."));
    spent.sort((a, b) => b[1] - a[1]);
    const bar = make("div", { className: "stack" }, ...spent.map(([, s], i) => {
      const piece = swatch(i);
      piece.style.flexGrow = String(s / total);
      return piece;
    }));
    bar.setAttribute("aria-hidden", "true");
    at("parts").replaceChildren(bar, make("ul", {}, ...spent.map(([part, s], i) =>
      make("li", {}, swatch(i), `${part} ${((100 * s) / total).toFixed(1)} %`))));
  }
}

function swatch(number) {
  const piece = make("i");
  piece.style.background = COLOURS[Math.min(number, COLOURS.length - 1)];
  return piece;
}

// Layers over time, one on the other; `words(top)` says for those who do not see it what it shows.
function stack(canvas, rows, colours, words) {
  const ratio = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  const top = Math.max(1, ...rows.map((row) => row.reduce((sum, n) => sum + n, 0)));
  const x = (i) => width - ((rows.length - 1 - i) * width) / (LOOKS - 1);
  const y = (n) => height - 2 - (n / top) * (height - 22);
  const below = rows.map(() => 0);
  for (let layer = 0; layer < (rows[0]?.length ?? 0); layer += 1) {
    if (!rows.some((row) => row[layer])) continue;
    paint.beginPath();
    rows.forEach((_, i) => paint.lineTo(x(i), y(below[i])));
    for (let i = rows.length - 1; i >= 0; i -= 1) paint.lineTo(x(i), y(below[i] + rows[i][layer]));
    paint.closePath();
    paint.fillStyle = paint.strokeStyle = colours[Math.min(layer, colours.length - 1)];
    paint.globalAlpha = 0.75;
    paint.fill();
    paint.globalAlpha = 1;
    paint.stroke();
    rows.forEach((row, i) => (below[i] += row[layer]));
  }
  const style = getComputedStyle(canvas);
  paint.fillStyle = style.color;
  paint.font = `12px ${style.fontFamily}`;
  paint.fillText(rate(top), 4, 12);
  canvas.setAttribute("aria-label", words(top));
}
