// The table of tenants: what each costs per million tokens, busy and idle GPU time apart.

import { attr, el, keyed, show, text } from "./dom.js";
import { count, pct, usd } from "./format.js";

const COLUMNS = ["Requests", "Tokens", "Within SLO", "$/1M busy", "$/1M with idle", "Share of the bill"];

export function tenantTable(container, empty) {
  const body = el("tbody");
  const head = el("tr", {}, el("th", { scope: "col", text: "Tenant" }), ...COLUMNS.map((c) => el("th", { scope: "col", text: c })));
  const last = head.lastChild;
  last.replaceChildren("Share of the bill: ", el("span", { class: "key" }), "busy ", el("span", { class: "key idle" }), "idle");
  const table = el("table", {}, el("caption", { text: "Cost by tenant over the last 5 minutes" }), el("thead", {}, head), body);
  container.append(table, empty);
  return (tenants) => {
    show(table, tenants.length > 0);
    show(empty, tenants.length === 0);
    keyed(body, tenants, (t) => t.tenant, row);
  };
}

function row() {
  const name = el("th", { scope: "row" });
  const cells = COLUMNS.map((c) => el("td", { "data-label": c }));
  const shown = el("span");
  const direct = el("span", { class: "direct" });
  const idle = el("span", { class: "idle" });
  const split = el("div", { class: "bar" }, direct, idle);
  cells[5].className = "share";
  cells[5].append(shown, split);
  return {
    node: el("tr", {}, name, ...cells),
    update(t) {
      text(name, t.tenant);
      attr(name, "title", t.pools.map((p) => `${p.pool}: ${usd(p.usd_total)}`).join("\n"));
      const values = [count(t.requests), count(t.tokens), pct(t.slo_attainment, 2), usd(t.usd_per_million_tokens_direct), usd(t.usd_per_million_tokens)];
      values.forEach((value, i) => text(cells[i], value));
      text(shown, `${pct(t.share, 0)} · ${usd(t.usd_total)}`);
      const part = t.usd_total ? (t.share ?? 0) / t.usd_total : 0;
      direct.style.width = `${(100 * part * (t.usd_direct ?? 0)).toFixed(1)}%`;
      idle.style.width = `${(100 * part * (t.usd_idle ?? 0)).toFixed(1)}%`;
    },
  };
}
