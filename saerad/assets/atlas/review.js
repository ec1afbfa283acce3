// The review pack in the browser: one item at a time, a key an answer, answers kept under the pack's own name and by reader, exported as JSON.
"use strict";
const pack = document.body.dataset.pack, key = `saerad-review-${pack}`, items = [...document.querySelectorAll(".item")];
const $ = id => document.getElementById(id);
const LONGEST_PAUSE = 120;                // seconds on one item that count; after that somebody has left the room
let kept = { pack, reader: "", readers: { "": {} } }, at = 1, since = Date.now(), done = [];

function trouble(sentence) { $("trouble").textContent = sentence; $("trouble").hidden = !sentence; }

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(key));
    if (stored && stored.pack === pack && stored.readers) kept = stored;
  } catch (error) { console.warn(error); }
}

function save() {
  try { localStorage.setItem(key, JSON.stringify(kept)); trouble(""); }
  catch { trouble("This browser keeps nothing for pages opened from disk; export your answers before you close the page."); }
  progress();
}

// ---- answers of the reader who sits here
const mine = () => kept.readers[kept.reader] ??= {};
const answer = section => mine()[section.dataset.item] ??= {};
const rated = section => mine()[section.dataset.item]?.fits != null;
const fields = section => [...section.querySelectorAll("[name=guess], [name^=coherence]")];

function clock(section) {                 // seconds that were spent on an item, over all visits
  const given = answer(section), spent = Math.min(LONGEST_PAUSE, (Date.now() - since) / 1000);
  given.seconds = Math.round(10 * ((given.seconds ?? 0) + spent)) / 10;
  since = Date.now();
}

function progress() {
  const count = items.filter(rated).length, times = items.filter(rated).map(section => answer(section).seconds).filter(Boolean).sort((a, b) => a - b);
  const typical = times.length ? times[Math.floor(times.length / 2)] : null, left = items.length - count;
  $("progress").value = count;
  $("done").textContent = `${count} of ${items.length} rated` + (typical && left ? `, about ${Math.max(1, Math.round(left * typical / 60))} min to go` : "");
  [...$("jump").children].forEach((button, i) => {
    button.classList.toggle("done", rated(items[i]));
    button.setAttribute("aria-label", `Item ${i + 1}${rated(items[i]) ? ", rated" : ""}`);
  });
  $("undo").disabled = !done.length;
}

// ---- moving about
function show(number, moved = true) {
  at = number;
  since = Date.now();
  items.forEach((section, i) => { section.hidden = i + 1 !== number; });
  [...$("jump").children].forEach((button, i) => i + 1 === number ? button.setAttribute("aria-current", "true") : button.removeAttribute("aria-current"));
  if (!moved) return;
  $(`title-${number}`).focus({ preventScroll: true });
  $("jump").scrollIntoView({ block: "start" });
}

const first_open = () => items.findIndex(section => !rated(section)) + 1;           // 0 where all are rated
const next_open = () => (items.findIndex((section, i) => i + 1 > at && !rated(section)) + 1) || first_open();

function reveal(section, yes) {          // what was guessed before the explanation was seen is not changed after it
  section.querySelector(".after").hidden = !yes;
  section.querySelector(".reveal").hidden = yes;
  for (const field of fields(section)) field.disabled = yes;
}

function show_explanation(section) {
  answer(section).revealed = true;
  reveal(section, true);
  save();
  section.querySelector(".said").focus({ preventScroll: true });
  section.querySelector(".after").scrollIntoView({ block: "nearest" });
}

function fill() {
  $("reader").value = kept.reader;
  for (const section of items) {
    const given = mine()[section.dataset.item] ?? {};
    section.querySelector("[name=guess]").value = given.guess ?? "";
    section.querySelector("[name=comment]").value = given.comment ?? "";
    for (const radio of section.querySelectorAll("[type=radio]")) radio.checked = given[radio.name.split("-")[0]] === Number(radio.value);
    for (const box of section.querySelectorAll("[type=checkbox]")) box.checked = (given.confusions ?? []).includes(box.value);
    reveal(section, Boolean(given.revealed));
  }
  progress();
}

