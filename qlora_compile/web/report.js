"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const COLORS = ["#3b6fd4", "#0f9d8a", "#c2557a", "#d98b1f", "#7a5cc9", "#64748b", "#b4452c", "#4d8a3a"];
const KINDS = ["weights", "adapters", "gradients", "saved", "output", "workspace", "temporary", "optimizer"];
const colorOf = (kind) => COLORS[Math.max(0, KINDS.indexOf(kind)) % COLORS.length];
const el = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};
const human = (n, unit = "B", digits = 2) => {
  const scale = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => Math.abs(n) >= size);
  return scale ? `${(n / scale[0]).toFixed(digits)} ${scale[1]}${unit}` : `${n} ${unit}`;
};

// Pages: one is shown, arrow keys move between them, the address remembers it.
const tabs = [...document.querySelectorAll("[role=tab]")];
const drawn = new Set();
function show(name) {
  for (const tab of tabs) {
    const mine = tab.getAttribute("aria-controls") === `page-${name}`;
    tab.setAttribute("aria-selected", mine);
    tab.tabIndex = mine ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !mine;
  }
  history.replaceState(null, "", `#${name}`);
  if (!drawn.has(name)) { drawn.add(name); ({ graph: startGraph, memory: drawMemory, training: drawTraining, numerics: drawNumerics }[name] || (() => {}))(); }
}
tabs.forEach((tab, i) => {
  tab.onclick = () => show(tab.getAttribute("aria-controls").slice(5));
  tab.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = tabs[(i + move + tabs.length) % tabs.length];
    next.focus(); next.click();
  };
});
function theme(name) {
  document.documentElement.dataset.theme = name;
  if (window.cy) cy.style(graphStyle());
  for (const [id, draw] of [["memory", drawMemory], ["training", drawTraining], ["numerics", drawNumerics]]) if (drawn.has(id)) draw();
}
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

// Overview: the linears' bytes and all others, before and after.
function bars() {
  const sizes = data.sizes, most = Math.max(sizes.model_before, sizes.model_after) || 1;
  for (const when of ["before", "after"]) {
    const linears = sizes[`linears_${when}`], rest = sizes[`model_${when}`] - linears;
    const track = el("div", { className: "track" });
    for (const [name, amount, color] of [["linears", linears, COLORS[0]], ["other", rest, COLORS[5]]]) {
      const part = el("div", { title: `${name}: ${human(amount)}`, textContent: `${name} ${human(amount)}` });
      part.style.cssText = `width:${100 * amount / most}%;background:${color}`;
      track.append(part);
    }
    $("bars").append(el("div", { className: "bar" }, el("span", { textContent: `${when}: ${human(sizes[`model_${when}`], "B", 1)}` }), track));
  }
}

