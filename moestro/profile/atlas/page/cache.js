// What a cache of experts would have found in memory, by policy and size: the replay of the profile's trace.
function drawCache(section) {
  section.append(el("h2", {}, "Cache curves"));
  const curves = data.curves;
  if (!curves) return section.append(el("p", {}, "There are none: the profile has no trace beside it, or the replay was left out (--cache-tokens 0)."));
  const named = (line) => `${line.policy}${line.routing === "trace" ? "" : ", uniform routing"}`;
  const share = (slots) => slots / curves.experts;
  section.append(el("p", { class: "soft" }, `Share of demanded experts found in memory when ${count(curves.tokens)} tokens of the trace are decoded one by one, for caches shared by all layers. belady knows the future and bounds every policy; uniform routing has no locality to use.`),
    lineChart("hit rate by cache size", curves.lines.map((line) => ({ name: named(line), points: line.slots.map((s, i) => [share(s), line.hit_rate[i]]) })), { title: "experts in memory, share of all", low: 0, high: 1, show: (v) => `${Math.round(100 * v)} %` }, { title: "found in memory", low: 0, high: 1, show: (v) => `${trim(100 * v)} %` }),
    table(["experts in memory", ...curves.lines.map(named)], curves.lines[0].slots.map((s, i) => [`${count(s)} (${number(share(s), "%")})`, ...curves.lines.map((line) => el("span", { "data-hit": line.hit_rate[i] }, number(line.hit_rate[i], "%")))])),
    el("p", { class: "note" }, "All policies, sizes in bytes and prefetching: ", el("code", {}, "moestro replay"), "."));
}
