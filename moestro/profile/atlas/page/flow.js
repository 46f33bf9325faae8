// From layer to layer: how far one expert tells the next, and the traffic between two neighbouring layers by heaviest expert.
const flowState = { pair: 0, least: 0.05, chosen: null };

function drawFlow(section, [pairText]) {
  section.append(el("h2", {}, "Flow between layers"));
  if (!array("links.flow.experts")) return section.append(layers < 2 ? el("p", {}, "The model has one MoE layer.") : lacks("Flow", "transitions"));
  const before = flowState.pair;
  flowState.pair = within(pairText, layers - 1, flowState.pair);
  if (flowState.pair !== before) flowState.chosen = null;
  const affinity = data.measures.find((m) => m.name === "affinity");
  if (affinity && layers > 2) {
    const points = (column) => affinity.rows.map((row, i) => [i, row[affinity.columns.indexOf(column)]]);
    section.append(el("p", { class: "soft" }, "Affinity: share of tokens whose heaviest next expert is the likeliest one after their present one. Chance: the same without knowing the present one."), lineChart("affinity by layer", ["affinity", "chance", "information"].map((name) => ({ name, points: points(name) })), { title: "from layer", low: 0, high: layers - 2, show: (v) => (Number.isInteger(v) ? String(v) : "") }, { title: "share", low: 0, high: 1, show: (v) => String(v) }));
  }
  const { pair } = flowState, again = (change) => { Object.assign(flowState, change); redraw("flow"); };
  const row = affinity ? affinity.rows[pair] : null;
  section.append(el("h3", {}, `Layer ${pair} to ${pair + 1}`), row ? el("p", {}, `Affinity ${trim(row[1])}, chance ${trim(row[2])}, information ${trim(row[3])}; the surest frequent pair is ${row[4]}.`) : null,
    el("div", { class: "controls" }, select("layers", range(layers - 1).map((p) => [p, `${p} → ${p + 1}`]), pair, (v) => { location.hash = `#flow/${v}`; }),
      el("label", {}, `links of at least ${Math.round(100 * flowState.least)} % of an expert's tokens`, el("input", { type: "range", min: 0, max: 0.6, step: 0.01, value: flowState.least, onchange: (e) => again({ least: Number(e.target.value) }) })),
      el("button", { type: "button", disabled: flowState.chosen === null, onclick: () => again({ chosen: null }) }, "show all experts")), ...flowPicture(pair, again));
}

function flowPicture(pair, again) {
  const out = array("flow_out_LE"), into = array("flow_in_LE"), to = array("links.flow.experts"), tokens = array("links.flow.values");
  const left = range(expertsOf(pair)), right = range(expertsOf(pair + 1)), total = Math.max(1, left.reduce((sum, e) => sum + out.at(pair, e), 0));
  const width = Math.max(320, Math.min(820, document.getElementById("view").clientWidth || 820)), gap = 3, height = Math.max(360, 11 * Math.max(left.length, right.length));
  const placed = (list, of) => {
    let y = 18;
    const room = height - 24 - gap * list.length;
    return list.map((e) => { const size = (of(e) / total) * room, node = { e, y, size, used: 0 }; y += size + gap; return node; });
  };
  const from = placed(left, (e) => out.at(pair, e)), goal = placed(right, (e) => into.at(pair, e)), x0 = 40, x1 = width - 40, bar = 12;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `tokens from experts of layer ${pair} to layer ${pair + 1}` },
    svg("text", { class: "soft", x: x0, y: 11 }, `layer ${pair}`), svg("text", { class: "soft", x: x1, y: 11, "text-anchor": "end" }, `layer ${pair + 1}`));
  const rows = [], { chosen } = flowState;
  for (const node of from) for (const n of range(to.shape[2])) {
    const e = to.at(pair, node.e, n), value = tokens.at(pair, node.e, n), share = value / out.at(pair, node.e);
    if (e < 0) continue;
    const end = goal[e], thick = (value / total) * (height - 24 - gap * Math.max(left.length, right.length)), a = node.y + node.used, b = end.y + end.used;
    node.used += thick; end.used += thick;
    if (share < flowState.least) continue;
    const touched = chosen === null || (chosen.side === 0 ? chosen.e === node.e : chosen.e === e), middle = (x0 + x1) / 2;
    rows.push({ from: node.e, to: e, value, share, touched });
    plot.append(put(svg("path", { d: `M${x0 + bar} ${a}C${middle} ${a} ${middle} ${b} ${x1 - bar} ${b}V${b + thick}C${middle} ${b + thick} ${middle} ${a + thick} ${x0 + bar} ${a + thick}Z`, fill: css(mixed(VIRIDIS, 0.08 + 0.84 * (node.e / Math.max(1, left.length - 1)))), opacity: touched ? 0.62 : 0.06, "data-from": node.e, "data-to": e, "data-value": value }), {}, [svg("title", {}, `expert ${node.e} → ${e}: ${count(value)} tokens, ${number(share, "%")} of its own`)]));
  }
  for (const [side, nodes] of [[0, from], [1, goal]]) for (const node of nodes) {
    const pick = () => again({ chosen: chosen && chosen.side === side && chosen.e === node.e ? null : { side, e: node.e } });
    const x = side ? x1 - bar : x0, tall = Math.max(1, node.size);
    plot.append(svg("g", { tabindex: 0, role: "button", "aria-pressed": Boolean(chosen && chosen.side === side && chosen.e === node.e), "aria-label": `expert ${node.e} of layer ${pair + side}`, onclick: pick, onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); pick(); } } },
      svg("rect", { class: "node", x, y: node.y, width: bar, height: tall }), svg("rect", { x: side ? x : x - 34, y: node.y, width: bar + 34, height: Math.max(tall, 9), fill: "transparent" }),
      tall >= 8 || left.length <= 16 ? svg("text", { x: side ? x1 + 5 : x0 - 5, y: node.y + tall / 2 + 4, "text-anchor": side ? "start" : "end", "font-size": 11, "font-weight": chosen && chosen.side === side && chosen.e === node.e ? 700 : 400 }, String(node.e)) : null));
  }
  const kept = rows.filter((r) => r.touched).sort((a, b) => b.value - a.value).slice(0, 12);
  const told = chosen === null ? "All experts" : `Expert ${chosen.e} of layer ${pair + chosen.side}`;
  return [el("div", { class: "scroll" }, plot), el("p", { class: "note" }, "Height: tokens whose heaviest expert it is. Of each expert the eight most frequent links are drawn. Choose an expert by click or with Tab and Enter."),
    table(["from", "to", "tokens", "of the first's"], kept.map((r) => [expertLink(pair, r.from), expertLink(pair + 1, r.to), r.value, number(r.share, "%")]), `${told}: the most frequent links`)];
}
