// The table of all features: groups before rows, filters, order. What it shows is in the address.
"use strict";
const RANGES = ["f1", "density", "steerability"], CHOICES = ["level", "mainly", "view", "finding", "status"];
const ALIKE = { all: "every feature", others: "only with others like it", alone: "only like no other" };
const ORDERS = { concept: "concept", f1: "F1", visual: "how much on images", steerability: "steerability", density: "how often it fires", feature: "number" };

saerad.start = table => {
  saerad.columns = table.columns;
  saerad.table = table;
  const names = table.columns.map(column => column.name);
  saerad.rows = table.rows.map(values => {
    const row = {};
    for (let i = 0; i < names.length; i++) row[names[i]] = values[i];
    row.searched = `${row.feature} ${row.explanation ?? ""} ${row.finding ?? ""} ${row.concept ?? ""}`.toLowerCase();
    return row;
  });
  saerad.rows.sort((a, b) => (b.f1 ?? -1) - (a.f1 ?? -1) || a.feature - b.feature);      // whatever else it is ordered by, the better come first
  saerad.byFeature = new Map(saerad.rows.map(row => [row.feature, row]));
  group_alike();
  know_groups(table.groups ?? []);
  saerad.orders = Object.entries(ORDERS).filter(([name]) => name === "feature" || saerad.rows.some(row => row[name] != null));
  saerad.first_order = saerad.orders[0][0] === "concept" || saerad.orders[0][0] === "f1" ? saerad.orders[0][0] : "feature";
  saerad.state = read();
  for (const name of CHOICES) options(name);
  likenesses();
  build();
  controls();
  first_page(table.first);
  document.addEventListener("DOMContentLoaded", route);   // the plotting library is read after the table is there
  window.addEventListener("hashchange", route);
  window.addEventListener("keydown", keys);
  route();
};

function group_alike() {                       // the best of each group leads it
  saerad.alike = new Map();
  for (const row of saerad.rows) {
    if (row.alike == null) continue;
    if (!saerad.alike.has(row.alike)) saerad.alike.set(row.alike, []);
    saerad.alike.get(row.alike).push(row.feature);
  }
  saerad.leads = new Set([...saerad.alike.values()].map(features => features[0]));
}

