// One study: its radiographs, its text, and which features fired where. A question's answer is shown the same way.
"use strict";
const ROWS_FIRST = 15;

// which features fire in a text, with all their places: worked out from what each token lists, where nobody sent more
function features_of(reading) {
  if (reading.features) return reading.features;
  const found = new Map();
  reading.by_token.forEach((list, i) => list.forEach(([feature, activation]) => {
    if (!found.has(feature)) found.set(feature, { feature, peak: 0, words: 0, strongest: "", on: [] });
    const one = found.get(feature);
    one.words += 1;
    one.on.push([i, activation]);
    if (activation > one.peak) { one.peak = activation; one.strongest = reading.tokens[i]; }
  }));
  const worth = one => one.peak * Math.log(1 / Math.max(saerad.byFeature.get(one.feature)?.density ?? 1, 1e-6));
  return [...found.values()].sort((a, b) => worth(b) - worth(a));
}

// text and table side by side: a word tells its features, a feature its words
function reading_view(reading, sections_first = false) {
  const features = features_of(reading), says = el("div", { class: "says", "aria-live": "polite" });
  const text = el("div", { class: "reading", tabindex: 0, role: "group",
    "aria-label": "The text; arrow keys go from word to word and say what fires there" });
  const on = new Map(features.map(one => [one.feature, new Map(one.on)])), spans = [];
  const strength = (i, feature) => feature == null ? (reading.by_token[i]?.[0]?.[1] ?? 0) : on.get(feature)?.get(i) ?? 0;
  function shade_by(feature) {
    const shown = spans.map((_, i) => strength(i, feature)), top = Math.max(1e-9, ...shown);
    spans.forEach((span, i) => { span.style.background = shown[i] > 0 ? `rgba(0, 114, 178, ${(0.06 + 0.44 * shown[i] / top).toFixed(3)})` : "none"; });
    for (const line of rows.children) line.classList.toggle("chosen", feature != null && line.dataset.feature === String(feature));
  }
  let at = -1;
  function tell(i) {
    spans[at]?.classList.remove("at");
    at = i;
    spans[at].classList.add("at");
    const fires = reading.by_token[i] ?? [];
    const line = ([feature, activation]) => el("li", {}, feature_link(feature), el("small", {}, two(activation)), el("span", {}, explanation_of(feature)));
    says.replaceChildren(el("h3", {}, `“${reading.tokens[i].trim()}”`),
      fires.length ? el("ol", { class: "near" }, fires.map(line)) : note("No feature that stands out fires here."));
  }
  const parts = [];
  reading.tokens.forEach((token, i) => {
    if (i === 0 || reading.sections[i] !== reading.sections[i - 1]) parts.push({ name: reading.sections[i], words: [], places: [] });
    const [space, span] = word(token, 0, !parts.at(-1).words.length, { onclick: () => tell(i) });
    spans[i] = span;
    parts.at(-1).words.push(space, span);
    parts.at(-1).places.push(i);
  });
  const shown = sections_first ? parts : [...parts.filter(p => p.name === "findings"), ...parts.filter(p => p.name !== "findings")];
  text.append(...shown.map(p => el("div", { class: "part" }, el("h3", {}, plain(p.name)), el("p", { class: "window" }, p.words))));
  text.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], next = shown.flatMap(p => p.places);
    if (!step) return;
    event.preventDefault();
    tell(next[Math.min(next.length - 1, Math.max(0, next.indexOf(at) + step))]);
  });
  const line = one => el("tr", { "data-feature": one.feature, onmouseenter: () => shade_by(one.feature), onfocusin: () => shade_by(one.feature) },
    el("th", { scope: "row" }, feature_link(one.feature)),
    cells(el("span", { title: explanation_of(one.feature) }, explanation_of(one.feature)), two(one.peak), String(one.words), one.strongest.trim()));
  const heads = ["feature", "explanation", "peak", "words", "strongest on"].map(name => el("th", { scope: "col" }, name));
  const rows = el("tbody", { onmouseleave: () => shade_by(null) }, features.slice(0, ROWS_FIRST).map(line)), rest = features.slice(ROWS_FIRST);
  const more = rest.length
    ? el("button", { type: "button", onclick: () => { rows.append(...rest.map(line)); more.remove(); } }, `Show ${rest.length} more`) : null;
  shade_by(null);
  return el("div", { class: "asked" }, el("div", {}, text, says),
    el("div", { class: "wide" }, el("table", { class: "plain firing" },
      el("caption", {}, "Features that stand out. Point at one to see its words; press a word to see its features."),
      el("thead", {}, el("tr", {}, heads)), rows), ...present([more])));
}

function films_view(reading, chosen, scales) {
  if (!reading.films?.length) return null;
  return section("On the radiographs", el("div", { class: "views" }, reading.films.map(shown => film_of_many(shown, chosen, scales))));
}

// ---- the page of a study
saerad.pages.study = state => {
  const known = saerad.studies?.get(state.id);
  if (known) return study_page(known);
  if (!saerad.table.studies.length && !saerad.served) return put_page("Study", note("This atlas shows no studies."));
  if (saerad.table.studies.length && !need("data/studies.js", saerad.studies)) return put_page("Study", note("Reading …"));
  if (!state.id) return studies_page();
  if (!saerad.served) {
    const held = `Study ${state.id} has no page here: an atlas on disk holds ${saerad.table.studies.length} held-out studies. `;
    return put_page("Study", note(held, command("atlas --serve"), " shows any."));
  }
  put_page(`Study ${state.id}`, note("The model is reading it …"));
  return ask_server(`../ask/study?id=${encodeURIComponent(state.id)}`).then(found => {
    if (saerad.state.id !== state.id) return;
    if (found.error) return put_page("Study", note(found.error));
    study_page(found);
  });
};

function study_page(study) {
  const all = saerad.table.studies, at = all.indexOf(study.study);
  const step = (text, other) => other == null ? null : el("a", { href: link_to({ page: "study", id: other }) }, text);
  const again = saerad.served ? el("a", { href: link_to({ page: "ask", q: findings_of(study), "q-study": study.study }) }, "ask about it") : null;
  put_page(`Study ${study.study}`,
    el("nav", { "aria-label": "Studies" }, step("‹ previous", at > 0 ? all[at - 1] : null), step("next ›", at >= 0 ? all[at + 1] : null),
      step("all studies", ""), again),
    where(`Patient ${study.patient}, ${study.split} split. The model has read it with the radiologist's own report.`, same_patient(study)),
    films_view(study), section("In the text", reading_view(study, true)));
}

function same_patient(study) {                  // the others of those that were read
  const others = [...(saerad.studies?.values() ?? [])].filter(other => other.patient === study.patient && other.study !== study.study);
  return others.length ? [" The same patient: ", others.map((other, i) => [i ? ", " : "", study_link(other.study)]), "."] : null;
}

const findings_of = study => study.tokens.filter((_, i) => study.sections[i] === "findings").join("").trim();

function studies_page() {
  const line = study => el("li", {}, study_link(study.study), el("small", {}, ` patient ${study.patient}`), ` ${findings_of(study).slice(0, 110)}…`);
  put_page("Studies", where("Held-out studies that the model has read anew; each opens with its radiographs, its report and the features that fire where."),
    el("ul", { class: "studies" }, [...(saerad.studies?.values() ?? [])].map(line)));
}
