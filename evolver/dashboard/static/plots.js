// What Plotly draws, and the colours of models, which are the same in every plot and in the legend above them.
"use strict";

// The colours of Okabe and Ito (2008), which colour-blind people tell apart. Where there are more experts than colours,
// dashes, symbols and hatching tell those of one colour apart.
const BEST = "#d55e00", EXPERTS = ["#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];
const DASHES = ["dot", "dash", "longdash", "dashdot"], SYMBOLS = ["circle", "square", "diamond", "cross"], HATCHES = ["", "/", "x", "."];

const color = (v) => getComputedStyle(document.documentElement).getPropertyValue(v).trim();
// Plotly reads some markup in texts, and a name is none.
const plain = (text) => `${text}`.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const short = (text, length) => (`${text}`.length > length ? `${`${text}`.slice(0, length - 1)}…` : `${text}`);

// How a model looks: the best candidate, the base, an expert by its place, or a merge without a search by its place.
function look(run, label) {
  if (label === "best") return { color: BEST, dash: "solid", symbol: "star", hatch: "" };
  if (label === "base") return { color: color("--text"), dash: "solid", symbol: "x", hatch: "" };
  const expert = run.experts.indexOf(label);
  const place = expert >= 0 ? Math.floor(expert / EXPERTS.length) : Object.keys(run.plain).filter((l) => l !== "base" && !run.experts.includes(l)).indexOf(label);
  const at = (list) => list[Math.max(0, place) % list.length];
  return { color: expert >= 0 ? EXPERTS[expert % EXPERTS.length] : color("--soft"), dash: at(DASHES), symbol: at(SYMBOLS), hatch: at(HATCHES) };
}

// A sample of a model's line and colour.
function swatch(run, label) {
  const { color: stroke, dash } = look(run, label);
  const pattern = { solid: null, dot: "2 3", dash: "6 3", longdash: "10 3", dashdot: "6 3 2 3" }[dash];
  return svg("svg", { width: 30, height: 12, "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 29, y1: 6, y2: 6, stroke, "stroke-width": label === "best" ? 4 : 3, "stroke-dasharray": pattern }));
}

function legend(run) {
  const labels = ["best", ...new Set([...Object.keys(run.plain), ...run.experts])];
  return el("ul", { class: "legend", "aria-label": "colours of the models in all plots" },
    labels.map((label) => el("li", { title: label }, swatch(run, label), " ", short(label === "best" ? "best candidate" : label, 24))),
    el("li", {}, el("span", { class: "dot" }), " other candidates"));
}

function put(id, data, more) {
  if (!window.Plotly || !document.getElementById(id)) return;
  // The tool bar has the strip above the plot for itself, and is there while the pointer is over the plot.
  const layout = { margin: { l: 55, r: 15, t: 44, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--text") }, showlegend: false,
    uirevision: "kept", font: { color: color("--text") }, legend: { orientation: "h", y: innerWidth < 600 ? -0.45 : -0.25 }, xaxis: { gridcolor: color("--line") },
    yaxis: { gridcolor: color("--line") }, ...more };
  Plotly.react(id, data, layout, { displayModeBar: "hover", displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
}

const titled = (x, y) => ({ xaxis: { title: { text: plain(short(x, 40)) }, gridcolor: color("--line") }, yaxis: { title: { text: plain(short(y, 40)) }, gridcolor: color("--line") } });

function draw(run) {
  drawCurve(run);
  put("tasks", Object.entries(run.tasks.models).map(([m, v]) => {
    const { color: fill, hatch } = look(run, m);
    return { x: run.tasks.tasks.map((t) => plain(short(t, 24))), y: v, type: "bar", name: plain(m), marker: { color: fill, pattern: { shape: hatch, fillmode: "overlay", fgcolor: color("--card"), size: 6 } } };
  }), { barmode: "group" });
  if (run.pareto.front.length) drawFront(run);
  const models = run.heat.models;
  if (models.length) put("heat", [{ z: run.heat.items, y: models.map((m, i) => `${i}: ${plain(short(m, 24))}`), type: "heatmap", colorscale: "Viridis" }],
    { yaxis: { autorange: "reversed", automargin: true }, xaxis: { title: { text: "dev items" } } });
  put("busy", [{ x: run.busy.at.map((t) => new Date(1000 * t)), y: run.busy.share, type: "scatter", mode: "lines", fill: "tozeroy", line: { shape: "hvh", color: color("--accent") } }],
    { xaxis: { gridcolor: color("--line") }, yaxis: { title: { text: "workers busy" }, tickformat: ".0%", range: [0, 1.05], gridcolor: color("--line") } });
}

function drawCurve(run) {
  const end = run.curve.spent.at(-1) || 1;
  put("curve", [
    { x: run.curve.spent, y: run.curve.score, mode: "markers", name: "candidates", marker: { color: color("--soft"), size: 5 }, text: run.curve.number },
    ...Object.entries(run.plain).map(([label, v]) => {
      const { color: stroke, dash } = look(run, label);
      return { x: [0, end], y: [v, v], mode: "lines", name: plain(label), line: { dash, width: 1.5, color: stroke } };
    }),
    { x: run.curve.spent, y: run.curve.best, mode: "lines", name: "best so far", line: { shape: "hv", width: 3, color: BEST } },
  ], titled("items scored", "dev score"));
}

function drawFront(run) {
  const points = (rows, more) => ({ x: rows.map((r) => r.values[axis[0]]), y: rows.map((r) => r.values[axis[1]]), text: rows.map((r) => `${r.number}`), mode: "markers", ...more });
  const models = Object.entries(run.tasks.models).map(([label, values]) => {
    const { color: fill, symbol } = look(run, label);
    return { x: [values[axis[0]]], y: [values[axis[1]]], mode: "markers", name: plain(label), marker: { color: fill, symbol, size: label === "best" ? 14 : 10 } };
  });
  put("pareto", [points(run.pareto.others, { name: "others", marker: { color: color("--soft"), size: 5 } }),
    points(run.pareto.front, { name: "front", marker: { color: "rgba(0,0,0,0)", size: 13, line: { color: color("--text"), width: 1.5 } } }), ...models],
  titled(run.pareto.tasks[axis[0]], run.pareto.tasks[axis[1]]));
}

// The coefficients of a candidate by layer. A line is an expert's where its name ends with one.
function drawLayers(run, settings) {
  if (!settings.lines.length) return;
  put("layers", settings.lines.map((l, i) => {
    const expert = run.experts.find((label) => l.name.endsWith(` of ${label}`));
    const { color: stroke, dash } = expert ? look(run, expert) : { color: color("--text"), dash: DASHES[i % DASHES.length] };
    return { x: l.values.map((_, k) => k), y: l.values, name: plain(short(l.name, 40)), mode: "lines+markers", line: { shape: "hvh", color: stroke, dash }, marker: { size: 4 } };
  }), { ...titled("layer", "coefficient"), showlegend: true });
}
