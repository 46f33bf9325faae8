// Layers x experts, coloured by a statistic, for all text or one label; cells are walked with the arrow keys.
const mapState = { name: data.maps.length ? data.maps[0].name : "", label: "", own: false, sorted: false, least: 0, find: "" };
const mapOf = (name) => data.maps.find((m) => m.name === name);
const mapValue = (map, label, layer, expert) => array(`map.${map.name}`).at(map.labels.indexOf(label), layer, expert);

function drawMap(section, [name, label]) {
  if (!data.maps.length) return section.append(lacks("Maps", "counts"));
  if (mapOf(name)) mapState.name = name;
  const chosen = mapOf(mapState.name);
  if (label !== undefined) mapState.label = decodeURIComponent(label);
  if (!chosen.labels.includes(mapState.label)) mapState.label = chosen.labels[0];
  const again = (change) => { Object.assign(mapState, change); redraw("map"); };
  const go = (n, l) => { location.hash = `#map/${n}/${encodeURIComponent(l)}`; };
  section.append(el("h2", {}, "Map of the experts"), el("p", { class: "soft", id: "map-about" }, `${chosen.title}: ${chosen.about}.`),
    el("div", { class: "controls" },
      select("statistic", data.maps.map((m) => [m.name, m.title]), chosen.name, (v) => go(v, mapState.label)),
      chosen.labels.length > 1 || chosen.labels[0] ? select("text", chosen.labels.map((l) => [l, labelName(l)]), mapState.label, (v) => go(chosen.name, v)) : el("label", {}, "text", el("span", { class: "note" }, "all text only")),
      select("order of experts", [["number", "by number"], ["value", "by value in each layer"]], mapState.sorted ? "value" : "number", (v) => again({ sorted: v === "value" })),
      array("counts_LE") ? el("label", {}, "at least … tokens", el("input", { type: "number", min: 0, value: mapState.least, onchange: (e) => again({ least: Math.max(0, Number(e.target.value) || 0) }) })) : null,
      array("ids.often.ids") && Object.keys(data.texts).length ? el("label", {}, "has among its token ids", el("input", { type: "search", value: mapState.find, placeholder: "text", onchange: (e) => again({ find: e.target.value }) })) : null,
      check("each layer on its own scale", mapState.own, (v) => again({ own: v }))));
  const widest = Math.max(...data.layers.map((la) => la.experts));
  const values = range(layers).map((layer) => range(expertsOf(layer)).map((expert) => mapValue(chosen, mapState.label, layer, expert)));
  const stops = chosen.diverging ? DIVERGING : VIRIDIS;
  const bounds = (list) => {
    const kept = list.filter((v) => !Number.isNaN(v)), low = Math.min(...kept), high = Math.max(...kept);
    if (!kept.length) return [0, 1];
    return chosen.diverging ? [-Math.max(Math.abs(low), Math.abs(high)), Math.max(Math.abs(low), Math.abs(high))] : [low, high];
  };
  const all = bounds(values.flat()), avail = (document.getElementById("view").clientWidth || 900) - 40;
  const size = Math.max(16, Math.min(58, Math.floor(avail / widest) - 1)), roomy = size >= 40;
  const grid = el("div", { class: "map", role: "grid", "aria-label": `${chosen.title}, ${labelName(mapState.label)}`, style: { "grid-template-columns": `34px repeat(${widest}, ${size}px)`, "--cell": `${Math.min(size, 30)}px` } });
  const every = size >= 24 ? 1 : widest > 100 ? 16 : 8;
  if (!mapState.sorted) grid.append(el("div", { class: "row", role: "row" }, el("div", { class: "head layer", role: "columnheader", title: "layer" }, ""), range(widest).map((e) => el("div", { class: "head", role: "columnheader" }, e % every ? "" : String(e)))));
  const wanted = mapState.find.toLowerCase();
  let shown = 0, first = null;
  values.forEach((row, layer) => {
    const [low, high] = mapState.own ? bounds(row) : all;
    const order = range(row.length);
    if (mapState.sorted) order.sort((a, b) => (Number.isNaN(row[b]) ? -Infinity : row[b]) - (Number.isNaN(row[a]) ? -Infinity : row[a]) || a - b);
    grid.append(el("div", { class: "row", role: "row" }, el("div", { class: "head layer", role: "rowheader", title: layerName(layer) }, String(layer)), order.map((expert) => {
      const value = row[expert], none = Number.isNaN(value), rgb = none ? null : mixed(stops, high > low ? (value - low) / (high - low) : 0.5);
      const off = (array("counts_LE") && array("counts_LE").at(layer, expert) < mapState.least) || (wanted && !hasToken(layer, expert, wanted));
      if (!off) shown += 1;
      const cell = el("div", { class: `cell${none ? " none" : ""}${off ? " off" : ""}`, role: "gridcell", tabindex: -1, "data-layer": layer, "data-expert": expert, "data-value": none ? "" : value, "data-off": off ? 1 : 0,
        "aria-label": `layer ${layer}, expert ${expert}: ${number(value, chosen.unit)}${off ? ", filtered out" : ""}`, style: none ? {} : { background: css(rgb), color: inkOn(rgb) } }, roomy && !none ? short(value, chosen.unit) : "");
      first = first || cell;
      return cell;
    })));
  });
  const readout = el("div", { class: "readout", "aria-live": "polite" });
  const tell = (cell) => readout.replaceChildren(...toldOf(chosen, Number(cell.dataset.layer), Number(cell.dataset.expert)));
  grid.addEventListener("pointerover", (e) => e.target.dataset.expert && tell(e.target));
  grid.addEventListener("focusin", (e) => { if (e.target.dataset.expert) { grid.querySelectorAll("[tabindex='0']").forEach((c) => c.setAttribute("tabindex", -1)); e.target.setAttribute("tabindex", 0); tell(e.target); } });
  grid.addEventListener("click", (e) => { if (e.target.dataset.expert) location.hash = hrefOf(e.target.dataset.layer, e.target.dataset.expert); });
  grid.addEventListener("keydown", (e) => walkMap(e, grid));
  first.setAttribute("tabindex", 0);
  readout.append(el("span", { class: "soft" }, "Point at an expert, or reach the map with the Tab key and walk with the arrow keys; Enter or a click opens its page."));
  const ends = mapState.own ? ["layer's least", "layer's most"] : [number(all[0], chosen.unit), number(all[1], chosen.unit)];
  section.append(el("div", { class: "legend" }, el("span", {}, ends[0]), el("span", { class: "bar", style: { background: gradient(stops) } }), el("span", {}, ends[1]),
    values.flat().some(Number.isNaN) ? [el("span", { class: "blank" }), el("span", {}, "no number (never chosen, or no such layer)")] : null,
    el("span", { class: "soft", id: "map-shown" }, `${count(shown)} of ${count(values.flat().length)} experts shown`)), el("div", { class: "beside" }, el("div", { class: "scroll" }, grid), readout),
    el("p", { class: "note" }, "Rows are MoE layers from the first, columns experts. An expert's number means something within its layer only."));
}

