// The drawing of a lineage, as SVG: the server says where boxes stand and which ways arrows take.
"use strict";

const BOX = [104, 58], PITCH = 104, EDGE = 8; // a box, from layer to layer, around the whole; in pixels
const KINDS = { parent: "what it is made of", partner: "partners of its mutation", base: "the base of its task vectors", scale: "whose task vectors its noise is as large as", statistics: "the model that its statistics were collected on" };

function svg(tag, given = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(given)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return made;
}

function lineage(run, found, id) {
  if (!found) return el("p", {}, "There is no candidate with a score yet.");
  const width = found.width + 2 * EDGE, height = (found.rows - 1) * PITCH + BOX[1] + 2 * EDGE;
  const kinds = Object.keys(KINDS).filter((kind) => found.edges.some((e) => e.kind === kind));
  const last = found.nodes.at(-1).id;
  const said = found.shown < found.models
    ? `The ${found.shown} of ${found.models} models of its lineage that are nearest to it; more could not be read.` : `All ${found.models} models of its lineage.`;
  return [
    el("p", {}, `${said} Arrows go from parents to children, the experts at the top.`),
    el("ul", { class: "legend" }, kinds.map((kind) => el("li", {}, svg("svg", { width: 30, height: 12, "aria-hidden": "true" },
      svg("line", { class: `arrow ${kind}`, x1: 1, x2: 29, y1: 6, y2: 6 })), " ", KINDS[kind]))),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "lineage" },
      svg("svg", { class: "lineage", id, width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": said },
        svg("defs", {}, svg("marker", { id: `${id}-head`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { class: "head", d: "M0 0 8 4 0 8z" }))),
        found.edges.map((e) => svg("path", { class: `arrow ${e.kind}`, d: way(e.points), "marker-end": `url(#${id}-head)` })),
        found.nodes.map((n) => box(run, n, n.id === last)))),
  ];
}

// From the lower side of a box, by the middles of the layers that are passed, to the upper side of another one.
function way(points) {
  const last = points.length - 1;
  const at = points.map(([x, row], k) => [x + EDGE, row * PITCH + EDGE + (k === 0 ? BOX[1] : k === last ? 0 : BOX[1] / 2)]);
  const text = [`M${at[0]}`];
  for (let k = 1; k <= last; k++) {
    const [[x0, y0], [x1, y1]] = [at[k - 1], at[k]], half = (y1 - y0) / 2;
    text.push(`C${x0} ${y0 + half} ${x1} ${y1 - half} ${x1} ${y1}`);
  }
  return text.join("");
}

function box(run, node, last) {
  const x = node.x + EDGE - BOX[0] / 2, y = node.row * PITCH + EDGE;
  const known = node.role === "expert" ? look(run, node.label).color : last && node.number === run.best ? BEST : null;
  const open = node.number === null ? {} : { tabindex: "0", role: "link", on: { click: () => choose(node.number), keydown: (e) => { if (e.key === "Enter") choose(node.number); } } };
  const line = (text, k, more = {}) => svg("text", { x: BOX[0] / 2, y: 18 + 16 * k + (node.lines.length ? 0 : 16), ...more }, short(text, more.class ? 13 : 16));
  return svg("g", { class: `box ${node.role.replace(" ", "-")}`, transform: `translate(${x} ${y})`, ...open },
    svg("title", {}, `${node.label}: ${node.made}`),
    svg("rect", { width: BOX[0], height: BOX[1], rx: 6, style: known ? `stroke:${known};stroke-width:3` : null }),
    line(node.label, 0, { class: "name" }), node.lines.map((text, k) => line(text, k + 1)));
}
