"use strict";
// Coordinates: an index counts voxels of the fixed grid, its axes in the order right, front, up. A pixel of a plane lies
// at index[across] along its columns and index[up] along its rows, the first row on top.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const MODES = ["slider", "blink", "checkerboard", "edges", "both"];
const state = {
  mode: "slider", first: "fixed", second: "warped", divider: 0.5, flicked: false, grid: false, fixed: false, warped: false,
  colour: "", window: 0, slices: data.planes.map((plane) => plane.start), point: null,
};
const dpr = Math.min(window.devicePixelRatio || 1, 2);

// ---- the map, at low resolution

const field = (() => {
  const bytes = Uint8Array.from(atob(data.field.vectors), (c) => c.charCodeAt(0));
  return { size: data.field.size, unit: data.field.unit, vectors: new Int16Array(bytes.buffer) };
})();

function displacement(index) { // in voxels, without the linear part; interpolated linearly on the lattice
  const low = [], weight = [];
  for (let a = 0; a < 3; a++) {
    const [start, end] = data.box[a], n = field.size[a];
    const x = n > 1 ? Math.min(Math.max((index[a] - start) / (end - start), 0), 1) * (n - 1) : 0;
    low.push(Math.min(Math.floor(x), Math.max(n - 2, 0)));
    weight.push(x - low[a]);
  }
  const [nx, ny, nz] = field.size, found = [0, 0, 0];
  for (let corner = 0; corner < 8; corner++) {
    let share = 1;
    const at = [];
    for (let a = 0; a < 3; a++) {
      const upper = (corner >> a) & 1;
      share *= upper ? weight[a] : 1 - weight[a];
      at.push(Math.min(low[a] + upper, field.size[a] - 1));
    }
    if (share === 0) continue;
    const place = (at[0] * ny + at[1]) * nz + at[2];
    for (let d = 0; d < 3; d++) found[d] += share * field.vectors[d * nx * ny * nz + place] * field.unit;
  }
  return found;
}

const add = (a, b) => a.map((x, i) => x + b[i]);
const toAligned = (index) => add(index, displacement(index));

function toFixed(aligned) { // the inverse, by iteration
  let index = aligned;
  for (let i = 0; i < 30; i++) index = add(aligned, displacement(index).map((x) => -x));
  return index;
}

const affine = (m, p) => [0, 1, 2].map((r) => m[r][0] * p[0] + m[r][1] * p[1] + m[r][2] * p[2] + m[r][3]);
const toFixedMm = (index) => affine(data.affine, index);
const toMovingMm = (aligned) => affine(data.linear, affine(data.affine, aligned));
const length = (v) => Math.hypot(...v);
const vectorMm = (v) => [0, 1, 2].map((r) => data.affine[r][0] * v[0] + data.affine[r][1] * v[1] + data.affine[r][2] * v[2]);

// ---- pictures

const sprites = new Map(); // address -> image
function load(uri) {
  if (!sprites.has(uri)) {
    const image = new Image();
    sprites.set(uri, new Promise((resolve, reject) => {
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("a picture of this page cannot be read"));
    }));
    sprites.set(uri + "#", image);
    image.src = uri;
  }
  return sprites.get(uri);
}
const sprite = (uri) => sprites.get(uri + "#");
const picture = (plane, name, window = state.window) => plane.images[name][window] || plane.images[name][0];

const tiles = new Map();
function pixels(uri, number, rows, columns) { // levels of grey of a slice
  const key = `${uri.length}:${uri.slice(-60)}:${number}`;
  if (!tiles.has(key)) {
    if (tiles.size > 200) tiles.clear();
    const canvas = new OffscreenCanvas(columns, rows), context = canvas.getContext("2d");
    context.drawImage(sprite(uri), 0, number * rows, columns, rows, 0, 0, columns, rows);
    const all = context.getImageData(0, 0, columns, rows).data, grey = new Uint8Array(rows * columns);
    for (let i = 0; i < grey.length; i++) grey[i] = all[4 * i];
    tiles.set(key, grey);
  }
  return tiles.get(key);
}

