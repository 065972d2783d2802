// The table of nodes: every GPU as a square filled by its utilisation, what is free, and who is slowed by a neighbour.

import { el, keyed, once, show, text } from "./dom.js";
import { num, pct } from "./format.js";

const COLUMNS = ["GPUs", "Allocated", "Free", "SM active", "Power", "Slowed by a neighbour"];

export function nodeTable(container, empty) {
  const body = el("tbody");
  const head = el("tr", {}, el("th", { scope: "col", text: "Node" }), ...COLUMNS.map((c) => el("th", { scope: "col", text: c })));
  const table = el("table", {}, el("caption", { text: "Nodes and their GPUs in the last closed window" }), el("thead", {}, head), body);
  container.append(table, empty);
  return (nodes) => {
    show(table, nodes.length > 0);
    show(empty, nodes.length === 0);
    keyed(body, nodes, (n) => `${n.node}/${n.gpu_type}`, row);
  };
}

function square(gpu) {
  const state = gpu.status === "lost" ? "failed" : gpu.status === null ? "unknown" : "ready";
  const told = gpu.status === "ok" ? `${num(gpu.util_gpu_pct_mean, 0)} % of the time busy` : (gpu.status ?? "no samples");
  const item = el("li", { class: state, title: `GPU ${gpu.gpu} · ${gpu.pool === "-" ? "free" : gpu.pool} · ${told}` });
  item.style.setProperty("--fill", `${Math.round(gpu.util_gpu_pct_mean ?? 0)}%`);
  return item;
}

function row() {
  const name = el("span");
  const kind = el("span", { class: "hint" });
  const cells = COLUMNS.map((c) => el("td", { "data-label": c }));
  const gpus = el("ul", { class: "replicas", role: "list" });
  cells[0].append(gpus);
  return {
    node: el("tr", {}, el("th", { scope: "row" }, name, " ", kind), ...cells),
    update(n) {
      text(name, n.node);
      text(kind, n.gpu_type ?? "");
      once(gpus, JSON.stringify(n.gpus_of), () => n.gpus_of.map(square));
      const power = n.power_w_mean === null ? num(null) : `${num(n.power_w_mean / 1000, 1)} kW`;
      const slowed = n.victims.map((v) => `${v.replica} ${num(v.slowdown, 2)}× by ${v.antagonist ?? "unknown"}`).join(", ");
      const values = [num(n.gpus_allocated), num(n.gpus_free), pct(n.sm_active_ratio_mean, 0), power, slowed || "none"];
      values.forEach((value, i) => text(cells[i + 1], value));
    },
  };
}
