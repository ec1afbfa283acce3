// The atlas in the browser. Data arrive by <script>, because a page opened from disk may not fetch; text is only ever set as text.
"use strict";
const saerad = { title: document.title, rows: [], columns: [], chunks: {}, state: {} };
const $ = id => document.getElementById(id);
const INK = "#1d1d1b", BLUE = "#0072B2", RUST = "#A03C14", SOFT = "#62625c";
const RANGES = ["f1", "density", "steerability"], CHOICES = ["level", "mainly", "view", "finding", "status"];
const ALIKE = { once: "each explanation once", others: "only with others like it", alone: "only like no other" };

const present = children => children.flat(Infinity).filter(child => child != null && child !== false);

function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  node.append(...present(children));
  return node;
}

const minus = text => text.replace("-", "−");
const brief = text => text.replace(/^Lexical baseline: /, "");     // who explained a feature stands on its page
const plain = name => String(name).replaceAll("_", " ");
const percent = share => share == null ? "–" : share === 0 ? "0 %" : share < 0.0001 ? `${(100 * share).toExponential(0)} %` : `${Number((100 * share).toPrecision(2))} %`;
const show = (value, column) => value == null || value === "" ? "–" : typeof value !== "number" ? plain(value) : column.whole ? String(value)
  : column.percent ? percent(value) : value.toFixed(2);

// ---- the address: everything that a link must bring back
const read = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function address(changes) {
  const next = { ...saerad.state, ...changes };
  const kept = Object.entries(next).filter(([, value]) => value !== "" && value != null);
  return "#" + new URLSearchParams(kept).toString();
}

function set(changes) {                       // typing is no step of the history, opening a feature is
  history.replaceState(null, "", address(changes));
  saerad.state = read();
  filter();
}

// ---- the table
saerad.start = table => {
  saerad.columns = table.columns;
  saerad.table = table;
  const names = table.columns.map(column => column.name);
  saerad.rows = table.rows.map(values => {
    const row = {};
    for (let i = 0; i < names.length; i++) row[names[i]] = values[i];
    row.searched = `${row.feature} ${row.explanation ?? ""} ${row.finding ?? ""}`.toLowerCase();
    return row;
  });
  saerad.byFeature = new Map(saerad.rows.map(row => [row.feature, row]));
  saerad.alike = new Map();
  for (const row of saerad.rows) if (row.alike != null) (saerad.alike.get(row.alike) ?? saerad.alike.set(row.alike, []).get(row.alike)).push(row.feature);
  saerad.state = read();
  for (const name of CHOICES) options(name);
  likenesses();
  build();
  controls();
  document.addEventListener("DOMContentLoaded", route);   // the plotting library is read after the table is there
  window.addEventListener("hashchange", route);
  window.addEventListener("keydown", keys);
  route();
};

