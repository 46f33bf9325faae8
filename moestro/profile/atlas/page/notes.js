// What to know before believing the rest, the measures' tables, and what the profile does not hold.
function measureOf(found) {
  const options = Object.entries(found.options).map(([k, v]) => `${k}=${v}`).join(", ");
  return el("div", { "data-measure": found.name }, table(found.columns, found.rows, found.title), found.notes.map((note) => el("p", { class: "note" }, note)), el("p", { class: "note" }, el("code", {}, `moestro show PROFILE --measure ${found.name}${options ? `:${options.replaceAll(", ", ",")}` : ""}`)));
}

function drawMeasures(section) {
  section.append(el("h2", {}, "Measures"), el("p", { class: "soft" }, "Each beside what it would be at chance. moestro methods --kind measure lists all of them."), ...data.measures.map((found) => el("div", {}, measureOf(found))));
}

function drawNotes(section) {
  section.append(el("h2", {}, "Warnings"), data.warnings.length ? el("ul", { class: "plain", id: "warnings" }, data.warnings.map((line) => el("li", {}, line))) : el("p", { id: "warnings" }, "None: every expert was seen often enough, and nothing stands out."));
  const byProbe = new Map();
  for (const { what, probe, why } of data.missing) byProbe.set(probe || "", [...(byProbe.get(probe || "") || []), why ? `${what} (${why})` : what]);
  section.append(el("h2", {}, "Not in this profile"));
  if (!byProbe.size) section.append(el("p", {}, "Nothing that an atlas shows is missing."));
  else section.append(el("ul", { class: "plain", id: "missing" }, [...byProbe].map(([probe, what]) => el("li", {}, what.join("; "), probe && probe !== "trace" ? [": ", el("code", {}, probe.split(", ").map((p) => `--probe ${p}`).join(" "))] : null))),
    el("p", { class: "note" }, "Profile again with what is named, or with --for METHOD, which brings all that a method needs. Probes that look inside the experts cost a second evaluation of them."));
  section.append(el("h2", {}, "How it was made"), el("div", { class: "facts" }, table(["", ""], [["model", data.model], ["family", data.family], ["digest of the text", data.made.data], ["probes", Object.keys(data.made.probes).join(", ")],
    ...data.labels.map((label) => [`label ${label.name}`, `${count(label.tokens)} tokens${label.sequences ? ` in ${count(label.sequences)} sequences` : ""}`]), ...data.made.sources.map((source) => ["source", Object.entries(source).map(([k, v]) => `${k}: ${v}`).join(", ")])])));
}
