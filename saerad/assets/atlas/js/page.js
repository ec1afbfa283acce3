// What every page of the atlas uses. Data arrive by <script>, because a page opened from disk may not fetch; text is only ever set as text.
"use strict";
const saerad = { title: document.title, run: document.body.dataset.run, rows: [], columns: [], chunks: {}, state: {}, pages: {}, served: document.body.dataset.ask === "yes" };
const $ = id => document.getElementById(id);
const INK = "#1d1d1b", BLUE = "#0072B2";

const present = children => children.flat(Infinity).filter(child => child != null && child !== false);

function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...present(children));
  return node;
}

// ---- words and numbers
const minus = text => text.replace("-", "−");
const brief = text => text.replace(/^Lexical baseline: /, "");     // who explained a feature stands on its page
const plain = name => String(name).replaceAll("_", " ");
const two = value => value == null ? "–" : minus(value.toFixed(2));
const number = (text, otherwise) => text == null || text === "" || isNaN(text) ? otherwise : Number(text);
const explanation_of = feature => brief(saerad.byFeature.get(feature)?.explanation || "no explanation");

function percent(share) {
  if (share == null) return "–";
  if (share === 0) return "0 %";
  return share < 0.0001 ? `${(100 * share).toExponential(0)} %` : `${Number((100 * share).toPrecision(2))} %`;
}

function show(value, column) {
  if (value == null || value === "") return "–";
  if (typeof value !== "number") return plain(value);
  return column.whole ? String(value) : column.percent ? percent(value) : value.toFixed(2);
}

// ---- the address: everything that a link must bring back
const PAGE_KEYS = ["feature", "page", "id", "a", "b", "pins", "q", "q-study", "q-view", "q-paint", "q2", "q2-view", "q2-paint"];
const read = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function address(changes) {
  const next = { ...saerad.state, ...changes };
  const kept = Object.entries(next).filter(([, value]) => value !== "" && value != null);
  return "#" + new URLSearchParams(kept).toString();
}

// a link to another page keeps what the table was filtered and sorted by
const link_to = changes => address({ ...Object.fromEntries(PAGE_KEYS.map(key => [key, ""])), ...changes });
const home = () => el("a", { href: link_to({}) }, "‹ all features");
const feature_link = (feature, text = String(feature)) => el("a", { href: link_to({ feature }) }, text);
const study_link = study => saerad.served || saerad.table.studies.includes(study)
  ? el("a", { href: link_to({ page: "study", id: study }) }, study) : study;

// ---- pieces of pages
const section = (title, ...children) => el("section", {}, el("h2", {}, title), children);
const card = (title, ...body) => el("section", { class: "card" }, el("h3", {}, title), body);
const note = (...parts) => el("p", { class: "notice" }, parts);
const where = (...parts) => el("p", { class: "where" }, parts);
const command = name => el("code", {}, `saerad ${name}`);

const cells = (...values) => values.map(value => el("td", {}, value));

// a small table: headings, and rows of which the first cell is a heading too
const plain_table = (heads, rows) => el("div", { class: "wide" }, el("table", { class: "plain" },
  el("thead", {}, el("tr", {}, heads.map(head => el("th", { scope: "col" }, head)))), el("tbody", {}, rows)));
const plain_row = (first, ...rest) => el("tr", {}, el("th", { scope: "row" }, first), cells(...rest));

function save_as(name, text, kind = "application/json") {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function copy(button, url) {
  const before = button.textContent;
  try { await navigator.clipboard.writeText(url); button.textContent = "Copied"; setTimeout(() => { button.textContent = before; }, 2000); }
  catch { window.prompt("The link to this page:", url); }
}

// ---- files that are read when they are first needed; each calls back and routes again
const asked = new Set();

function need(source, there) {
  if (there || asked.has(source)) return there;
  asked.add(source);
  const script = el("script", { src: source });
  script.onerror = () => open_page().replaceChildren(home(), note(`The file ${source} is missing beside this page; copy the whole folder of the atlas.`));
  document.body.append(script);
  return false;
}

const chunk_file = feature => `data/features-${String(Math.floor(feature / saerad.table.chunk)).padStart(4, "0")}.js`;
const data_of = feature => saerad.chunks[Math.floor(feature / saerad.table.chunk)]?.[feature];
saerad.put = (chunk, features) => { saerad.chunks[chunk] = features; route(); };
saerad.put_studies = studies => { saerad.studies = new Map(studies.map(study => [study.study, study])); route(); };

// ---- which page is shown
const open_page = () => $("feature").hidden ? $("page") : $("feature");

function reveal(name) {
  for (const id of ["list", "feature", "page"]) $(id).hidden = id !== name;
  document.body.classList.toggle("one", name !== "list");
}

function route() {
  saerad.state = read();
  const row = saerad.state.feature == null ? null : saerad.byFeature.get(Number(saerad.state.feature));
  const page = saerad.pages[saerad.state.page], came_back = $("list").hidden;
  reveal(row ? "feature" : page ? "page" : "list");
  if (!row) saerad.shown = null;
  if (row) route_feature(row);
  else if (page) page(saerad.state);
  else route_list(came_back);
}

function put_page(title, ...children) {        // a whole page that is no feature's; typing in it must not lose its place
  const fresh = document.title !== `${title} · ${saerad.title}`;
  document.title = `${title} · ${saerad.title}`;
  $("page").replaceChildren(...present([el("nav", { "aria-label": "Back" }, home()), el("h1", {}, title), children]));
  if (fresh) { $("page").focus({ preventScroll: true }); window.scrollTo(0, 0); }
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName), open = $("list").hidden;
  if (event.key === "/" && !typing && !open) { event.preventDefault(); $("search").focus(); }
  else if (event.key === "Escape" && open) location.hash = link_to({});
  else if (!$("feature").hidden && !typing && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    $(event.key === "ArrowLeft" ? "previous" : "next")?.click();
  } else if (!open && (event.key === "ArrowDown" || event.key === "ArrowUp")) table_key(event);
}
