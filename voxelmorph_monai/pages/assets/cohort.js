"use strict";
const { cohort, one, many, first, measures, rows, plots } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const AT_A_TIME = 50; // rows to show at a time
const STORE = `voxelmorph_monai:${cohort}`;
const state = { sort: null, descending: false, page: 0, current: null, shown: rows };
rows.forEach((row) => { row.lower = row.name.toLowerCase(); });

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const counted = (n) => `${n} ${n === 1 ? one : many}`;
const written = (row, m) => (row.values[m] === null || row.values[m] === undefined ? "" : row.values[m].toFixed(measures[m].digits));

// ---- decisions, by the name of the pair

const decisions = new Map();
function remember() {
  try { localStorage.setItem(STORE, JSON.stringify([...decisions])); } catch {
    byId("message").textContent = "This browser cannot store your decisions: export them before you close the page.";
  }
}
try {
  for (const [name, each] of JSON.parse(localStorage.getItem(STORE) || "[]")) decisions.set(name, each);
} catch { /* nothing is stored, or it cannot be read */ }
const decision = (row) => decisions.get(row.name) || { decision: "", note: "" };
function decide(row, change) {
  const next = { ...decision(row), ...change };
  if (next.decision || next.note) decisions.set(row.name, next);
  else decisions.delete(row.name);
  remember();
}

const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
function toCsv() {
  const lines = rows.filter((row) => decisions.has(row.name))
    .map((row) => [row.name, decision(row).decision, decision(row).note].map(cell).join(","));
  return ["name,decision,note", ...lines].join("\n") + "\n";
}

function parseCsv(text) {
  const table = [[]];
  let value = "", quoted = false;
  const end = () => { table[table.length - 1].push(value); value = ""; };
  for (let i = 0; i < text.length; i++) {
    const c = text[i];
    if (quoted) {
      if (c === '"' && text[i + 1] === '"') { value += '"'; i++; }
      else if (c === '"') quoted = false;
      else value += c;
    } else if (c === '"') quoted = true;
    else if (c === ",") end();
    else if (c === "\n") { end(); table.push([]); }
    else if (c !== "\r") value += c;
  }
  end();
  return table.filter((line) => line.some((each) => each !== ""));
}

function fromCsv(text) {
  const [head, ...lines] = parseCsv(text.replace(/^\uFEFF/, "")), at = (name) => (head || []).indexOf(name);
  if (at("name") < 0 || at("decision") < 0) return "The file needs the columns name and decision.";
  const known = new Map(rows.map((row) => [row.name, row]));
  let taken = 0, unknown = 0, wrong = 0;
  for (const line of lines) {
    const row = known.get(line[at("name")]), chosen = line[at("decision")];
    if (!row) unknown++;
    else if (!["", "accept", "reject"].includes(chosen)) wrong++;
    else {
      decide(row, { decision: chosen, note: at("note") < 0 ? decision(row).note : line[at("note")] || "" });
      taken++;
    }
  }
  const parts = [`${taken} decisions read`];
  if (unknown) parts.push(`${unknown} of ${many} that are not in this index`);
  if (wrong) parts.push(`${wrong} that are neither accept nor reject`);
  return `${parts.join(", ")}.`;
}

// ---- what is shown

const limits = measures.map((_, m) => ["low", "high"].map((end) => document.querySelector(`[data-${end}="${m}"]`)));
const WHICH = {
  "": () => true, open: (row) => !decision(row).decision, accept: (row) => decision(row).decision === "accept",
  reject: (row) => decision(row).decision === "reject", odd: (row) => row.notes.length > 0, failed: (row) => row.failed !== "",
};
function sortKey(row) {
  if (state.sort === "name") return row.lower;
  if (state.sort === "notes") return row.failed ? 1e6 : row.notes.length;
  if (state.sort === "decision") return decision(row).decision || "~";
  const value = row.values[Number(state.sort)];
  return value === undefined ? null : value;
}
function select() {
  const words = byId("search").value.toLowerCase(), which = WHICH[byId("which").value];
  const bounds = limits.map(([low, high]) => [low, high].map((box) => (box.value === "" ? null : Number(box.value))));
  state.shown = rows.filter((row) => which(row) && row.lower.includes(words) && bounds.every(([low, high], m) => {
    if (low === null && high === null) return true;
    const value = row.values[m];
    return value !== null && value !== undefined && (low === null || value >= low) && (high === null || value <= high);
  }));
  if (state.sort !== null) {
    const keys = new Map(state.shown.map((row) => [row, sortKey(row)])), sign = state.descending ? -1 : 1;
    state.shown.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === null || y === null) return (x === null) - (y === null); // missing values come last
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
  }
  state.page = Math.min(state.page, Math.max(0, Math.ceil(state.shown.length / AT_A_TIME) - 1));
}