function paint(rows, columns, colourOf) { // a small canvas; colourOf(i) gives [red, green, blue, opacity] or null
  const canvas = new OffscreenCanvas(columns, rows), context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const colour = colourOf(i);
    if (colour) image.data.set(colour, 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function edges(plane, name, number) {
  const { rows, columns } = plane, grey = pixels(picture(plane, name), number, rows, columns);
  const size = new Float32Array(rows * columns), some = [];
  for (let r = 1; r < rows - 1; r++) {
    for (let c = 1; c < columns - 1; c++) {
      const i = r * columns + c, at = (dr, dc) => grey[i + dr * columns + dc];
      const x = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1);
      const y = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1);
      size[i] = Math.hypot(x, y);
      if (size[i] > 24) some.push(size[i]);
    }
  }
  some.sort((a, b) => a - b);
  const level = some.length ? some[Math.floor(0.72 * some.length)] : Infinity;
  return paint(rows, columns, (i) => (size[i] > level ? [255, 93, 93, 255] : null));
}

const mix = (stops, x) => {
  const at = Math.min(Math.max(x, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((v, i) => Math.round(v + (at - low) * (stops[low + 1][i] - v)));
};
const VOLUME = [[179, 88, 6], [241, 163, 64], [247, 247, 247], [153, 142, 195], [84, 39, 136]]; // as in report.png
const SIZE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const FOLD = [255, 47, 208, 255];
const OPACITY = 150;

function shownAt(plane, number, rows, columns) { // whether either scan shows something there, for coarser pixels
  const [window, least] = data.shown;
  const grey = ["fixed", "warped"].map((name) => pixels(picture(plane, name, window), number, plane.rows, plane.columns));
  return (i) => {
    const r = Math.floor(((Math.floor(i / columns) + 0.5) / rows) * plane.rows);
    const c = Math.floor((((i % columns) + 0.5) / columns) * plane.columns);
    return grey.some((level) => level[r * plane.columns + c] > least);
  };
}

function volumeTile(plane, number) {
  const rows = Math.ceil(plane.rows / 2), columns = Math.ceil(plane.columns / 2);
  const level = pixels(plane.volume, number, rows, columns), shown = shownAt(plane, number, rows, columns);
  return paint(rows, columns, (i) => {
    if (level[i] === 0) return FOLD;
    if (!shown(i)) return null;
    const octaves = ((level[i] - 128) / 127) * data.octaves;
    return [...mix(VOLUME, 0.5 + octaves / (2 * data.shownOctaves)), OPACITY];
  });
}

function sizeTile(plane, number) {
  const rows = Math.ceil(plane.rows / 3), columns = Math.ceil(plane.columns / 3);
  const shown = shownAt(plane, number, rows, columns);
  return paint(rows, columns, (i) => {
    if (!shown(i)) return null;
    const r = Math.floor(i / columns), c = i % columns;
    const index = indexAt(plane, number, (c + 0.5) / columns, (r + 0.5) / rows);
    return [...mix(SIZE, length(vectorMm(displacement(index))) / data.shownMm), OPACITY];
  });
}

function outline(plane, source, number, width, height, context, colour) {
  const { rows, columns } = plane, label = pixels(plane.labels[source], number, rows, columns);
  const sx = width / columns, sy = height / rows;
  context.beginPath();
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const i = r * columns + c;
      if (c + 1 < columns && label[i] !== label[i + 1]) {
        context.moveTo((c + 1) * sx, r * sy);
        context.lineTo((c + 1) * sx, (r + 1) * sy);
      }
      if (r + 1 < rows && label[i] !== label[i + columns]) {
        context.moveTo(c * sx, (r + 1) * sy);
        context.lineTo((c + 1) * sx, (r + 1) * sy);
      }
    }
  }
  context.strokeStyle = colour;
  context.lineWidth = 1.4 * dpr;
  context.stroke();
}

