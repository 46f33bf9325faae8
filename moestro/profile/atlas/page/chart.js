// The two charts: lines over a common axis, and dots with intervals.
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2", "10 4", "4 2 1 2", "3 6"];
const SHAPES = ["circle", "square", "triangle", "diamond"];

function mark(shape, x, y, size, fill, more = {}) {
  if (shape === "circle") return svg("circle", { cx: x, cy: y, r: size, fill, ...more });
  if (shape === "square") return svg("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, fill, ...more });
  const d = shape === "triangle" ? `M${x} ${y - size * 1.2}L${x + size * 1.1} ${y + size}H${x - size * 1.1}Z` : `M${x} ${y - size * 1.35}L${x + size * 1.35} ${y}L${x} ${y + size * 1.35}L${x - size * 1.35} ${y}Z`;
  return svg("path", { d, fill, ...more });
}
const styleOf = (i) => ({ colour: HUES[i % HUES.length], dash: DASHES[i % DASHES.length], shape: SHAPES[i % SHAPES.length] });

function legendOf(names, from = 0) {
  return el("div", { class: "legend" }, names.map((name, i) => {
    const look = styleOf(i + from);
    return el("span", {}, put(svg("svg", { width: 34, height: 14, viewBox: "0 0 34 14", style: { display: "inline-block", "vertical-align": "-2px" }, "aria-hidden": true }),
      {}, [svg("line", { x1: 1, y1: 7, x2: 33, y2: 7, stroke: look.colour, "stroke-width": 2, "stroke-dasharray": look.dash }), mark(look.shape, 17, 7, 4, look.colour)]), ` ${name}`);
  }));
}

function ticks(low, high) {
  const raw = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const out = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) out.push(Number(at.toPrecision(12)));
  return out;
}

// lines: [{name, points: [[x, y], ...]}]; x, y: {title, low, high, show}.
function lineChart(title, lines, x, y) {
  const width = Math.max(320, Math.min(760, document.getElementById("view").clientWidth || 760)), height = 320, left = 52, bottom = 42, top = 10, right = 26;
  const across = (v) => left + ((v - x.low) / (x.high - x.low || 1)) * (width - left - right);
  const up = (v) => height - bottom - ((v - y.low) / (y.high - y.low || 1)) * (height - top - bottom);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title });
  for (const v of ticks(y.low, y.high)) plot.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: up(v), y2: up(v) }), svg("text", { class: "soft", x: left - 6, y: up(v) + 4, "text-anchor": "end" }, y.show(v)));
  for (const v of ticks(x.low, x.high)) plot.append(svg("text", { class: "soft", x: across(v), y: height - bottom + 16, "text-anchor": "middle" }, x.show(v)));
  plot.append(svg("text", { class: "soft", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.title), svg("text", { class: "soft", x: 12, y: top + (height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${top + (height - bottom) / 2})` }, y.title));
  lines.forEach((line, i) => {
    const look = styleOf(i), kept = line.points.filter(([, v]) => v !== null && !Number.isNaN(v));
    plot.append(svg("path", { d: kept.map(([h, v], n) => `${n ? "L" : "M"}${across(h).toFixed(1)} ${up(v).toFixed(1)}`).join(""), fill: "none", stroke: look.colour, "stroke-width": 2, "stroke-dasharray": look.dash }));
    for (const [h, v] of kept) plot.append(put(mark(look.shape, across(h), up(v), 3.2, look.colour, { "data-line": line.name, "data-x": h, "data-y": v }), {}, [svg("title", {}, `${line.name}: ${x.title} ${x.show(h)}, ${y.title} ${y.show(v)}`)]));
  });
  return el("div", {}, legendOf(lines.map((line) => line.name)), plot);
}

// rows: [{name, href, dots: [{value, low, high, look, told, key}], note}] on one axis of shares from 0.
function dotChart(title, rows) {
  const width = Math.max(320, Math.min(900, document.getElementById("view").clientWidth || 900)), step = 12, top = 26, left = 18 + 7 * Math.max(...rows.map((row) => row.name.length));
  const most = Math.max(1e-9, ...rows.flatMap((row) => row.dots.map((dot) => dot.high))), across = (v) => left + (v / most) * (width - left - 20);
  const heights = rows.map((row) => Math.max(20, 8 + row.dots.length * step)), height = top + heights.reduce((a, b) => a + b, 0) + 4;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": title });
  for (const v of ticks(0, most)) plot.append(svg("line", { class: "grid", x1: across(v), x2: across(v), y1: top - 6, y2: height }), svg("text", { class: "soft", x: across(v), y: 14, "text-anchor": "middle" }, `${trim(100 * v)} %`));
  let y = top;
  rows.forEach((row, n) => {
    const name = svg("text", { x: left - 10, y: y + heights[n] / 2 + 4, "text-anchor": "end" }, row.name);
    plot.append(row.href ? svg("a", { href: row.href }, name) : name);
    row.dots.forEach((dot, i) => {
      const at = y + 4 + step * (i + 0.5) + (heights[n] - 8 - row.dots.length * step) / 2;
      plot.append(put(svg("g", { "data-key": dot.key, "data-value": dot.value, "data-low": dot.low, "data-high": dot.high }), {}, [
        svg("title", {}, dot.told), svg("line", { x1: across(dot.low), x2: across(dot.high), y1: at, y2: at, stroke: dot.look.colour, "stroke-width": 2.5 }),
        mark(dot.look.shape, across(dot.value), at, 3.6, dot.look.colour)]));
    });
    plot.append(svg("line", { class: "grid", x1: left, x2: width - 10, y1: y + heights[n], y2: y + heights[n], opacity: 0.6 }));
    y += heights[n];
  });
  return plot;
}
