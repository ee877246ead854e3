// The pages: fetched as JSON, drawn anew when something has changed. No state is kept but what the server says.
"use strict";

const REFRESH = 2000;
const main = document.getElementById("main");
const live = document.getElementById("live");
const name = location.pathname.startsWith("/run/") ? decodeURIComponent(location.pathname.slice(5)) : null;
let shown = "", current = null; // what the page is of, as text and as the server said it
let chosen = null; // the candidate that is shown
const axis = [0, 1]; // the tasks that the front is drawn over

const number = (v, digits = 4) => (v === null || v === undefined ? "–" : Number(v).toFixed(digits));
const age = (s) => {
  if (s === null) return "–";
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (s >= size) return `${Math.floor(s / size)} ${unit} ago`;
  return `${Math.max(0, Math.floor(s))} s ago`;
};
const spent = (now, limit) => (limit === null ? `${now}` : `${now} of ${limit}`);

// Elements are made, not written as text: what a run is called can be no markup.
function el(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(given)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return made;
}

function table(head, rows, label) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    el("table", {}, el("thead", {}, el("tr", {}, head.map((h) => el("th", { scope: "col" }, h)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, cell)))))));
}

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(answer.status === 401 ? "open the address with its token again" : (await answer.json()).error);
  return answer.json();
}

async function act(path, body) {
  const answer = await fetch(path, { method: "POST", headers: { "x-evolver": "1" }, body: JSON.stringify(body || {}) });
  const said = answer.headers.get("content-type")?.includes("json") ? await answer.json() : { error: await answer.text() };
  live.textContent = said.said || said.error;
  setTimeout(refresh, 500);
}

const state = (s) => el("span", { class: `state ${s}` }, s);

function list(runs) {
  const rows = runs.map((r) => [el("a", { href: `/run/${encodeURIComponent(r.name)}` }, r.name), state(r.state), r.algorithm,
    number(r.best), number(r.expert), spent(r.spent[0], r.budget[0]), spent(r.spent[1], r.budget[1]), `${r.workers}`, age(r.age)]);
  const head = ["run", "state", "search", "best dev", "best expert", "candidates", "items", "workers", "last result"];
  return [runs.length ? table(head, rows, "runs") : el("p", {}, "There are no runs in this folder yet.")];
}

function facts(s) {
  const pairs = [["state", state(s.state)], ["best dev", number(s.best)], ["best expert", number(s.expert)],
    ["candidates", spent(s.spent[0], s.budget[0])], ["items", spent(s.spent[1], s.budget[1])], ["failed", `${s.failed}`],
    ["last result", age(s.age)], ["run by", s.holder || "nobody"]];
  return el("dl", { class: "facts" }, pairs.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v))));
}

function actions(s) {
  const going = s.state === "running";
  const budget = el("input", { type: "number", min: "1", id: "budget", "aria-label": "budget of candidates", value: s.budget[0] });
  const path = `/api/runs/${encodeURIComponent(name)}`;
  return el("div", { class: "actions" },
    el("button", { id: "stop", disabled: !going, on: { click: () => act(`${path}/stop`) } }, "Stop"),
    el("button", { id: "resume", disabled: going, on: { click: () => act(`${path}/resume`) } }, "Resume"),
    el("label", { for: "budget" }, "candidates"), budget,
    el("button", { id: "extend", disabled: going, on: { click: () => act(`${path}/resume`, { candidates: Number(budget.value) }) } }, "Resume with this budget"),
    el("button", { id: "export", on: { click: () => act(`${path}/export`) } }, "Export the best"));
}

function card(title, content, wide = false) {
  return el("section", { class: wide ? "card wide" : "card" }, el("h2", {}, title), content);
}

const plot = (id) => el("div", { class: "plot", id });