// Graph: modules of a stage, equal layers as one.
let byId = {}, current = null;
const graphStyle = () => [
  { selector: "node", style: { label: "data(label)", shape: "round-rectangle", width: 270, height: 44, "font-size": 17, color: css("--fg"), "text-valign": "center", "text-wrap": "ellipsis", "text-max-width": 258, "background-color": css("--bg"), "border-width": 1, "border-color": css("--dim") } },
  { selector: "node[?product]", style: { "border-color": css("--accent"), "border-width": 2.5 } },
  { selector: "edge", style: { width: 1.4, "line-color": css("--dim"), "target-arrow-color": css("--dim"), opacity: 0.6, "target-arrow-shape": "triangle", "curve-style": "bezier" } },
  { selector: ".match", style: { "background-color": "#f6c945", color: "#1b1500" } },
  { selector: ":selected", style: { "background-color": css("--accent"), color: "#fff" } },
];
function startGraph() {
  const names = Object.keys(data.stages), last = names.filter((n) => n !== "forward" && n !== "backward").pop();
  for (const name of names) $("stage").append(el("option", { value: name, textContent: name, selected: name === last }));
  window.cy = cytoscape({ container: $("canvas"), style: graphStyle(), elements: [] });
  cy.on("tap", "node", (event) => pick(event.target.id()));
  $("stage").onchange = () => { $("search").value = ""; drawStage(); };
  $("search").oninput = search;
  $("search").onkeydown = (event) => { if (event.key === "Enter" && cy.$(".match").length) pick(cy.$(".match")[0].id()); };
  $("fit").onclick = () => cy.fit(undefined, 30);
  drawStage();
}
// `model.layers.0…29 ×30.mlp.down_proj` -> `mlp.down_proj ×30`: the end of a name tells the boxes apart.
function shortened(id) {
  const short = id.replace(/^.*?\d+(?:…\d+ (×\d+))?\.(.+)$/, (_, times, rest) => (times ? `${rest} ${times}` : id));
  return short.length > 38 ? `…${short.slice(-37)}` : short;
}
function drawStage() {
  const stage = data.stages[$("stage").value];
  byId = Object.fromEntries(stage.nodes.map((node) => [node.id, node]));
  current = null;
  cy.elements().remove();
  cy.add(stage.nodes.map((node) => ({ data: { id: node.id, label: shortened(node.id), product: node.flops > 0 } })));
  cy.add(stage.edges.map(([source, target]) => ({ data: { source, target } })));
  cy.layout({ name: "dagre", nodeSep: 24, rankSep: 34, animate: false }).run();
  if (cy.zoom() < 0.35 && stage.nodes.length) { cy.zoom(0.5); cy.pan({ x: cy.width() / 2 - 0.5 * cy.nodes()[0].position("x"), y: 40 }); }
  $("picked").textContent = "Blocks";
  $("details").replaceChildren(el("p", { className: "note", textContent: `${stage.nodes.length} blocks; pick one here or in the drawing.` }));
  list(stage.nodes);
}
function list(nodes) {
  $("blocks").replaceChildren(...nodes.map((node) => {
    const button = el("button", { textContent: node.id, onclick: () => pick(node.id) });
    button.setAttribute("aria-current", node.id === current);
    return el("li", {}, button);
  }));
}
// `layers.17.mlp` is found in the block `layers.0…29 ×30.mlp`, which holds the ops of its first layer.
function texts(node) {
  return [node.id, node.module, ...Object.keys(node.targets), ...node.members.flatMap((m) => [m[0], m[9]])].join("\n").toLowerCase();
}
function matches(node, query) {
  if (texts(node).includes(query)) return true;
  const range = node.id.match(/(\d+)…(\d+)/), number = query.match(/(^|\.)(\d+)(?=\.|$)/);
  if (!range || !number || +number[2] < +range[1] || +number[2] > +range[2]) return false;
  return texts(node).includes(query.replace(number[0], number[1] + range[1]));
}
function search() {
  const query = $("search").value.trim().toLowerCase();
  cy.elements().removeClass("match");
  const nodes = data.stages[$("stage").value].nodes.filter((node) => !query || matches(node, query));
  if (query) for (const node of nodes) cy.getElementById(node.id).addClass("match");
  $("found").textContent = query ? `${nodes.length} found` : "";
  list(nodes);
}
function pick(id) {
  current = id;
  const node = byId[id];
  cy.elements().unselect();
  cy.getElementById(id).select();
  const place = cy.getElementById(id).boundingBox(), view = cy.extent();
  if (place.x1 < view.x1 || place.x2 > view.x2 || place.y1 < view.y1 || place.y2 > view.y2) cy.animate({ center: { eles: cy.getElementById(id) }, duration: 150 });
  $("picked").textContent = id;
  const box = $("details");
  box.replaceChildren(el("dl", {},
    el("dt", { textContent: "ops" }), el("dd", { textContent: node.ops }),
    el("dt", { textContent: "values" }), el("dd", { textContent: human(node.bytes) }),
    el("dt", { textContent: "work" }), el("dd", { textContent: human(node.flops, "FLOP") })));
  box.append(changes(node));
  for (const name of [...new Set(node.members.map((m) => m[6]).filter(Boolean))]) box.append(kernelOf(name));
  for (const [name, target, shape, dtype, bytes, flops, kernel, made, source, sites] of node.members.slice(0, 60)) {
    const lines = [[shape && `${dtype} ${shape}`, bytes && human(bytes), flops && human(flops, "FLOP")], [kernel && `kernel ${kernel}`, made && `made by ${made}`], [sites], [source]];
    box.append(el("div", { className: "op" }, el("b", { textContent: target }), ` ${name}`,
      ...lines.map((line) => line.filter(Boolean).join(" · ")).filter(Boolean).map((text) => el("div", { className: "note", textContent: text }))));
  }
  if (node.members.length > 60) box.append(el("p", { className: "note", textContent: `and ${node.members.length - 60} more ops` }));
  for (const button of $("blocks").querySelectorAll("button")) button.setAttribute("aria-current", button.textContent === id);
  box.parentElement.scrollTop = 0;
}
// What every pass up to this stage took out of the block and put into it.
function changes(node) {
  const box = el("div"), stage = $("stage").value, names = Object.keys(data.stages);
  if (["forward", "backward"].includes(stage)) return box;
  let before = null;
  for (const name of names.slice(0, names.indexOf(stage) + 1)) {
    const targets = (data.stages[name].nodes.find((other) => other.id === node.id) || { targets: {} }).targets;
    const keys = before === null ? [] : [...new Set([...Object.keys(before), ...Object.keys(targets)])];
    const rows = keys.map((key) => [key, (targets[key] || 0) - (before[key] || 0)]).filter(([, n]) => n);
    if (rows.length) box.append(el("div", { className: "change" }, el("code", { textContent: name }),
      ...rows.map(([key, n]) => el("span", { className: n < 0 ? "gone" : "came", textContent: ` ${n < 0 ? "−" : "+"} ${key} ×${Math.abs(n)}` }))));
    before = targets;
  }
  if (!box.children.length && stage !== "input") box.append(el("p", { className: "note", textContent: "as in the input graph" }));
  return box;
}
// `fp32_gemm, backward library_gemm`: the generated sources of both.
function kernelOf(name) {
  const words = name.split(/[\s,]+/), parts = [...new Set(words.flatMap((word) => data.parts[word] || [word]).map((part) => data.articles[part] || part))];
  const details = el("details", { className: "kernel" }, el("summary", { textContent: `kernel: ${name}` }));
  const articles = parts.map((part) => $(`kernel-${part}`)).filter(Boolean);
  for (const article of articles) {
    const link = el("button", { textContent: article.id.slice(7), onclick: () => { show("kernels"); article.scrollIntoView(); } });
    details.append(link, article.querySelector(".source").cloneNode(true));
  }
  if (!articles.length) details.append(el("p", { className: "note", textContent: "the library's own: no source here" }));
  return details;
}