function line(row) {
  const made = element("tr", { "aria-selected": String(row === state.current) });
  const picture = row.thumbnail
    ? element("img", { src: row.thumbnail, alt: "", loading: "lazy", width: 140, height: 84 })
    : element("span", { class: "soft" }, row.failed ? "" : "no picture");
  const flags = element("td");
  if (row.failed) flags.append(element("span", { class: "mark failed" }, "failed"));
  else if (row.notes.length) {
    flags.append(element("span", { class: "mark odd", title: row.notes.join("\n") }, `${row.notes.length} flag${row.notes.length > 1 ? "s" : ""}`));
  }
  made.append(element("td", {}, picture), element("td", { class: "name" }, element("button", { type: "button" }, row.name)), flags);
  if (row.failed) made.append(element("td", { class: "reason", colspan: Math.max(measures.length, 1) }, row.failed));
  else {
    measures.forEach((measure, m) => made.append(element("td", { class: "number", "data-name": measure.name }, written(row, m))));
  }
  const { decision: chosen, note } = decision(row), last = element("td");
  if (chosen) last.append(element("span", { class: `mark ${chosen}` }, `${chosen}ed`));
  if (note) last.append(` ✎ ${note}`);
  made.append(last);
  made.addEventListener("click", () => choose(row));
  return made;
}

function list(all = false) {
  const start = all ? 0 : state.page * AT_A_TIME, end = all ? state.shown.length : Math.min(start + AT_A_TIME, state.shown.length);
  document.querySelector("#pairs tbody").replaceChildren(...state.shown.slice(start, end).map(line));
  byId("shown").textContent = state.shown.length ? `${start + 1} to ${end} of ${state.shown.length}` : `No ${one} matches.`;
  byId("previous").disabled = state.page === 0;
  byId("next").disabled = end >= state.shown.length;
}

function counts() {
  const count = (test) => rows.filter(test).length;
  byId("counts").textContent = `${counted(rows.length)}: ${count((row) => row.failed)} failed, ` +
    `${count((row) => !row.failed && row.notes.length)} flagged; ${count(WHICH.accept)} accepted, ` +
    `${count(WHICH.reject)} rejected, ${count(WHICH.open)} undecided`;
}

function detail() {
  const row = state.current;
  byId("detail").classList.toggle("empty", !row);
  byId("decide").hidden = byId("noting").hidden = !row;
  if (!row) return;
  byId("detail-title").textContent = row.name;
  const notes = row.failed ? [`Failed: ${row.failed}`] : row.notes;
  byId("detail-body").replaceChildren(
    notes.length ? element("ul", {}, ...notes.map((note) => element("li", {}, note))) : element("p", { class: "soft" }, "No check found anything wrong."));
  for (const button of document.querySelectorAll("[data-decide]")) {
    button.setAttribute("aria-pressed", String(decision(row).decision === button.dataset.decide));
  }
  if (document.activeElement !== byId("note")) byId("note").value = decision(row).note;
  byId("open").hidden = !row.page;
  byId("open").href = row.page || "#";
  if (byId("picture").dataset.of !== row.picture) {
    byId("picture").dataset.of = row.picture;
    byId("picture").replaceChildren(...(row.picture ? [
      element("a", { href: row.picture, target: "_blank", rel: "noopener" }, element("img", { src: row.picture, alt: `pictures of ${row.name}, in full size` }))] : []));
  }
}

// ---- histogram and scatter plot

