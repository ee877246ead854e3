// Several runs side by side: which ones are picked in the list, and the page that compares them.
"use strict";

const MOST = 8; // runs that one page compares
const picked = new Set(); // names of the runs that are ticked in the list

function tick(run) {
  const box = el("input", { type: "checkbox", class: "tick", id: `tick-${run}`, "aria-label": `compare ${run}`,
    on: { change: () => { if (box.checked) picked.add(run); else picked.delete(run); enough(); } } });
  box.checked = picked.has(run);
  return box;
}

function comparing(runs) {
  for (const run of picked) if (!runs.some((r) => r.name === run)) picked.delete(run);
  const open = () => { location.href = `/compare?${[...picked].map((run) => `run=${encodeURIComponent(run)}`).join("&")}`; };
  return runs.length < 2 ? null : el("div", { class: "actions" },
    el("button", { id: "compare", disabled: !pickable(), on: { click: open } }, "Compare the ticked runs"));
}

const pickable = () => picked.size >= 2 && picked.size <= MOST;

function enough() {
  document.getElementById("compare").disabled = !pickable();
}

// What a run's line looks like, by its place.
const runLook = (place) => ({ color: [BEST, ...EXPERTS][place % (EXPERTS.length + 1)], dash: ["solid", ...DASHES][Math.floor(place / (EXPERTS.length + 1)) % (DASHES.length + 1)] });

function runSwatch(place) {
  const { color: stroke, dash } = runLook(place);
  return svg("svg", { width: 30, height: 12, "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 29, y1: 6, y2: 6, stroke, "stroke-width": 3, "stroke-dasharray": { solid: null, dot: "2 3", dash: "6 3", longdash: "10 3", dashdot: "6 3 2 3" }[dash] }));
}

function comparisonPage(found) {
  document.title = "Comparison – Evolver";
  document.getElementById("where").textContent = found.runs.join(", ");
  return [
    el("ul", { class: "legend", "aria-label": "colours of the runs" },
      found.runs.map((run, place) => el("li", { title: run }, runSwatch(place), " ", el("a", { href: `/run/${encodeURIComponent(run)}` }, short(run, 24))))),
    el("div", { class: "cards" },
      card("Best dev score against scored items", [found.alike ? null : el("p", { class: "warning" }, "The runs have other dev items, weights or metrics, so these scores do not mean the same in each of them."), plot("curves")], true),
      card(`Winners on ${found.items} shared report items`, [el("p", {}, found.said), found.winners.length
        ? table(["run", "winner", "recipe", "score", "95 % interval", ...found.tasks], found.winners.map(([run, what, recipe, ...more]) => [run, what, recipe.slice(0, 12), ...more]), "winners")
        : null], true),
      found.tests.length ? card("Paired tests of the winners", table(["winner of", "against that of", "points", "95 % interval", "p (paired permutation)", "p (Holm)"], found.tests, "tests"), true) : null,
      card("Keys that differ", found.keys.length ? table(["key", ...found.runs], found.keys.map(([key, values]) => [key, ...values.map((v) => short(v, 60))]), "keys")
        : el("p", {}, "The configurations are the same."), true)),
  ];
}

function drawCurves(found) {
  put("curves", found.runs.map((run, place) => {
    const { color: stroke, dash } = runLook(place);
    return { x: found.curves[run].spent, y: found.curves[run].best, name: plain(short(run, 24)), mode: "lines+markers", marker: { size: 5, color: stroke }, line: { shape: "hv", width: 3, color: stroke, dash } };
  }), titled("items scored", "best dev score"));
}

// The comparison is fetched once: it is of what the runs have found when the page is opened.
async function compareRuns() {
  if (current === null) main.replaceChildren(el("p", {}, "The runs are being compared."));
  try {
    current = current ?? await get(`/api/compare${location.search}`);
    main.replaceChildren(...comparisonPage(current).filter((part) => part !== null));
    drawCurves(current);
  } catch (error) {
    main.replaceChildren(el("p", { class: "warning" }, error.message));
  }
}
