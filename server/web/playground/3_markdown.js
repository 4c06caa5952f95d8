// --- Markdown, as far as chat models write it, into elements ----------------------------------------------------

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|__(.+?)__|\*(\S(?:.*?\S)?)\*|\[([^\]]*)\]\(([^\s)]+)\)/s;

function inlineOf(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const parts = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    if (!found) return [...parts, rest];
    parts.push(rest.slice(0, found.index));
    rest = rest.slice(found.index + found[0].length);
    const [whole, , code, strong, alsoStrong, emphasis, label, address] = found;
    if (code !== undefined) parts.push(make("code", {}, code.trim() || code));
    else if (strong ?? alsoStrong) parts.push(make("strong", {}, ...inlineOf(strong ?? alsoStrong, depth + 1)));
    else if (emphasis) parts.push(make("em", {}, ...inlineOf(emphasis, depth + 1)));
    else parts.push(linkOf(label, address) ?? whole);
  }
  return parts;
}

// Only to addresses that a browser opens as pages or mail: no scripts, no data.
function linkOf(label, address) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return null;
  return make("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, label || address);
}

const DEEPEST = 16; // quotes and lists in each other; what is deeper is text
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

// Blocks of lines; a fence that is still open is code up to the end, as it is while an answer comes.
function markdown(text, depth = 0) {
  if (depth > DEEPEST) return [make("p", {}, text)];
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const fence = /^\s*(`{3,}|~{3,})\s*([\w+-]*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (!line.trim()) i += 1;
    else if (fence) {
      const inside = [];
      for (i += 1; i < lines.length && !lines[i].trim().startsWith(fence[1]); i += 1) inside.push(lines[i]);
      i += 1;
      blocks.push(codeBlock(inside.join("\n"), fence[2]));
    } else if (heading) {
      blocks.push(make(heading[1].length < 3 ? "h3" : "h4", {}, ...inlineOf(heading[2])));
      i += 1;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      blocks.push(make("hr"));
      i += 1;
    } else if (/^\s*>/.test(line)) {
      const inside = [];
      for (; i < lines.length && /^\s*>/.test(lines[i]); i += 1) inside.push(lines[i].replace(/^\s*>\s?/, ""));
      blocks.push(make("blockquote", {}, ...markdown(inside.join("\n"), depth + 1)));
    } else if (ITEM.test(line)) {
      const inside = [];
      for (; i < lines.length && (ITEM.test(lines[i]) || /^\s+\S/.test(lines[i])); i += 1) inside.push(lines[i]);
      blocks.push(listOf(inside, depth));
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[i + 1] ?? "")) {
      const rows = [line];
      for (i += 2; i < lines.length && lines[i].includes("|"); i += 1) rows.push(lines[i]);
      blocks.push(tableOf(rows));
    } else {
      const inside = [];
      for (; i < lines.length && lines[i].trim() && !(inside.length && startsBlock(lines[i])); i += 1) inside.push(lines[i]);
      const broken = inside.flatMap((one, n) => (n ? [make("br"), ...inlineOf(one)] : inlineOf(one)));
      blocks.push(make("p", {}, ...broken));
    }
  }
  return blocks;
}

const startsBlock = (line) => /^\s*(`{3,}|~{3,}|#{1,6}\s|>)/.test(line) || ITEM.test(line);

function codeBlock(code, language) {
  const pre = make("pre", { tabIndex: 0 }, make("code", {}, code));
  if (language) pre.setAttribute("aria-label", `Code, ${language}`);
  return pre;
}

// Items by their indentation: what is farther in than the first belongs to the item above it.
function listOf(lines, nesting) {
  const first = ITEM.exec(lines[0]);
  const list = make(/\d/.test(first[2]) ? "ol" : "ul");
  if (list.localName === "ol" && Number.parseInt(first[2], 10) !== 1) list.start = Number.parseInt(first[2], 10);
  const depth = first[1].length;
  let inside = [];
  const close = () => {
    if (!inside.length) return;
    const [head, ...rest] = inside;
    list.append(make("li", {}, ...inlineOf(head), ...(rest.length ? markdown(rest.join("\n"), nesting + 1) : [])));
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= depth) {
      close();
      inside = [found[3]];
    } else inside.push(found ? line.slice(depth) : line.trim());
  }
  close();
  return list;
}

function tableOf(rows) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const [head, ...rest] = rows.map(cells);
  return make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((cell) => make("th", {}, ...inlineOf(cell))))),
    make("tbody", {}, ...rest.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, ...inlineOf(cell)))))));
}
