// Groups of features, each as one thing: a row on the first page that folds out, and a page.
"use strict";
const GROUPS_FIRST = 6;
const SIGNS = { directions: "decoder rows", words: "words", neighbours: "surroundings", explanations: "explanations" };

saerad.put_groups = pages => { saerad.group_pages = pages; route(); };

const group_link = (group, text = group.name) => el("a", { href: link_to({ page: "group", id: group.group }) }, text);
const score_in_words = row => row.f1 == null ? "not scored" : `F1 ${two(row.f1)}, control ${two(row.shuffled_f1)}`;

function know_groups(groups) {
  saerad.groups = groups;
  saerad.group_of = new Map(groups.flatMap(group => group.features.map(feature => [feature, group])));
  for (const group of groups) group.searched = `${group.name} ${group.explanation ?? ""}`.toLowerCase();
}

// ---- on the first page: those that the search finds, and none while a filter asks for features
function show_groups(words, filtered) {
  const place = $("groups"), found = filtered ? [] : saerad.groups.filter(group => words.every(word => group.searched.includes(word)));
  const key = found.map(group => group.group).join();
  place.hidden = !found.length;
  if (place.dataset.shown === key) return;      // typing must not fold in what was folded out
  place.dataset.shown = key;
  const rows = el("div", {}, found.slice(0, GROUPS_FIRST).map(group_row)), rest = found.slice(GROUPS_FIRST);
  const more = !rest.length ? null : el("button", { type: "button", onclick: () => {
    const others = rest.map(group_row);
    rows.append(...others);
    more.remove();
    others[0].querySelector("summary").focus();
  } }, `Show ${rest.length} more groups`);
  place.replaceChildren(...present([el("h3", {}, words.length ? "Groups that are found" : "Groups of features that seem to be of one thing"), rows, more]));
}

function group_row(group) {
  return el("details", { class: "group" },
    el("summary", {}, el("b", {}, group.name), el("small", {}, ` ${group.features.length} features · ${score_in_words(group)}`)),
    el("p", {}, brief(group.explanation || "It has no explanation."), " ", group_link(group, "As one thing")),
    el("ul", { class: "members" }, group.features.map(feature => {
      const row = saerad.byFeature.get(feature);
      return el("li", {}, feature_link(feature), el("small", {}, row?.f1 == null ? "–" : two(row.f1)), el("span", {}, explanation_of(feature)));
    })));
}

// ---- on a feature's page
function its_group(row) {
  const group = saerad.group_of.get(row.feature);
  return group ? el("p", { class: "where grouped" }, "In the group ", group_link(group), ` of ${group.features.length} features that seem to be of one thing.`) : null;
}

// ---- its own page
saerad.pages.group = state => {
  const group = saerad.groups.find(group => String(group.group) === state.id);
  if (!group) return put_page("Groups of features", saerad.groups.length ? el("div", {}, saerad.groups.map(group_row)) : note("This run has none."));
  need("data/groups.js", saerad.group_pages);
  const data = saerad.group_pages?.[group.group];
  if (!data || typeof vendoredPlot === "undefined") return put_page(`Group: ${group.name}`, note("Reading …"));
  put_page(`Group: ${group.name}`,
    el("p", { class: "explanation" }, group.explanation || no_explanation(group, data)),
    el("ul", { class: "tags", "aria-label": "Properties" }, [`${group.features.length} features`, ...data.tags].map(tag => el("li", {}, tag))),
    scores(group, data), where(data.about, " Its activation is the sum of what its members add along their mean direction."),
    section("Its members", members_table(data.members), where("Share: of the group's activation on training tokens. The other columns say how alike a "
      + "member and the others are on average, by each sign: 1 is the same, 0 nothing in common. No label was used to find them.")),
    el("div", { class: "cards" }, card("How strongly it fires", histogram(data)), card("Where it fires", places(data))),
    section("In the text", data.groups.length ? contexts(data) : left_out("Contexts", "group")),
    data.examined ? section("Its examination", examined(data)) : null);
};

const members_table = members => plain_table(["feature", "share", ...Object.values(SIGNS), "F1", "explanation"], members.map(member => plain_row(
  feature_link(member.feature), percent(member.share), ...Object.keys(SIGNS).map(sign => two(member[sign])),
  two(saerad.byFeature.get(member.feature)?.f1), el("span", { class: "said" }, explanation_of(member.feature)))));
