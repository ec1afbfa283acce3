// The charts of a feature's page. Each says in words what it shows.
"use strict";
const HOUSE = { width: 340, style: { background: "none", color: INK, fontSize: "12px", overflow: "visible" } };

function chart(label, options) {
  try {
    const node = vendoredPlot.plot({ ...HOUSE, ...options });
    for (const inner of node.querySelectorAll("[aria-label]")) inner.removeAttribute("aria-label");     // the library's "rect" and "bar" say nothing
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", label);
    return node;
  } catch (error) { console.error(error); return note("This chart could not be drawn."); }
}

const legend = entries => el("ul", { class: "legend" }, entries.map(([text, style]) => el("li", {}, el("i", { style }), text)));

function ticks(low, high) {                     // a few round numbers of a logarithmic axis
  const round = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const step of [1, 2, 5]) round.push(Number((step * 10 ** power).toPrecision(1)));
  }
  const inside = round.filter(tick => tick >= low && tick <= high);
  return inside.length > 4 ? inside.filter(tick => String(tick).replace(/[0.]/g, "").startsWith("1")) : inside;
}

function histogram(data) {
  const { counts, edges, why, about } = data.histogram, total = counts.reduce((a, b) => a + b, 0);
  if (!total) return note(why);
  const bins = counts.map((count, i) => ({ count, low: edges[i], high: edges[i + 1] })), most = bins.reduce((a, b) => b.count > a.count ? b : a);
  const { rectY, ruleY } = vendoredPlot;
  return [chart(`Histogram of ${total} activations; most are between ${most.low.toPrecision(2)} and ${most.high.toPrecision(2)}.`, {
    width: 290, height: 160, marginLeft: 44, marginBottom: 36,
    x: { type: "log", label: "activation (normalised units)", labelAnchor: "center", labelArrow: "none", ticks: ticks(edges[0], edges.at(-1)),
      tickFormat: d => Number(d.toPrecision(2)) },
    y: { label: "tokens", labelArrow: "none", ticks: 4, grid: true },
    marks: [rectY(bins, { x1: "low", x2: "high", y: "count", fill: BLUE, insetLeft: 0.5 }), ruleY([0])],
  }), where(about)];
}

function places(data) {
  const rows = Object.entries(data.places).map(([name, share]) => ({ name: plain(name), share })).filter(row => row.share > 0.0005);
  if (!rows.length) return note("It never fired.");
  const { barX, text } = vendoredPlot;
  return chart(`Shares of its firings: ${rows.map(row => `${row.name} ${Math.round(100 * row.share)} percent`).join(", ")}.`, {
    width: 290, height: 34 + 24 * rows.length, marginLeft: 84, marginRight: 46, marginTop: 4, marginBottom: 24,
    x: { label: null, domain: [0, 1], tickFormat: d => `${100 * d} %`, ticks: 3 }, y: { label: null, domain: rows.map(row => row.name) },
    marks: [barX(rows, { x: "share", y: "name", fill: BLUE, insetTop: 3, insetBottom: 3 }),
      text(rows, { x: "share", y: "name", text: row => percent(row.share), dx: 4, textAnchor: "start" })],
  });
}

function outcomes(doses) {
  const colours = Object.entries(saerad.table.outcomes);
  const rows = doses.flatMap(d => colours.map(([kind]) => ({ alpha: d.name, kind: plain(kind), share: d[kind] })));
  const said = doses.map(d => `${d.name}: ${colours.map(([kind]) => `${plain(kind)} ${Math.round(100 * d[kind])} percent`).join(", ")}`).join("; ");
  return [chart(said, {
    height: 46 + 26 * doses.length, marginLeft: 64, marginTop: 4, marginBottom: 36,
    x: { label: "share of reports", labelAnchor: "center", labelArrow: "none", domain: [0, 1], ticks: 4 }, y: { label: null, domain: doses.map(d => d.name) },
    color: { domain: colours.map(([kind]) => plain(kind)), range: colours.map(([, colour]) => colour) },
    marks: [vendoredPlot.barX(rows, { x: "share", y: "alpha", fill: "kind", stroke: INK, strokeWidth: 0.3, insetTop: 3, insetBottom: 3 })],
  }), legend(colours.map(([kind, colour]) => [plain(kind), `background:${colour}`]))];
}

function dose(data) {
  const kinds = ["changed", "on target"], both = data.doses.some(d => d.alpha < 0) && data.doses.some(d => d.alpha > 0);
  const rows = data.doses.flatMap(d => kinds.map(kind => ({ kind, alpha: d.alpha, share: kind === "changed" ? 1 - d.unchanged : d.on_target_only + d.mixed })));
  const line = [...rows, ...(both ? kinds.map(kind => ({ kind, alpha: 0, share: 0 })) : [])].sort((a, b) => a.alpha - b.alpha);
  const { ruleX, lineY, dot } = vendoredPlot;
  return [chart(data.doses.map(d => `at ${d.name} ${Math.round(100 * (1 - d.unchanged))} percent changed`).join(", "), {
    height: 190, marginLeft: 40, marginBottom: 36, x: { label: data.unit, labelAnchor: "center", labelArrow: "none" },
    y: { label: "share of reports", domain: [0, 1], grid: true, ticks: 4, labelArrow: "none" },
    color: { domain: kinds, range: [INK, "#2A9D78"] }, symbol: { domain: kinds, range: ["circle", "diamond"] },
    marks: [ruleX([0], { stroke: "#bbb" }), lineY(line, { x: "alpha", y: "share", stroke: "kind" }),
      dot(rows, { x: "alpha", y: "share", stroke: "kind", fill: "kind", symbol: "kind", r: 4 })],
  }), legend([["changed", `background:${INK};border-radius:50%`], ["changed on target (also with other changes)", "background:#2A9D78;transform:rotate(45deg)"]])];
}

function logit_lens(data, shared = new Set()) {
  if (!data.promoted.length) return note("The promoted tokens were not computed in this run; ", command("portray"), " does it.");
  const row = ([token, logit]) => el("li", { class: shared.has(token) ? "shared" : null }, el("code", {}, token), el("small", {}, two(logit)));
  const list = (title, words, kind) => el("div", {}, el("h4", {}, title), el("ol", { class: `words ${kind}` }, words.map(row)));
  return [el("div", { class: "lens" }, list("promoted", data.promoted, "up"), list("suppressed", data.suppressed, "down")),
    where("Decoder row through the unembedding: a hint, since the layers in between are left out.")];
}

function neighbours(row, data) {
  if (!data.neighbours.length) return note("Not computed in this run; ", command("portray"), " does it.");
  const line = ([other, cosine]) => el("li", {}, feature_link(other), el("small", {}, two(cosine)),
    el("span", {}, explanation_of(other)),
    el("a", { href: link_to({ page: "compare", a: row.feature, b: other }), "aria-label": `Compare with feature ${other}` }, "compare"));
  return [el("ol", { class: "near pairs" }, data.neighbours.map(line)), where("By the cosine of the decoder rows.")];
}
