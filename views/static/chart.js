// The chart of a pool: load that came, the forecast that had been made for it, and what the replicas can take.

import { attr, el, show, svg, text } from "./dom.js";
import { clock, num } from "./format.js";

const HEIGHT = 190;
const PAD = { left: 34, right: 8, top: 12, bottom: 20 };
const SPAN_MIN_S = 600;

export class Chart {
  constructor(label) {
    this.points = new Map();
    this.forecasts = new Map();
    this.marks = [];
    this.layers = {};
    const layer = (name, tag) => (this.layers[name] = svg(tag, { class: name }));
    this.grid = svg("g");
    this.marksNode = svg("g");
    this.hair = svg("line", { class: "hair", visibility: "hidden" });
    this.svg = svg(
      "svg",
      { role: "img", "aria-label": label, preserveAspectRatio: "none" },
      this.grid, layer("load-area", "path"), layer("band", "path"), layer("ordered", "path"), layer("capacity", "path"),
      layer("forecast", "path"), layer("load", "path"), layer("now", "line"), this.marksNode, this.hair,
    );
    this.tip = el("div", { class: "tip", hidden: true });
    this.node = el("div", { class: "chart" }, this.svg, this.tip);
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  /** Merges an answer of /api/pools/{pool}/history. `horizon`: the forecast to show. */
  merge(history, horizon) {
    for (const point of history.points) this.points.set(point.t, point);
    if (this.horizon !== horizon) {
      this.forecasts.clear();
      this.horizon = horizon;
    }
    for (const row of history.forecasts[horizon] ?? []) this.forecasts.set(row[0], row);
    const newest = Math.max(0, ...this.points.keys());
    for (const map of [this.points, this.forecasts]) for (const t of map.keys()) if (t < newest - 3600) map.delete(t);
    this.newest = newest;
    this.draw();
  }

  draw() {
    const width = this.node.clientWidth;
    const height = this.svg.clientHeight || HEIGHT;
    if (!width || !this.points.size) return;
    attr(this.svg, "viewBox", `0 0 ${width} ${height}`);
    const points = [...this.points.values()].sort((a, b) => a.t - b.t);
    const forecasts = [...this.forecasts.values()].sort((a, b) => a[0] - b[0]);
    const last = Math.max(this.newest, ...forecasts.map((f) => f[0]));
    const first = Math.min(points[0].t, this.newest - SPAN_MIN_S);
    const of = (p, replicas) => (p[replicas] === null || p.capacity_rps === null ? null : p[replicas] * p.capacity_rps);
    const top = 1.12 * Math.max(
      0.1, ...points.map((p) => Math.max(p.requests_per_s ?? 0, of(p, "replicas_ready") ?? 0, of(p, "replicas_target") ?? 0)),
      ...forecasts.map((f) => f[3] ?? 0),
    );
    const x = (t) => PAD.left + ((t - first) / (last - first)) * (width - PAD.left - PAD.right);
    const y = (v) => height - PAD.bottom - (v / top) * (height - PAD.top - PAD.bottom);
    this.scale = { x, first, last, width, height, points, of };

    const load = points.filter((p) => p.requests_per_s !== null).map((p) => [x(p.t), y(p.requests_per_s)]);
    this.path("load", line(load));
    this.path("load-area", load.length ? `${line(load)}L${load.at(-1)[0]},${y(0)}L${load[0][0]},${y(0)}Z` : "");
    this.path("capacity", steps(points.map((p) => [x(p.t), value(y, of(p, "replicas_ready"))]), x(this.newest)));
    this.path("ordered", steps(points.map((p) => [x(p.t), value(y, of(p, "replicas_target"))]), x(this.newest)));
    const mean = forecasts.filter((f) => f[2] !== null).map((f) => [x(f[0]), y(f[2])]);
    this.path("forecast", line(mean));
    const band = forecasts.filter((f) => f[1] !== null && f[3] !== null);
    const upper = band.map((f) => [x(f[0]), y(f[3])]);
    const lower = band.map((f) => [x(f[0]), y(f[1])]).reverse();
    this.path("band", band.length ? `${line(upper)}${line(lower).replace("M", "L")}Z` : "");
    const now = this.layers.now;
    for (const [name, v] of [["x1", x(this.newest)], ["x2", x(this.newest)], ["y1", PAD.top - 6], ["y2", y(0)]]) attr(now, name, v.toFixed(1));
    this.axes(x, y, top, first, last, width, height);
    this.drawMarks(x);
  }

  path(name, d) {
    attr(this.layers[name], "d", d);
  }

  axes(x, y, top, first, last, width, height) {
    const nodes = [];
    const step = nice(top / 4);
    for (let v = 0; v <= top; v += step) {
      nodes.push(svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(v).toFixed(1), y2: y(v).toFixed(1) }));
      nodes.push(svg("text", { x: PAD.left - 6, y: (y(v) + 4).toFixed(1), "text-anchor": "end", text: num(v) }));
    }
    const wanted = width < 420 ? 3 : 5;
    const every = [60, 120, 300, 600, 900, 1200, 1800].find((s) => (last - first) / s <= wanted) ?? 3600;
    for (let t = Math.ceil(first / every) * every; t <= last; t += every) {
      if (x(t) < PAD.left + 12 || x(t) > width - 18 || Math.abs(x(t) - x(this.newest)) < 34) continue;
      nodes.push(svg("text", { x: x(t).toFixed(1), y: height - 4, "text-anchor": "middle", text: clock(t, false) }));
    }
    nodes.push(svg("text", { x: x(this.newest).toFixed(1), y: height - 4, "text-anchor": "middle", text: "now" }));
    this.grid.replaceChildren(...nodes);
  }

  /** Executed decisions as triangles at the top: up, down, or a diamond for a reroute. */
  drawMarks(x) {
    const shapes = { up: "M-4,4 4,4 0,-4Z", down: "M-4,-4 4,-4 0,4Z", way: "M0,-4.5 4.5,0 0,4.5 -4.5,0Z" };
    this.marksNode.replaceChildren(
      ...this.marks
        .filter((m) => m.t >= this.scale.first && m.t <= this.newest + 10)
        .map((m) => svg("path", { class: `mark-${m.kind}`, d: shapes[m.kind], transform: `translate(${x(m.t).toFixed(1)} 6)` }, svg("title", { text: m.text }))),
    );
  }

  hover(event) {
    if (!this.scale) return;
    const { first, last, width, height, of, x } = this.scale;
    const left = event.clientX - this.svg.getBoundingClientRect().left;
    const share = (left - PAD.left) / (width - PAD.left - PAD.right);
    const t = Math.round((first + share * (last - first)) / 10) * 10;
    const point = this.points.get(t);
    const forecast = this.forecasts.get(t);
    if (!point && !forecast) return this.leave();
    for (const [name, v] of [["x1", x(t)], ["x2", x(t)], ["y1", PAD.top - 6], ["y2", height - PAD.bottom]]) attr(this.hair, name, v.toFixed(1));
    attr(this.hair, "visibility", "visible");
    const lines = [el("b", { text: clock(t) })];
    if (point) lines.push(el("div", { text: `load ${num(point.requests_per_s)} req/s` }));
    if (forecast) lines.push(el("div", { text: `forecast ${num(forecast[2])} (${num(forecast[1])} to ${num(forecast[3])})` }));
    if (point) lines.push(el("div", { text: `${num(point.replicas_ready)} ready take ${num(of(point, "replicas_ready"))} req/s` }));
    this.tip.replaceChildren(...lines);
    show(this.tip, true);
    const tipWidth = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(width - tipWidth, left > width / 2 ? left - tipWidth - 14 : left + 14))}px`;
  }

  leave() {
    attr(this.hair, "visibility", "hidden");
    show(this.tip, false);
  }

  describe(value) {
    attr(this.svg, "aria-label", value);
  }
}

const value = (y, v) => (v === null ? null : y(v));

function line(points) {
  return points.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)},${py.toFixed(1)}`).join("");
}

/** A step line with gaps where the value is unknown; the last step reaches `end`. */
function steps(points, end) {
  let d = "";
  let pen = null;
  for (const [px, py] of points) {
    if (py === null) pen = null;
    else {
      d += pen === null ? `M${px.toFixed(1)},${py.toFixed(1)}` : `H${px.toFixed(1)}V${py.toFixed(1)}`;
      pen = py;
    }
  }
  return pen === null ? d : `${d}H${end.toFixed(1)}`;
}

function nice(raw) {
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
}