// ---- giving and taking back
function rate(section, fits) {
  const given = answer(section);
  done.push([section.dataset.item, given.fits]);
  given.fits = fits;
  given.at = new Date().toISOString();
  clock(section);
}

function undo() {                        // the last rating, not what was said before the explanation was seen
  const last = done.pop();
  if (!last) return;
  const [item, before] = last, given = mine()[item];
  if (before == null) delete given.fits; else given.fits = before;
  save();
  fill();
  show(Number(item));
}

for (const section of items) {
  section.addEventListener("input", event => {
    const given = answer(section), field = event.target;
    if (field.name.startsWith("fits")) rate(section, Number(field.value));
    else if (field.type === "radio") given.coherence = Number(field.value);
    else if (field.type === "checkbox") given.confusions = [...section.querySelectorAll("[type=checkbox]:checked")].map(box => box.value);
    else given[field.name] = field.value;
    given.at = new Date().toISOString();
    save();
  });
  section.querySelector(".reveal").addEventListener("click", () => show_explanation(section));
  for (const button of section.querySelectorAll(".to")) button.addEventListener("click", () => { clock(section); show(Number(button.dataset.to)); });
}

// one key: before the explanation it says how clear the contexts are and shows it; after it, it rates and goes on
const typing = field => /^(TEXTAREA|SELECT)$/.test(field.tagName) || (field.tagName === "INPUT" && field.type === "text");

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  if (event.target.type === "radio" && event.key.startsWith("Arrow")) return;      // there the arrows choose an answer
  const section = items[at - 1], given = answer(section);
  if (["0", "1", "2"].includes(event.key)) {
    event.preventDefault();
    if (given.revealed) { rate(section, Number(event.key)); save(); fill(); if (next_open()) show(next_open()); else $("export").focus(); }
    else { given.coherence = Number(event.key); fill(); show_explanation(section); }
  } else if (event.key === "u") undo();
  else if (event.key === "ArrowRight" && at < items.length) show(at + 1);
  else if (event.key === "ArrowLeft" && at > 1) show(at - 1);
  else if (given.revealed) {
    const box = section.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (box) box.click();
  }
});

$("jump").append(...items.map((section, i) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = i + 1;
  button.addEventListener("click", () => show(i + 1));
  return button;
}));
$("undo").addEventListener("click", undo);

$("reader").addEventListener("change", () => {       // a second reader of the same file begins with nothing; the first finds everything again
  const name = $("reader").value.trim();
  if (name === kept.reader) return;
  if (!kept.reader && !kept.readers[name]) { kept.readers[name] = kept.readers[""] ?? {}; delete kept.readers[""]; }
  kept.reader = name;
  done = [];
  save();
  fill();
  show(first_open() || 1, false);
});

$("export").addEventListener("click", () => {
  if (!kept.reader.trim()) { trouble("Write your initials first, so that the file can be told from others."); $("reader").focus(); return; }
  const readers = Object.fromEntries(Object.entries(kept.readers).filter(([name, given]) => name && Object.keys(given).length));
  const names = Object.keys(readers), one = names.length < 2, file = one ? { pack, reader: kept.reader, items: mine() } : { pack, readers };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], { type: "application/json" }));
  link.download = `review-${pack}-${(one ? [kept.reader] : names).join("-").replace(/[^\w-]+/g, "_")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});

$("import").addEventListener("change", async () => {
  try {
    const file = JSON.parse(await $("import").files[0].text());
    if (file.pack !== pack) { trouble("That file belongs to another pack; nothing was changed."); return; }
    const readers = file.readers ?? { [String(file.reader ?? "")]: file.items ?? {} };
    kept = { pack, reader: Object.keys(readers)[0] ?? "", readers: { ...kept.readers, ...readers } };
    if (!Object.keys(kept.readers[""] ?? {}).length) delete kept.readers[""];
    save();
    fill();
    show(first_open() || 1, false);
  } catch { trouble("That file holds no answers of a review; nothing was changed."); }
});

load();
fill();
show(first_open() || 1, false);