const HEIGHT = 136, LEFT = 55, BOTTOM = 26;
function plot() {
  const WIDTH = Math.max(byId("plot").clientWidth, 200);
  const m = Number(byId("across").value), n = byId("up").value === "" ? null : Number(byId("up").value);
  const known = state.shown.filter((row) => typeof row.values[m] === "number" && (n === null || typeof row.values[n] === "number"));
  const svg = byId("plot");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren();
  const name = n === null ? measures[m].name : `${measures[m].name} against ${measures[n].name}`;
  if (!known.length) { byId("plot-text").textContent = `${name}: no values for these ${many}`; return; }
  const values = known.map((row) => row.values[m]), sorted = [...values].sort((a, b) => a - b);
  const median = (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
  const digits = measures[m].digits;
  let low = sorted[0], high = sorted[sorted.length - 1];
  byId("plot-text").textContent = `${name}: ${counted(known.length)}, median ${median.toFixed(digits)}, ${low.toFixed(digits)} to ${high.toFixed(digits)}`;
  if (high === low) { const pad = 0.05 * Math.abs(high) || 1; low -= pad; high += pad; }
  const wide = high - low, x = (value) => LEFT + ((value - low) / wide) * (WIDTH - LEFT - 15);
  const bottom = HEIGHT - BOTTOM;
  svg.append(drawn("line", { x1: LEFT, x2: WIDTH - 10, y1: bottom, y2: bottom }));
  for (const share of [0, 0.5, 1]) {
    const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
    svg.append(drawn("text", { x: x(low + share * wide), y: HEIGHT - 8, "text-anchor": anchor }, (low + share * wide).toFixed(digits)));
  }
  if (n === null) {
    const bins = Math.max(1, Math.min(40, Math.ceil(Math.sqrt(known.length) * 1.5))), found = Array.from({ length: bins }, () => []);
    known.forEach((row) => found[Math.min(bins - 1, Math.floor(((row.values[m] - low) / wide) * bins))].push(row));
    const most = Math.max(...found.map((bin) => bin.length));
    svg.append(drawn("text", { x: LEFT - 8, y: 18, "text-anchor": "end" }, String(most)));
    found.forEach((bin, i) => {
      if (!bin.length) return;
      const from = low + (i / bins) * wide, to = low + ((i + 1) / bins) * wide, tall = (bin.length / most) * (bottom - 10);
      const bar = drawn("rect", { class: "bar", x: x(from) + 1, y: bottom - tall, width: Math.max(2, x(to) - x(from) - 2), height: tall },
        drawn("title", {}, `${from.toFixed(digits)} to ${to.toFixed(digits)}: ${counted(bin.length)}`));
      bar.addEventListener("click", () => {
        limits[m][0].value = String(from);
        limits[m][1].value = String(i === bins - 1 ? high : to);
        document.querySelector("#list details").open = true;
        refresh();
      });
      svg.append(bar);
    });
  } else {
    const heights = known.map((row) => row.values[n]), least = Math.min(...heights), tall = Math.max(...heights) - least || 1;
    const y = (value) => bottom - 6 - ((value - least) / tall) * (bottom - 20);
    for (const share of [0, 1]) {
      svg.append(drawn("text", { x: LEFT - 8, y: y(least + share * tall) + 4, "text-anchor": "end" }, (least + share * tall).toFixed(measures[n].digits)));
    }
    known.forEach((row) => {
      const kind = `dot${row.notes.length ? " odd" : ""}${row === state.current ? " current" : ""}`;
      const dot = drawn("circle", { class: kind, cx: x(row.values[m]), cy: y(row.values[n]), r: row === state.current ? 6 : 4 },
        drawn("title", {}, `${row.name}: ${written(row, m)}, ${written(row, n)}`));
      dot.addEventListener("click", () => choose(row));
      svg.append(dot);
    });
  }
}

// ---- boxes of structures

function boxes() {
  const { name, digits, stages, rows: structures } = plots[Number(byId("which-box").value)];
  const svg = byId("box"), wide = Math.max(svg.clientWidth, 280), left = Math.min(230, wide * 0.42);
  const tall = stages.length * 10 + 8, height = structures.length * tall + 30, right = wide - 18;
  const found = structures.flatMap(([, all]) => all.filter(Boolean));
  const ends = found.flatMap((box) => [box.low, box.high, ...box.beyond.map(([, value]) => value)]);
  const low = Math.min(...ends), high = Math.max(...ends), x = (value) => left + ((value - low) / (high - low || 1)) * (right - left);
  const told = (box) => `median ${box.median.toFixed(digits)}, quartiles ${box.first.toFixed(digits)} and ${box.third.toFixed(digits)}`;
  byId("box-text").textContent = found.length
    ? `${name} of each structure: median, quartiles, and whiskers of up to 1.5 times the interquartile range; ${stages.join(" above ")}`
    : `${name}: no values`;
  svg.setAttribute("viewBox", `0 0 ${wide} ${height}`);
  svg.style.height = `${height}px`;
  svg.replaceChildren();
  const head = ["structure", "stage", many, "lowest", "first quartile", "median", "third quartile", "highest"];
  const table = [element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))];
  for (const share of found.length ? [0, 0.5, 1] : []) {
    const value = low + share * (high - low);
    svg.append(drawn("line", { x1: x(value), x2: x(value), y1: 0, y2: height - 22 }),
      drawn("text", { x: x(value), y: height - 6, "text-anchor": share === 1 ? "end" : "middle" }, value.toFixed(digits)));
  }
  structures.forEach(([structure, all], i) => {
    const most = Math.floor(left / 7), label = structure.length > most ? `${structure.slice(0, most - 1)}…` : structure;
    svg.append(drawn("text", { x: left - 10, y: i * tall + tall / 2 + 4, "text-anchor": "end" }, label, drawn("title", {}, structure)));
    all.forEach((box, stage) => {
      if (!box) return;
      const y = i * tall + 4 + stage * 10 + 5, kind = stages.length > 1 && stage === 0 ? "before" : "after";
      const group = drawn("g", { class: `whole ${kind}` }, drawn("title", {}, `${structure}, ${stages[stage]}: ${told(box)}, ${counted(box.number)}`),
        drawn("rect", { class: "catch", x: x(box.low), y: y - 5, width: Math.max(4, x(box.high) - x(box.low)), height: 10 }),
        drawn("line", { x1: x(box.low), x2: x(box.high), y1: y, y2: y }),
        drawn("rect", { x: x(box.first), y: y - 4, width: Math.max(1, x(box.third) - x(box.first)), height: 8 }),
        drawn("line", { class: "median", x1: x(box.median), x2: x(box.median), y1: y - 4, y2: y + 4 }));
      svg.append(group);
      for (const [place, value] of box.beyond) {
        const dot = drawn("circle", { class: kind, cx: x(value), cy: y, r: 3 },
          drawn("title", {}, `${rows[place].name}: ${structure}, ${stages[stage]}, ${value.toFixed(digits)}`));
        dot.addEventListener("click", () => choose(rows[place]));
        svg.append(dot);
      }
      table.push(element("tr", {}, element("th", { scope: "row" }, structure), element("td", {}, stages[stage]),
        element("td", { class: "number" }, String(box.number)),
        ...[box.low, box.first, box.median, box.third, box.high].map((value) => element("td", { class: "number" }, value.toFixed(digits)))));
    });
  });
  byId("box-table").replaceChildren(...table);
}

