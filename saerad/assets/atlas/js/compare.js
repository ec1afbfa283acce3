// Two features side by side.
"use strict";

saerad.pages.compare = state => {
  const [a, b] = ["a", "b"].map(key => state[key] !== undefined && saerad.byFeature.has(Number(state[key])) ? Number(state[key]) : null);
  if (a == null || b == null || a === b) return put_page("Compare two features", pair_form(state, a));
  if (saerad.table.studies.length) need("data/studies.js", saerad.studies);
  for (const feature of [a, b]) need(chunk_file(feature), data_of(feature));
  const waits = !data_of(a) || !data_of(b) || typeof vendoredPlot === "undefined" || (saerad.table.studies.length && !saerad.studies);
  if (waits) return put_page("Compare two features", note("Reading …"));
  const [left, right] = [a, b].map(data_of), promoted = new Set(right.promoted.map(([token]) => token));
  const shared = new Set(left.promoted.map(([token]) => token).filter(token => promoted.has(token)));
  const exact = el("div");
  put_page(`Features ${a} and ${b}`, together(a, b, left, right, shared), exact,
    el("div", { class: "sides" }, [[a, left], [b, right]].map(([feature, data]) => side(feature, data, shared))), pair_form(state, a));
  if (saerad.served) ask_server(`../ask/pair?a=${a}&b=${b}`).then(found => { if (!found.error) exact.replaceChildren(measured(a, b, found)); });
};

function pair_form(state, a) {
  const field = key => el("input", { type: "number", min: 0, max: saerad.rows.length - 1, value: state[key] ?? "", name: key, required: true });
  const [first, second] = [field("a"), field("b")];
  const near = a == null ? [] : [...saerad.pins].filter(feature => feature !== a);
  const go = event => { event.preventDefault(); location.hash = link_to({ page: "compare", a: first.value, b: second.value }); };
  return el("form", { class: "question", onsubmit: go },
    el("div", { class: "fields" }, el("label", {}, "Feature", first), el("label", {}, "and feature", second), el("button", {}, "Compare")),
    near.length ? where("Pinned: ", near.map((feature, i) => [i ? ", " : "",
      el("a", { href: link_to({ page: "compare", a, b: feature }) }, `with ${feature}`)])) : null);
}

function cosine_in_words(a, b, left, right) {
  const known = left.neighbours.find(([other]) => other === b) ?? right.neighbours.find(([other]) => other === a);
  if (known) return `Cosine of their decoder rows: ${two(known[1])}.`;
  const least = Math.min(...[left, right].filter(data => data.neighbours.length).map(data => data.neighbours.at(-1)[1]));
  if (!Number.isFinite(least)) return "The cosine of their decoder rows was not computed in this run.";
  return `Neither is among the nearest of the other: the cosine of their decoder rows is at most ${two(least)}.`;
}

function firing_in_words(a, b, left, right, both) {
  if (!left.at || !right.at) return "Which words they fire on together was not kept in this run.";
  const any = left.at.length + right.at.length - both.length;
  if (!any) return "Neither fires on a word of the studies that were read.";
  const total = [...(saerad.studies?.values() ?? [])].reduce((sum, study) => sum + study.tokens.length, 0);
  return `Of ${total ? `${total.toLocaleString("en")} ` : "the "}words of held-out studies feature ${a} fires on ${left.at.length}, feature ${b} on `
    + `${right.at.length}, both on ${both.length}: ${percent(both.length / any)} of those on which either does.`;
}

function together(a, b, left, right, shared) {
  const there = new Set(right.at ?? []), both = (left.at ?? []).filter(place => there.has(place));
  const tokens = [...shared].map((token, i) => [i ? ", " : "", el("code", {}, token.trim())]);
  return section("Together", el("ul", {}, el("li", {}, cosine_in_words(a, b, left, right)), el("li", {}, firing_in_words(a, b, left, right, both)),
    el("li", {}, shared.size ? ["Both promote ", tokens, "."] : "They promote no token in common.")), shared_words(both));
}

function shared_words(places, most = 6) {
  if (!places.length || !saerad.studies) return null;
  const lines = [];
  let begin = 0;                                // words are numbered through all studies
  for (const study of saerad.studies.values()) {
    const mine = places.map(place => place - begin).filter(at => at >= 0 && at < study.tokens.length);
    lines.push(...mine.slice(0, most - lines.length).map(at => word_line(study, at)));
    begin += study.tokens.length;
  }
  return [el("h3", {}, "Words on which both fire"), lines];
}

function word_line(study, at, around = 6) {
  const from = Math.max(0, at - around), shown = study.tokens.slice(from, at + around);
  return el("div", { class: "context" }, el("small", {}, plain(study.sections[at]), ", study ", study_link(study.study)),
    el("span", { class: "window" }, shown.map((token, i) => word(token, from + i === at ? 1 : 0, !i, { peak: from + i === at }))));
}

function measured(a, b, found) {
  const lines = [`Decoder rows: cosine ${two(found.decoder_cosine)}; encoder columns: cosine ${two(found.encoder_cosine)}.`];
  if (found.tokens) {
    lines.push(`On ${found.tokens.toLocaleString("en")} tokens of test patients in the store feature ${a} fires on ${found.fires[0]}, feature ${b} on `
      + `${found.fires[1]}, both on ${found.both}; correlation of their activations ${two(found.correlation)}.`);
  }
  return el("div", {}, el("h3", {}, "Measured on the run itself"), el("ul", {}, lines.map(line => el("li", {}, line))));
}

function side(feature, data, shared) {
  const row = saerad.byFeature.get(feature), top = top_of(data.groups), strongest = data.groups[0]?.contexts.slice(0, 5) ?? [];
  return el("section", {}, el("h2", {}, feature_link(feature, `Feature ${feature}`), " ", pin_button(feature)),
    el("p", { class: "explanation" }, brief(row.explanation || no_explanation(row, data))), ...present([scores(row, data)]),
    el("div", { class: "cards" }, card("Where it fires", places(data)), card("Logit lens", logit_lens(data, shared))),
    data.views.length ? film(data.views[0]) : null, el("h3", {}, "Strongest contexts"),
    strongest.length ? strongest.map(context => context_line(context, top)) : left_out("Contexts"));
}
