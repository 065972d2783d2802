// A card per pool.

import { Chart } from "./chart.js";
import { attr, bar, el, keyed, once, show, text } from "./dom.js";
import { ago, dur, num, pct, span, usd } from "./format.js";

const MODES = {
  observe: ["", "observe: proposes nothing"],
  shadow: ["info", "shadow: proposes, never acts"],
  approve: ["warn", "approve: a person decides"],
  automatic: ["good", "automatic: acts within bounds"],
};

export function poolCard(onPause) {
  const chart = new Chart("load and forecast");
  const name = el("h3");
  const what = el("span", { class: "what" });
  const mode = el("span", { class: "chip" });
  const state = el("span", { class: "chip bad", hidden: true });
  const pause = el("button", { type: "button", class: "quiet" });
  const gauges = { load: gauge("Load / capacity"), gpu: gauge("GPU busy"), kv: gauge("KV cache"), queue: gauge("Waiting") };
  const replicaText = el("span");
  const replicaList = el("ul", { class: "replicas", "aria-label": "replicas" });
  const replicas = el("div", { class: "whole" }, el("div", { class: "gauge" }, el("span", { class: "label", text: "Ready / ordered / wanted" }), replicaText), replicaList);
  const facts = el("dl", { class: "facts" });
  const policy = el("p", { class: "policy" });
  const horizonText = el("span");
  const legend = el(
    "ul",
    { class: "legend" },
    el("li", {}, el("i"), "load, req/s"),
    el("li", {}, el("i", { class: "f" }), horizonText),
    el("li", {}, el("i", { class: "c" }), "capacity of ready replicas"),
    el("li", {}, el("i", { class: "o" }), "of ordered ones"),
  );
  const node = el(
    "article",
    { class: "card" },
    el("div", { class: "pool-head" }, name, what, el("div", { class: "push" }, state, mode, pause)),
    el(
      "div",
      { class: "pool-body" },
      el("figure", {}, chart.node, legend),
      el("div", { class: "gauges" }, replicas, gauges.load.node, gauges.gpu.node, gauges.kv.node, gauges.queue.node),
    ),
    facts,
    policy,
  );
  let latest = null;
  pause.addEventListener("click", () => onPause(latest));

  function update(pool) {
    latest = pool;
    const spec = pool.spec ?? {};
    text(name, pool.pool);
    text(what, [spec.model, `${num(pool.gpus_per_replica)} × ${pool.gpu_type} a replica`].filter(Boolean).join(" · "));
    const [kind, title] = MODES[spec.mode] ?? ["", "mode unknown"];
    show(mode, Boolean(spec.mode));
    text(mode, spec.mode ?? "");
    attr(mode, "class", `chip ${kind}`);
    attr(mode, "title", title);
    const trouble = pool.paused ? "paused" : pool.stale ? `evidence ${pool.evidence_age_s === null ? "missing" : `${span(pool.evidence_age_s)} old`}` : "";
    show(state, Boolean(trouble));
    text(state, trouble);
    attr(state, "title", pool.paused ? `by ${pool.paused.actor}: ${pool.paused.cause}` : "nothing is done on stale data");
    text(pause, pool.paused ? "Resume" : "Pause");
    attr(pause, "aria-label", `${pool.paused ? "Resume" : "Pause"} ${pool.pool}`);
    showGauges(pool);
    showReplicas(pool);
    showFacts(pool, spec);
    showPolicy(pool);
    const horizon = horizonOf(pool);
    show(horizonText.parentNode, horizon !== null);
    text(horizonText, `forecast ${span(horizon ?? 0)} ahead, 80 %`);
    chart.describe(
      `${pool.pool}: load ${num(pool.requests_per_s)} requests per second, ${num(pool.replicas_ready)} ready replicas take ` +
        `${num((pool.replicas_ready ?? 0) * (pool.capacity_rps ?? 0))}`,
    );
  }

  function showGauges(pool) {
    const use = pool.utilisation_ratio;
    const able = pool.replicas_ready === null || pool.capacity_rps === null ? null : pool.replicas_ready * pool.capacity_rps;
    gauges.load.set(use, `${num(pool.requests_per_s)} of ${num(able)} req/s`, use > 1 ? "bad" : use > 0.9 ? "warn" : "load");
    gauges.gpu.set(pool.util_gpu_pct === null ? null : pool.util_gpu_pct / 100, pool.util_gpu_pct === null ? "–" : `${num(pool.util_gpu_pct, 0)} %`);
    gauges.kv.set(pool.kv_usage_ratio, pct(pool.kv_usage_ratio, 0), pool.kv_usage_ratio > 0.9 ? "warn" : "");
    const queue = pool.waiting === null || !pool.running ? null : pool.waiting / (pool.waiting + pool.running);
    gauges.queue.set(queue, `${num(pool.waiting, 0)} of ${num(pool.waiting === null ? null : pool.waiting + (pool.running ?? 0), 0)}`, queue > 0.1 ? "warn" : "");
  }

  function showReplicas(pool) {
    text(replicaText, `${num(pool.replicas_ready)} / ${num(pool.replicas_target)} / ${num(pool.replicas_wanted)}`);
    keyed(replicaList, pool.replicas, (r) => r.replica, replicaSquare);
  }

  function showFacts(pool, spec) {
    const cost = pool.cost ?? {};
    const target = spec.slo_target ?? 0.99;
    const rows = [
      ["Within SLO, 5 min", pct(pool.slo_attainment, 2), spec.slo_target ? `of ${pct(target, 0)} wanted` : "", grade(pool.slo_attainment, target)],
      ["TTFT p50 / p99", `${dur(pool.ttft_s_p50)} / ${dur(pool.ttft_s_p99)}`, spec.slo_ttft_s ? `≤ ${dur(spec.slo_ttft_s)}` : "", over(pool.ttft_s_p99, spec.slo_ttft_s)],
      ["TPOT p50 / p99", `${dur(pool.tpot_s_p50)} / ${dur(pool.tpot_s_p99)}`, spec.slo_tpot_s ? `≤ ${dur(spec.slo_tpot_s)}` : "", over(pool.tpot_s_p99, spec.slo_tpot_s)],
      ["Cost", `${usd(pool.usd_per_hour)}/h`, cost.usd_total ? `${pct(cost.usd_idle / cost.usd_total, 0)} idle` : "", ""],
      ["Per 1M tokens", usd(cost.usd_per_million_tokens), cost.usd_per_million_tokens_direct ? `${usd(cost.usd_per_million_tokens_direct)} busy` : "", ""],
    ];
    once(facts, JSON.stringify(rows), () =>
      rows.map(([label, shown, under, kind]) => el("div", {}, el("dt", { text: label }), el("dd", { class: kind }, shown, under ? " " : "", el("small", { text: under })))),
    );
  }

  function showPolicy(pool) {
    const forecast = pool.forecasts.find((f) => f.horizon_s === horizonOf(pool));
    const skill =
      forecast && forecast.mae !== null && forecast.mae_last > 0
        ? ` Forecast error ${num(forecast.mae)} req/s, ${Math.abs(Math.round((1 - forecast.mae / forecast.mae_last) * 100))} % ` +
          `${forecast.mae <= forecast.mae_last ? "less" : "more"} than taking the present load; ${forecast.model} leads.`
        : "";
    once(policy, pool.policy + skill, () => (pool.policy ? ["The planner's rule: ", el("code", { text: pool.policy }), skill ? `.${skill}` : ""] : [skill.trim()]));
  }

  return { node, update, chart };
}