function page(run) {
  const s = run.status;
  document.title = `${s.name} – Evolver`;
  document.getElementById("where").textContent = s.name;
  const total = Math.max(1e-9, ...Object.values(run.cost.workers));
  const workers = Object.entries(run.cost.workers).map(([w, sec]) => [w || "–", number(sec, 1), `${Math.round((100 * sec) / total)} %`]);
  return [
    facts(s),
    s.verdict ? el("p", { class: "verdict" }, s.verdict) : null,
    ...run.warnings.map((w) => el("p", { class: "warning" }, w)),
    actions(s),
    el("div", { class: "cards" },
      card("Best dev score against scored items", plot("curve"), true),
      card("Scores per task", plot("tasks")),
      run.pareto.front.length ? card(`Pareto front (hypervolume ${number(run.pareto.volume)})`,
        [run.pareto.whole ? null : el("p", {}, `The ${run.pareto.front.length} of it with the highest sums.`), axes(run), plot("pareto")]) : null,
      card("Lineage of the best candidate", plot("lineage"), run.pareto.front.length > 0), // no hole beside it
      card("Answers: models by items", plot("heat"), true),
      card("Leading candidates", table(["candidate", "score", "items", "seconds", "proposed by"],
        run.candidates.slice(0, 25).map((c) => [el("a", { href: "#candidate", on: { click: () => choose(c.number) } }, `${c.number}`),
          number(c.score), `${c.size}`, number(c.total, 2), c.proposer]), "candidates")),
      card("Workers and cost", [run.busy.at.length ? plot("busy") : null, table(["worker", "seconds", "of the busiest"], workers, "workers"),
        el("p", {}, `${number(run.cost.seconds.total, 1)} s of evaluation, of these ${number(run.cost.seconds.materialise, 1)} s materialising; `
          + `${run.cost.flying} under way, ${run.cost.guessed} scored ahead`),
        ...run.cost.bill.map(([what, value]) => el("p", {}, `${what}: ${value}`))]),
      run.failures.length ? card("Failures", table(["candidate", "reason"], run.failures.map((f) => [`${f.number}`, f.reason]), "failures"), true) : null,
      candidateCard(run)),
  ];
}

// Which tasks the front is drawn over, where there are more than two.
function axes(run) {
  if (run.pareto.tasks.length < 3) return null;
  const pick = (k) => el("select", { id: `axis${k}`, "aria-label": k ? "upwards" : "to the right", on: { change: (e) => { axis[k] = +e.target.value; draw(run); } } },
    run.pareto.tasks.map((t, i) => el("option", { value: `${i}`, selected: axis[k] === i }, t)));
  return el("p", {}, pick(0), " against ", pick(1));
}

function candidateCard(run) {
  const input = el("input", { type: "number", min: "0", id: "which", "aria-label": "number of a candidate", value: chosen ?? run.best });
  return el("section", { class: "card wide", id: "candidate" }, el("h2", {}, "A candidate"),
    el("div", { class: "actions" }, el("label", { for: "which" }, "candidate"), input,
      el("button", { id: "show", on: { click: () => choose(Number(input.value)) } }, "Show"),
      el("button", { id: "take", on: { click: () => act(`/api/runs/${encodeURIComponent(name)}/export`, { candidate: Number(input.value) }) } }, "Export it")),
    el("div", { id: "shown" }));
}

function choose(n) {
  chosen = n;
  document.getElementById("which").value = n;
  candidate();
}

async function candidate() {
  if (chosen === null) return;
  const box = document.getElementById("shown");
  let found;
  try {
    found = await get(`/api/runs/${encodeURIComponent(name)}/candidates/${chosen}`);
  } catch (error) {
    box.replaceChildren(el("p", { class: "warning" }, error.message));
    return;
  }
  const rows = found.settings.rules.flatMap((rule) => Object.entries(rule.values).map(([k, v]) => [rule.method, rule.place, k,
    Array.isArray(v) ? v.map((x, i) => `${rule.inputs[i] ?? i}: ${number(x)}`).join(", ") : typeof v === "number" && !Number.isInteger(v) ? number(v) : `${v}`]));
  const scores = Object.entries(found.tasks).map(([t, v]) => `${t} ${number(v)}`).join(", ");
  box.replaceChildren(
    el("p", {}, `Candidate ${chosen}, recipe ${found.settings.recipe}. ${found.reason || scores}`),
    found.settings.depth ? plot("layers") : "",
    rows.length ? table(["method", "where", "setting", "value"], rows, "settings") : el("p", {}, "It is made by crossovers alone: no coefficients are in force."),
    plot("family"));
  const lines = found.settings.lines.map((l) => ({ x: l.values.map((_, i) => i), y: l.values, name: l.name, mode: "lines+markers", line: { shape: "hvh" }, marker: { size: 4 } }));
  if (lines.length) put("layers", lines, { xaxis: { title: { text: "layer" }, tickformat: "d", gridcolor: color("--line") }, yaxis: { title: { text: "coefficient" }, gridcolor: color("--line") } });
  family("family", found.lineage);
}

const color = (v) => getComputedStyle(document.documentElement).getPropertyValue(v).trim();

