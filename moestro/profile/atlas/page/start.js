// Views by address, theme, and everything at once for the printer.
const VIEWS = { map: ["Map", drawMap], expert: ["Expert", drawExpert], flow: ["Flow", drawFlow], text: ["Text", drawText], labels: ["Labels", drawLabels], cache: ["Cache", drawCache], measures: ["Measures", drawMeasures], notes: ["Notes", drawNotes] };
const sections = new Map();

function redraw(name, rest = []) {
  const section = sections.get(name), had = document.activeElement && section.contains(document.activeElement) ? focusPath(section, document.activeElement) : null;
  section.replaceChildren();
  VIEWS[name][1](section, rest);
  if (had) { const again = [...section.querySelectorAll(had.tag)][had.place]; if (again) again.focus({ preventScroll: true }); }
}
// Redrawing replaces the control that was used; the same one of the new ones gets the focus back.
const focusPath = (section, node) => ({ tag: node.tagName.toLowerCase(), place: [...section.querySelectorAll(node.tagName.toLowerCase())].indexOf(node) });

function show() {
  const [wanted, ...rest] = location.hash.slice(1).split("/"), name = VIEWS[wanted] ? wanted : "map";
  const moved = sections.get(name).hidden;
  for (const [other, section] of sections) section.hidden = other !== name;
  document.querySelectorAll("#tabs a").forEach((a) => (a.dataset.view === name ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current")));
  redraw(name, rest);
  document.querySelector("#tabs [aria-current]").scrollIntoView({ block: "nearest", inline: "nearest" });
  if (moved) window.scrollTo(0, 0);
}

function themed(wanted) {
  const root = document.documentElement, dark = wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (wanted) root.dataset.theme = wanted;
  const button = document.getElementById("theme");
  button.textContent = dark ? "light theme" : "dark theme";
  button.onclick = () => { const next = dark ? "light" : "dark"; try { localStorage.setItem("atlas-theme", next); } catch { /* not allowed in this browser: the choice lasts until the page is closed */ } themed(next); };
}

let remembered = null;
try { remembered = localStorage.getItem("atlas-theme"); } catch { /* as above */ }
themed(remembered === "dark" || remembered === "light" ? remembered : null);
document.title = `Atlas of ${data.name}`;
document.getElementById("title").textContent = `Experts of ${data.name}`;
const sizes = new Set(data.layers.map((la) => la.experts)), places = new Set(data.layers.map((la) => la.slots));
const span = (set) => (set.size === 1 ? [...set][0] : `${Math.min(...set)}–${Math.max(...set)}`);
document.getElementById("subtitle").textContent = `${layers} MoE layers of ${span(sizes)} experts, ${span(places)} for each token · ${count(data.tokens)} tokens of text, ${data.labels.length} ${data.labels.length === 1 ? "label" : "labels"}`;
document.querySelector(".skip").addEventListener("click", (e) => { e.preventDefault(); document.getElementById("view").focus(); });
for (const [name, [title]] of Object.entries(VIEWS)) {
  document.getElementById("tabs").append(el("a", { href: `#${name}`, "data-view": name }, name === "notes" && data.warnings.length ? `${title} (${data.warnings.length})` : title));
  const section = el("section", { id: `view-${name}`, hidden: true, "aria-label": title });
  sections.set(name, section);
  document.getElementById("view").append(section);
}
window.addEventListener("hashchange", show);
window.addEventListener("beforeprint", () => { for (const name of sections.keys()) if (!sections.get(name).children.length) redraw(name); });
let waiting = 0;
window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => { const current = [...sections].find(([, section]) => !section.hidden); if (current) redraw(current[0]); }, 150); });
show();
