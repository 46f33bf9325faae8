// Labels beside one another: share of each one's tokens by expert, with intervals.
const labelState = { layer: 0, shown: data.labels.slice(0, 4).map((_, g) => g), sorted: "difference", most: 24 };
const intervalNote = () => "Lines: 95 % intervals, the wider of Wilson's over tokens and a bootstrap over whole sequences" + (data.labels.some((l) => l.sequences < 2) ? "; labels with fewer than two sequences have Wilson's alone, which takes tokens for independent and is too narrow." : ".");

function dotOf(g, layer, expert, look) {
  const value = array("usage_GLE").at(g, layer, expert) / Math.max(1, data.labels[g].tokens), low = array("share_low_GLE").at(g, layer, expert), high = array("share_high_GLE").at(g, layer, expert);
  return { value, low, high, look: styleOf(look), key: `${g}/${layer}/${expert}`, told: `expert ${expert}, ${data.labels[g].name}: ${number(value, "%")}, ${number(low, "%")} to ${number(high, "%")}` };
}

function drawLabels(section, [layerText]) {
  section.append(el("h2", {}, "Labels compared"));
  if (!array("usage_GLE")) return section.append(lacks("Comparison of labels", "usage"));
  if (data.labels.length < 2) return section.append(el("p", {}, "All text has one label. Give more than one file, or "), el("code", {}, "moestro profile MODEL DATA --label folder"));
  labelState.layer = within(layerText, layers, labelState.layer);
  const { layer, shown } = labelState, again = (change) => { Object.assign(labelState, change); redraw("labels"); };
  const toggle = (g, on) => again({ shown: on ? [...shown, g].sort((a, b) => a - b) : shown.filter((h) => h !== g) });
  section.append(el("p", { class: "soft" }, "Which experts does each kind of text use more than the others? Shares of a label's tokens that chose the expert."),
    el("div", { class: "controls" }, select("layer", layerOptions, layer, (v) => { location.hash = `#labels/${v}`; }),
      select("order", [["difference", "largest difference first"], ["number", "by number"]], labelState.sorted, (v) => again({ sorted: v })),
      expertsOf(layer) > 24 ? select("experts", [[24, "24"], [100000, "all"]], labelState.most, (v) => again({ most: Number(v) })) : null,
      el("fieldset", {}, el("legend", {}, "labels"), data.labels.map((label, g) => check(`${label.name} (${count(label.tokens)})`, shown.includes(g), (on) => toggle(g, on))))));
  if (!shown.length) return section.append(el("p", {}, "Choose a label."));
  const rows = range(expertsOf(layer)).map((expert) => {
    const dots = shown.map((g, i) => dotOf(g, layer, expert, i)), values = dots.map((d) => d.value);
    const apart = dots.some((a) => dots.some((b) => a.low > b.high));
    return { expert, name: `${apart ? "* " : ""}${expert}`, href: hrefOf(layer, expert), dots, spread: Math.max(...values) - Math.min(...values), apart };
  });
  if (labelState.sorted === "difference") rows.sort((a, b) => b.spread - a.spread || a.expert - b.expert);
  const apart = rows.filter((row) => row.apart).length;
  section.append(legendOf(shown.map((g) => data.labels[g].name)), el("div", { class: "scroll" }, dotChart(`shares by label, layer ${layer}`, rows.slice(0, labelState.most))),
    el("p", { class: "note", id: "labels-apart" }, `* ${apart} of ${rows.length} experts have intervals that do not touch.`), el("p", { class: "note" }, intervalNote() + " With many experts and labels some are apart by chance."));
  const found = data.measures.find((m) => m.name === "domain_specialisation");
  if (found) section.append(measureOf(found));
}
