// --- Views, and the beginning -----------------------------------------------------------------------------------

const READY_MS = 1000;

const chat = new Chat();
const compare = new Compare();
const live = new Live();
const adapters = new Adapters((name) => {
  chat.choose(name);
  show("chat");
  at("prompt").focus();
});
const VIEWS = ["chat", "compare", "adapters", "live"];

function show(view) {
  for (const one of VIEWS) {
    const tab = at(`tab-${one}`);
    tab.setAttribute("aria-selected", String(one === view));
    tab.tabIndex = one === view ? 0 : -1;
    at(one).hidden = one !== view;
  }
  if (location.hash.slice(1) !== view) history.replaceState(null, "", `#${view}`);
  if (!baseModel) return;
  adapters.show(view === "adapters");
  live.show(view === "live");
}

for (const view of VIEWS) {
  at(`tab-${view}`).addEventListener("click", () => show(view));
  at(`tab-${view}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = VIEWS[(VIEWS.indexOf(view) + step + VIEWS.length) % VIEWS.length];
    show(next);
    at(`tab-${next}`).focus();
  });
}
addEventListener("hashchange", () => VIEWS.includes(location.hash.slice(1)) && show(location.hash.slice(1)));

at("key-button").hidden = !apiKey;
at("key-button").addEventListener("click", async () => {
  if ((await askForKey("")) && !baseModel) begin();
});

function say(words, state) {
  at("server-text").textContent = words;
  at("server").firstElementChild.className = `dot ${state}`;
}

async function begin() {
  for (;;) {
    try {
      const ready = await fetch(new URL("ready", home));
      if (ready.ok) break;
      say(await reasonOf(ready), "");
    } catch {
      say("The server does not answer", "gone");
    }
    await new Promise((resolve) => setTimeout(resolve, READY_MS));
  }
  try {
    baseModel = (await getJson("v1/models")).data[0].id;
    const { total } = await getJson("v1/adapters?limit=1");
    say(`${baseModel} · ${total} adapter${total === 1 ? "" : "s"}`, "ready");
    await Promise.all([chat.begin(), compare.begin()]);
  } catch (error) {
    at("key-button").hidden = error.status !== 401 && !apiKey;
    return say(error.message, "gone");
  }
  show(VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
}

if (VIEWS.includes(location.hash.slice(1))) show(location.hash.slice(1));
begin();