function options(name) {
  const counts = new Map();
  for (const row of saerad.rows) for (const value of String(row[name] ?? "").split("; ")) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  const values = [...counts.keys()].sort((a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  $(name).replaceChildren(el("option", { value: "" }, "any"), ...values.map(value => el("option", { value }, `${plain(value)} (${counts.get(value)})`)));
  $(name).closest("label").hidden = !values.length;
}

function likenesses() {                        // filters by what is explained alike; by one explanation only where the address names its feature
  const likeOne = saerad.alike.has(Number(saerad.state.alike)) ? [saerad.state.alike, `like feature ${saerad.state.alike}`] : [];
  const choices = [["", "any"], ...Object.entries(ALIKE), ...(likeOne.length ? [likeOne] : [])];
  $("alike").replaceChildren(...choices.map(([value, text]) => el("option", { value }, text)));
  $("alike").closest("label").hidden = !saerad.alike.size;
}

function alike(row, wanted) {
  if (wanted === "once") return row.alike == null || row.alike === row.feature;
  if (wanted === "others" || wanted === "alone") return (row.alike == null) === (wanted === "alone") && Boolean(row.explanation);
  return row.alike === Number(wanted);
}

function build() {
  const { Tabulator, ...modules } = vendoredTable;
  Tabulator.registerModule(Object.values(modules));
  const narrow = window.matchMedia("(max-width: 48rem)").matches;
  saerad.grid = new Tabulator($("table"), {
    data: saerad.rows, index: "feature", height: narrow ? "62vh" : "66vh", layout: narrow ? "fitData" : "fitColumns", headerSortElement: "<span></span>",
    placeholder: "No feature fits. Clear a filter.", columnHeaderSortMulti: false, rowHeight: 50, initialSort: sorted(), renderVerticalBuffer: 300,
    columns: saerad.columns.filter(column => !column.hidden).map(column => ({
      field: column.name, title: column.title, visible: !narrow || Boolean(column.narrow),
      width: narrow && column.name === "explanation" ? 216 : column.width, widthGrow: column.name === "explanation" ? 4 : undefined, minWidth: column.width || (column.name === "explanation" ? 216 : 58),
      hozAlign: column.text ? "left" : "right", headerHozAlign: column.text ? "left" : "right", resizable: !narrow && "header",
      headerSortStartingDir: column.text ? "asc" : "desc", titleFormatter: () => el("button", { type: "button", title: column.about }, column.title),
      sorter: column.text ? "string" : "number", sorterParams: { alignEmptyValues: "bottom" },
      formatter: cell => {
        const row = cell.getData(), text = column.name === "explanation" ? brief(show(row.explanation, column)) : show(row[column.name], column);
        if (column.text && text.length > 8) cell.getElement().title = text;
        return column.name === "feature" ? el("a", { href: address({ feature: row.feature }) }, text) : document.createTextNode(text);
      } })),
  });
  saerad.grid.on("tableBuilt", () => { saerad.ready = true; filter(); });
  saerad.grid.on("dataSorted", sorters => {
    if (!saerad.ready || !sorters.length) return;
    const [name, direction] = [sorters[0].field, sorters[0].dir];
    const sort = name === "f1" && direction === "desc" ? "" : `${name}:${direction}`;
    if ((saerad.state.sort ?? "") !== sort) { history.replaceState(null, "", address({ sort })); saerad.state = read(); links(); }
  });
  saerad.grid.on("dataFiltered", (_, rows) => { $("count").textContent = `${rows.length.toLocaleString("en")} of ${saerad.rows.length.toLocaleString("en")} features`; });
  saerad.grid.on("rowClick", (event, row) => { if (!event.target.closest("a") && !String(getSelection())) location.hash = address({ feature: row.getData().feature }); });
}

const links = () => document.querySelectorAll("#table .tabulator-row a").forEach(a => { a.href = address({ feature: a.textContent }); });

function sorted() {
  const [name, direction] = (saerad.state.sort ?? "f1:desc").split(":");
  const known = saerad.columns.some(column => column.name === name);
  return [{ column: known ? name : "f1", dir: direction === "asc" ? "asc" : "desc" }];
}

function filter() {
  if (!saerad.ready) return;
  const { search = "", ...state } = saerad.state, words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const limits = RANGES.map(name => [name, number(state[`${name}-from`], -Infinity), number(state[`${name}-to`], Infinity), name === "density" ? 100 : 1])
    .filter(([, low, high]) => low > -Infinity || high < Infinity);
  const chosen = CHOICES.filter(name => state[name]).map(name => [name, state[name]]);
  saerad.grid.setFilter(row => words.every(word => row.searched.includes(word))
    && limits.every(([name, low, high, unit]) => row[name] != null && row[name] * unit >= low && row[name] * unit <= high)
    && chosen.every(([name, value]) => String(row[name] ?? "").split("; ").includes(value)) && (!state.alike || alike(row, state.alike)));
  $("clear").hidden = !(words.length || limits.length || chosen.length || state.alike);
  links();
}

const number = (text, otherwise) => text == null || text === "" || isNaN(text) ? otherwise : Number(text);

function controls() {
  const ids = ["search", ...RANGES.flatMap(name => [`${name}-from`, `${name}-to`]), ...CHOICES, "alike"];
  for (const id of ids) $(id).addEventListener("input", () => set({ [id]: $(id).value }));
  $("clear").addEventListener("click", () => { set(Object.fromEntries(ids.map(id => [id, ""]))); fill(ids); $("search").focus(); });
  saerad.fill = () => fill(ids);
  $("more").open = ids.slice(1).some(id => saerad.state[id]) || !window.matchMedia("(max-width: 48rem)").matches;
}

function fill(ids) {
  likenesses();
  for (const id of ids) if ($(id).value !== (saerad.state[id] ?? "")) $(id).value = saerad.state[id] ?? "";
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName), open = !$("feature").hidden;
  if (event.key === "/" && !typing && !open) { event.preventDefault(); $("search").focus(); }
  else if (event.key === "Escape" && open) location.hash = address({ feature: "" });
  else if (open && !typing && (event.key === "ArrowLeft" || event.key === "ArrowRight")) $(event.key === "ArrowLeft" ? "previous" : "next")?.click();
  else if (!open && (event.key === "ArrowDown" || event.key === "ArrowUp") && (event.target.id === "search" || event.target.closest?.("#table"))) {
    const all = [...document.querySelectorAll("#table .tabulator-row a")], at = all.indexOf(document.activeElement);
    const next = all[event.key === "ArrowDown" ? at + 1 : at - 1];
    if (next) { event.preventDefault(); next.focus(); } else if (at === 0) $("search").focus();
  }
}

// ---- one feature
saerad.put = (chunk, features) => { saerad.chunks[chunk] = features; route(); };

function route() {
  saerad.state = read();
  const row = saerad.state.feature == null ? null : saerad.byFeature.get(Number(saerad.state.feature));
  const back = $("list").hidden;
  $("list").hidden = Boolean(row);
  $("feature").hidden = !row;
  document.body.classList.toggle("one", Boolean(row));
  if (!row) {
    saerad.shown = null;
    document.title = saerad.title;
    saerad.fill();
    if (saerad.ready) {
      const [{ column, dir }] = sorted(), now = saerad.grid.getSorters()[0];
      if (!now || now.field !== column || now.dir !== dir) saerad.grid.setSort(column, dir);
      if (!back) filter(); else { saerad.grid.redraw(); filter(); if (saerad.last != null) saerad.grid.scrollToRow(saerad.last, "center", false).catch(() => {}).then(() => setTimeout(refocus, 60)); }
    }
    return;
  }
  const chunk = Math.floor(row.feature / saerad.table.chunk);
  if (!(chunk in saerad.chunks)) {
    saerad.chunks[chunk] = null;
    const script = el("script", { src: `data/features-${String(chunk).padStart(4, "0")}.js` });
    script.onerror = () => $("feature").replaceChildren(home(), el("p", { class: "notice" }, `The file ${script.getAttribute("src")} is missing beside this page; copy the whole folder of the atlas.`));
    document.body.append(script);
  }
  if (!saerad.chunks[chunk] || typeof vendoredPlot === "undefined") { $("feature").replaceChildren("Reading …"); return; }
  if (saerad.shown === row.feature) return;
  saerad.shown = saerad.last = row.feature;
  feature(row, saerad.chunks[chunk][row.feature]);
}

function refocus() {                           // whoever comes back by key goes on from where he left
  const left = [...document.querySelectorAll("#table .tabulator-row a")].find(a => a.textContent === String(saerad.last));
  (left ?? $("search")).focus({ preventScroll: true });
}

const home = () => el("a", { href: address({ feature: "" }) }, "‹ all features");
const section = (title, ...children) => el("section", {}, el("h2", {}, title), children);
const note = (...parts) => el("p", { class: "notice" }, parts);
const command = name => el("code", {}, `saerad ${name}`);
const score = (name, value, about = "", control = false) => el("li", { class: control ? "control" : null }, el("small", {}, name), el("b", {}, value == null ? "–" : value.toFixed(2)), about ? el("small", {}, about) : null);
const feature_link = number => el("a", { href: address({ feature: number }) }, String(number));

function order() {
  const rows = saerad.ready ? saerad.grid.getRows("active").map(row => row.getData().feature) : saerad.rows.map(row => row.feature);
  return rows.length ? rows : saerad.rows.map(row => row.feature);
}

function feature(row, data) {
  const all = order(), at = all.indexOf(row.feature);
  const step = (id, text, other) => other == null ? null : el("a", { id, href: address({ feature: other }) }, text);
  const share = el("button", { type: "button" }, "Copy link");
  share.onclick = async () => { const url = location.href.split("#")[0] + `#feature=${row.feature}`; try { await navigator.clipboard.writeText(url); share.textContent = "Copied"; } catch { window.prompt("The link to this feature:", url); } };
  const left = what => saerad.table.published ? note(`${what} were left out of this published atlas.`) : note(`This run has no ${what.toLowerCase()} of the feature.`);
  document.title = `Feature ${row.feature}`;
  $("feature").replaceChildren(...present([
    el("nav", { "aria-label": "Features" }, home(), step("previous", "‹ previous", at > 0 ? all[at - 1] : null), step("next", "next ›", at >= 0 ? all[at + 1] : null), share),
    el("h1", {}, `Feature ${row.feature}`),
    el("p", { class: "explanation" }, row.explanation || (data.reason || row.status !== "ok" ? `No explanation: ${data.reason || plain(row.status ?? "not examined")}.` : "It has no explanation yet.")),
    explained_alike(row),
    data.tags.length ? el("ul", { class: "tags", "aria-label": "Properties" }, data.tags.map(tag => el("li", {}, tag))) : null,
    row.f1 == null ? null : el("ul", { class: "scores", "aria-label": "Scores" }, score("F1", row.f1, data.interval), score("precision", row.precision), score("recall", row.recall),
      data.near_f1 == null ? null : score("F1 against near misses", data.near_f1), score("F1 with another feature's explanation", row.shuffled_f1, "control", true), score("F1 of always saying yes", data.always_yes_f1, "control", true)),
    el("p", { class: "where" }, data.about),
    el("div", { class: "cards" }, card("How strongly it fires", histogram(data)), card("Where it fires", places(data)), card("Logit lens: what it promotes", logitLens(data)), card("Nearest features", neighbours(data))),
    section("On the radiographs", data.views.length ? [el("div", { class: "views" }, data.views.map(view)), el("p", { class: "where" }, data.views_about)] : data.places.image || saerad.table.published ? left("Radiographs") : note("It does not fire on radiographs.")),
    section("In the text", data.groups.length ? contexts(data) : left("Contexts")),
    data.examined ? section("Its examination", examined(data)) : null,
    section("What pushing on it does", data.doses.length ? [el("p", { class: "where" }, data.steering), el("div", { class: "cards two" }, card("What becomes of the reports", outcomes(data)), card("More push, more change?", dose(data)))] : note("This feature was not steered."),
      data.steered.map(pair), data.doses.length && !data.steered.length ? left("Steered reports") : null)]));
  $("feature").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function explained_alike(row, most = 12) {      // the others whose explanations say the same
  const others = (saerad.alike.get(row.alike) ?? []).filter(other => other !== row.feature);
  if (!others.length) return null;
  const named = others.slice(0, most).flatMap((other, i) => [i ? ", " : "", feature_link(other)]), rest = others.length - most;
  const all = { ...Object.fromEntries(Object.keys(saerad.state).map(name => [name, ""])), alike: row.alike };
  return el("p", { class: "where alike" }, "Explained alike: ", named, rest > 0 ? ` and ${rest} more` : null, " · ", el("a", { href: address(all) }, "see them side by side"));
}

const card = (title, body) => el("section", { class: "card" }, el("h3", {}, title), body);

// ---- its charts
function ticks(low, high) {                     // a few round numbers of a logarithmic axis
  const round = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) for (const step of [1, 2, 5]) round.push(Number((step * 10 ** power).toPrecision(1)));
  const inside = round.filter(tick => tick >= low && tick <= high);
  return inside.length > 4 ? inside.filter(tick => String(tick).replace(/[0.]/g, "").startsWith("1")) : inside;
}

function chart(label, options) {
  try { const node = vendoredPlot.plot({ width: 340, style: { background: "none", color: INK, fontSize: "12px", overflow: "visible" }, ...options }); node.setAttribute("role", "img"); node.setAttribute("aria-label", label); return node; }
  catch (error) { console.error(error); return note("This chart could not be drawn."); }
}

function histogram(data) {
  const { counts, edges } = data.histogram;
  const total = counts.reduce((a, b) => a + b, 0);
  if (!total) return note(data.histogram.why);
  const bins = counts.map((count, i) => ({ count, low: edges[i], high: edges[i + 1] })).filter(bin => bin.count || true);
  return [chart(`Histogram of ${total} activations; most are between ${bins.reduce((a, b) => b.count > a.count ? b : a).low.toPrecision(2)} and ${bins.reduce((a, b) => b.count > a.count ? b : a).high.toPrecision(2)}.`, {
    width: 290, height: 160, marginLeft: 44, marginBottom: 36, x: { type: "log", label: "activation (normalised units)", labelAnchor: "center", labelArrow: "none", ticks: ticks(edges[0], edges.at(-1)), tickFormat: d => Number(d.toPrecision(2)) }, y: { label: "tokens", labelArrow: "none", ticks: 4, grid: true },
    marks: [vendoredPlot.rectY(bins, { x1: "low", x2: "high", y: "count", fill: BLUE, insetLeft: 0.5 }), vendoredPlot.ruleY([0])] }), el("p", { class: "where" }, data.histogram.about)];
}

function places(data) {
  const rows = Object.entries(data.places).map(([name, share]) => ({ name: plain(name), share })).filter(row => row.share > 0.0005);
  if (!rows.length) return note("It never fired.");
  return chart(`Shares of its firings: ${rows.map(row => `${row.name} ${Math.round(100 * row.share)} percent`).join(", ")}.`, {
    width: 290, height: 34 + 24 * rows.length, marginLeft: 84, marginRight: 46, marginTop: 4, marginBottom: 24, x: { label: null, domain: [0, 1], tickFormat: d => `${100 * d} %`, ticks: 3 }, y: { label: null, domain: rows.map(row => row.name) },
    marks: [vendoredPlot.barX(rows, { x: "share", y: "name", fill: BLUE, insetTop: 3, insetBottom: 3 }), vendoredPlot.text(rows, { x: "share", y: "name", text: row => percent(row.share), dx: 4, textAnchor: "start" })] });
}

function outcomes(data) {
  const rows = data.doses.flatMap(d => Object.keys(saerad.table.outcomes).map(kind => ({ alpha: d.name, kind: plain(kind), share: d[kind] })));
  const label = data.doses.map(d => `${d.name}: ${Object.keys(saerad.table.outcomes).map(kind => `${plain(kind)} ${Math.round(100 * d[kind])} percent`).join(", ")}`).join("; ");
  return [chart(label, { height: 46 + 26 * data.doses.length, marginLeft: 64, marginTop: 4, marginBottom: 36, x: { label: "share of reports", labelAnchor: "center", labelArrow: "none", domain: [0, 1], ticks: 4 }, y: { label: null, domain: data.doses.map(d => d.name) },
    color: { domain: Object.keys(saerad.table.outcomes).map(plain), range: Object.values(saerad.table.outcomes) },
    marks: [vendoredPlot.barX(rows, { x: "share", y: "alpha", fill: "kind", stroke: INK, strokeWidth: 0.3, insetTop: 3, insetBottom: 3 })] }),
    el("ul", { class: "legend" }, Object.entries(saerad.table.outcomes).map(([kind, colour]) => el("li", {}, el("i", { style: `background:${colour}` }), plain(kind))))];
}

function dose(data) {
  const rows = data.doses.flatMap(d => ["changed", "on target"].map(kind => ({ kind, alpha: d.alpha, share: kind === "changed" ? 1 - d.unchanged : d.on_target_only + d.mixed })));
  return [chart(data.doses.map(d => `at ${d.name} ${Math.round(100 * (1 - d.unchanged))} percent changed`).join(", "), {
    height: 190, marginLeft: 40, marginBottom: 36, x: { label: data.unit, labelAnchor: "center", labelArrow: "none" }, y: { label: "share of reports", domain: [0, 1], grid: true, ticks: 4, labelArrow: "none" },
    color: { domain: ["changed", "on target"], range: [INK, "#2A9D78"] }, symbol: { domain: ["changed", "on target"], range: ["circle", "diamond"] },
    marks: [vendoredPlot.ruleX([0], { stroke: "#bbb" }), vendoredPlot.lineY([...rows, ...(data.doses.some(d => d.alpha < 0) && data.doses.some(d => d.alpha > 0) ? ["changed", "on target"].map(kind => ({ kind, alpha: 0, share: 0 })) : [])].sort((a, b) => a.alpha - b.alpha), { x: "alpha", y: "share", stroke: "kind" }),
      vendoredPlot.dot(rows, { x: "alpha", y: "share", stroke: "kind", fill: "kind", symbol: "kind", r: 4 })] }),
    el("ul", { class: "legend" }, el("li", {}, el("i", { style: `background:${INK};border-radius:50%` }), "changed"), el("li", {}, el("i", { style: "background:#2A9D78;transform:rotate(45deg)" }), "changed on target (also with other changes)"))];
}

function logitLens(data) {
  if (!data.promoted.length) return note("The promoted tokens were not computed in this run; ", command("portray"), " does it.");
  const list = (title, words, kind) => el("div", {}, el("h4", {}, title), el("ol", { class: `words ${kind}` }, words.map(([word, logit]) => el("li", {}, el("code", {}, word), el("small", {}, minus(logit.toFixed(2)))))));
  return [el("div", { class: "lens" }, list("promoted", data.promoted, "up"), list("suppressed", data.suppressed, "down")), el("p", { class: "where" }, "Decoder row through the unembedding: a hint, since the layers in between are left out.")];
}

function neighbours(data) {
  if (!data.neighbours.length) return note("Not computed in this run; ", command("portray"), " does it.");
  return [el("ol", { class: "near" }, data.neighbours.map(([other, cosine]) => el("li", {}, feature_link(other), el("small", {}, minus(cosine.toFixed(2))), el("span", {}, brief(saerad.byFeature.get(other)?.explanation || "no explanation"))))), el("p", { class: "where" }, "By the cosine of the decoder rows.")];
}

// ---- its exemplars
function view(shown) {
  const { columns, rows, patches, activations, boxes } = shown, top = Math.max(...activations, 1e-9), width = 100 / columns, height = 100 / rows;
  const best = patches[activations.indexOf(Math.max(...activations))];
  const cell = (patch, i) => el("svg:rect", { x: (patch % columns) * width, y: Math.floor(patch / columns) * height, width, height, fill: "#F0A000", "fill-opacity": (0.08 + 0.55 * activations[i] / top).toFixed(3) }, el("svg:title", {}, activations[i].toFixed(2)));
  const box = b => [el("svg:rect", { class: "box", x: b.left, y: b.top, width: b.width, height: b.height }), el("svg:rect", { class: "box dashed", x: b.left, y: b.top, width: b.width, height: b.height })];
  return el("figure", {}, el("svg:svg", { viewBox: "0 0 100 100", role: "img", "aria-label": `${shown.title}; strongest at patch row ${Math.floor(best / columns) + 1} of ${rows}, column ${best % columns + 1} of ${columns}` },
    el("svg:image", { href: shown.image, width: 100, height: 100, preserveAspectRatio: "none" }), patches.map(cell), boxes.map(box)),
    el("figcaption", {}, el("b", {}, shown.title), boxes.length ? el("ul", {}, boxes.map(b => el("li", {}, b.text))) : null));
}

function tokens(context, top) {
  return context.tokens.map((token, i) => {
    const strength = Math.min(1, Math.max(0, context.activations[i] / top));
    const bare = token.trimStart() || token, space = i ? token.slice(0, token.length - bare.length) : "";     // a shaded space would hang at a line's end
    return [space, el("span", { class: i === context.peak ? "token peak" : "token", title: strength > 0 ? context.activations[i].toFixed(2) : null,
      style: strength > 0 ? `background: rgba(0, 114, 178, ${(0.06 + 0.44 * strength).toFixed(3)})` : null }, bare)];
  });
}

function contexts(data) {
  const top = Math.max(1e-9, ...data.groups.flatMap(group => group.contexts.flatMap(context => context.activations)));
  return [data.places.image > 0.5 ? note(`${percent(data.places.image)} of its firings are on patches of radiographs; these are the others.`) : null, el("p", { class: "where" }, "The darker a word, the stronger the feature; the strongest is underlined, and pointing at a word shows its activation. Tenths are of the feature's own firings, by strength."),
    data.groups.map((group, i) => el("details", { class: "decile", open: i < 2 }, el("summary", {}, group.title), group.contexts.map(context =>
      el("div", { class: "context" }, el("small", {}, context.place), el("span", { class: "window" }, tokens(context, top))))))];
}

const changed = parts => parts.map(([kind, text]) => kind === "=" ? text : el(kind === "-" ? "del" : "ins", {}, text));

const pair = shown => el("section", { class: "pair" }, el("h3", {}, shown.title),
  el("div", {}, el("h4", {}, "as it is"), el("p", {}, changed(shown.parts.filter(p => p[0] !== "+")))), el("div", {}, el("h4", {}, "while pushed"), el("p", {}, changed(shown.parts.filter(p => p[0] !== "-")))));