// Two digits, for the inside of a cell; the scale above says the unit.
const short = (value, unit) => trim(Number((unit === "%" ? 100 * value : value).toPrecision(2)));

const hasToken = (layer, expert, wanted) => ["often", "own"].some((kind) => range(array(`ids.${kind}.ids`).shape[2]).some((n) => {
  const id = array(`ids.${kind}.ids`).at(layer, expert, n);
  return id >= 0 && tokenText(id).toLowerCase().includes(wanted);
}));

function toldOf(chosen, layer, expert) {
  const counts = array("counts_LE"), lines = [el("strong", {}, `layer ${layer}, expert ${expert}: ${number(mapValue(chosen, mapState.label, layer, expert), chosen.unit)}`), ` ${chosen.title}, ${labelName(mapState.label)}`];
  if (counts) lines.push(`; ${count(counts.at(layer, expert))} tokens`);
  if (array("usage_GLE") && data.labels.length > 1) {
    const shares = data.labels.map((label, g) => [label.name, array("usage_GLE").at(g, layer, expert) / Math.max(1, label.tokens)]).sort((a, b) => b[1] - a[1]).slice(0, 4);
    lines.push(el("br"), "most in ", shares.map(([name, share]) => `${name} ${number(share, "%")}`).join(", "));
  }
  if (array("ids.often.ids")) {
    const ids = range(Math.min(6, array("ids.often.ids").shape[2])).map((n) => array("ids.often.ids").at(layer, expert, n)).filter((id) => id >= 0);
    if (ids.length) lines.push(el("br"), "token ids: ", ...ids.flatMap((id) => [token(id), " "]));
  }
  return lines;
}

function walkMap(event, grid) {
  const cell = event.target;
  if (!cell.dataset.expert) return;
  const row = cell.parentElement, rows = [...grid.children].filter((r) => r.querySelector(".cell")), place = [...row.children].indexOf(cell), y = rows.indexOf(row);
  const pick = (r, i) => r && r.children[Math.min(Math.max(i, 1), r.children.length - 1)];
  const target = { ArrowRight: () => pick(row, place + 1), ArrowLeft: () => pick(row, place - 1), ArrowDown: () => pick(rows[y + 1], place), ArrowUp: () => pick(rows[y - 1], place), Home: () => pick(row, 1), End: () => pick(row, row.children.length) }[event.key];
  if (event.key === "Enter" || event.key === " ") location.hash = hrefOf(cell.dataset.layer, cell.dataset.expert);
  else if (!target) return;
  else if (target()) target().focus();
  event.preventDefault();
}
