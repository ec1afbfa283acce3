// Words with activations: contexts, whole studies, and reports before and after a push.
"use strict";

function word(token, strength, first, { title, peak, tag = "span", ...attributes } = {}) {
  const bare = token.trimStart() || token, space = first ? "" : token.slice(0, token.length - bare.length);    // a shaded space would hang at a line's end
  const style = strength > 0 ? `background: rgba(0, 114, 178, ${(0.06 + 0.44 * Math.min(1, strength)).toFixed(3)})` : null;
  return [space, el(tag, { class: peak ? "token peak" : "token", title, style, ...attributes }, bare)];
}

const tokens = (context, top) => context.tokens.map((token, i) => {
  const activation = context.activations[i];
  return word(token, activation / top, !i, { peak: i === context.peak, title: activation > 0 ? activation.toFixed(2) : null });
});

const top_of = groups => Math.max(1e-9, ...groups.flatMap(group => group.contexts.flatMap(context => context.activations)));

const context_line = (context, top) => el("div", { class: "context" },
  el("small", {}, context.section ? [`${context.section}, study `, study_link(context.study), `, ${context.use}`] : null),
  el("span", { class: "window" }, tokens(context, top)));

function contexts(data) {
  const top = top_of(data.groups), groups = el("div", {}, data.groups.map((group, i) => el("details", { class: "decile", open: i < 2 },
    el("summary", {}, group.title), group.contexts.map(context => context_line(context, top)))));
  const numbers = el("input", { type: "checkbox", oninput: () => groups.classList.toggle("numbers", numbers.checked) });
  return [
    data.places.image > 0.5 ? note(`${percent(data.places.image)} of its firings are on patches of radiographs; these are the others.`) : null,
    where("The darker a word, the stronger the feature; the strongest is underlined, and pointing at a word shows its activation. ",
      "Tenths are of the feature's own firings, by strength."),
    el("label", { class: "tick" }, numbers, "write the activations beside the words"),      // for those who cannot point
    groups,
  ];
}

const changed = parts => parts.map(([kind, text]) => kind === "=" ? text : el(kind === "-" ? "del" : "ins", {}, text));

const pair = shown => el("section", { class: "pair" }, el("h3", {}, shown.title),
  el("div", {}, el("h4", {}, "as it is"), el("p", {}, changed(shown.parts.filter(part => part[0] !== "+")))),
  el("div", {}, el("h4", {}, "while pushed"), el("p", {}, changed(shown.parts.filter(part => part[0] !== "-")))));
