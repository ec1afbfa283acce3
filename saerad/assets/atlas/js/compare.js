// Two features side by side, and the reader's own list of features.
"use strict";

saerad.pages.compare = state => {
  const [a, b] = ["a", "b"].map(key => saerad.byFeature.get(Number(state[key])) && state[key] !== undefined ? Number(state[key]) : null);
  if (a == null || b == null || a === b) return put_page("Compare two features", pair_form(state, a));
  if (saerad.table.studies.length) need("data/studies.js", saerad.studies);
  for (const feature of [a, b]) need(chunk_file(feature), data_of(feature));
  if (!data_of(a) || !data_of(b) || typeof vendoredPlot === "undefined" || (saerad.table.studies.length && !saerad.studies)) return put_page("Compare two features", note("Reading …"));
  const [left, right] = [a, b].map(data_of), shared = new Set(left.promoted.map(([token]) => token).filter(token => right.promoted.some(([other]) => other === token)));
  const exact = el("div");
  put_page(`Features ${a} and ${b}`, together(a, b, left, right, shared), exact,
    el("div", { class: "sides" }, [[a, left], [b, right]].map(([feature, data]) => side(feature, data, shared))), pair_form(state, a));
  if (saerad.served) ask_server(`../ask/pair?a=${a}&b=${b}`).then(found => { if (!found.error) exact.replaceChildren(measured(a, b, found)); });
};

function pair_form(state, a) {
  const field = key => el("input", { type: "number", min: 0, max: saerad.rows.length - 1, value: state[key] ?? "", name: key, required: true });
  const [first, second] = [field("a"), field("b")];
  const near = a == null ? [] : [...saerad.pins].filter(feature => feature !== a);
  return el("form", { class: "question", onsubmit: event => { event.preventDefault(); location.hash = link_to({ page: "compare", a: first.value, b: second.value }); } },
    el("div", { class: "fields" }, el("label", {}, "Feature", first), el("label", {}, "and feature", second), el("button", {}, "Compare")),
    near.length ? where("Pinned: ", near.map((feature, i) => [i ? ", " : "", el("a", { href: link_to({ page: "compare", a, b: feature }) }, `with ${feature}`)])) : null);
}

function cosine_in_words(a, b, left, right) {
  const known = left.neighbours.find(([other]) => other === b) ?? right.neighbours.find(([other]) => other === a);
  if (known) return `Cosine of their decoder rows: ${two(known[1])}.`;
  const least = Math.min(...[left, right].filter(data => data.neighbours.length).map(data => data.neighbours.at(-1)[1]));
  return Number.isFinite(least) ? `Neither is among the nearest of the other: the cosine of their decoder rows is at most ${two(least)}.` : "The cosine of their decoder rows was not computed in this run.";
}

function together(a, b, left, right, shared) {
  const [here, there] = [left.at ?? [], new Set(right.at ?? [])], both = here.filter(place => there.has(place)), any = here.length + there.size - both.length;
  const total = [...(saerad.studies?.values() ?? [])].reduce((sum, study) => sum + study.tokens.length, 0);
  const say = !left.at || !right.at ? "Which words they fire on together was not kept in this run."
    : any === 0 ? "Neither fires on a word of the studies that were read."
      : `Of ${total ? `${total.toLocaleString("en")} ` : "the "}words of held-out studies feature ${a} fires on ${here.length}, feature ${b} on ${there.size}, both on ${both.length}: ${percent(both.length / any)} of those on which either does.`;
  return section("Together", el("ul", {}, el("li", {}, cosine_in_words(a, b, left, right)), el("li", {}, say),
    el("li", {}, shared.size ? ["Both promote ", [...shared].map((token, i) => [i ? ", " : "", el("code", {}, token.trim())]), "."] : "They promote no token in common.")), shared_words(both));
}

function shared_words(places, most = 6, around = 6) {
  if (!places.length || !saerad.studies) return null;
  const lines = [];
  let begin = 0;
  for (const study of saerad.studies.values()) {
    for (const place of places) {
      const at = place - begin;
      if (at < 0 || at >= study.tokens.length || lines.length >= most) continue;
      const [from, to] = [Math.max(0, at - around), Math.min(study.tokens.length, at + around)];
      lines.push(el("div", { class: "context" }, el("small", {}, plain(study.sections[at]), ", study ", study_link(study.study)), el("span", { class: "window" },
        study.tokens.slice(from, to).map((token, i) => word(token, from + i === at ? 1 : 0, !i, { peak: from + i === at })))));
    }
    begin += study.tokens.length;
  }
  return [el("h3", {}, "Words on which both fire"), lines];
}

function measured(a, b, found) {
  const lines = [`Decoder rows: cosine ${two(found.decoder_cosine)}; encoder columns: cosine ${two(found.encoder_cosine)}.`];
  if (found.tokens) lines.push(`On ${found.tokens.toLocaleString("en")} tokens of test patients in the store feature ${a} fires on ${found.fires[0]}, feature ${b} on ${found.fires[1]}, both on ${found.both}; correlation of their activations ${two(found.correlation)}.`);
  return el("div", {}, el("h3", {}, "Measured on the run itself"), el("ul", {}, lines.map(line => el("li", {}, line))));
}