// Charts.
const axis = () => ({ stroke: css("--fg"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") } });
const WHOLE = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6, 7].map((p) => n * 10 ** p)).sort((a, b) => a - b);
const table = (heads, rows) => el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { textContent: text })))),
  el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell instanceof Node ? cell : String(cell)))))));
function drawMemory() {
  const memory = data.memory;
  drawPaging();
  $("memory-chart").replaceChildren();
  if (!memory) { $("peak").textContent = "Only a traced report knows this: qlora_compile.trace(...), or `qlora-compile inspect MODEL --format html --out FILE`."; return; }
  const at = memory.event.indexOf(memory.peak_event), [phase, target, module] = memory.events[at] || ["", "", ""];
  $("peak").textContent = `peak ${human(memory.peak)} (${memory.peak} bytes), ${phase}: ${target} in ${module || "the model"}`;
  const order = Object.keys(memory.kinds), sums = new Array(memory.event.length).fill(0);
  const stacked = order.map((kind) => memory.kinds[kind].map((v, i) => (sums[i] += v)));
  const series = [{ label: "node" }, ...order.map((_, k) => order.length - 1 - k).map((k) => ({
    label: order[k], stroke: colorOf(order[k]), fill: `${colorOf(order[k])}cc`, width: 1, paths: uPlot.paths.stepped({ align: 1 }),
    value: (u, v, s, i) => (i == null ? "" : human(memory.kinds[order[k]][i])), points: { show: false },
  }))];
  const values = (u, ticks) => ticks.map((v) => human(v, "B", 1));
  window.memoryChart = new uPlot({
    width: $("memory-chart").clientWidth, height: 400, series, scales: { x: { time: false }, y: { range: (u, lo, hi) => [0, hi * 1.05 || 1] } },
    axes: [{ ...axis(), label: "executed nodes: forward, then backward" }, { ...axis(), size: 84, values }], legend: { live: true },
    hooks: { setCursor: [(u) => hover(u.cursor.idx)], draw: [(u) => { phases(u); pageMarks(u); }] },
  }, [memory.event, ...stacked.slice().reverse()], $("memory-chart"));
  $("memory-chart").onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const index = Math.min(Math.max((memoryChart.cursor.idx ?? at) + move, 0), memory.event.length - 1);
    memoryChart.setCursor({ left: memoryChart.valToPos(memory.event[index], "x"), top: 10 });
    event.preventDefault();
  };
  const kinds = Object.entries(memory.by_kind).sort((a, b) => b[1] - a[1]);
  const name = (kind, text = kind) => { const mark = el("span", { className: "swatch", title: kind }); mark.style.background = colorOf(kind); return el("span", {}, mark, text); };
  $("made-of").replaceChildren(table(["kind", "bytes", ""], kinds.map(([kind, n]) => [name(kind), human(n), `${(100 * n / memory.peak).toFixed(1)}%`])));
  $("at-peak").replaceChildren(table(["bytes", "tensor", "module"], memory.at_peak.map(([tensor, owner, kind, n]) => [human(n), name(kind, tensor), owner || "the model"])));
}
// A line where the backward begins.
function phases(u) {
  const index = data.memory.events.findIndex(([phase]) => phase === "backward");
  if (index < 0) return;
  const x = u.valToPos(data.memory.event[index], "x", true), { ctx, bbox } = u;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = css("--dim");
  ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
  ctx.textAlign = "left"; ctx.font = `${13 * devicePixelRatio}px sans-serif`;
  ctx.fillText("backward →", x + 8 * devicePixelRatio, bbox.top + (data.memory.pages.length ? 40 : 14) * devicePixelRatio);
  ctx.restore();
}
function hover(index) {
  if (index == null || !data.memory.events[index]) return;
  const [phase, target, module] = data.memory.events[index];
  $("memory-hover").replaceChildren(el("div", { textContent: `${phase}: ${target} in ${module || "the model"}` }),
    ...pagesBetween(index ? data.memory.event[index - 1] : -1, data.memory.event[index]).slice(0, 3).map((text) => el("div", { textContent: text })),
    ...data.memory.tops[index].map(([name, owner, bytes]) => el("div", { textContent: `${human(bytes)} ${name} (${owner || "the model"})` })));
}
const TRAINING = [["steps", "loss", "Loss"], ["evals", "perplexity", "Perplexity on held-out text"], ["steps", "tokens_per_s", "Tokens/s"], ["steps", "memory_bytes", "Memory"],
  ["steps", "paged_in_bytes", "Paged in, bytes a step"], ["steps", "paged_out_bytes", "Paged out, bytes a step"], ["steps", "stall_ms", "Waited for pages, ms a step"],
  ["steps", "grad_norm", "Gradient norm"], ["steps", "lr", "Learning rate"]];