// ---- the fields above it
function options(name) {
  const counts = new Map();
  for (const row of saerad.rows) for (const value of String(row[name] ?? "").split("; ")) if (value) counts.set(value, (counts.get(value) ?? 0) + 1);
  const values = [...counts.keys()].sort((a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  $(name).replaceChildren(el("option", { value: "" }, "any"), ...values.map(value => el("option", { value }, `${plain(value)} (${counts.get(value)})`)));
  $(name).closest("label").hidden = !values.length;
}

function likenesses() {                        // by one explanation only where the address names its feature
  const one = saerad.alike.has(Number(saerad.state.alike)) ? [[saerad.state.alike, `like feature ${saerad.state.alike}`]] : [];
  const choices = [["", "each explanation once"], ...Object.entries(ALIKE), ...one];
  $("alike").replaceChildren(...choices.map(([value, text]) => el("option", { value }, text)));
  $("alike").closest("label").hidden = !saerad.alike.size;
}

function alike(row, wanted) {
  if (!wanted) return row.alike == null || saerad.leads.has(row.feature);
  if (wanted === "all") return true;
  if (wanted === "others" || wanted === "alone") return (row.alike == null) === (wanted === "alone") && Boolean(row.explanation);
  return row.alike === Number(wanted);
}

function set(changes) {                       // typing is no step of the history, opening a feature is
  history.replaceState(null, "", address(changes));
  saerad.state = read();
  filter();
}

const FIELDS = ["search", ...RANGES.flatMap(name => [`${name}-from`, `${name}-to`]), ...CHOICES, "alike"];

function controls() {
  $("filters").addEventListener("submit", event => event.preventDefault());
  $("skip").addEventListener("click", event => { event.preventDefault(); $("search").focus(); });
  for (const id of FIELDS) $(id).addEventListener("input", () => set({ [id]: $(id).value }));
  $("template").addEventListener("input", () => set({ template: $("template").checked ? "aside" : "" }));
  $("template").closest("label").hidden = !saerad.rows.some(row => row.template);
  $("order").replaceChildren(...saerad.orders.map(([value, text]) => el("option", { value }, text)));
  $("order").addEventListener("input", () => {
    const column = saerad.columns.find(column => column.name === $("order").value);
    saerad.grid.setSort(column.name, column.text || column.name === "feature" ? "asc" : "desc");
  });
  $("clear").addEventListener("click", () => {        // how features are grouped is no filter and stays
    const cleared = [...FIELDS.filter(id => id !== "alike" || saerad.alike.has(Number(saerad.state.alike))), "template"];
    set(Object.fromEntries(cleared.map(id => [id, ""])));
    fill();
    $("search").focus();
  });
  $("csv").addEventListener("click", () => save_as("features.csv", csv(saerad.grid.getRows("active").map(row => row.getData())), "text/csv"));
  $("more").open = FIELDS.slice(1).some(id => id !== "alike" && saerad.state[id]);
}

function fill() {
  likenesses();
  for (const id of FIELDS) if ($(id).value !== (saerad.state[id] ?? "")) $(id).value = saerad.state[id] ?? "";
  $("template").checked = saerad.state.template === "aside";
  $("order").value = sorted()[0].column;
}

function csv(rows) {                           // as spreadsheets read it: quotes doubled, and no cell that begins a formula
  const cell = value => {
    const text = value == null ? "" : String(value), safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const names = saerad.columns.map(column => column.name);
  return [names, ...rows.map(row => names.map(name => row[name]))].map(values => values.map(cell).join(",")).join("\r\n") + "\r\n";
}

// ---- the grid
function build() {
  const { Tabulator, ...modules } = vendoredTable;
  Tabulator.registerModule(Object.values(modules));
  const narrow = window.matchMedia("(max-width: 48rem)").matches;
  saerad.grid = new Tabulator($("table"), {
    data: saerad.rows, index: "feature", height: narrow ? "62vh" : "66vh", layout: narrow ? "fitData" : "fitColumns", headerSortElement: "<span></span>",
    placeholder: "No feature fits. Clear a filter.", columnHeaderSortMulti: false, rowHeight: 50, initialSort: sorted(), renderVerticalBuffer: 300,
    columns: saerad.columns.filter(column => !column.hidden || column.name in ORDERS).map(column => grid_column(column, narrow)),
  });
  saerad.grid.on("tableBuilt", () => { saerad.ready = true; name_grid(); filter(); });
  saerad.grid.on("dataSorted", sorters => {
    if (!saerad.ready || !sorters.length) return;
    const [name, direction] = [sorters[0].field, sorters[0].dir], first = saerad.first_order === "f1" ? "f1:desc" : `${saerad.first_order}:asc`;
    const sort = `${name}:${direction}` === first ? "" : `${name}:${direction}`;
    if ($("order").value !== name) $("order").value = name in ORDERS ? name : "";
    if ((saerad.state.sort ?? "") !== sort) { history.replaceState(null, "", address({ sort })); saerad.state = read(); links(); }
  });
  saerad.grid.on("dataFiltered", (_, rows) => {
    const count = rows.length.toLocaleString("en"), all = saerad.rows.length.toLocaleString("en");
    $("count").textContent = `${count} of ${all} features${!saerad.state.alike && saerad.alike.size ? ", each explanation once" : ""}`;
  });
  saerad.grid.on("rowClick", (event, row) => {
    if (!event.target.closest("a") && !String(getSelection())) location.hash = link_to({ feature: row.getData().feature });
  });
}

function grid_column(column, narrow) {
  const wide = column.name === "explanation";
  return {
    field: column.name, title: column.title, visible: !column.hidden && (!narrow || Boolean(column.narrow)),
    width: narrow && wide ? 216 : column.width, widthGrow: wide ? 4 : undefined, minWidth: column.width || (wide ? 216 : 58),
    hozAlign: column.text ? "left" : "right", headerHozAlign: column.text ? "left" : "right", resizable: !narrow && "header",
    headerSortStartingDir: column.text ? "asc" : "desc", titleFormatter: () => el("button", { type: "button", title: column.about }, column.title),
    sorter: column.text ? "string" : "number", sorterParams: { alignEmptyValues: "bottom" }, formatter: cell => cell_content(cell, column),
  };
}

function cell_content(cell, column) {
  const row = cell.getData(), text = column.name === "explanation" ? brief(show(row.explanation, column)) : show(row[column.name], column);
  if (column.text && text.length > 8) cell.getElement().title = text;
  if (column.name === "feature") return el("a", { href: link_to({ feature: row.feature }) }, text);
  const others = column.name === "explanation" && !saerad.state.alike ? (saerad.alike.get(row.alike)?.length ?? 1) - 1 : 0;
  if (!others) return document.createTextNode(text);
  return el("span", {}, el("a", { class: "chip", href: link_to({ alike: row.alike }) }, `+${others} alike`), ` ${text}`);
}

function name_grid() {                          // its rows are reached by their links, so the box around them need not be
  $("table").setAttribute("aria-label", "All features");
  $("table").querySelector(".tabulator-tableholder").removeAttribute("tabindex");
}

const number_links = () => [...document.querySelectorAll("#table .tabulator-row [tabulator-field=feature] a")];
const links = () => { for (const a of number_links()) a.href = link_to({ feature: a.textContent }); };

function sorted() {
  const [name, direction] = (saerad.state.sort ?? (saerad.first_order === "f1" ? "f1:desc" : `${saerad.first_order}:asc`)).split(":");
  const known = saerad.columns.some(column => column.name === name && (!column.hidden || name in ORDERS));
  return [{ column: known ? name : "f1", dir: direction === "asc" ? "asc" : "desc" }];
}

function filter() {
  if (!saerad.ready) return;
  const { search = "", ...state } = saerad.state, words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const limits = RANGES.map(name => [name, number(state[`${name}-from`], -Infinity), number(state[`${name}-to`], Infinity), name === "density" ? 100 : 1])
    .filter(([, low, high]) => low > -Infinity || high < Infinity);
  const chosen = CHOICES.filter(name => state[name]).map(name => [name, state[name]]), aside = state.template === "aside";
  saerad.grid.setFilter(row => (!aside || !row.template) && alike(row, state.alike) && words.every(word => row.searched.includes(word))
    && limits.every(([name, low, high, unit]) => row[name] != null && row[name] * unit >= low && row[name] * unit <= high)
    && chosen.every(([name, value]) => String(row[name] ?? "").split("; ").includes(value)));
  show_groups(words, limits.length > 0 || chosen.length > 0 || Boolean(state.alike));
  $("clear").hidden = !(words.length || limits.length || chosen.length || aside || saerad.alike.has(Number(state.alike)));
  links();
}

function route_list(came_back) {
  document.title = saerad.title;
  fill();
  if (!saerad.ready) return;
  const [{ column, dir }] = sorted(), now = saerad.grid.getSorters()[0];
  if (!now || now.field !== column || now.dir !== dir) saerad.grid.setSort(column, dir);
  if (came_back) saerad.grid.redraw();
  filter();
  if (came_back && saerad.last != null) {       // whoever comes back by key goes on from where he left
    saerad.grid.scrollToRow(saerad.last, "center", false).catch(() => {}).then(() => setTimeout(refocus, 60));
  }
}

function refocus() { (number_links().find(a => a.textContent === String(saerad.last)) ?? $("search")).focus({ preventScroll: true }); }

function table_key(event) {
  if (event.target.id !== "search" && !event.target.closest?.("#table")) return;
  const all = number_links(), at = all.indexOf(document.activeElement), next = all[event.key === "ArrowDown" ? at + 1 : at - 1];
  if (next) { event.preventDefault(); next.focus(); } else if (at === 0) $("search").focus();
}

function order() {                              // of features, as the table has them
  const rows = saerad.ready ? saerad.grid.getRows("active").map(row => row.getData().feature) : saerad.rows.map(row => row.feature);
  return rows.length ? rows : saerad.rows.map(row => row.feature);
}