function side(feature, data, shared) {
  const row = saerad.byFeature.get(feature), top = top_of(data.groups), strongest = data.groups[0]?.contexts.slice(0, 5) ?? [];
  return el("section", {}, el("h2", {}, feature_link(feature, `Feature ${feature}`), " ", pin_button(feature)), el("p", { class: "explanation" }, brief(row.explanation || no_explanation(row, data))), scores(row, data),
    el("div", { class: "cards" }, card("Where it fires", places(data)), card("Logit lens", logit_lens(data, shared))),
    data.views.length ? film(data.views[0]) : null, el("h3", {}, "Strongest contexts"), strongest.length ? strongest.map(context => context_line(context, top)) : left_out("Contexts"));
}

// ---- a list of one's own: kept in this browser, taken along as a file or a link
const PINS = `saerad-pins:${document.title}`;

function load_pins() {
  try { return new Set(JSON.parse(localStorage.getItem(PINS) ?? "[]").filter(Number.isInteger)); } catch { return new Set(); }
}

saerad.pins = load_pins();

function keep_pins(pins) {
  saerad.pins = new Set(pins);
  try { localStorage.setItem(PINS, JSON.stringify([...saerad.pins])); saerad.unkept = false; } catch { saerad.unkept = true; }
  count_pins();
}

const count_pins = () => { $("pinned").textContent = `Pinned features (${saerad.pins.size})`; };

function pin_button(feature) {
  const button = el("button", { type: "button", class: "pin", onclick: () => {
    keep_pins(saerad.pins.has(feature) ? [...saerad.pins].filter(other => other !== feature) : [...saerad.pins, feature]);
    say();
  } });
  function say() {
    button.textContent = saerad.pins.has(feature) ? "★ Pinned" : "☆ Pin";
    button.setAttribute("aria-pressed", String(saerad.pins.has(feature)));
    button.setAttribute("aria-label", `${saerad.pins.has(feature) ? "Pinned" : "Pin"}: feature ${feature}`);
  }
  say();
  return button;
}

saerad.pages.pins = state => {
  const sent = state.pins === undefined ? null : state.pins.split(",").map(Number).filter(feature => saerad.byFeature.has(feature));
  const list = sent ?? [...saerad.pins].filter(feature => saerad.byFeature.has(feature)), shared = `${location.href.split("#")[0]}#page=pins&pins=${list.join(",")}`;
  const trouble = el("p", { role: "alert", class: "notice", hidden: !saerad.unkept }, "This browser keeps nothing for pages opened from disk; export the list before you close it.");
  const file = el("input", { type: "file", accept: "application/json,.json", onchange: () => import_pins(file, trouble) });
  const again = () => saerad.pages.pins(saerad.state);
  const line = (feature, i) => el("tr", {}, el("th", { scope: "row" }, feature_link(feature)), el("td", {}, explanation_of(feature)), el("td", {}, two(saerad.byFeature.get(feature).f1)),
    el("td", {}, i ? el("a", { href: link_to({ page: "compare", a: list[0], b: feature }) }, `compare with ${list[0]}`) : ""),
    el("td", {}, sent ? pin_button(feature) : el("button", { type: "button", onclick: () => { keep_pins([...saerad.pins].filter(other => other !== feature)); again(); } }, "Remove")));
  put_page(sent ? "A list of features that was sent to you" : "Pinned features", trouble,
    list.length ? el("div", { class: "wide" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ["feature", "explanation", "F1", "compare", "list"].map(name => el("th", { scope: "col" }, name)))),
      el("tbody", {}, list.map(line)))) : note("Nothing is pinned yet. Press ☆ on a feature's page, or import a list."),
    el("div", { class: "fields" }, sent ? el("button", { type: "button", onclick: () => { keep_pins([...new Set([...saerad.pins, ...sent])]); location.hash = link_to({ page: "pins" }); } }, "Keep them all") : null,
      el("button", { type: "button", disabled: !list.length, onclick: () => save_as("pinned-features.json", JSON.stringify({ atlas: saerad.title, pins: list }, null, 1)) }, "Export as JSON"),
      el("button", { type: "button", class: "copy", disabled: !list.length, onclick: event => copy(event.target, shared) }, "Copy a link to the list"), el("label", {}, "Import ", file)));
};

async function import_pins(file, trouble) {
  try {
    const sent = JSON.parse(await file.files[0].text());
    const known = sent.pins.filter(feature => saerad.byFeature.has(feature));
    keep_pins([...new Set([...saerad.pins, ...known])]);
    saerad.pages.pins({});
    if (sent.atlas !== saerad.title) alert_in($("page"), `The list is of another atlas (${String(sent.atlas).slice(0, 80)}): the numbers may mean other features here.`);
  } catch { trouble.textContent = "That file holds no list of features; nothing was changed."; trouble.hidden = false; }
}

const alert_in = (place, sentence) => place.prepend(el("p", { role: "alert", class: "notice" }, sentence));

count_pins();
