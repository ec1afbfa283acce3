// The contexts behind a feature's F1: some that it got wrong, with the words that were read. Blue: how strongly the feature fires; framed: named by the explanation.
const examined_word = (context, i, top) => {
  const token = context.tokens[i], bare = token.trimStart() || token, strength = Math.min(1, Math.max(0, context.activations[i] / top));
  return [i ? token.slice(0, token.length - bare.length) : "", el("span", {
    class: context.named[i] ? "token named" : "token", title: strength > 0 ? context.activations[i].toFixed(2) : null,
    style: strength > 0 ? `background: rgba(0, 114, 178, ${(0.06 + 0.44 * strength).toFixed(3)})` : null }, bare)];
};

function examined(data) {
  const shown = data.examined;
  if (!shown || !shown.groups.length) return null;
  const top = Math.max(1e-9, ...shown.groups.flatMap(group => group.contexts.flatMap(context => context.activations)));
  return [el("p", { class: "where" }, `${shown.about} Framed words are named by the explanation; the darker a word, the stronger the feature.`),
    shown.groups.map((group, i) => el("details", { class: "decile", open: i < 2 }, el("summary", {}, group.title), group.contexts.map(context =>
      el("div", { class: "context" }, el("small", {}, context.place),
        el("span", { class: "window" }, context.tokens.map((_, j) => examined_word(context, j, top)))))))];
}
