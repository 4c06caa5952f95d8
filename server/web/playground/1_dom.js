// The playground of this server. The files of this folder are put together in the order of their names into one
// script. Whatever a model, an adapter or an error says is put on the page as text: nothing is parsed as HTML.

const at = (id) => document.getElementById(id);

const button = (text, act, more = {}) => {
  const element = make("button", { type: "button", ...more }, text);
  element.addEventListener("click", act);
  return element;
};

// Enter sends a form; with Shift it makes a new line, and while a word is put together it means the word.
function sendOnEnter(form, box, send) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(box.value);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

// --- What this browser remembers; it may refuse, then the page forgets with the tab ----------------------------

function remembered(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`motet.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`motet.${name}`);
    else localStorage.setItem(`motet.${name}`, JSON.stringify(value));
  } catch {
    // full, or forbidden
  }
}

// --- Numbers for people ---------------------------------------------------------------------------------------

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${number >= 100 || unit === 0 ? Math.round(number) : number.toFixed(1)} ${units[unit]}`;
}

const milliseconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const rate = (number) => (number >= 100 ? Math.round(number).toString() : number.toFixed(1));

async function copy(text, element) {
  const before = element.textContent;
  try {
    await navigator.clipboard.writeText(text);
    element.textContent = "Copied";
  } catch {
    element.textContent = "Cannot copy here";
  }
  setTimeout(() => (element.textContent = before), 1500);
}
