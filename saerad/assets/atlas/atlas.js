// The atlas in the browser. Data arrive by <script>, because a page opened from disk may not fetch; text is only ever set as text.
"use strict";
const saerad = { rows: [], columns: [], chunks: {}, sort: ["f1", -1], page: 0, size: 100 };
const $ = id => document.getElementById(id);

const there = children => children.flat(Infinity).filter(child => child != null);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== false && value != null) node.setAttribute(name, value);
  node.append(...there(children));
  return node;
}

const show = (value, column) => value == null ? "–" : typeof value !== "number" || column.whole ? String(value)
  : column.percent ? `${(100 * value).toPrecision(2)} %` : value.toFixed(2);

// ---- the table
saerad.start = table => {
  saerad.columns = table.columns;
  saerad.chunkSize = table.chunk;
  saerad.published = table.published;
  const names = table.columns.map(column => column.name);
  saerad.rows = table.rows.map(values => {
    const row = Object.fromEntries(names.map((name, i) => [name, values[i]]));
    row.searched = `${row.feature} ${row.description} ${row.target ?? ""}`.toLowerCase();
    return row;
  });
  $("table").tHead.append(el("tr", {}, table.columns.map(column => {
    const button = el("button", { type: "button", title: column.about }, column.title);
    button.onclick = () => { saerad.sort = [column.name, saerad.sort[0] === column.name ? -saerad.sort[1] : column.text ? 1 : -1]; saerad.page = 0; list(); };
    return el("th", { scope: "col", "data-name": column.name, class: column.text ? null : "number" }, button);
  })));
  for (const id of ["search", "least", "everything"]) $(id).oninput = () => { saerad.page = 0; list(); };
  window.onhashchange = route;
  list();
  route();
};

function matching() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), least = Number($("least").value) || 0;
  const [name, direction] = saerad.sort;
  const kept = saerad.rows.filter(row => words.every(word => row.searched.includes(word))
    && (row.f1 == null ? $("everything").checked && !least : row.f1 >= least));
  return kept.sort((a, b) => {                      // rows without a value come last, whichever way the column is sorted
    const x = a[name], y = b[name];
    if (x == null || y == null) return (x == null) - (y == null) || a.feature - b.feature;
    return (typeof x === "string" ? x.localeCompare(y) : x - y) * direction || a.feature - b.feature;
  });
}

function list() {
  const rows = matching(), pages = Math.max(1, Math.ceil(rows.length / saerad.size)), from = saerad.page * saerad.size;
  for (const th of $("table").tHead.rows[0].cells) {
    const sorted = th.dataset.name === saerad.sort[0];
    if (sorted) th.setAttribute("aria-sort", saerad.sort[1] > 0 ? "ascending" : "descending"); else th.removeAttribute("aria-sort");
  }
  $("table").tBodies[0].replaceChildren(...rows.slice(from, from + saerad.size).map(row => el("tr", {}, saerad.columns.map(column => {
    const value = show(row[column.name], column);
    return el("td", { class: column.text ? null : "number" }, column.name === "feature" ? el("a", { href: `#feature=${row.feature}` }, value) : value);
  }))));
  $("count").textContent = `${rows.length} of ${saerad.rows.length} features`;
  const turn = (text, step) => {
    const button = el("button", { type: "button", disabled: saerad.page + step < 0 || saerad.page + step >= pages ? "" : null }, text);
    button.onclick = () => { saerad.page += step; list(); };
    return button;
  };
  $("pages").replaceChildren(turn("‹ back", -1), `page ${saerad.page + 1} of ${pages}`, turn("on ›", 1));
}

// ---- one feature
saerad.put = (chunk, features) => { saerad.chunks[chunk] = features; route(); };

