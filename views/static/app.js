// Polls /api/summary and shows it. What is shown is what the service said last, with its age.

import { attr, el, keyed, once, show, text } from "./dom.js";
import { decisionItem, findingItem } from "./decisions.js";
import { action, clock, num, pct, span, usd, words } from "./format.js";
import { ask, lock, setRemedy, unlocked } from "./orders.js";
import { grade, horizonOf, marksOf, poolCard } from "./pools.js";
import { nodeTable } from "./nodes.js";
import { tenantTable } from "./tenants.js";

const POLL_MS = 1000;
const POLL_HIDDEN_MS = 10000;
const HISTORY_EVERY = 2;
const DECISIONS_SHOWN = 6;
const CLOSED_FINDINGS_SHOWN = 3;
const find = (id) => document.getElementById(id);

let latest = null;
let failures = 0;
let turn = 0;
const cards = new Map();

// ---- empty states: they say what would be here, and what to do

function empty(title, ...rest) {
  return el("div", { class: "empty" }, el("b", { text: title }), ...rest);
}
const none = {
  pools: empty("No pools yet", "A pool appears with its first status. Apply one with ", el("code", { text: "fleetloop apply -f pools.yaml" }), " and let exporters and gateways send, or run ", el("code", { text: "fleetloop demo" }), "."),
  tenants: empty("No tenants yet", "Each tenant appears with the first cost window of a pool that served it: about 12 s after its first request ended."),
  nodes: empty("No nodes yet", "A node appears with the first window of its GPUs: run ", el("code", { text: "fleetloop export nvml" }), " there, or scrape its dcgm-exporter."),
  decisions: empty("No decisions yet", "The planner proposes when the load, as it is or as forecast, no longer fits the replicas, and when a replica answers more slowly than its peers. Each decision will say why, what it should do, and what it did."),
  findings: empty("Nothing found", "Slow or failed replicas, idle and lost GPUs, collapsed batches and stale data are told here, with what they cost."),
};
find("pools").after(none.pools);
find("decision-list").after(none.decisions);
find("finding-list").after(none.findings);

let all = false;
const older = el("button", { type: "button", class: "quiet older", hidden: true, onclick: () => { all = !all; render(latest); } });
none.decisions.after(older);
const showNodes = nodeTable(find("nodes"), none.nodes);
const showTenants = tenantTable(find("tenants"), none.tenants);

// ---- the headline strip

const TILES = [["Cost"], ["Within SLO, 5 min"], ["Load"], ["GPUs in use"], ["Open findings", "#h-findings"], ["Waiting for approval", "#decisions"]];
const tiles = TILES.map(([name, href]) => {
  const value = el("p", { class: "value" });
  const under = el("p", { class: "under" });
  find("strip").append(el("div", { class: "tile" }, el("p", { class: "name" }, href ? el("a", { href, text: name }) : name), value, under));
  return { value, under };
});

function tile(i, value, unit, under, kind = "") {
  once(tiles[i].value, `${value}${unit}`, () => [value, el("small", { text: unit })]);
  attr(tiles[i].value, "class", `value ${kind}`);
  text(tiles[i].under, under);
  attr(tiles[i].under, "title", under);
}

function showStrip({ fleet, pools, decisions }) {
  const bound = fleet.usd_per_hour_max ? ` of ${usd(fleet.usd_per_hour_max)}/h allowed` : "";
  tile(0, usd(fleet.usd_per_hour), "/h", `${fleet.idle_ratio === null ? "" : `${pct(fleet.idle_ratio, 0)} idle · `}${usd(fleet.usd_day_to_date)} today${bound}`);
  const worst = Math.max(0, ...pools.map((p) => p.spec?.slo_target ?? 0)) || 0.99;
  tile(1, pct(fleet.slo_attainment, 2).replace(" %", ""), " %", fleet.requests_judged ? `of ${num(fleet.requests_judged, 0)} requests` : "no requests judged", grade(fleet.slo_attainment, worst));
  tile(2, num(fleet.requests_per_s), " req/s", `${num(fleet.replicas_ready)} of ${num(fleet.replicas_target)} replicas ready`);
  const gpus = fleet.gpus.reduce((sum, g) => sum + g.allocated, 0);
  tile(3, fleet.gpus.length ? num(gpus) : "–", "", fleet.gpus.map((g) => `${num(g.allocated)}${g.max ? `/${num(g.max)}` : ""} ${g.gpu_type}`).join(" · "));
  tile(4, num(fleet.findings_open), "", fleet.findings_usd_per_hour ? `costing ${usd(fleet.findings_usd_per_hour)}/h` : fleet.findings_open ? "cost not known" : "all as it should be", fleet.findings_open ? "warn" : "");
  const recent = decisions.filter((d) => latest.now_s - d.changed_s < 3600).length;
  tile(5, num(fleet.decisions_pending), "", `${recent} decisions in the last hour`, fleet.decisions_pending ? "warn" : "");
}

