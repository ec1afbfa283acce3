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

function question_from(state, n) {              // "q" is the first question in the address, "q2" the second
  const parts = [["text", state[n]], ...["study", "view", "paint"].map(key => [key, state[`${n}-${key}`]])];
  return Object.fromEntries(parts.filter(([, value]) => value));
}

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

// [key in the address, label, placeholder], in the order of the form
const FIRST = [["q-study", "after the sections of study", "none"], ["q-view", "over the radiograph of study", "its own, or “none”"],
  ["q-paint", "with a painted", "e.g. left effusion"]];
const SECOND = [["q2", "another text", "the same"], ["q2-view", "another radiograph", "the same"], ["q2-paint", "with a painted", "nothing more"]];

function fields_of(kinds, state) {              // only the phantom's radiographs can be painted
  return kinds.filter(([name]) => saerad.table.phantom || !name.endsWith("paint")).map(([name, label, placeholder]) => {
    const list = /study|view/.test(name) ? "study-ids" : null;
    return el("label", {}, label, el("input", { type: "text", name, value: state[name] ?? "", placeholder, list, autocomplete: "off" }));
  });
}

function question_form(state) {
  const text = el("textarea", { rows: 2, "aria-label": "Text, read as the findings of a report",
    placeholder: "There is a small left pleural effusion." }, state.q ?? "");
  const form = el("form", { class: "question", onsubmit: event => {
    event.preventDefault();
    const given = Object.fromEntries([...form.querySelectorAll("input")].map(input => [input.name, input.value.trim()]));
    location.hash = link_to({ page: "ask", q: text.value.trim(), ...given });
  } },
  text, el("div", { class: "fields" }, fields_of(FIRST, state)),
  el("details", { open: SECOND.some(([name]) => state[name]) }, el("summary", {}, "What differs from …"),
    el("div", { class: "fields" }, fields_of(SECOND, state))),
  el("datalist", { id: "study-ids" }), el("button", {}, "Which features fire?"));
  text.addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); } });
  ask_server("../ask/studies").then(ids => {
    if (Array.isArray(ids)) form.querySelector("datalist").append(...ids.map(id => el("option", { value: id })));
  });
  return form;
}

function heading_of(found) {
  const after = found.study ? [", after the sections of study ", study_link(found.study)] : null;
  return where(`Read with ${found.shown}`, after, `; ${Math.round(1000 * found.seconds)} ms.`);
}

function answer_view(found) {
  if (!found.against) return [heading_of(found), reading_view(found), films_view(found)];
  const chosen = found.differences[0]?.feature;
  const scales = found.part === "image" ? new Map(found.differences.map(one => [one.feature, Math.max(one.first, one.second)])) : new Map();
  return [difference_view(found), ...[["First", found], ["Second", found.against]].map(([title, one]) =>
    section(title, heading_of(one), reading_view(one), films_view(one, chosen, scales)))];
}

function difference_view(found) {
  const row = one => plain_row(feature_link(one.feature), explanation_of(one.feature), two(one.first), two(one.second), two(one.change));
  const measured_on = found.part === "report" ? "the words of the report" : "the patches of the radiographs";
  return section("What differs", where(`Peak of each feature on ${measured_on}; the most telling differences first.`),
    found.differences.length ? plain_table(["feature", "explanation", "first", "second", "change"], found.differences.map(row)) : note("Nothing differs."));
}

try_box();