function drawTraining() {
  const body = $("training-body"), names = Object.keys(data.runs);
  body.replaceChildren();
  if (!names.length) { body.append(el("p", { textContent: "No run was given: to_html(path, runs=[folder]), or inspect --run FOLDER." })); return; }
  const draws = []; // a chart is as wide as its column, which is known when all columns are there
  for (const [kind, key, title] of TRAINING) {
    const lines = (name) => data.runs[name][kind].filter((line) => line[key] != null);
    if (!names.some((name) => lines(name).length)) continue;
    const steps = [...new Set(names.flatMap((name) => lines(name).map((line) => line.step)))].sort((a, b) => a - b);
    const columns = names.map((name) => { const at = new Map(lines(name).map((line) => [line.step, line[key]])); return steps.map((s) => at.get(s) ?? null); });
    const holder = el("div", {}, el("h2", { textContent: title }));
    body.append(holder);
    const shown = (v) => (v == null ? "–" : key.endsWith("bytes") ? human(v) : +v.toPrecision(5));
    const values = (u, ticks) => ticks.map(shown);
    draws.push(() => new uPlot({ width: holder.clientWidth, height: 240, scales: { x: { time: false } }, axes: [{ ...axis(), incrs: WHOLE }, { ...axis(), size: 84, values }],
      series: [{ label: "step" }, ...names.map((name, i) => ({ label: name, stroke: COLORS[i % COLORS.length], width: 2, spanGaps: true, value: (u, v) => shown(v) }))] }, [steps, ...columns], holder));
  }
  draws.forEach((draw) => draw());
}
function drawNumerics() {
  const body = $("numerics-body"), rows = data.numerics.slice().sort((a, b) => b.error - a.error);
  body.replaceChildren();
  if (!rows.length) { body.append(el("p", { textContent: "Not measured, as it needs the weights: qlora-compile inspect MODEL --numerics --format html --out FILE." })); return; }
  const holder = el("div"), least = rows[rows.length - 1].error, most = rows[0].error, count = Math.min(30, Math.max(5, Math.ceil(Math.sqrt(rows.length) * 1.5)));
  const width = (most - least) / count || most || 1, bins = new Array(count).fill(0);
  for (const row of rows) bins[Math.min(count - 1, Math.floor((row.error - least) / width))] += 1;
  const formats = data.formats.map((f) => [f.quant_type, f.block_size, f.double_quant ? "yes" : "no", f.bits.toFixed(3), f.error.toFixed(5), ...(f.perplexity == null ? [] : [f.perplexity.toFixed(3)])]);
  const text = data.perplexity_dense == null ? [] : ["perplexity"];
  const left = el("div", {}, el("h2", { textContent: `Layers by relative error of the weight (${data.format})` }), holder);
  const right = el("div", {}, el("h2", { textContent: "All layers together, by format" }), table(["type", "block", "double quantization", "bits", "error", ...text], formats));
  if (text.length) right.append(el("p", { className: "note", textContent: `the dense model's perplexity on the same text: ${data.perplexity_dense.toFixed(3)}` }));
  body.append(el("div", { className: "charts" }, left, ...(formats.length ? [right] : [])));
  new uPlot({ width: holder.clientWidth, height: 320, scales: { x: { time: false, range: [least, least + count * width] }, y: { range: (u, lo, hi) => [0, hi * 1.1] } }, legend: { show: false },
    axes: [{ ...axis(), label: "relative error", values: (u, ticks) => ticks.map((v) => v.toFixed(3)) }, { ...axis(), label: "layers", incrs: WHOLE }],
    series: [{}, { label: "layers", stroke: COLORS[0], fill: `${COLORS[0]}aa`, paths: uPlot.paths.bars({ size: [0.95, Infinity], align: 1 }), points: { show: false } }],
  }, [bins.map((_, i) => least + i * width), bins], holder);
  const bar = (row) => { const mark = el("div"); mark.style.cssText = `height:12px;border-radius:3px;min-width:2px;background:${COLORS[0]};width:${100 * row.error / most}%`; return mark; };
  const layers = (some) => { const made = table(["layer", "relative error", "", "kept dense"], some.map((row) => [el("code", { textContent: row.name }), row.error.toFixed(5), bar(row), row.dense ? "suggested" : ""])); for (const cell of made.querySelectorAll("td:nth-child(3)")) cell.style.width = "45%"; return made; };
  body.append(el("h2", { textContent: "Worst layers" }), layers(rows.slice(0, 15)));
  if (rows.length > 15) body.append(el("details", {}, el("summary", { textContent: `the other ${rows.length - 15}` }), layers(rows.slice(15))));
}
for (const link of document.querySelectorAll(".to-kernels")) link.onclick = (event) => { event.preventDefault(); show("kernels"); scrollTo(0, 0); };
let resized = 0;
window.onresize = () => { clearTimeout(resized); resized = setTimeout(() => { for (const [id, draw] of [["memory", drawMemory], ["training", drawTraining], ["numerics", drawNumerics]]) { drawn.delete(id); if (!$(`page-${id}`).hidden) { drawn.add(id); draw(); } } }, 150); };
bars();
theme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
show(["graph", "kernels", "memory", "numerics", "training", "export"].includes(location.hash.slice(1)) ? location.hash.slice(1) : "overview");
