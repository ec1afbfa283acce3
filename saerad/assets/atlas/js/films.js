// A radiograph at its own resolution with the patches on which a feature fires, the boxes that are known, a scale; larger in a window of its own.
"use strict";

function heat_layer({ rows, columns, patches, activations }, top) {
  const cell = (patch, i) => el("svg:rect", { x: patch % columns, y: Math.floor(patch / columns), width: 1, height: 1, fill: "#F0A000",
    "fill-opacity": (0.08 + 0.55 * activations[i] / top).toFixed(3) }, el("svg:title", {}, activations[i].toFixed(2)));
  return el("svg:svg", { class: "heat", viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" }, patches.map(cell));
}

const box_layer = boxes => boxes.map(box => el("span", { class: "box", "aria-hidden": "true",
  style: `left:${box.left}%;top:${box.top}%;width:${box.width}%;height:${box.height}%` }, box.name ? el("b", {}, box.name) : null));

function film_says(film) {                      // for those who cannot see it
  const { columns, patches, activations, title } = film;
  if (!patches.length) return `${title}; the feature does not fire on it`;
  const best = patches[activations.indexOf(Math.max(...activations))], row = Math.floor(best / columns) + 1;
  return `${title}; strongest at patch row ${row} of ${film.rows}, column ${best % columns + 1} of ${columns}`;
}

// `most`: the activation that counts as full, where several films share a scale
function film(shown, { most, caption = true } = {}) {
  const film_top = Math.max(...shown.activations, 1e-9), top = most ?? film_top;
  const picture = () => el("div", { class: "picture", role: "img", "aria-label": film_says(shown) },
    el("img", { src: shown.image, alt: "", loading: "lazy" }), heat_layer(shown, top), box_layer(shown.boxes));
  const larger = el("button", { type: "button", class: "larger", "aria-label": `Enlarge: ${shown.title}`, onclick: () => enlarge(shown, picture(), top) },
    "Enlarge");
  return el("figure", { class: "film" }, picture(), scale(top), caption ? el("figcaption", {}, el("b", {}, film_title(shown)),
    shown.boxes.some(box => box.text) ? el("ul", {}, shown.boxes.map(box => box.text ? el("li", {}, box.text) : null)) : null, larger) : larger);
}

const film_title = shown => shown.study && shown.view ? [`${shown.view}, study `, study_link(shown.study), `, at most ${shown.peak.toFixed(2)}`] : shown.title;

const scale = top => el("div", { class: "scale" }, el("small", {}, "0"), el("i", { "aria-hidden": "true" }),
  el("small", {}, `${top.toFixed(2)} (activation by patch)`));

// ---- larger: window, zoom, heat and boxes
const DIALS = [["brightness", "Brightness", 40, 200, 100], ["contrast", "Contrast", 40, 300, 100], ["heat", "Heat", 0, 100, 100],
  ["zoom", "Zoom", 100, 500, 100]];

function enlarge(shown, picture, top) {
  const dials = DIALS.map(([name, label, min, max, value]) => {
    const field = el("input", { type: "range", min, max, value, name, oninput: draw });
    return el("label", {}, label, field);
  });
  const field = name => dials.map(dial => dial.querySelector("input")).find(input => input.name === name);
  const boxes = el("input", { type: "checkbox", checked: true, oninput: draw });
  function draw() {
    const [img, heat] = [picture.querySelector("img"), picture.querySelector(".heat")];
    img.style.filter = `brightness(${field("brightness").value}%) contrast(${field("contrast").value}%)`;
    heat.style.opacity = field("heat").value / 100;
    picture.style.setProperty("--zoom", field("zoom").value / 100);
    picture.classList.toggle("bare", !boxes.checked);
  }
  const reset = () => {
    for (const input of dials.map(dial => dial.querySelector("input"))) input.value = input.defaultValue;
    boxes.checked = true;
    draw();
  };
  const frame = el("div", { class: "frame", tabindex: 0, role: "group", "aria-label": "The radiograph; arrow keys move it" }, picture);
  const dialog = el("dialog", { class: "enlarged", "aria-label": shown.title },
    el("div", { class: "dials" }, dials, shown.boxes.length ? el("label", { class: "tick" }, boxes, "Boxes") : null,
      el("button", { type: "button", onclick: reset }, "Reset"), el("button", { type: "button", onclick: () => dialog.close() }, "Close")),
    frame, scale(top), where(shown.title, ". Brightness and contrast are of this screen; the file is not changed."));
  frame.addEventListener("wheel", event => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    field("zoom").value = Number(field("zoom").value) - event.deltaY;
    draw();
  }, { passive: false });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// ---- one film with many features: the reader chooses whose patches are shown; `scales`: of features that are compared with another film
function film_of_many(shown, chosen, scales = new Map()) {
  const one = feature => ({ ...shown, ...(shown.features.find(f => f.feature === feature) ?? { patches: [], activations: [] }) });
  const place = el("div"), first = shown.features.some(f => f.feature === chosen) ? chosen : shown.features[0]?.feature;
  const put = feature => place.replaceChildren(film(one(feature), { caption: false, most: scales.get(feature) }));
  const said = f => `${f.feature}: ${explanation_of(f.feature)}`.slice(0, 70);
  const options = shown.features.map(f => el("option", { value: f.feature, selected: f.feature === first }, said(f)));
  const select = el("select", { oninput: event => put(Number(event.target.value)) }, options);
  put(first);
  return el("div", { class: "many" }, el("h3", {}, shown.title),
    shown.features.length ? el("label", {}, "Feature ", select) : note("No feature stands out on it."), place);
}

// ---- the same radiograph without and with a painted finding
function painted_pair(shown) {
  const most = Math.max(...shown.before.activations, ...shown.after.activations, 1e-9);
  const side = (title, part) => film({ ...shown, ...part, title: `${title}, study ${shown.study}`, study: null }, { most });
  return el("section", { class: "painted" }, el("h3", {}, `${shown.finding}: its peak rises by ${shown.rise.toFixed(2)}`),
    el("div", { class: "views" }, side("without", shown.before), side(`with a painted ${shown.finding}`, shown.after)));
}
