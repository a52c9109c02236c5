// Elements, and text that people read. Texts of others (names of engines, errors) become text nodes and nothing else.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: `class`, `text`, `on` (event → listener), and attributes; false and undefined leave one out. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** As `h`, an element of SVG. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === false || value === null) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, heard] of Object.entries(value)) node.addEventListener(event, heard);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set the text of `node` if it is another: what is not touched keeps selection and is not read out again. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Set or, for false and empty, remove an attribute, if it is another. */
export function set(node, name, value) {
  if (value === false || value === undefined || value === "") {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Make the children of `parent` those of `items`, and keep the nodes of items that were there: they may have focus. */
export function keyed(parent, items, keyOf, make, update = () => {}) {
  const known = (parent.keyedNodes ??= new Map());
  const seen = new Set();
  let at = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    seen.add(key);
    let node = known.get(key);
    if (node === undefined) known.set(key, (node = make(item)));
    update(node, item);
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  for (const [key, node] of known) {
    if (seen.has(key)) continue;
    known.delete(key);
    node.remove();
  }
}

/** A table with a head and an empty body. On a phone each row is a card, whose cells are named by their `data-label`. */
export function table(label, heads, kind = "cards") {
  const body = h("tbody");
  const head = h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col", text }))));
  const whole = h("table", { class: kind, "aria-label": label }, head, body);
  const node = kind === "cards" ? whole : h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, whole);
  return { node, body };
}

/** Cells for `table`, the first of which names the row. */
export function cells(heads) {
  return heads.map((label, at) => h(at ? "td" : "th", { "data-label": label, scope: at ? undefined : "row" }));
}

// ------------------------------------------------------------------------------------------------------------- numbers
const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

export function size(bytes) {
  let [value, at] = [bytes, 0];
  while (value >= 1000 && at < UNITS.length - 1) [value, at] = [value / 1000, at + 1];
  return `${at ? short(value) : value} ${UNITS[at]}`;
}

export function short(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** Bytes per second. */
export function rate(bytes, seconds) {
  return seconds > 0 ? `${size(bytes / seconds)}/s` : "";
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 90) return `${short(value)} s`;
  return ago(value);
}

/** Whole units, two at most: of what is minutes old nobody asks the milliseconds. */
export function ago(value) {
  const s = Math.max(0, Math.round(value));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Local time, with the date where it is not today's. */
export function clock(unix) {
  if (!unix) return "";
  const when = new Date(unix * 1000);
  const today = when.toDateString() === new Date().toDateString();
  return (today ? "" : `${when.toLocaleDateString("sv-SE")} `) + when.toLocaleTimeString("sv-SE");
}

export function version(view) {
  return view ? `step ${view.step}` : "none";
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}
