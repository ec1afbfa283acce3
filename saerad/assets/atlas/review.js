// The review pack in the browser: one item at a time, answers kept under the pack's own name, exported as JSON.
"use strict";
const pack = document.body.dataset.pack, key = `saerad-review-${pack}`, items = [...document.querySelectorAll(".item")];
const $ = id => document.getElementById(id);
let kept = { pack, reader: "", items: {} };

function trouble(sentence) { $("trouble").textContent = sentence; $("trouble").hidden = !sentence; }

function load() { try { const stored = JSON.parse(localStorage.getItem(key)); if (stored && stored.pack === pack) kept = stored; } catch (error) { console.warn(error); } }

function save() {
  try { localStorage.setItem(key, JSON.stringify(kept)); trouble(""); }
  catch { trouble("This browser keeps nothing for pages opened from disk; export your answers before you close the page."); }
  progress();
}

const answer = section => kept.items[section.dataset.item] ??= {};
const rated = section => kept.items[section.dataset.item]?.fits != null;

function progress() {
  const done = items.filter(rated).length;
  $("progress").value = done;
  $("done").textContent = `${done} of ${items.length} rated`;
  [...$("jump").children].forEach((button, i) => { button.classList.toggle("done", rated(items[i])); button.setAttribute("aria-label", `Item ${i + 1}${rated(items[i]) ? ", rated" : ""}`); });
}

function show(number, moved = true) {
  items.forEach((section, i) => { section.hidden = i + 1 !== number; });
  [...$("jump").children].forEach((button, i) => i + 1 === number ? button.setAttribute("aria-current", "true") : button.removeAttribute("aria-current"));
  if (!moved) return;
  $(`title-${number}`).focus({ preventScroll: true });
  $("jump").scrollIntoView({ block: "start" });
}

function reveal(section, yes) {          // what was guessed before the explanation was seen is not changed after it
  section.querySelector(".after").hidden = !yes;
  section.querySelector(".reveal").hidden = yes;
  for (const field of section.querySelectorAll("[name=guess], [name^=coherence]")) field.disabled = yes;
}

function fill() {
  $("reader").value = kept.reader;
  for (const section of items) {
    const given = kept.items[section.dataset.item] ?? {};
    section.querySelector("[name=guess]").value = given.guess ?? "";
    section.querySelector("[name=comment]").value = given.comment ?? "";
    for (const radio of section.querySelectorAll("[type=radio]")) radio.checked = given[radio.name.split("-")[0]] === Number(radio.value);
    for (const box of section.querySelectorAll("[type=checkbox]")) box.checked = (given.confusions ?? []).includes(box.value);
    reveal(section, Boolean(given.revealed));
  }
  progress();
}

for (const section of items) {
  section.addEventListener("input", event => {
    const given = answer(section), field = event.target;
    if (field.type === "radio") given[field.name.split("-")[0]] = Number(field.value);
    else if (field.type === "checkbox") given.confusions = [...section.querySelectorAll("[type=checkbox]:checked")].map(box => box.value);
    else given[field.name] = field.value;
    given.at = new Date().toISOString();
    save();
  });
  section.querySelector(".reveal").addEventListener("click", () => { answer(section).revealed = true; reveal(section, true); save(); section.querySelector(".said").focus(); });
  for (const button of section.querySelectorAll(".to")) button.addEventListener("click", () => show(Number(button.dataset.to)));
}

$("jump").append(...items.map((section, i) => { const button = document.createElement("button"); button.type = "button"; button.textContent = i + 1; button.addEventListener("click", () => show(i + 1)); return button; }));
$("reader").addEventListener("input", () => { kept.reader = $("reader").value; save(); });

$("export").addEventListener("click", () => {
  if (!kept.reader.trim()) { trouble("Write your initials first, so that the file can be told from others."); $("reader").focus(); return; }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(kept, null, 1)], { type: "application/json" }));
  link.download = `review-${pack}-${kept.reader.trim().replace(/[^\w-]+/g, "_")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

$("import").addEventListener("change", async () => {
  try {
    const file = JSON.parse(await $("import").files[0].text());
    if (file.pack !== pack) { trouble("That file belongs to another pack; nothing was changed."); return; }
    kept = { pack, reader: String(file.reader ?? ""), items: file.items ?? {} };
    save(); fill();
  } catch { trouble("That file holds no answers of a review; nothing was changed."); }
});

load(); fill(); show(1, false);
