// What the first page says before the table: the concepts that were found, what was steered, what failed.
"use strict";
const CARDS_FIRST = 6;

function first_page(found) {
  const place = $("found");
  if (!found) { place.hidden = true; return; }
  place.append(...present([
    found.concepts.length ? part("What the features are of", found.concepts_about, cards_of(found.concepts)) : null,
    found.steered.length ? part("What was steered", found.steered_about, steered_table(found.steered)) : null,
    found.failed.length ? part("What failed", null, el("ul", { class: "failed" }, found.failed.map(failure))) : null,
  ]));
}

const part = (title, about, ...body) => el("section", {}, el("h2", {}, title), about ? where(about) : null, body);
const failure = ({ text, features }) => el("li", {}, text, features?.length ? [" ", features.map((f, i) => [i ? ", " : "", feature_link(f)])] : null);

function cards_of(concepts) {
  const grid = el("div", { class: "concepts" }, concepts.slice(0, CARDS_FIRST).map(concept_card)), rest = concepts.slice(CARDS_FIRST);
  if (!rest.length) return grid;
  const more = el("button", { type: "button", onclick: () => {
    const cards = rest.map(concept_card);
    grid.append(...cards);
    more.remove();
    cards[0].querySelector("a").focus();
  } }, `Show ${rest.length} more`);
  return [grid, more];
}

function concept_card(concept) {
  const top = Math.max(1e-9, ...(concept.contexts ?? []).flatMap(context => context.activations));
  return el("section", { class: "concept" },
    el("h3", {}, el("a", { href: link_to({ feature: concept.feature }) }, plain(concept.concept))), el("p", { class: "measure" }, concept.measure),
    concept.film ? film(concept.film, { caption: false }) : null,
    (concept.contexts ?? []).map(context => el("p", { class: "window" }, tokens(context, top))),
    el("p", { class: "said" }, `Feature ${concept.feature}: ${brief(concept.explanation || "no explanation")}`,
      concept.f1 == null ? null : el("small", {}, ` F1 ${two(concept.f1)}, control ${two(concept.shuffled_f1)}`)));
}

function steered_table(rows) {
  const line = row => plain_row(feature_link(row.feature), row.target, String(row.reports), percent(row.on_target_only),
    percent(row.off_target_only), percent(row.unchanged));
  const one = rows.find(row => row.example);
  return [plain_table(["feature", "target", "pushes", "on target only", "off target only", "unchanged"], rows.map(line)),
    one ? pair({ ...one.example, title: `Feature ${one.feature}, ${one.example.title}` }) : null];
}