// ---- geometry of a plane; x to the right and y down, both 0 to 1

const span = (axis) => data.box[axis][1] - data.box[axis][0] + 1;
function indexAt(plane, number, x, y) {
  const index = [0, 0, 0];
  index[plane.axis] = plane.positions[number];
  index[plane.across] = data.box[plane.across][0] - 0.5 + x * span(plane.across);
  index[plane.up] = data.box[plane.up][0] - 0.5 + (1 - y) * span(plane.up);
  return index;
}
const place = (plane, index) => [
  (index[plane.across] - data.box[plane.across][0] + 0.5) / span(plane.across),
  1 - (index[plane.up] - data.box[plane.up][0] + 0.5) / span(plane.up),
];
const millimetres = (plane) => [span(plane.across) * data.spacing[plane.across], span(plane.up) * data.spacing[plane.up]];

// ---- drawing

const SIZE_OF = data.planes.length === 1 ? "area" : "volume"; // of a slice, and of a scan
const NAMES = { fixed: "fixed", aligned: "moving, aligned", warped: "warped" };

function drawImage(context, plane, name, number, width, height) {
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  const { rows, columns } = plane;
  context.drawImage(sprite(picture(plane, name)), 0, number * rows, columns, rows, 0, 0, width, height);
}

function clipped(context, x, y, w, h, draw) {
  context.save();
  context.beginPath();
  context.rect(x, y, w, h);
  context.clip();
  draw();
  context.restore();
}

function drawCompared(context, plane, pane, number, width, height) {
  const show = (name) => drawImage(context, plane, name, number, width, height);
  const { mode, first, second, divider, flicked } = state;
  if (mode === "both") return show(pane ? second : first);
  if (mode === "edges") {
    show(flicked ? second : first);
    context.drawImage(edges(plane, flicked ? first : second, number), 0, 0, width, height);
  } else if (mode === "blink" || flicked) {
    show(flicked ? second : first);
  } else if (mode === "slider") {
    show(first);
    clipped(context, divider * width, 0, width, height, () => show(second));
    context.fillStyle = "#fff";
    context.fillRect(divider * width - dpr / 2, 0, dpr, height);
  } else {
    show(first);
    const cells = 7, side = width / cells;
    for (let r = 0; r * side < height; r++) {
      for (let c = 0; c < cells; c++) {
        if ((r + c) % 2) clipped(context, c * side, r * side, side, side, () => show(second));
      }
    }
  }
}

function drawGrid(context, plane, number, width, height) {
  const lines = 26, most = Math.max(...millimetres(plane)), [wide, high] = millimetres(plane);
  const across = Math.max(4, Math.round((lines * wide) / most)), up = Math.max(4, Math.round((lines * high) / most));
  const draw = (from, to) => {
    for (let i = 0; i <= 60; i++) {
      const s = i / 60;
      const index = indexAt(plane, number, from[0] + s * (to[0] - from[0]), from[1] + s * (to[1] - from[1]));
      const [x, y] = place(plane, toAligned(index));
      if (i) context.lineTo(x * width, y * height);
      else context.moveTo(x * width, y * height);
    }
  };
  context.beginPath();
  for (let i = 0; i <= across; i++) draw([i / across, 0], [i / across, 1]);
  for (let i = 0; i <= up; i++) draw([0, i / up], [1, i / up]);
  context.strokeStyle = "#e8c547";
  context.lineWidth = dpr;
  context.stroke();
}

function text(context, words, x, y, align = "left") {
  context.textAlign = align;
  context.lineWidth = 3 * dpr;
  context.strokeStyle = "#000";
  context.strokeText(words, x, y);
  context.fillStyle = "#fff";
  context.fillText(words, x, y);
}

