"use strict";
// The page Memory, second half: what a paged optimizer has on the device when, and what of each copy a prefetch hides.
const ms = (t) => (t >= 1e4 ? `${(t / 1e3).toFixed(1)} s` : `${t >= 100 ? t.toFixed(0) : t.toFixed(t >= 1 ? 2 : 4)} ms`);
const movedName = (move) => (move.count > 1 ? `${move.first} and ${move.count - 1} more` : move.first);
const HIDDEN = "#0f9d8a", LATE = "#d9480f";

function drawPaging() {
  const box = $("paging");
  box.replaceChildren(el("h2", { textContent: "Pages of the optimizer" }));
  if (!data.paging.length) {
    box.append(el("p", { className: "note" }, "No paged optimizer was planned: ", el("code", { textContent: "qlora-compile inspect MODEL --optimizer paged_adamw --optimizer-budget 64MiB --format html --out FILE" }), " plans one."));
    return;
  }
  for (const timeline of data.paging) drawTimeline(box, timeline);
}
function drawTimeline(box, timeline) {
  const moves = timeline.prefetches, copies = moves.reduce((n, m) => n + m.copy_ms, 0), hidden = moves.reduce((n, m) => n + m.hidden_ms, 0);
  const words = [`${timeline.optimizer}, ${timeline.step_in_backward ? "updates inside the backward pass" : "step() after the backward pass"}: at most ${human(timeline.peak_bytes)} planned on the device`,
    timeline.budget == null ? "without a budget" : `of a budget of ${human(timeline.budget)}`];
  const more = [`the backward pass takes an estimated ${ms(timeline.backward_ms)}`];
  if (timeline.gradients_in_pages) more.push(`${timeline.gradients_in_pages} gradients lie in pages`);
  if (moves.length) more.push(`${moves.length} prefetches hide ${copies ? (100 * hidden / copies).toFixed(0) : 100}% of ${ms(copies)} of copies`);
  box.append(el("p", { textContent: `${words.join(" ")}; ${more.join("; ")}.` }));
  const left = el("div"), right = el("div");
  box.append(el("div", { className: "charts" }, left, right));
  if (timeline.resident.length) residentChart(left, timeline);
  if (!moves.length) { right.append(el("p", { className: "note", textContent: "Nothing is prefetched: all of the state stays on the device." })); return; }
  lanes(right, timeline);
  const rows = moves.map((m) => [el("code", { textContent: movedName(m) }), human(m.bytes), el("code", { textContent: m.after ? (m.module ? `${m.after} (${m.module})` : m.after) : "the start" }), ms(m.issued_ms), ms(m.needed_ms), ms(m.copy_ms), `${m.copy_ms ? (100 * m.hidden_ms / m.copy_ms).toFixed(0) : 100}%`]);
  const made = table(["state of", "bytes", "prefetched after", "at", "needed at", "copy", "hidden"], rows);
  box.append(el("div", { className: "scroll prefetches", tabIndex: 0, ariaLabel: "Every prefetch" }, made));
}
const msAxis = (label) => ({ ...axis(), label, values: (u, ticks) => ticks.map((t) => +t.toPrecision(4)) });
// State and gradients in pages, one on the other; the budget as a line.
function residentChart(box, timeline) {
  const end = timeline.backward_ms, line = [[0, 0, 0], ...timeline.resident.filter(([t]) => t > 0)];
  if (timeline.resident[0][0] <= 0) line[0] = timeline.resident[0];
  line.push([Math.max(end, line[line.length - 1][0]), ...line[line.length - 1].slice(1)]);
  const state = line.map((r) => r[1]), both = line.map((r) => r[1] + r[2]), budget = line.map(() => timeline.budget);
  const holder = el("div", {}, el("h2", { textContent: "Resident over the backward pass" }));
  box.append(holder);
  const band = (label, kind, shown) => ({ label, stroke: colorOf(kind), fill: `${colorOf(kind)}cc`, width: 1, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false }, value: (u, v, s, i) => (i == null ? "" : human(shown(line[i]))) });
  const values = (u, ticks) => ticks.map((v) => human(v, "B", 1)), top = Math.max(...both, timeline.budget || 0);
  new uPlot({ width: holder.clientWidth, height: 300, scales: { x: { time: false }, y: { range: [0, top * 1.06 || 1] } }, axes: [msAxis("estimated ms into the backward pass"), { ...axis(), size: 84, values }],
    series: [{ label: "ms", value: (u, v) => (v == null ? "" : ms(v)) }, band("gradients", "gradients", (r) => r[2]), band("state", "optimizer", (r) => r[1]),
      ...(timeline.budget == null ? [] : [{ label: "budget", stroke: css("--hot"), dash: [6, 4], width: 1.5, points: { show: false }, value: () => human(timeline.budget) }])] },
  [line.map((r) => r[0]), both, state, ...(timeline.budget == null ? [] : [budget])], holder);
}
// One row a prefetch: a line from its issue to its need, on it the copy; what of the copy comes after the need is late.
function lanes(box, timeline) {
  const moves = timeline.prefetches, says = el("p", { className: "note", role: "status", textContent: "Point at a row: what it brings, and what hides it. Drag to zoom, double-click to go back." });
  const holder = el("div", {}, el("h2", { textContent: "What each prefetch hides" }));
  box.append(holder, says);
  const draw = (u) => {
    const { ctx, bbox } = u, step = bbox.height / moves.length, thick = Math.max(1.5, Math.min(12 * devicePixelRatio, step * 0.6));
    ctx.save(); ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
    moves.forEach((m, row) => {
      const y = bbox.top + (row + 0.5) * step, x = (t) => u.valToPos(t, "x", true), done = m.begun_ms + m.copy_ms, split = Math.min(done, Math.max(m.begun_ms, m.needed_ms));
      ctx.fillStyle = css("--dim"); ctx.fillRect(x(m.issued_ms), y - 0.5, Math.max(1, x(m.needed_ms) - x(m.issued_ms)), 1);
      ctx.fillRect(x(m.needed_ms) - 1, y - thick / 2, 2, thick);
      ctx.fillStyle = HIDDEN; ctx.fillRect(x(m.begun_ms), y - thick / 2, Math.max(2, x(split) - x(m.begun_ms)), thick);
      if (done > split) { ctx.fillStyle = LATE; ctx.fillRect(x(split), y - thick / 2, Math.max(2, x(done) - x(split)), thick); }
    });
    ctx.restore();
  };
  const pick = (u) => {
    if (u.cursor.top == null || u.cursor.top < 0) return;
    const m = moves[Math.min(moves.length - 1, Math.max(0, Math.floor(u.cursor.top / (u.bbox.height / devicePixelRatio) * moves.length)))];
    says.textContent = `${movedName(m)}: ${human(m.bytes)}, prefetched after ${m.after || "the start"} at ${ms(m.issued_ms)}, needed at ${ms(m.needed_ms)}: ${ms(m.hidden_ms)} of ${ms(m.copy_ms)} of copying hidden.`;
  };
  const first = Math.min(...moves.map((m) => m.issued_ms));
  const last = Math.max(timeline.backward_ms, ...moves.map((m) => m.begun_ms + m.copy_ms));
  const from = Math.max(0, first - 0.2 * (last - first)); // before the first prefetch there is nothing to see
  new uPlot({ width: holder.clientWidth, height: 300, scales: { x: { time: false, range: (u, low, high) => [Math.max(low, 0), high || 1] }, y: { range: [0, 1] } }, legend: { show: false },
    axes: [msAxis("green: copied meanwhile; orange: waited for; tick: needed"), { ...axis(), size: 84, label: "prefetches, in order", values: () => [], grid: { show: false }, ticks: { show: false } }],
    series: [{}, { stroke: "transparent", points: { show: false } }], hooks: { draw: [draw], setCursor: [pick] } }, [[from, last], [0, 0]], holder);
}
// On the chart of a step: a tick in the upper row where state comes to the device, in the lower one where it leaves.
function pageMarks(u) {
  const marks = data.memory.pages, { ctx, bbox } = u, ratio = devicePixelRatio, tall = 9 * ratio;
  if (!marks.length) return;
  const first = u.valToPos(marks[0][0], "x", true), top = { in: bbox.top + 2 * ratio, out: bbox.top + 15 * ratio };
  ctx.save(); ctx.fillStyle = colorOf("optimizer");
  for (const [event, way] of marks) ctx.fillRect(u.valToPos(event, "x", true) - ratio, top[way], 2 * ratio, tall);
  ctx.fillStyle = css("--dim"); ctx.font = `${12 * ratio}px sans-serif`; ctx.textAlign = "right"; ctx.textBaseline = "middle";
  for (const way of ["in", "out"]) if (marks.some((mark) => mark[1] === way)) ctx.fillText(`pages ${way}`, first - 8 * ratio, top[way] + tall / 2);
  ctx.restore();
}
const pagesBetween = (from, to) => data.memory.pages.filter(([event]) => event > from && event <= to)
  .map(([, way, bytes, first, count]) => `pages ${way}: ${human(bytes)}, ${count > 1 ? `${first} and ${count - 1} more` : first}`);
