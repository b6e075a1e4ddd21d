"use strict";
// Draws the charts of a run's page with uPlot. All data come from #data; texts are set as text, never as HTML.

async function readData() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (i) => css(`--c${i % 8}`);
const barColor = (i) => `hsl(${(210 + i * 137.5) % 360} 55% ${i % 2 ? 45 : 58}%)`; // as many as there are phases
const element = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const shown = (value) => {
  if (value == null) return "–";
  if (value && Math.abs(value) < 1e-3) return value.toExponential(3).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(5));
};

function smoothed(values, width) {
  if (width <= 1) return values;
  const out = [];
  let sum = 0;
  values.forEach((value, i) => {
    sum += value - (i >= width ? values[i - width] : 0);
    out.push(sum / Math.min(width, i + 1));
  });
  return out;
}

// One color a curve where there is one run; else one a run, and a dash a curve.
function look(curve, number, names) {
  if (page.runs.length === 1) return { stroke: color(number), width: 1.6 };
  const dash = [[], [6, 4], [2, 3], [10, 4, 2, 4]][names.indexOf(curve.label) % 4];
  return { stroke: color(curve.run), width: 1.6, dash };
}

const label = (curve) => (page.runs.length > 1 ? `${page.runs[curve.run]}: ${curve.label}` : curve.label);

function joined(curves, width) {
  return uPlot.join(curves.map((curve) => [curve.x, smoothed(curve.y, width)]));
}

const points = (curve) => ({ show: curve.x.length < 40, size: 5 });

function linesOf(chart) {
  const names = [...new Set(chart.curves.map((curve) => curve.label))];
  const series = chart.curves.map((curve, i) => ({
    label: label(curve), spanGaps: true, points: points(curve), value: (_, v) => shown(v), ...look(curve, i, names),
  }));
  return { data: joined(chart.curves, settings.smooth), series };
}

function bandsOf(chart) {
  const series = chart.curves.map((curve, i) => ({
    label: curve.label, stroke: color(0), width: i === 3 ? 2 : i % 6 ? 0 : 0.7, dash: i % 6 ? [] : [3, 3],
    points: { show: curve.x.length === 1 }, value: (_, v) => shown(v),
  }));
  const band = (high, low, share) => ({ series: [high + 1, low + 1], fill: mixed(color(0), share) });
  return { data: joined(chart.curves, 1), series, bands: [band(5, 1, 0.16), band(4, 2, 0.28)] };
}

function mixed(hex, share) {
  const part = (i) => parseInt(hex.slice(i, i + 2), 16);
  return `rgba(${part(1)}, ${part(3)}, ${part(5)}, ${share})`;
}

// Stacked: each bar is drawn up to the sum of those below it, the highest first.
function barsOf(chart) {
  const bars = chart.curves.filter((curve) => !curve.is_line);
  const lines = chart.curves.filter((curve) => curve.is_line);
  let below = bars[0].x.map(() => 0);
  const stack = bars.map((curve, i) => {
    below = below.map((sum, j) => sum + curve.y[j]);
    const own = curve.y;
    return {
      sums: below,
      series: {
        label: curve.label, fill: barColor(i), stroke: barColor(i), width: 0, points: { show: false },
        paths: uPlot.paths.bars({ size: [0.9, 60] }), value: (u, v, si, j) => (j == null ? "–" : shown(own[j])),
      },
    };
  }).reverse();
  const line = lines.map((curve) => ({
    label: curve.label, stroke: css("--ink"), width: 1.6, dash: [5, 4], points: { show: false }, value: (_, v) => shown(v),
  }));
  return { data: [bars[0].x, ...stack.map((s) => s.sums), ...lines.map((c) => c.y)], series: [...stack.map((s) => s.series), ...line], zero: true };
}

