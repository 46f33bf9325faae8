// The text of the atlas, coloured by the experts of one layer.
const textState = { stretch: 0, layer: 0, expert: -1, numbers: false };

function drawText(section, [stretchText, layerText, expertText]) {
  section.append(el("h2", {}, "Text coloured by expert"));
  const ids = array("sample_tokens_N"), experts = array("sample_experts_LNK"), weights = array("sample_weights_LNK");
  if (!ids) return section.append(el("p", {}, "The profile has no trace beside it, so there is no text."));
  textState.stretch = within(stretchText, data.stretches.length, textState.stretch);
  textState.layer = within(layerText, layers, textState.layer);
  if (layerText !== undefined) textState.expert = expertText === undefined ? -1 : within(expertText, expertsOf(textState.layer), -1);
  if (textState.expert >= expertsOf(textState.layer)) textState.expert = -1;
  const { stretch, layer, expert } = textState, start = data.stretches[stretch].start, end = stretchEnd(stretch);
  const go = (x, la, e) => { location.hash = `#text/${x}/${la}${e >= 0 ? `/${e}` : ""}`; };
  section.append(el("div", { class: "controls" },
    select("text", data.stretches.map((s, x) => [x, `${labelName(s.label)}, sequence ${s.sequence}${s.position ? ` from ${s.position}` : ""}, ${stretchEnd(x) - s.start} tokens`]), stretch, (v) => go(v, layer, expert)),
    select("layer", layerOptions, layer, (v) => go(stretch, v, expert)),
    select("colour", [[-1, "heaviest expert of each token"], ...range(expertsOf(layer)).map((e) => [e, `where expert ${e} is chosen`])], expert, (v) => go(stretch, layer, Number(v))),
    check("numbers of the experts", textState.numbers, (v) => { textState.numbers = v; redraw("text"); })));
  const times = new Map();
  for (let n = start; n < end; n += 1) times.set(experts.at(layer, n, 0) - 1, (times.get(experts.at(layer, n, 0) - 1) || 0) + 1);
  const ranked = [...times.keys()].filter((e) => e >= 0).sort((a, b) => times.get(b) - times.get(a) || a - b), hue = new Map(ranked.slice(0, HUES.length).map((e, i) => [e, HUES[i]]));
  // With weights in the trace (--trace-weights) each expert's is told; they are in thousandths.
  const weightOf = (n, k) => (weights ? el("span", { class: "soft", "data-weight": weights.at(layer, n, k) }, ` (${trim(weights.at(layer, n, k) / 1000)})`) : null);
  const slots = (n) => range(experts.shape[2]).map((k) => experts.at(layer, n, k) - 1).filter((e) => e >= 0);
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const look = (n) => {
    if (expert < 0) return hue.has(slots(n)[0]) ? { background: hue.get(slots(n)[0]), color: inkOn(rgb(hue.get(slots(n)[0]))) } : {};
    const place = slots(n).indexOf(expert);
    return place < 0 ? {} : place === 0 ? { background: HUES[0], color: "#fff" } : { "box-shadow": `inset 0 -3px ${HUES[0]}` };
  };
  const readout = el("div", { class: "readout", "aria-live": "polite" }, el("span", { class: "soft" }, "Point at a token, or reach the text with the Tab key and walk with the arrow keys."));
  const reading = el("div", { class: "reading", role: "group", "aria-label": "text" }, range(end - start).map((i) => {
    const n = start + i, piece = tokenText(ids.values[n]), shown = piece === "" ? "∅" : piece.replace(/\n/g, "⏎\n");
    return el("span", { tabindex: i ? -1 : 0, "data-token": n, "data-heaviest": slots(n)[0], "data-chosen": expert >= 0 && slots(n).includes(expert) ? 1 : 0, style: look(n) }, shown, textState.numbers ? el("sub", {}, slots(n)[0] ?? "–") : null);
  }));
  const tell = (span) => {
    const n = Number(span.dataset.token);
    readout.replaceChildren(token(ids.values[n]), ` id ${ids.values[n]}, token ${n - start + data.stretches[stretch].position} of sequence ${data.stretches[stretch].sequence}; layer ${layer}, heaviest first: `, ...slots(n).flatMap((e, i) => [i ? ", " : "", expertLink(layer, e), weightOf(n, i) ?? ""]));
  };
  reading.addEventListener("pointerover", (e) => { const span = e.target.closest("[data-token]"); if (span) tell(span); });
  reading.addEventListener("focusin", (e) => e.target.dataset.token && tell(e.target));
  reading.addEventListener("keydown", (e) => {
    const next = e.key === "ArrowRight" ? e.target.nextElementSibling : e.key === "ArrowLeft" ? e.target.previousElementSibling : null;
    if (next) { e.target.tabIndex = -1; next.tabIndex = 0; next.focus(); e.preventDefault(); }
  });
  const swatch = (colour, told) => el("span", {}, el("span", { class: "swatch", style: { background: colour } }), " ", told);
  const legend = expert >= 0 ? [swatch(HUES[0], "heaviest"), el("span", {}, "underlined: in another place"), expertLink(layer, expert, "its page")] : [ranked.slice(0, HUES.length).map((e) => swatch(hue.get(e), expertLink(layer, e, `${e} (${times.get(e)})`))), ranked.length > HUES.length ? el("span", { class: "soft" }, `${ranked.length - HUES.length} rarer ones without colour`) : null];
  section.append(el("div", { class: "legend" }, legend), reading, readout, el("p", { class: "note" }, `${count(ids.values.length)} tokens of the trace's ${count(data.traced)} are in this atlas: beginnings of sequences of every label, then places where an expert not yet seen is chosen. ⏎ ends a line.`));
}