// ---- user input

function refresh() {
  select();
  list();
  plot();
}
function choose(row, keepPlot = false) {
  state.current = row;
  const place = state.shown.indexOf(row);
  if (place >= 0) state.page = Math.floor(place / AT_A_TIME);
  list();
  detail();
  if (!keepPlot || byId("up").value !== "") plot();
  const line = document.querySelector('#pairs [aria-selected="true"]');
  if (line) line.scrollIntoView({ block: "nearest" });
}
function step(by) {
  if (!state.shown.length) return;
  const place = state.shown.indexOf(state.current);
  choose(state.shown[place < 0 ? 0 : Math.min(Math.max(place + by, 0), state.shown.length - 1)], true);
}
function mark(chosen) {
  if (!state.current) return;
  decide(state.current, { decision: decision(state.current).decision === chosen ? "" : chosen });
  counts();
  list();
  detail();
}

measures.forEach((measure, m) => {
  byId("across").append(element("option", { value: String(m) }, measure.name));
  byId("up").append(element("option", { value: String(m) }, measure.name));
});
const isKnown = (m) => rows.some((row) => typeof row.values[m] === "number");
byId("across").value = String([first, ...measures.keys()].find(isKnown) ?? first);
byId("across").addEventListener("change", plot);
byId("up").addEventListener("change", plot);
byId("search").addEventListener("input", () => { state.page = 0; refresh(); });
byId("which").addEventListener("change", () => { state.page = 0; refresh(); });
limits.flat().forEach((box) => box.addEventListener("input", () => { state.page = 0; refresh(); }));
byId("previous").addEventListener("click", () => { state.page--; list(); });
byId("next").addEventListener("click", () => { state.page++; list(); });
for (const head of document.querySelectorAll("th[data-sort]")) {
  head.querySelector("button").addEventListener("click", () => {
    const again = state.sort === head.dataset.sort;
    state.descending = again ? !state.descending : false;
    state.sort = head.dataset.sort;
    state.page = 0;
    for (const other of document.querySelectorAll("th[data-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    refresh();
  });
}
for (const button of document.querySelectorAll("[data-decide]")) button.addEventListener("click", () => mark(button.dataset.decide));
byId("note").addEventListener("input", () => { decide(state.current, { note: byId("note").value }); list(); });
byId("note").addEventListener("keydown", (event) => { if (event.key === "Escape") byId("note").blur(); });
byId("export").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" }));
  element("a", { href: url, download: "decisions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
});
byId("import").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  byId("message").textContent = fromCsv(await file.text());
  event.target.value = "";
  counts();
  refresh();
  detail();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
  if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "a") mark("accept");
  else if (event.key === "r") mark("reject");
  else if (event.key === "n" && state.current) byId("note").focus();
  else if (event.key === "o" && state.current && state.current.page) byId("open").click();
  else if (event.key === "/") byId("search").focus();
  else return;
  event.preventDefault();
});
plots.forEach((each, i) => byId("which-box").append(element("option", { value: String(i) }, each.name)));
if (plots.length) {
  byId("which-box").addEventListener("change", boxes);
  window.addEventListener("resize", boxes);
  boxes();
}
window.addEventListener("resize", plot);
window.addEventListener("beforeprint", () => list(true));
window.addEventListener("afterprint", () => list());
byId("pairs").classList.toggle("bare", !rows.some((row) => row.thumbnail));
counts();
refresh();
document.documentElement.dataset.ready = "true";