// ---- header and banner

function showHeader(data) {
  const { fleet } = data;
  const late = data.stale || data.stale_s === null;
  attr(find("dot"), "class", `dot ${failures ? "gone" : late ? "late" : "live"}`);
  const speed = data.speed === 1 ? "" : ` · ${num(data.speed)} × real time`;
  text(find("clock-text"), `${clock(data.now_s)} UTC${speed}`);
  text(find("fleet-mode"), fleet.paused ? `fleet paused by ${fleet.paused.actor}` : fleet.mode ? `fleet mode: ${fleet.mode}` : "");
  text(find("fleet-pause"), fleet.paused ? "Resume fleet" : "Pause fleet");
  show(find("fleet-pause"), data.service.actions);
  text(find("sign-in"), unlocked() ? "Lock actions" : "Unlock actions");
  setRemedy(data.service.actions_remedy);
}

function showBanner() {
  const banner = find("banner");
  let message = "";
  if (failures > 2) message = `This page has had no answer for ${Math.round((failures * POLL_MS) / 1000)} s: what you see is old. It keeps trying.`;
  else if (latest && latest.service.ready.length) message = `Catching up: ${latest.service.ready.join("; ")}.`;
  else if (latest && latest.stale_s === null) message = "No record has been read yet: are the workers running (fleetloop worker)?";
  else if (latest && latest.stale) message = `Stale: the newest record is ${span(latest.stale_s)} of fleet time old. Check the workers and the broker; nothing is decided on stale data.`;
  else if (latest) {
    const old = latest.pools.filter((p) => p.stale).map((p) => p.pool);
    if (old.length) message = `No fresh evidence for ${old.length > 3 ? `${old.length} pools` : old.join(", ")}: every action there is held. Check their exporters and gateways.`;
  }
  text(banner, message);
  attr(banner, "class", `banner${failures > 2 ? " bad" : ""}`);
  show(banner, Boolean(message));
}

// ---- pools

function cardOf() {
  const card = poolCard((pool) => order(pool.paused ? "resume" : "pause", pool));
  return {
    node: card.node,
    update(pool) {
      card.update(pool);
      card.chart.marks = marksOf(latest.decisions, pool.pool, latest.now_s);
      cards.set(pool.pool, { chart: card.chart, horizon: horizonOf(pool) });
    },
  };
}

async function refreshHistory(pool) {
  const { chart, horizon } = cards.get(pool);
  const since = chart.newest && chart.horizon === String(horizon) ? chart.newest - 30 : 0;
  const history = await get(`/api/pools/${encodeURIComponent(pool)}/history?since=${since}`);
  if (history) chart.merge(history, String(horizon));
}

// ---- orders

function order(command, subject) {
  const pool = subject?.decision_kind ? null : subject?.pool;
  const title = { approve: "Approve", reject: "Reject", revert: "Revert", pause: "Pause", resume: "Resume" }[command];
  if (pool !== null) {
    const what = pool ?? "the fleet";
    const told = command === "pause" ? `Nothing more is done to ${what} until it is resumed. Proposals are still made, and held.` : `Decisions for ${what} are carried out again.`;
    const path = pool ? `/api/pools/${encodeURIComponent(pool)}/${command}` : `/api/fleet/${command}`;
    return ask({ title: `${title} ${what}?`, text: told, button: title, danger: command === "pause", path }, soon);
  }
  const d = subject;
  const what = d.action.type === "scale" ? `${d.pool}: ${action(d)}` : `${d.decision_kind} of ${d.pool}`;
  const told = command === "revert" ? "A new decision restores what was there before." : d.reason;
  ask({ title: `${title} ${what}?`, text: told, button: title, danger: command !== "approve", path: `/api/decisions/${encodeURIComponent(d.id)}/${command}` }, soon);
}