/** The forecast shown: the horizon nearest to the pool's cold start, the one that scaling has to trust. */
export function horizonOf(pool) {
  const cold = pool.spec?.cold_start_s ?? 180;
  const horizons = pool.forecasts.map((f) => f.horizon_s);
  return horizons.length ? horizons.reduce((a, b) => (Math.abs(b - cold) < Math.abs(a - cold) ? b : a)) : null;
}

function gauge(label) {
  const value = el("span");
  const meter = bar(label);
  const node = el("div", { class: "gauge" }, el("span", { class: "label", text: label }), value, meter.node);
  return {
    node,
    set(ratio, shown, kind) {
      text(value, shown);
      meter.set(ratio, kind);
    },
  };
}

function replicaSquare() {
  const node = el("li");
  return {
    node,
    update(r) {
      attr(node, "class", `${r.state}${r.weight < 1 ? " lowered" : ""}`);
      node.style.setProperty("--fill", `${Math.round(100 * (r.kv_usage_ratio_mean ?? 0))}%`);
      const lowered = r.weight < 1 ? `, weight lowered to ${pct(r.weight, 0)}` : "";
      const title = `${r.replica} on ${r.node}: ${r.state}${lowered}, KV ${pct(r.kv_usage_ratio_mean, 0)}, ${num(r.running_mean)} running, ${dur(r.tpot_s_mean)} per token`;
      attr(node, "title", title);
      attr(node, "aria-label", title);
    },
  };
}

const grade = (x, target) => (x === null ? "" : x >= target ? "good" : x >= target - 0.01 ? "warn" : "bad");
const over = (x, most) => (x !== null && most && x > most ? "bad" : "");
export { grade };

/** Executed decisions of a pool as marks of its chart. */
export function marksOf(decisions, pool, now) {
  return decisions.flatMap((d) => {
    const step = d.pool === pool ? d.history.find((h) => h.state === "executed") : undefined;
    if (!step) return [];
    const scale = d.action.type === "scale";
    const kind = !scale ? "way" : d.replicas_from !== null && d.action.replicas > d.replicas_from ? "up" : "down";
    return [{ t: step.at_s, kind, text: `${d.decision_kind}, ${ago(now - step.at_s)}: ${d.reason}` }];
  });
}
