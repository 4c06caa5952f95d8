// --- One answer: how it comes, what it cost, what can be done with it -------------------------------------------

const RECONNECT_MS = [500, 1000, 2000, 4000, 8000];

// `turns`: the conversation before it. `answer`: {model, content, state, figures}, which the owner keeps; state is
// "running", "done", "stopped" or "failed". `onChange` is told of every change of it; `onRun` is asked to run it again.
class AnswerView {
  constructor(turns, answer, settings, onChange, onRun) {
    Object.assign(this, { turns, answer, settings, onChange, onRun });
    this.stopping = null;
    this.body = make("div", { className: "prose" });
    this.figures = make("p", { className: "figures" });
    this.problem = make("p", { className: "problem", role: "alert", hidden: true });
    this.tools = make("div", { className: "tools" });
    this.element = make("article", { className: "answer" },
      make("h2", {}, answer.model), this.body, this.problem, this.figures, this.tools);
    this.draw();
  }

  get isRunning() {
    return this.answer.state === "running";
  }

  stop() {
    this.stopping?.abort();
  }

  // Ask, or go on where the text that is there ends. Never throws.
  async run() {
    const { answer } = this;
    Object.assign(answer, { state: "running", problem: "" });
    this.stopping = new AbortController();
    this.draw();
    for (let lost = 0; ; lost += 1) {
      const before = answer.content.length;
      try {
        await this.read(this.stopping.signal);
        answer.state = "done";
        break;
      } catch (error) {
        if (this.stopping.signal.aborted) {
          answer.state = "stopped";
          break;
        }
        // A connection that breaks is not the end: the server goes on after what has come.
        if (answer.content.length > before) lost = 0;
        const isBroken = error instanceof TypeError || error instanceof Cut;
        if (!isBroken || lost === RECONNECT_MS.length) {
          Object.assign(answer, { state: "failed", problem: isBroken ? "The connection to the server is lost." : error.message });
          break;
        }
        await this.pause(RECONNECT_MS[lost]);
      }
    }
    this.stopping = null;
    this.draw();
    this.onChange();
  }

  // Until then, and until there is a network again; or until it is stopped.
  async pause(ms) {
    const stopped = new Promise((resolve) => this.stopping.signal.addEventListener("abort", resolve, { once: true }));
    await Promise.race([new Promise((resolve) => setTimeout(resolve, ms)), stopped]);
    if (!navigator.onLine && !this.stopping.signal.aborted)
      await Promise.race([new Promise((resolve) => addEventListener("online", resolve, { once: true })), stopped]);
  }

  async read(signal) {
    const { answer } = this;
    const began = performance.now();
    const response = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(bodyOf(answer.model, this.turns, this.left(), answer.content)),
      signal,
    });
    const figures = (answer.figures = {
      adapter: response.headers.get("x-adapter-id"),
      prompt: Number(response.headers.get("x-prompt-tokens")),
      server: Number(response.headers.get("x-compute-time")),
    });
    let first = 0, pieces = 0, isWhole = false;
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(0, chunk.error.message ?? "the answer failed");
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) {
        const now = performance.now();
        first ||= now;
        pieces += 1;
        answer.content += choice.delta.content;
        answer.spent = (answer.spent ?? 0) + 1;
        Object.assign(figures, { first: first - began, generated: pieces, rate: rateOf(pieces, now - first) });
        this.drawSoon();
      }
      if (choice?.finish_reason) {
        isWhole = true;
        figures.finish = choice.finish_reason;
      }
      if (chunk.details) {
        const { generated_tokens: n, total_time_ms: total, time_to_first_token_ms: toFirst } = chunk.details;
        figures.rate = rateOf(n, total - toFirst, 0) || figures.rate;
      }
      if (chunk.usage) {
        figures.generated = chunk.usage.completion_tokens;
        figures.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      }
    }
    if (!isWhole) throw new Cut("the answer was cut off");
  }

  // Of the tokens that the answer may have, those that have come are spent.
  left() {
    const most = Number(this.settings.max_tokens);
    if (!most || !this.answer.content) return this.settings;
    return { ...this.settings, max_tokens: Math.max(1, most - (this.answer.spent ?? 0)) };
  }

  drawSoon() {
    if (this.isDrawing) return;
    this.isDrawing = true;
    requestAnimationFrame(() => {
      this.isDrawing = false;
      this.draw();
      this.onChange();
    });
  }

  draw() {
    const { answer } = this;
    const isWaiting = this.isRunning && !answer.content;
    this.element.setAttribute("aria-busy", String(this.isRunning));
    this.body.replaceChildren(...(isWaiting ? [typing()] : markdown(answer.content)));
    this.problem.hidden = !answer.problem;
    this.problem.textContent = answer.problem ?? "";
    this.figures.replaceChildren(...figuresOf(answer).map((text) => make("span", {}, text)));
    if (this.drawnState !== answer.state) this.drawTools();
  }

  drawTools() {
    const { answer } = this;
    this.drawnState = answer.state;
    if (this.isRunning) return void this.tools.replaceChildren(button("Stop", () => this.stop()));
    const copied = (words, text) => button(words, (event) => copy(text(), event.target));
    const body = () => bodyOf(answer.model, this.turns, this.settings);
    this.tools.replaceChildren(
      ...(answer.state === "done" ? [] : [button(answer.content ? "Go on" : "Try again", () => this.onRun(this))]),
      copied("Copy", () => answer.content),
      copied("Copy as curl", () => asCurl(body())),
      copied("Copy as Python", () => asPython(body())),
      copied("Copy as JavaScript", () => asJavaScript(body())));
  }
}

// Tokens a second after the first one. What comes in the first moments may have come together on the way.
const rateOf = (tokens, ms, least = 100) => (tokens > 1 && ms > least ? (tokens - 1) / (ms / 1000) : 0);

class Cut extends Error {}

const typing = () => {
  const dots = make("span", { className: "typing", role: "img" }, make("i"), make("i"), make("i"));
  dots.setAttribute("aria-label", "The answer is being computed");
  return dots;
};

function figuresOf({ figures = {}, state }) {
  const found = [];
  if (figures.first !== undefined) found.push(`first token ${milliseconds(figures.first)}`);
  if (figures.rate) found.push(`${rate(figures.rate)} tokens/s`);
  if (figures.prompt) found.push(`${figures.prompt} prompt tokens${figures.cached ? ` (${figures.cached} cached)` : ""}`);
  if (figures.generated) found.push(`${figures.generated} generated`);
  if (figures.adapter) found.push(`x-adapter-id ${figures.adapter}`);
  if (figures.server !== undefined) found.push(`x-compute-time ${figures.server} ms`);
  if (figures.finish === "length") found.push("cut at the most tokens");
  if (state === "stopped") found.push("stopped");
  return found;
}