function shownName(pane) {
  const { mode, first, second, flicked } = state;
  if (mode === "both") return NAMES[pane ? second : first];
  if (mode === "edges") return `${NAMES[flicked ? second : first]}, edges of ${NAMES[flicked ? first : second]}`;
  if (mode === "blink" || flicked) return NAMES[flicked ? second : first];
  if (mode === "checkerboard") return `${NAMES[first]} / ${NAMES[second]}`;
  return null;
}

function drawMarks(context, plane, pane, width, height) {
  const size = 13 * dpr, margin = 6 * dpr;
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = "alphabetic";
  const name = shownName(pane);
  if (name) text(context, name, margin, margin + size);
  else {
    text(context, NAMES[state.first], margin, margin + size);
    text(context, NAMES[state.second], width - margin, margin + size, "right");
  }
  const [left, right] = plane.axis === 0 ? ["P", "A"] : ["L", "R"];
  text(context, left, margin, height / 2);
  text(context, right, width - margin, height / 2, "right");
  const [wide] = millimetres(plane), bar = [100, 50, 20, 10, 5, 2, 1, 0.5, 0.1].find((mm) => mm < wide / 3) || wide / 3;
  const long = (bar / wide) * width;
  context.fillStyle = "#000";
  context.fillRect(width - margin - long - dpr, height - margin - 4 * dpr, long + 2 * dpr, 5 * dpr);
  context.fillStyle = "#fff";
  context.fillRect(width - margin - long, height - margin - 3 * dpr, long, 3 * dpr);
  text(context, `${+bar.toPrecision(2)} mm`, width - margin, height - margin - 8 * dpr, "right");
}

function drawPoint(context, plane, pane, number, width, height) {
  if (!state.point) return;
  const name = state.mode === "both" ? (pane ? state.second : state.first) : state.flicked ? state.second : state.first;
  const shown = [[name, "#7cff6b"]];
  if (state.mode !== "both" && state.first !== state.second) {
    shown.push([name === state.first ? state.second : state.first, "#7cff6b80"]);
  }
  for (const [image, colour] of shown) {
    const index = image === "aligned" ? toAligned(state.point) : state.point;
    const [x, y] = place(plane, index), gap = Math.abs(index[plane.axis] - plane.positions[number]) * data.spacing[plane.axis];
    context.strokeStyle = colour;
    context.lineWidth = 1.6 * dpr;
    context.setLineDash(gap > plane.gap ? [4 * dpr, 3 * dpr] : []);
    const r = 9 * dpr;
    context.beginPath();
    context.arc(x * width, y * height, r / 2, 0, 2 * Math.PI);
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x * width + dx * r * 0.5, y * height + dy * r * 0.5);
      context.lineTo(x * width + dx * r * 1.6, y * height + dy * r * 1.6);
    }
    context.stroke();
    context.setLineDash([]);
    if (state.first !== "aligned" && state.second !== "aligned") break;
  }
}

function drawPane(canvas, plane, pane, number) {
  const [wide, high] = millimetres(plane);
  const width = Math.round((canvas.clientWidth || 300) * dpr), height = Math.round((width * high) / wide);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.style.aspectRatio = `${wide} / ${high}`;
  const context = canvas.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  drawCompared(context, plane, pane, number, width, height);
  context.imageSmoothingEnabled = true;
  if (state.colour) {
    context.drawImage(state.colour === "volume" ? volumeTile(plane, number) : sizeTile(plane, number), 0, 0, width, height);
  }
  if (state.grid) drawGrid(context, plane, number, width, height);
  if (state.fixed) outline(plane, "fixed", number, width, height, context, "#35c4d7");
  if (state.warped) outline(plane, "warped", number, width, height, context, "#ffa62b");
  drawMarks(context, plane, pane, width, height);
  drawPoint(context, plane, pane, number, width, height);
}

