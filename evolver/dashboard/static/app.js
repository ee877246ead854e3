// The pages: fetched as JSON, drawn anew when something has changed. No state is kept but what the server says.
"use strict";

const REFRESH = 2000, SOON = 200; // milliseconds
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

const sentence = (r) => r.verdict || { running: "It is running.", stopped: "It was stopped; it can be resumed.", reading: "It is being read." }[r.state] || "";

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
  const rows = runs.map((r) => [[tick(r.name), el("a", { href: `/run/${encodeURIComponent(r.name)}`, title: r.name }, short(r.name, 40)), el("p", { class: "sentence" }, sentence(r))],
    state(r.state), spark(r.line), number(r.best), number(r.expert), spent(r.spent[0], r.budget[0]), spent(r.spent[1], r.budget[1]), `${r.workers}`, age(r.age)]);
  const head = ["run", "state", "best so far", "best dev", "best expert", "candidates", "items", "workers", "last result"];
  return [starting(), comparing(runs), runs.length ? table(head, rows, "runs") : el("p", {}, "There are no runs in this folder yet.")];
}

// A small curve of the best dev score, by share of the candidates.
function spark(line) {
  if (!line.length) return "–";
  const low = Math.min(...line), high = Math.max(...line), size = [96, 24];
  const at = (v, k) => [2 + ((size[0] - 4) * k) / Math.max(1, line.length - 1), size[1] - 3 - (high > low ? ((size[1] - 6) * (v - low)) / (high - low) : 0)].map((c) => c.toFixed(1));
  const said = `best dev score so far, from ${number(line[0])} to ${number(line.at(-1))}`;
  const d = line.map((v, k) => (k ? `H${at(v, k)[0]}V${at(v, k)[1]}` : `M${at(v, k)}`)).join("");
  return svg("svg", { class: "spark", width: size[0], height: size[1], role: "img", "aria-label": said }, svg("title", {}, said),
    svg("path", { d: line.length > 1 ? d : `${d}H${size[0] - 2}` }));
}

function starting() {
  const file = el("input", { id: "config", maxlength: "1000", size: "40", placeholder: "configs/demo.yaml", "aria-label": "path of a configuration", spellcheck: "false" });
  const start = async (event) => {
    event.preventDefault();
    button.disabled = true;
    live.textContent = "The configuration is being checked.";
    await act("/api/start", { config: file.value });
    button.disabled = false;
  };
  const button = el("button", { id: "start", type: "submit" }, "Check and start");
  return el("form", { class: "actions", on: { submit: start } }, el("label", { for: "config" }, "start the configuration"), file, button);
}

function facts(s) {
  const pairs = [["state", state(s.state)], ["best dev", number(s.best)], ["best expert", number(s.expert)],
    ["candidates", spent(s.spent[0], s.budget[0])], ["items", spent(s.spent[1], s.budget[1])], ["failed", `${s.failed}`],
    ["last result", age(s.age)], ["run by", s.holder || "nobody"]];
  if (s.infeasible !== null) pairs.push(["break constraints", `${s.infeasible}`]);
  if (s.ended) pairs.push(["search ended, as", s.ended]);
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
// A plot, or a sentence where there is nothing to draw.
const plotted = (there, id) => (there ? plot(id) : el("p", {}, "No model has a score yet."));

function page(run) {
  const s = run.status, guarded = s.infeasible !== null;
  document.title = `${s.name} – Evolver`;
  document.getElementById("where").textContent = s.name;
  const total = Math.max(1e-9, ...Object.values(run.cost.workers));
  const workers = Object.entries(run.cost.workers).map(([w, sec]) => [w || "–", number(sec, 1), `${Math.round((100 * sec) / total)} %`]);
  return [
    facts(s),
    s.verdict ? el("p", { class: "verdict" }, s.verdict) : null,
    ...run.warnings.map((w) => el("p", { class: "warning" }, w)),
    actions(s),
    legend(run),
    el("div", { class: "cards" },
      card("Best dev score against scored items", plotted(Object.keys(run.plain).length || run.best !== null, "curve"), true),
      card("Scores per task", plotted(Object.keys(run.tasks.models).length, "tasks"), !run.pareto.front.length), // no hole beside it
      run.pareto.front.length ? card(`Pareto front (hypervolume ${number(run.pareto.volume)})`,
        [run.pareto.whole ? null : el("p", {}, `The ${run.pareto.front.length} of it with the highest sums.`), axes(run), plot("pareto")]) : null,
      card("Lineage of the best candidate", lineage(run, run.lineage, "lineage"), true),
      card("Answers: models by items", plotted(run.heat.models.length, "heat"), true),
      card("Leading candidates", table(["candidate", "score", "items", "seconds", "proposed by", ...(guarded ? ["constraints"] : [])],
        run.candidates.slice(0, 25).map((c) => [el("a", { href: "#candidate", on: { click: () => choose(c.number) } }, `${c.number}`),
          number(c.score), `${c.size}`, number(c.total, 2), c.proposer, ...(guarded ? [c.score === null ? "–" : c.violation > 0 ? "broken" : "kept"] : [])]), "candidates")),
      run.finals.length ? card("The finals", table(["model", "dev", "select"],
        run.finals.map((f) => [f.label, number(f.dev), number(f.select)]), "finals")) : null,
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
    ...lineage(current, found.lineage, "family"));
  drawLayers(current, found.settings);
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

// The list is made anew, but for the path that somebody may be typing.
function relist(runs) {
  const old = document.querySelector("form");
  const made = list(runs);
  main.replaceChildren(...[old || made[0], ...made.slice(1)].filter((part) => part !== null));
}

async function refresh() {
  try {
    const found = await get(name === null ? "/api/runs" : `/api/runs/${encodeURIComponent(name)}`);
    if (name === null && found.some((r) => r.state === "reading")) setTimeout(refresh, SOON); // the rest of the list
    const now = JSON.stringify(found, (key, value) => (key === "age" ? undefined : value));
    if (now !== shown) {
      shown = now, current = found;
      const focused = document.activeElement?.id, top = scrollY;
      if (name === null) relist(found);
      else renew(found);
      if (focused) document.getElementById(focused)?.focus();
      scrollTo(0, top);
    }
  } catch (error) {
    if (current) live.textContent = error.message;
    else main.replaceChildren(el("p", { class: "warning" }, error.message));
  }
}

// The server is asked while Plotly, which is large, is still being read.
if (location.pathname === "/compare") {
  compareRuns();
  addEventListener("load", () => { if (current) drawCurves(current); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (current) drawCurves(current); });
} else {
  refresh();
  setInterval(refresh, REFRESH);
  addEventListener("load", () => { if (name !== null && current) draw(current); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { shown = ""; refresh(); candidate(); });
}
