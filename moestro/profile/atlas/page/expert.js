// One expert: its numbers, labels, token ids, neighbours, and tokens in context.
const expertState = { layer: 0, expert: 0 };
const CONTEXTS = 12, NEAR = 70;

function drawExpert(section, [layerText, expertText]) {
  expertState.layer = within(layerText, layers, expertState.layer);
  expertState.expert = within(expertText, expertsOf(expertState.layer), Math.min(expertState.expert, expertsOf(expertState.layer) - 1));
  const { layer, expert } = expertState, experts = expertsOf(layer), go = (la, e) => { location.hash = hrefOf(la, Math.min(e, expertsOf(la) - 1)); };
  section.append(el("h2", {}, `Expert ${expert} of ${layerName(layer)}`), el("div", { class: "controls" },
    select("layer", layerOptions, layer, (v) => go(Number(v), expert)), select("expert", range(experts).map((e) => [e, String(e)]), expert, (v) => go(layer, Number(v))),
    el("button", { type: "button", onclick: () => go(layer, (expert + experts - 1) % experts) }, "← previous"), el("button", { type: "button", onclick: () => go(layer, (expert + 1) % experts) }, "next →")));
  const seen = array("counts_LE") ? array("counts_LE").at(layer, expert) : null;
  if (seen === 0) section.append(el("p", {}, "This expert was never chosen on the profiled text: nothing is known of it."));
  const wide = [], cards = [numbersOf(layer, expert), ...idsOf(layer, expert), ...neighboursOf(layer, expert)];
  if (array("usage_GLE") && data.labels.length > 1) wide.push(labelsOf(layer, expert));
  wide.push(contextsOf(layer, expert));
  section.append(el("div", { class: "cards" }, cards), el("div", { class: "cards wide" }, wide));
}

function numbersOf(layer, expert) {
  const rows = array("counts_LE") ? [["tokens", count(array("counts_LE").at(layer, expert)), rank(range(expertsOf(layer)).map((e) => array("counts_LE").at(layer, e)), expert)]] : [];
  for (const map of data.maps.filter((m) => m.labels[0] === "")) {
    const values = range(expertsOf(layer)).map((e) => mapValue(map, "", layer, e));
    rows.push([el("span", { title: map.about }, map.title), el("span", { "data-map": map.name, "data-value": values[expert] }, number(values[expert], map.unit)), rank(values, expert)]);
  }
  return el("div", {}, el("h3", {}, "Numbers"), table(["", "", `rank of ${expertsOf(layer)}`], rows));
}
const rank = (values, expert) => (Number.isNaN(values[expert]) ? null : 1 + values.filter((v) => v > values[expert]).length);

function idsOf(layer, expert) {
  if (!array("ids.often.ids")) return [el("div", {}, el("h3", {}, "Token ids"), lacks("Token ids", "tokens"))];
  const ids = array("ids_I").values, occurs = new Map(range(ids.length).map((i) => [ids[i], array("id_counts_I").values[i]]));
  const listed = (kind) => range(array(`ids.${kind}.ids`).shape[2]).map((n) => [array(`ids.${kind}.ids`).at(layer, expert, n), array(`ids.${kind}.counts`).at(layer, expert, n)]).filter(([id]) => id >= 0)
    .map(([id, n]) => [token(id), el("span", { "data-id": id, "data-kind": kind, "data-count": n }, count(n)), number(n / occurs.get(id), "%")]);
  const one = (kind, title, note) => el("div", {}, el("h3", {}, title), table(["token", "times", "of its occurrences"], listed(kind)), el("p", { class: "note" }, note));
  return [one("often", "Most frequent token ids", "What it sees most; frequent tokens lead for many experts."), one("own", "Token ids that are most its own", "Ids with 8 or more occurrences, by the share of them that chose this expert.")];
}