function drawAlarms(chart) {
  return (u) => {
    const runs = new Set(chart.curves.map((curve) => curve.run));
    u.ctx.save();
    u.ctx.strokeStyle = css("--warn");
    u.ctx.setLineDash([4, 4]);
    for (const alarm of page.alarms) {
      const x = u.valToPos(alarm.step, "x", true);
      if (!runs.has(alarm.run) || x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
    }
    u.ctx.restore();
  };
}

// The alarms that began at the step under the pointer are named below the chart.
function nameAlarms(chart, node) {
  return (u) => {
    const step = u.cursor.idx == null ? null : u.data[0][u.cursor.idx];
    const names = page.alarms.filter((alarm) => alarm.step === step).map((alarm) => `${alarm.name} begins`);
    node.textContent = names.length ? names.join(", ") : chart.about;
    node.classList.toggle("warn", names.length > 0);
  };
}

const kinds = { lines: linesOf, bands: bandsOf, bars: barsOf };

function zoomAll(from) {
  const { min, max } = from.scales.x;
  for (const plot of plots) {
    if (plot !== from && (plot.scales.x.min !== min || plot.scales.x.max !== max)) plot.setScale("x", { min, max });
  }
}

// From the first step of any curve to the last, and half a step on both sides, for bars.
function wholeRange() {
  const steps = hosts.flatMap(([chart]) => chart.curves.flatMap(({ x }) => [x[0], x[x.length - 1]]));
  return { min: Math.min(...steps) - 0.5, max: Math.max(...steps) + 0.5 };
}

const showWhole = (u) => () => {
  u.setScale("x", wholeRange());
  return null;
};

function draw(chart, host) {
  const about = host.querySelector(".about");
  const { data, series, bands, zero } = kinds[chart.kind](chart);
  const axis = { stroke: css("--faint"), grid: { stroke: css("--grid") }, ticks: { stroke: css("--grid") } };
  const isLog = settings.log && chart.kind === "lines" && chart.curves.every((c) => c.y.every((v) => v > 0));
  const y = isLog ? { distr: 3 } : zero ? { range: (u, low, high) => [0, high * 1.05 || 1] } : {};
  const options = {
    width: host.clientWidth - 22, height: 210, bands,
    scales: { x: { time: false }, y },
    axes: [axis, { ...axis, size: 58, values: (u, ticks) => ticks.map((v) => (v == null ? "" : shown(v))) }],
    series: [{ label: "step" }, ...series],
    cursor: { sync: { key: "steps" }, points: { size: 6 }, drag: { x: true, y: false }, bind: { dblclick: showWhole } },
    legend: { live: true },
    hooks: { draw: [drawAlarms(chart)], setCursor: [nameAlarms(chart, about)], setScale: [(u, key) => key === "x" && ready && zoomAll(u)] },
  };
  plots.push(new uPlot(options, data, host));
}

function drawAll() {
  ready = false;
  for (const plot of plots.splice(0)) plot.destroy();
  for (const [chart, host] of hosts) draw(chart, host);
  for (const plot of plots) plot.setScale("x", wholeRange());
  document.querySelectorAll(".dot").forEach((dot) => (dot.style.background = color(+dot.dataset.run)));
  setTimeout(() => (ready = true)); // uPlot sets the first scales in a microtask
}

function layOut() {
  const root = document.getElementById("charts");
  document.getElementById("empty").hidden = page.sections.length > 0;
  for (const section of page.sections) {
    root.append(element("h2", "", section.title));
    const grid = element("div", "grid");
    root.append(grid);
    for (const chart of section.charts) {
      const host = element("div", "chart");
      host.dataset.title = chart.title;
      host.append(element("h3", "", chart.title), element("p", "about", chart.about));
      grid.append(host);
      hosts.push([chart, host]);
    }
  }
}

function filterConfig() {
  const which = document.getElementById("which").value;
  const words = document.getElementById("filter").value.toLowerCase();
  for (const row of document.querySelectorAll(".config tbody tr")) {
    const isMeant = which === "all" || row.dataset[which] === "1" || words;
    row.hidden = !(isMeant && row.textContent.toLowerCase().includes(words));
  }
}

function listen() {
  document.getElementById("smooth").addEventListener("change", (e) => { settings.smooth = Math.max(1, +e.target.value || 1); drawAll(); });
  document.getElementById("log").addEventListener("change", (e) => { settings.log = e.target.checked; drawAll(); });
  document.getElementById("which").addEventListener("change", filterConfig);
  document.getElementById("filter").addEventListener("input", filterConfig);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 200); });
}

const settings = { smooth: 1, log: false };
const plots = [], hosts = [];
let page, ready = false;

readData().then((data) => {
  page = data;
  filterConfig();
  layOut();
  drawAll();
  listen();
  document.body.dataset.ready = String(Math.round(performance.now()));
});
