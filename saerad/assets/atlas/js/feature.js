// One feature from every side.
"use strict";

function route_feature(row) {
  const data = data_of(row.feature);
  need(chunk_file(row.feature), data);
  if (!data || typeof vendoredPlot === "undefined") { $("feature").replaceChildren("Reading …"); return; }
  if (saerad.shown === row.feature) return;
  saerad.shown = saerad.last = row.feature;
  feature_page(row, data);
}

function score(name, value, about = "", control = false) {
  return el("li", { class: control ? "control" : null }, el("small", {}, name), el("b", {}, two(value)), about ? el("small", {}, about) : null);
}

function no_explanation(row, data) {
  if (!data.reason && row.status === "ok") return "It has no explanation yet.";
  return `No explanation: ${data.reason || plain(row.status ?? "not examined")}.`;
}

function left_out(what, whose = "feature") {
  return note(saerad.table.published ? `${what} were left out of this published atlas.` : `This run has no ${what.toLowerCase()} of the ${whose}.`);
}

function feature_nav(row) {
  const all = order(), at = all.indexOf(row.feature);
  const step = (id, text, other) => other == null ? null : el("a", { id, href: link_to({ feature: other }) }, text);
  const link = `${location.href.split("#")[0]}#feature=${row.feature}`;
  return el("nav", { "aria-label": "Features" }, home(), step("previous", "‹ previous", at > 0 ? all[at - 1] : null),
    step("next", "next ›", at >= 0 ? all[at + 1] : null),
    el("span", { class: "actions" },
      el("button", { type: "button", class: "copy", onclick: event => copy(event.target, link) }, "Copy link"),
      pin_button(row.feature), el("a", { href: link_to({ page: "compare", a: row.feature }) }, "Compare …")));
}

function scores(row, data) {
  if (row.f1 == null) return null;
  return el("ul", { class: "scores", "aria-label": "Scores" },
    score("F1", row.f1, data.interval), score("precision", row.precision), score("recall", row.recall),
    data.near_f1 == null ? null : score("F1 against near misses", data.near_f1),
    data.auroc == null ? null : score("AUROC of its probabilities", data.auroc),
    data.calibrated_f1 == null ? null : score("F1 with a threshold from other contexts", data.calibrated_f1),
    score("F1 with another feature's explanation", row.shuffled_f1, "control", true), score("F1 of always saying yes", data.always_yes_f1, "control", true));
}

function on_radiographs(data) {
  if (data.views.length) return [el("div", { class: "views" }, data.views.map(view => film(view))), where(data.views_about)];
  return data.places.image || saerad.table.published ? left_out("Radiographs") : note("It does not fire on radiographs.");
}

function steering(data) {
  if (!data.doses.length) return note("This feature was not steered.");
  const charts = el("div", { class: "cards two" }, card("What becomes of the reports", outcomes(data.doses)), card("More push, more change?", dose(data)));
  return [where(data.steering), charts,
    data.steered.length ? data.steered.map(pair) : left_out("Steered reports")];
}

function feature_page(row, data) {
  document.title = `Feature ${row.feature}`;
  $("feature").replaceChildren(...present([
    feature_nav(row),
    el("h1", {}, `Feature ${row.feature}`),
    el("p", { class: "explanation" }, row.explanation || no_explanation(row, data)),
    explained_alike(row),
    its_group(row),
    data.tags.length ? el("ul", { class: "tags", "aria-label": "Properties" }, data.tags.map(tag => el("li", {}, tag))) : null,
    scores(row, data),
    where(data.about),
    el("div", { class: "cards" }, card("How strongly it fires", histogram(data)), card("Where it fires", places(data)),
      card("Logit lens: what it promotes", logit_lens(data)), card("Nearest features", neighbours(row, data))),
    section("On the radiographs", on_radiographs(data)),
    data.painted.length ? section("Without and with a painted finding", data.painted.map(painted_pair), where(saerad.table.painted_about)) : null,
    section("In the text", data.groups.length ? contexts(data) : left_out("Contexts")),
    data.examined ? section("Its examination", examined(data)) : null,
    section("What pushing on it does", steering(data)),
  ]));
  $("feature").focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function explained_alike(row, most = 12) {      // the others whose explanations say the same
  const others = (saerad.alike.get(row.alike) ?? []).filter(other => other !== row.feature).sort((a, b) => a - b);
  if (!others.length) return null;
  const named = others.slice(0, most).flatMap((other, i) => [i ? ", " : "", feature_link(other)]), rest = others.length - most;
  const all = "#" + new URLSearchParams({ alike: row.alike });
  return el("p", { class: "where alike" }, "Explained alike: ", named, rest > 0 ? ` and ${rest} more` : null, " · ",
    el("a", { href: all }, "see them side by side"));
}