const figures = [...document.querySelectorAll("figure[data-plane]")];
function draw() {
  figures.forEach((figure, i) => {
    const plane = data.planes[i], number = state.slices[i], panes = figure.querySelectorAll(".pane");
    panes[1].hidden = state.mode !== "both";
    const sides = ["right", "front", "up"];
    const mm = (plane.positions[number] * data.spacing[plane.axis]).toFixed(0);
    figure.querySelector("output").textContent = `${number + 1} of ${plane.positions.length}`;
    figure.querySelector("input").setAttribute("aria-valuetext", `slice ${number + 1}, ${mm} mm to the ${sides[plane.axis]}`);
    panes.forEach((pane, k) => {
      if (!pane.hidden) drawPane(pane.querySelector("canvas"), plane, k, number);
    });
  });
}

let wanted = false;
function redraw() {
  if (wanted) return;
  wanted = true;
  requestAnimationFrame(() => { wanted = false; draw(); });
}

// ---- legends and read-out

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function scale(stops, ticks, label) {
  const bar = element("canvas", { width: 256, height: 1, role: "img", "aria-label": `${label}: ${ticks.join(", ")}` });
  const context = bar.getContext("2d"), image = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) image.data.set([...mix(stops, i / 255), 255], 4 * i);
  context.putImageData(image, 0, 0);
  const words = element("span", { class: "ticks", "aria-hidden": "true" }, ...ticks.map((tick) => element("span", {}, tick)));
  return element("span", { class: "key" }, element("span", {}, label), element("span", { class: "scale" }, bar, words));
}

const key = (kind, words) => element("span", { class: "key" }, element("span", { class: `swatch ${kind}` }), words);
function legends() {
  const shown = [];
  if (state.mode === "edges") shown.push(key("edges", `edges of ${NAMES[state.flicked ? state.first : state.second]}`));
  if (state.fixed) shown.push(key("fixed", "fixed labels"));
  if (state.warped) shown.push(key("warped", "warped labels"));
  if (state.grid) shown.push(key("grid", "where straight rows and columns of the fixed scan lie in the aligned moving scan"));
  if (state.colour === "volume") {
    const percent = (octaves) => `${octaves > 0 ? "+" : ""}${Math.round(100 * (2 ** octaves - 1))} %`;
    const most = data.shownOctaves;
    const ticks = [-most, -most / 2, 0, most / 2, most].map((o) => (o === 0 ? "0" : percent(o).replace("-", "−")));
    shown.push(scale(VOLUME, ticks, `${SIZE_OF} of the moving tissue`), key("fold", "fold"));
  }
  if (state.colour === "size") {
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((x) => `${+(x * data.shownMm).toPrecision(3)}`);
    shown.push(scale(SIZE, ticks, "displacement, mm"));
  }
  byId("legends").replaceChildren(...shown);
}

function readout() {
  if (!state.point) return;
  const aligned = toAligned(state.point), mm = (point) => point.map((x) => x.toFixed(1)).join(", ");
  const size = length(vectorMm(displacement(state.point)));
  const words = [
    `Fixed scan ${mm(toFixedMm(state.point))} mm ↔ moving scan ${mm(toMovingMm(aligned))} mm (right, front, up).`,
    `Displacement without the linear part: ${size.toFixed(1)} mm.`,
  ];
  const plane = data.planes[0], number = nearest(plane, state.point);
  const rows = Math.ceil(plane.rows / 2), columns = Math.ceil(plane.columns / 2), [x, y] = place(plane, state.point);
  if (x >= 0 && x < 1 && y >= 0 && y < 1 && Math.abs(state.point[plane.axis] - plane.positions[number]) < 1) {
    const level = pixels(plane.volume, number, rows, columns)[Math.floor(y * rows) * columns + Math.floor(x * columns)];
    const percent = 100 * (2 ** (((level - 128) / 127) * data.octaves) - 1);
    words.push(level ? `${SIZE_OF[0].toUpperCase()}${SIZE_OF.slice(1)} ${percent >= 0 ? "+" : "−"}${Math.abs(percent).toFixed(0)} %.` : "The map folds here.");
  }
  for (const source of ["fixed", "warped"]) {
    if (!plane.labels[source]) continue;
    const column = Math.floor(x * plane.columns), row = Math.floor(y * plane.rows);
    const label = pixels(plane.labels[source], number, plane.rows, plane.columns)[row * plane.columns + column];
    words.push(`Label, ${source}: ${label ? data.labels[label - 1] : "none"}.`);
  }
  byId("readout").textContent = words.join(" ");
}