function put(id, data, more) {
  if (!window.Plotly || !document.getElementById(id)) return;
  const layout = { margin: { l: 50, r: 15, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    uirevision: "kept", font: { color: color("--text") }, legend: { orientation: "h", y: innerWidth < 600 ? -0.45 : -0.25 }, xaxis: { gridcolor: color("--line") },
    yaxis: { gridcolor: color("--line") }, ...more };
  Plotly.react(id, data, layout, { displaylogo: false, responsive: true });
}

function draw(run) {
  const titled = (x, y) => ({ xaxis: { title: { text: x }, gridcolor: color("--line") }, yaxis: { title: { text: y }, gridcolor: color("--line") } });
  const end = run.curve.spent.at(-1) || 1;
  put("curve", [
    { x: run.curve.spent, y: run.curve.score, mode: "markers", name: "candidates", marker: { color: color("--soft"), size: 5 }, text: run.curve.number },
    { x: run.curve.spent, y: run.curve.best, mode: "lines", name: "best so far", line: { shape: "hv", width: 3, color: color("--accent") } },
    ...Object.entries(run.plain).map(([label, v]) => ({ x: [0, end], y: [v, v], mode: "lines", name: label, line: { dash: "dot", width: 1.5 } })),
  ], titled("items scored", "dev score"));
  put("tasks", Object.entries(run.tasks.models).map(([m, v]) => ({ x: run.tasks.tasks, y: v, type: "bar", name: m })), { barmode: "group" });
  if (run.pareto.front.length) {
    const points = (rows, more) => ({ x: rows.map((r) => r.values[axis[0]]), y: rows.map((r) => r.values[axis[1]]), text: rows.map((r) => `${r.number}`), mode: "markers", ...more });
    put("pareto", [points(run.pareto.others, { name: "others", marker: { color: color("--soft") } }),
      points(run.pareto.front, { name: "front", marker: { color: color("--accent"), size: 9 } })],
    titled(run.pareto.tasks[axis[0]], run.pareto.tasks[axis[1]]));
  }
  const models = run.heat.models;
  if (models.length) put("heat", [{ z: run.heat.items, y: models.map((m, i) => `${i}: ${m}`), type: "heatmap", colorscale: "Viridis" }],
    { yaxis: { autorange: "reversed", automargin: true }, xaxis: { title: { text: "dev items" } } });
  put("busy", [{ x: run.busy.at.map((t) => new Date(1000 * t)), y: run.busy.share, type: "scatter", mode: "lines", fill: "tozeroy", line: { shape: "hvh", color: color("--accent") } }],
    { xaxis: { gridcolor: color("--line") }, yaxis: { title: { text: "workers busy" }, tickformat: ".0%", range: [0, 1.05], gridcolor: color("--line") }, showlegend: false });
  family("lineage", run.lineage);
}

function family(id, lineage) {
  const at = new Map(), levels = new Map();
  for (const n of lineage.nodes) {
    const place = levels.get(n.depth) || 0;
    levels.set(n.depth, place + 1);
    at.set(n.id, [place + 0.3 * Math.sin(2.4 * n.depth), -n.depth, n.label, n.made]); // so that no line hides behind another
  }
  const lines = { x: [], y: [], mode: "lines", line: { color: color("--line") }, hoverinfo: "skip", showlegend: false };
  for (const [a, b] of lineage.edges) {
    lines.x.push(at.get(a)[0], at.get(b)[0], null);
    lines.y.push(at.get(a)[1], at.get(b)[1], null);
  }
  const nodes = [...at.values()];
  put(id, [lines, { x: nodes.map((n) => n[0]), y: nodes.map((n) => n[1]), text: nodes.map((n) => n[2]), hovertext: nodes.map((n) => n[3]),
    mode: nodes.length < 25 ? "markers+text" : "markers", textposition: "top center", marker: { size: 10, color: color("--accent") },
    hoverinfo: "text", showlegend: false, cliponaxis: false }], { xaxis: { visible: false }, yaxis: { visible: false } });
}

// The page is made anew, but for what somebody may be looking into or typing at.
function renew(run) {
  const root = el("div", {}, page(run));
  const typing = document.activeElement?.id === "budget" ? ["budget"] : [];
  for (const id of ["candidate", ...typing, ...[...document.querySelectorAll("main .plot")].map((p) => p.id)]) {
    const old = document.getElementById(id);
    const made = root.querySelector(`#${id}`);
    if (old && made && old !== made) made.replaceWith(old);
  }
  main.replaceChildren(root);
  draw(run);
}

async function refresh() {
  try {
    const found = await get(name === null ? "/api/runs" : `/api/runs/${encodeURIComponent(name)}`);
    const now = JSON.stringify(found, (key, value) => (key === "age" ? undefined : value));
    if (now !== shown) {
      shown = now, current = found;
      const focused = document.activeElement?.id, top = scrollY;
      if (name === null) main.replaceChildren(...list(found));
      else renew(found);
      if (focused) document.getElementById(focused)?.focus();
      scrollTo(0, top);
    }
  } catch (error) {
    live.textContent = error.message;
  }
}

// The server is asked while Plotly, which is large, is still being read.
refresh();
setInterval(refresh, REFRESH);
addEventListener("load", () => { if (name !== null && current) draw(current); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { shown = ""; refresh(); candidate(); });