function soon() {
  setTimeout(poll, 300);
}

find("sign-in").addEventListener("click", () => {
  if (unlocked()) {
    lock();
    showHeader(latest);
  } else ask({ title: "Unlock actions", text: "With the access token of this service you can approve, reject and revert decisions, and pause pools.", button: "Unlock" }, () => showHeader(latest));
});
find("fleet-pause").addEventListener("click", () => order(latest.fleet.paused ? "resume" : "pause", undefined));

// ---- refused records

function showRefused(letters) {
  show(find("refused-section"), letters.rows > 0);
  once(find("refused"), JSON.stringify(letters), () => [
    el(
      "ul",
      { class: "refused-list" },
      ...letters.reasons.map((r) => el("li", {}, el("b", { text: `${num(r.rows, 0)} ${r.rows === 1 ? "row" : "rows"} ${words(r.reason)}` }), ` from ${r.topic}`)),
      ...letters.newest.slice(0, 2).map((l) => el("li", {}, el("span", { class: "hint", text: `${l.topic}/${l.partition} at ${l.offset}: ` }), `${l.field} ${l.value}: ${l.remedy}`)),
    ),
  ]);
}

// ---- the loop

function render(data) {
  showHeader(data);
  showStrip(data);
  keyed(find("pools"), data.pools, (p) => p.pool, cardOf);
  for (const name of cards.keys()) if (!data.pools.some((p) => p.pool === name)) cards.delete(name);
  show(none.pools, data.pools.length === 0);
  showTenants(data.tenants);
  showNodes(data.nodes);
  const timed = (make) => (item) => {
    const entry = make(item);
    return { node: entry.node, update: (value) => entry.update(value, latest.now_s) };
  };
  const shown = all ? data.decisions : data.decisions.slice(0, DECISIONS_SHOWN);
  keyed(find("decision-list"), shown, (d) => d.id, timed(() => decisionItem(order)));
  show(older, data.decisions.length > DECISIONS_SHOWN);
  text(older, all ? "Show fewer" : `Show ${data.decisions.length - DECISIONS_SHOWN} older`);
  show(none.decisions, data.decisions.length === 0);
  const closed = data.findings.filter((f) => !f.open).slice(0, CLOSED_FINDINGS_SHOWN);
  keyed(find("finding-list"), [...data.findings.filter((f) => f.open), ...closed], (f) => `${f.pool}/${f.finding}/${f.subject}`, timed(findingItem));
  show(none.findings, data.findings.length === 0);
  showRefused(data.dead_letters);
  document.title = `${data.fleet.decisions_pending ? `(${data.fleet.decisions_pending}) ` : ""}Fleetloop`;
}

let timer = null;
let busy = false;

async function poll() {
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  const data = await get("/api/summary");
  failures = data ? 0 : failures + 1;
  try {
    if (data) {
      latest = data;
      render(data);
      if (turn++ % HISTORY_EVERY === 0) await Promise.all(data.pools.map((p) => refreshHistory(p.pool)));
    } else attr(find("dot"), "class", "dot gone");
  } finally {
    busy = false;
    showBanner();
    timer = setTimeout(poll, document.hidden ? POLL_HIDDEN_MS : POLL_MS);
  }
}

/** An answer as JSON, or null where there is none. */
async function get(path) {
  try {
    const answer = await fetch(path, { signal: AbortSignal.timeout(5000) });
    return answer.ok ? await answer.json() : null;
  } catch (problem) {
    if (problem instanceof TypeError || problem instanceof DOMException) return null; // not reached, or cut off
    throw problem;
  }
}

document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