// ---- user input

function nearest(plane, index) {
  let best = 0;
  plane.positions.forEach((position, k) => {
    if (Math.abs(position - index[plane.axis]) < Math.abs(plane.positions[best] - index[plane.axis])) best = k;
  });
  return best;
}

function update() {
  for (const button of document.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
  }
  byId("divider-label").hidden = state.mode !== "slider";
  byId("divider").value = String(Math.round(100 * state.divider));
  byId("running").hidden = state.mode !== "blink";
  byId("first").value = state.first;
  byId("second").value = state.second;
  byId("grid").checked = state.grid;
  for (const source of ["fixed", "warped"]) {
    const box = byId(`outline-${source}`);
    if (box) box.checked = state[source];
  }
  byId("colour").value = state.colour;
  if (byId("window")) byId("window").value = String(state.window);
  figures.forEach((figure, i) => { figure.querySelector("input").value = String(state.slices[i]); });
  legends();
  redraw();
}

let timer = 0;
function blink(on) {
  clearInterval(timer);
  timer = 0;
  byId("running").setAttribute("aria-pressed", String(on));
  byId("running").textContent = on ? "Blinking" : "Stopped";
  if (on) timer = setInterval(() => { state.flicked = !state.flicked; redraw(); }, 700);
}

function setMode(mode) {
  state.mode = mode;
  state.flicked = false;
  blink(mode === "blink" && !window.matchMedia("(prefers-reduced-motion: reduce)").matches);
  update();
}

function setSlice(i, number) {
  state.slices[i] = Math.min(Math.max(number, 0), data.planes[i].positions.length - 1);
  update();
}

function setPoint(index) {
  state.point = index.map((x, a) => Math.min(Math.max(x, data.box[a][0]), data.box[a][1]));
  data.planes.forEach((plane, i) => { state.slices[i] = nearest(plane, state.point); });
  readout();
  update();
}

function imageUnder(pane, x) { // image at the horizontal position x
  const { mode, first, second, flicked, divider } = state;
  if (mode === "both") return pane ? second : first;
  if (mode === "slider" && !flicked) return x < divider ? first : second;
  return flicked ? second : first;
}

figures.forEach((figure, i) => {
  const plane = data.planes[i], slider = figure.querySelector("input");
  slider.max = String(plane.positions.length - 1);
  slider.disabled = plane.positions.length === 1;
  slider.addEventListener("input", () => setSlice(i, Number(slider.value)));
  figure.querySelectorAll("canvas").forEach((canvas, pane) => {
    let dragging = false;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      const [x] = at(event);
      dragging = state.mode === "slider" && Math.abs(x - state.divider) < 0.04;
      if (dragging) canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x] = at(event);
      canvas.style.cursor = state.mode === "slider" && Math.abs(x - state.divider) < 0.04 ? "ew-resize" : "crosshair";
      if (!dragging) return;
      state.divider = Math.min(Math.max(x, 0), 1);
      update();
    });
    canvas.addEventListener("pointerup", (event) => {
      if (dragging) { dragging = false; return; }
      const [x, y] = at(event), index = indexAt(plane, state.slices[i], x, y);
      setPoint(imageUnder(pane, x) === "aligned" ? toFixed(index) : index);
    });
    canvas.addEventListener("pointercancel", () => { dragging = false; });
    canvas.addEventListener("wheel", (event) => {
      if (!event.shiftKey) return; // without Shift, the wheel scrolls the page
      event.preventDefault();
      setSlice(i, state.slices[i] + Math.sign(event.deltaY || event.deltaX));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (step) {
        const index = state.point || indexAt(plane, state.slices[i], 0.5, 0.5);
        index[plane.across] += step[0];
        index[plane.up] += step[1];
        setPoint(index);
      } else if (event.key === "PageUp" || event.key === "PageDown") {
        setSlice(i, state.slices[i] + (event.key === "PageUp" ? 1 : -1));
      } else return;
      event.preventDefault();
    });
  });
});

