// A question of the reader's own. The atlas on disk says how to get answers; one that is served gives them.
"use strict";

const answers = new Map();                      // what was asked once, by its question: going back asks nobody

function ask_server(url, question) {
  const key = JSON.stringify([url, question]);
  if (!answers.has(key)) answers.set(key, fetch_answer(url, question).then(found => { if (found.error) answers.delete(key); return found; }));
  return answers.get(key);
}

async function fetch_answer(url, question) {
  try {
    const reply = await fetch(url, question ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question) } : {});
    return await reply.json();
  } catch { return { error: "The server does not answer any more; start saerad atlas --serve again." }; }
}

const HOW = ["Which features fire on a sentence of your own? The files of an atlas cannot run a model. Start ",
  el("code", {}, "saerad atlas CONFIG --serve"), ", and this box answers; or ask at a prompt: ",
  el("code", {}, 'saerad ask RUN "There is a small left pleural effusion."')];

function try_box() {                            // on the first page
  const place = $("try");
  if (!saerad.served) { place.replaceChildren(note(HOW)); return; }
  const field = el("input", { id: "sentence", type: "text", autocomplete: "off", placeholder: "There is a small left pleural effusion." });
  place.replaceChildren(el("form", { onsubmit: event => {
    event.preventDefault();
    location.hash = link_to({ page: "ask", q: field.value.trim() || field.placeholder });
  } }, el("label", { class: "wide" }, "Try a sentence ", field), " ", el("button", {}, "Which features fire?")));
}

const question_from = (state, n) => Object.fromEntries([["text", state[n]], ...["study", "view", "paint"].map(key => [key, state[`${n}-${key}`]])].filter(([, value]) => value));

saerad.pages.ask = state => {
  if (!saerad.served) return put_page("Try a sentence", note(HOW));
  const first = question_from(state, "q"), second = question_from(state, "q2");
  const question = Object.keys(second).length ? { ...first, against: { ...first, ...second } } : first;
  const place = el("div", { "aria-live": "polite", "aria-busy": "true" }, note("The model is reading …"));
  put_page("Try a sentence", question_form(state), place);
  if (!first.text && !first.study) {
    place.replaceChildren(note("Write a sentence, or name a study whose own report is to be read."));
    place.removeAttribute("aria-busy");
    return;
  }
  const asked_for = location.hash;
  ask_server("../ask", question).then(found => {
    if (location.hash !== asked_for) return;
    place.removeAttribute("aria-busy");
    place.replaceChildren(...present(found.error ? [note(found.error)] : answer_view(found)));
  });
};

function question_form(state) {
  const field = (name, label, placeholder, attributes = {}) => [name, el("input", { type: "text", value: state[name] ?? "", placeholder, autocomplete: "off", ...attributes }), label];
  const text = el("textarea", { rows: 2, "aria-label": "Text, read as the findings of a report", placeholder: "There is a small left pleural effusion." }, state.q ?? "");
  const fields = [field("q-study", "after the sections of study", "none", { list: "study-ids" }), field("q-view", "over the radiograph of study", "its own, or “none”", { list: "study-ids" })];
  if (saerad.table.phantom) fields.push(field("q-paint", "with a painted", "e.g. left effusion"));
  const second = [field("q2", "another text", "the same"), field("q2-view", "another radiograph", "the same", { list: "study-ids" })];
  if (saerad.table.phantom) second.push(field("q2-paint", "with a painted", "nothing more"));
  const form = el("form", { class: "question", onsubmit: event => {
    event.preventDefault();
    location.hash = link_to({ page: "ask", q: text.value.trim(), ...Object.fromEntries([...fields, ...second].map(([name, input]) => [name, input.value.trim()])) });
  } }, text, el("div", { class: "fields" }, fields.map(([, input, label]) => el("label", {}, label, input))),
  el("details", { open: second.some(([name]) => state[name]) }, el("summary", {}, "What differs from …"), el("div", { class: "fields" }, second.map(([, input, label]) => el("label", {}, label, input)))),
  el("datalist", { id: "study-ids" }), el("button", {}, "Which features fire?"));
  text.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); } });
  ask_server("../ask/studies").then(ids => { if (Array.isArray(ids)) form.querySelector("datalist").append(...ids.map(id => el("option", { value: id }))); });
  return form;
}

const heading_of = found => [where(`Read with ${found.shown}`, found.study ? [", after the sections of study ", study_link(found.study)] : null, `; ${Math.round(1000 * found.seconds)} ms.`)];

function answer_view(found) {
  if (!found.against) return [heading_of(found), reading_view(found), films_view(found)];
  const row = one => el("tr", {}, el("th", { scope: "row" }, feature_link(one.feature)), el("td", {}, explanation_of(one.feature)), el("td", {}, two(one.first)), el("td", {}, two(one.second)), el("td", {}, two(one.change)));
  const heads = ["feature", "explanation", "first", "second", "change"].map(name => el("th", { scope: "col" }, name));
  const where_it_counts = found.part === "report" ? "the words of the report" : "the patches of the radiographs";
  const chosen = found.differences[0]?.feature;
  return [section("What differs", where(`Peak of each feature on ${where_it_counts}; the most telling differences first.`),
    found.differences.length ? el("div", { class: "wide" }, el("table", { class: "plain" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, found.differences.map(row)))) : note("Nothing differs.")),
  ...[["First", found], ["Second", found.against]].map(([title, one]) => section(title, heading_of(one), reading_view(one), films_view(one, chosen)))];
}

try_box();