function neighboursOf(layer, expert) {
  const chosen = array("counts_LE"), out = [];
  const list = (name, other, of) => array(`links.${name}.experts`) ? range(array(`links.${name}.experts`).shape[2]).map((n) => [array(`links.${name}.experts`).at(of, expert, n), array(`links.${name}.values`).at(of, expert, n)]).filter(([e]) => e >= 0)
    .map(([e, value]) => ({ link: expertLink(other, e), e, value, cell: el("span", { "data-link": name, "data-expert": e, "data-value": value }, name === "similar" ? trim(value) : count(value)) })) : null;
  const card = (title, name, other, of, probe, note) => {
    const found = list(name, other, of);
    if (!found) return el("div", {}, el("h3", {}, title), lacks(title, probe));
    const shares = name !== "similar" && chosen;
    return el("div", {}, el("h3", {}, title), found.length ? table(shares ? ["", "tokens", "of its own", "at chance"] : ["", "CKA"], found.map((f) => (shares ? [f.link, f.cell, number(f.value / chosen.at(layer, expert), "%"), number(chosen.at(other, f.e) / Math.max(1, data.tokens), "%")] : [f.link, f.cell]))) : el("p", { class: "note" }, "none"), note ? el("p", { class: "note" }, note) : null);
  };
  out.push(card("Chosen together with", "together", layer, layer, "coactivation", "At chance: the other's share of all tokens."));
  out.push(card("Answers most like", "similar", layer, layer, "similarity", "On the same tokens, whatever the router chose. 1: equal up to rotation and scale."));
  if (layer + 1 < layers) out.push(card("Its tokens go on to", "next", layer + 1, layer, "transitions", `Experts of layer ${layer + 1}.`));
  if (layer > 0) out.push(card("Its tokens come from", "before", layer - 1, layer - 1, "transitions", `Experts of layer ${layer - 1}.`));
  return out;
}

function labelsOf(layer, expert) {
  return el("div", {}, el("h3", {}, "Share of each label's tokens"), dotChart("share of each label's tokens, with intervals", data.labels.map((label, g) => ({ name: label.name.length > 15 ? `${label.name.slice(0, 14)}…` : label.name, dots: [dotOf(g, layer, expert, 0)] }))), el("p", { class: "note" }, intervalNote()));
}

// Where the expert was chosen in the text of the atlas: as heaviest first, and spread over the stretches.
function contextsOf(layer, expert) {
  const out = el("div", {}, el("h3", {}, "Tokens in context"));
  const ids = array("sample_tokens_N"), experts = array("sample_experts_LNK");
  if (!ids) return put(out, {}, [el("p", { class: "note" }, "The profile has no trace beside it, so there is no text.")]);
  const found = [];
  data.stretches.forEach((stretch, x) => {
    const end = stretchEnd(x);
    let taken = 0;
    for (let n = stretch.start; n < end; n += 1) {
      const slot = range(experts.shape[2]).findIndex((k) => experts.at(layer, n, k) === expert + 1);
      if (slot >= 0) found.push({ n, x, slot, turn: taken++ });
    }
  });
  const shown = found.sort((a, b) => a.slot - b.slot || a.turn - b.turn || a.n - b.n).slice(0, CONTEXTS);
  put(out, {}, [el("p", { class: "note" }, found.length ? `${count(found.length)} of the ${count(ids.values.length)} tokens of text in this atlas (${count(data.traced)} are in the trace); where it was the heaviest first.` : `It is not chosen in the text of this atlas, which is ${count(ids.values.length)} of the trace's ${count(data.traced)} tokens.`)]);
  for (const { n, x, slot } of shown) {
    const pieces = { before: "", after: "" };
    for (let i = n - 1; i >= data.stretches[x].start && pieces.before.length < NEAR; i -= 1) pieces.before = tokenText(ids.values[i]) + pieces.before;
    for (let i = n + 1; i < stretchEnd(x) && pieces.after.length < NEAR; i += 1) pieces.after += tokenText(ids.values[i]);
    out.append(el("div", { class: "context", "data-token": n }, el("span", { class: "where" }, `${labelName(data.stretches[x].label)}, sequence ${data.stretches[x].sequence}, ${slot ? `in place ${slot + 1}` : "heaviest"} · `, el("a", { href: `#text/${x}/${layer}/${expert}` }, "read there")), flat(pieces.before), el("mark", {}, flat(tokenText(ids.values[n])) || "∅"), flat(pieces.after)));
  }
  return out;
}
// Line ends as signs, so that a context is one line.
const flat = (text) => text.replace(/\s*\n\s*/g, " ⏎ ");
const stretchEnd = (x) => (x + 1 < data.stretches.length ? data.stretches[x + 1].start : array("sample_tokens_N").values.length);
