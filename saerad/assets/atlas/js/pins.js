// A list of one's own: kept in this browser by the run whose features it names, taken along as a file or a link.
"use strict";

const PINS = `saerad-pins:${saerad.run}`;

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

saerad.pages.pins = state => {                   // the reader's list, or one that a link brings
  const sent = state.pins === undefined ? null : state.pins.split(",").map(Number).filter(feature => saerad.byFeature.has(feature));
  const list = sent ?? [...saerad.pins].filter(feature => saerad.byFeature.has(feature));
  const trouble = el("p", { role: "alert", class: "notice", hidden: !saerad.unkept },
    "This browser keeps nothing for pages opened from disk; export the list before you close it.");
  put_page(sent ? "A list of features that was sent to you" : "Pinned features", trouble,
    list.length ? plain_table(["feature", "explanation", "F1", "compare", "list"], list.map((feature, i) => pinned_row(feature, i ? list[0] : null, sent)))
      : note("Nothing is pinned yet. Press ☆ on a feature's page, or import a list."),
    el("div", { class: "fields" }, pin_actions(list, sent, trouble)));
};

function pinned_row(feature, first, sent) {
  const remove = () => { keep_pins([...saerad.pins].filter(other => other !== feature)); saerad.pages.pins(saerad.state); };
  return plain_row(feature_link(feature), explanation_of(feature), two(saerad.byFeature.get(feature).f1),
    first == null ? "" : el("a", { href: link_to({ page: "compare", a: first, b: feature }) }, `compare with ${first}`),
    sent ? pin_button(feature) : el("button", { type: "button", onclick: remove }, "Remove"));
}

function pin_actions(list, sent, trouble) {
  const shared = `${location.href.split("#")[0]}#page=pins&pins=${list.join(",")}`, disabled = !list.length;
  const keep = () => { keep_pins([...new Set([...saerad.pins, ...sent])]); location.hash = link_to({ page: "pins" }); };
  const save = () => save_as("pinned-features.json", JSON.stringify({ atlas: saerad.title, run: saerad.run, pins: list }, null, 1));
  const file = el("input", { type: "file", accept: "application/json,.json", onchange: () => import_pins(file, trouble) });
  return [sent ? el("button", { type: "button", onclick: keep }, "Keep them all") : null,
    el("button", { type: "button", disabled, onclick: save }, "Export as JSON"),
    el("button", { type: "button", class: "copy", disabled, onclick: event => copy(event.target, shared) }, "Copy a link to the list"),
    el("label", {}, "Import ", file)];
}

async function import_pins(file, trouble) {
  try {
    const sent = JSON.parse(await file.files[0].text());
    const known = sent.pins.filter(feature => saerad.byFeature.has(feature));
    keep_pins([...new Set([...saerad.pins, ...known])]);
    saerad.pages.pins({});
    if (sent.run === undefined ? sent.atlas === saerad.title : sent.run === saerad.run) return;
    alert_in($("page"), `The list is of another atlas (${String(sent.atlas).slice(0, 80)}): the numbers may mean other features here.`);
  } catch { trouble.textContent = "That file holds no list of features; nothing was changed."; trouble.hidden = false; }
}

const alert_in = (place, sentence) => place.prepend(el("p", { role: "alert", class: "notice" }, sentence));

count_pins();
