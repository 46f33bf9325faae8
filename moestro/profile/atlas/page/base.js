// Data, elements, numbers and colours. Texts of tokens, labels and files come from outside: they only ever become text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = { u1: Uint8Array, u2: Uint16Array, i2: Int16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };
const unpacked = new Map();

// {shape, values, at(i, j, ...)} of a named array, or null when the profile lacks it.
function array(name) {
  if (!unpacked.has(name)) {
    const packed = data.arrays[name];
    if (!packed) return null;
    const raw = Uint8Array.from(atob(packed.base64), (c) => c.charCodeAt(0));
    const shape = packed.shape, values = new KINDS[packed.kind](raw.buffer);
    const at = (...index) => values[index.reduce((place, i, axis) => place * shape[axis] + i, 0)];
    unpacked.set(name, { shape, values, at });
  }
  return unpacked.get(name);
}

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, rule] of Object.entries(value)) node.style.setProperty(key, rule);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const range = (n) => Array.from({ length: n }, (_, i) => i);

const count = (n) => Math.round(n).toLocaleString("en-US");
function number(value, unit = "") {
  if (value === null || value === undefined || Number.isNaN(value)) return "no data";
  if (unit === "%") return `${trim(100 * value)} %`;
  return trim(value) + (unit === "x" ? " ×" : "");
}
function trim(value) {
  if (value === 0 || Number.isInteger(value)) return Math.abs(value) < 1e6 ? String(value) : count(value);
  const size = Math.abs(value);
  if (size < 0.001 || size >= 1e6) return value.toExponential(2);
  return size >= 1000 ? count(value) : String(Number(value.toPrecision(3)));
}

// Viridis, and blue - grey - orange with the middle at 0: both readable with any kind of colour vision.
const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const DIVERGING = ["08519c", "4292c6", "9ecae1", "d9dce0", "fdbe85", "f08228", "a63603"];
// Okabe and Ito, and shapes beside them, so that no line or dot is told by its colour alone.
const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8c6bb1"];
function mixed(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2), part = place - low;
  const channel = (i, at) => parseInt(stops[i].slice(at, at + 2), 16);
  return [0, 2, 4].map((at) => Math.round(channel(low, at) * (1 - part) + channel(low + 1, at) * part));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
const inkOn = (rgb) => (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 ? "#000" : "#fff");
const gradient = (stops) => `linear-gradient(90deg, ${stops.map((s) => `#${s}`).join(", ")})`;

function tokenText(id) {
  const text = data.texts[id];
  return text === undefined ? `#${id} ` : text;
}
// A token by itself: blanks and line ends are made visible.
function token(id) {
  const text = tokenText(id);
  const seen = text === "" ? "(nothing)" : text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
  return el("span", { class: "token", title: `token id ${id}` }, seen);
}

function select(label, options, chosen, change) {
  const list = el("select", { onchange: (e) => change(e.target.value) }, options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
  return el("label", {}, label, list);
}
const check = (label, on, change) => el("label", { class: "check" }, el("input", { type: "checkbox", checked: on, onchange: (e) => change(e.target.checked) }), label);

function table(columns, rows, caption) {
  const cells = rows.map((row) => row.map((value) => el("td", {}, value === null ? "–" : typeof value === "number" ? trim(value) : value)));
  const numeric = columns.map((_, i) => cells.length > 0 && cells.every((row) => /^(–|no data|[-\d.,e]+( [%×])?)$/.test(row[i].textContent)));
  for (const row of cells) row.forEach((cell, i) => numeric[i] && cell.classList.add("number"));
  return el("div", { class: "scroll" }, el("table", {}, caption ? el("caption", {}, caption) : null,
    el("thead", {}, el("tr", {}, columns.map((name, i) => el("th", { scope: "col", class: numeric[i] ? "number" : null }, name)))),
    el("tbody", {}, cells.map((row) => el("tr", {}, row)))));
}

const lacks = (what, probe) => el("p", { class: "note" }, `${what}: not in this profile. It needs the probe ${probe}: `, el("code", {}, `moestro profile MODEL DATA -o PROFILE --probe ${probe}`));
const layers = data.layers.length;
const expertsOf = (layer) => data.layers[layer].experts;
const layerName = (layer) => (data.layers[layer].index === layer ? `layer ${layer}` : `layer ${layer} (block ${data.layers[layer].index})`);
const layerOptions = range(layers).map((layer) => [layer, layerName(layer)]);
const labelName = (label) => (label === "" ? "all text" : label);
const hrefOf = (layer, expert) => `#expert/${layer}/${expert}`;
const expertLink = (layer, expert, text) => el("a", { href: hrefOf(layer, expert) }, text || `expert ${expert}`);
// A number out of the address or a field, kept within 0 .. most - 1.
const within = (value, most, otherwise = 0) => (Number.isFinite(Number(value)) && value !== "" ? Math.min(Math.max(Math.trunc(Number(value)), 0), Math.max(0, most - 1)) : otherwise);