function route() {
  const match = /^#feature=(\d+)$/.exec(location.hash), row = match && saerad.rows.find(row => row.feature === Number(match[1]));
  $("list").hidden = Boolean(row);
  $("feature").hidden = !row;
  if (!row) return;
  const chunk = Math.floor(row.feature / saerad.chunkSize);
  if (!(chunk in saerad.chunks)) {
    saerad.chunks[chunk] = null;
    document.body.append(el("script", { src: `data/features-${String(chunk).padStart(4, "0")}.js` }));
  }
  if (saerad.chunks[chunk]) feature(row, saerad.chunks[chunk][row.feature]);
  else $("feature").replaceChildren("Reading …");
}

const score = (name, value, about = "") => el("li", {}, el("small", {}, name), el("b", {}, value == null ? "–" : value.toFixed(2)), el("small", {}, about));

function tokens(context, top) {
  if (context.film) return [el("img", { src: context.film, alt: `film of study ${context.study}` })];
  return context.tokens.map((token, i) => {
    const strength = Math.min(1, Math.max(0, context.activations[i] / top));
    return el("span", { class: i === context.peak ? "token peak" : "token", title: context.activations[i].toFixed(2),
      style: strength > 0 ? `background: rgba(0, 114, 178, ${(0.08 + 0.47 * strength).toFixed(3)})` : null }, token);
  });
}

const changed = parts => parts.map(([kind, text]) => kind === "=" ? text : el(kind === "-" ? "del" : "ins", {}, text));

const bars = (shares, kind = "") => el("div", { class: "bars" }, Object.entries(shares).map(([name, share]) =>
  [el("span", {}, name.replaceAll("_", " ")), el("div", { class: `bar ${kind}`, style: `width: ${(100 * share).toFixed(1)}%` }), el("span", {}, `${(100 * share).toFixed(0)} %`)]));

function feature(row, data) {
  const top = Math.max(1e-9, ...data.exemplars.flatMap(context => context.activations));
  const order = matching().map(other => other.feature), at = order.indexOf(row.feature);
  const step = (text, other) => other == null ? null : el("a", { href: `#feature=${other}` }, text);
  const left = what => el("p", { class: "notice" }, saerad.published ? `${what} were left out of this atlas.` : `There are no ${what.toLowerCase()}.`);
  $("feature").replaceChildren(...there([
    el("nav", { "aria-label": "Features" }, el("a", { href: "#" }, "‹ all features"), step("previous", at > 0 ? order[at - 1] : null), step("next", at >= 0 ? order[at + 1] : null)),
    el("h1", {}, `Feature ${row.feature}`),
    el("p", { class: "description" }, row.description || `No description: ${data.reason || row.status}.`),
    el("ul", { class: "scores" }, score("F1", row.f1, data.interval), score("precision", row.precision), score("recall", row.recall),
      score("F1, another feature's description", row.shuffled_f1, "control"), score("F1, always yes", data.always_yes_f1, "control")),
    el("p", { class: "where" }, data.about),
    el("h2", {}, "Where it fires"), Object.keys(data.places).length ? bars(data.places) : left("Shares"),
    el("h2", {}, "Contexts in which it fires"), data.exemplars.length ? data.exemplars.map(context =>
      el("div", { class: "context" }, el("small", {}, context.place), tokens(context, top))) : left("Contexts"),
    el("h2", {}, "What pushing on it does"),
    Object.keys(data.outcomes).length ? [el("p", { class: "where" }, data.steering), Object.entries(data.outcomes).map(([name, shares]) => [el("h3", {}, name), bars(shares)])] : el("p", { class: "notice" }, "This feature was not steered."),
    data.steered.map(pair => el("div", { class: "pair" }, el("h3", {}, pair.title), el("p", {}, changed(pair.parts.filter(p => p[0] !== "+"))), el("p", {}, changed(pair.parts.filter(p => p[0] !== "-"))))),
    Object.keys(data.outcomes).length && !data.steered.length ? left("Steered reports") : null]));
  $("feature").focus();
  window.scrollTo(0, 0);
}