for (const id of ["first", "second"]) {
  for (const [name, words] of Object.entries(NAMES)) byId(id).append(element("option", { value: name }, words));
  byId(id).addEventListener("change", () => { state[id] = byId(id).value; update(); });
}
for (const button of document.querySelectorAll("[data-mode]")) {
  button.addEventListener("click", () => setMode(button.dataset.mode));
}
byId("divider").addEventListener("input", () => { state.divider = byId("divider").value / 100; update(); });
byId("running").addEventListener("click", () => blink(!timer));
byId("grid").addEventListener("change", () => { state.grid = byId("grid").checked; update(); });
const windows = byId("window") ? byId("window").options.length : 1;
function setWindow(number) {
  state.window = number % windows;
  update();
}
if (windows > 1) byId("window").addEventListener("change", () => setWindow(Number(byId("window").value)));
byId("colour").addEventListener("change", () => { state.colour = byId("colour").value; update(); });
for (const source of ["fixed", "warped"]) {
  const box = byId(`outline-${source}`);
  if (box) box.addEventListener("change", () => { state[source] = box.checked; update(); });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input:not([type=range]):not([type=checkbox])")) return;
  const onButton = event.target.matches("button, summary, input, a");
  if (event.key >= "1" && event.key <= "5") setMode(MODES[event.key - 1]);
  else if (event.key === "b") setMode(state.mode === "blink" ? "slider" : "blink");
  else if (event.key === "s") { [state.first, state.second] = [state.second, state.first]; update(); }
  else if (event.key === "w") setWindow(state.window + 1);
  else if (event.key === "g") { state.grid = !state.grid; update(); }
  else if (event.key === "o") {
    const shown = !(state.fixed || state.warped);
    for (const source of ["fixed", "warped"]) state[source] = shown && Boolean(byId(`outline-${source}`));
    update();
  } else if (event.key === "c") {
    const choices = ["", "volume", "size"];
    state.colour = choices[(choices.indexOf(state.colour) + 1) % 3];
    update();
  } else if (event.key === "," || event.key === ".") {
    data.planes.forEach((_, i) => setSlice(i, state.slices[i] + (event.key === "." ? 1 : -1)));
  } else if (event.key === " " && !onButton) {
    blink(false);
    state.flicked = !state.flicked;
    update();
  } else return;
  event.preventDefault();
});

byId("copy").addEventListener("click", async () => {
  const references = [...document.querySelectorAll("#methods li")].map((item, i) => `${i + 1}. ${item.textContent}`);
  const words = [byId("methods-text").textContent, ...references].join("\n");
  try {
    await navigator.clipboard.writeText(words);
    byId("copied").textContent = "Copied.";
  } catch {
    const range = document.createRange();
    range.selectNodeContents(byId("methods"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    byId("copied").textContent = "The text is selected: press Ctrl+C to copy it.";
  }
});

// one scale for all planes
byId("planes").style.setProperty("--columns", data.planes.map((plane) => `minmax(0, ${millimetres(plane)[0].toFixed(1)}fr)`).join(" "));
const folder = decodeURIComponent(location.pathname.split("/").slice(-2, -1)[0] || ""); // of the page, not in it
byId("place").textContent = folder;
if (folder) document.title = `${folder} – registration report`;
window.addEventListener("resize", redraw);
window.addEventListener("beforeprint", draw);
const uris = data.planes.flatMap((plane) => [...Object.values(plane.images).flat(), plane.volume, ...Object.values(plane.labels)]);
Promise.all(uris.map(load)).then(() => {
  document.documentElement.dataset.ready = "true";
  update();
  draw();
}).catch((error) => { byId("readout").textContent = error.message; });
