// The timeline of decisions, and the list of findings.

import { attr, el, once, show, text } from "./dom.js";
import { action, ago, clock, dur, num, pct, signedUsd, span, usd, words } from "./format.js";

const STATES = {
  proposed: "info", pending: "warn", approved: "info", dispatched: "info", executed: "info", verified: "good",
  regressed: "bad", failed: "bad", blocked: "", rejected: "", expired: "", superseded: "", shadowed: "",
};
const SHOWN = { pending: "waits for you", shadowed: "shadow only" };
const UNDOABLE = ["executed", "verified", "regressed"];

export function decisionItem(onOrder) {
  const chip = el("span", { class: "chip" });
  const title = el("span", { class: "title" });
  const when = el("span", { class: "when" });
  const target = el("p", { class: "target" });
  const reason = el("p", { class: "reason" });
  const effect = el("dl", { class: "effect" });
  const steps = el("ol", { class: "steps", "aria-label": "history" });
  const more = el("div", { class: "more", hidden: true });
  const toggle = el("button", { type: "button", class: "link", "aria-expanded": "false", text: "Evidence" });
  const button = (command, label, kind) => el("button", { type: "button", class: kind, text: label, onclick: () => onOrder(command, latest) });
  const buttons = { approve: button("approve", "Approve", "primary"), reject: button("reject", "Reject", "danger"), revert: button("revert", "Revert", "quiet") };
  const node = el(
    "article",
    { class: "item" },
    el("div", { class: "item-head" }, chip, title, when),
    target, reason, effect, steps,
    el("div", { class: "row" }, buttons.approve, buttons.reject, buttons.revert, toggle),
    more,
  );
  let latest = null;
  let open = false;
  let loaded = -1;
  toggle.addEventListener("click", () => {
    open = !open;
    attr(toggle, "aria-expanded", String(open));
    text(toggle, open ? "Less" : "Evidence");
    show(more, open);
    if (open) load();
  });

  async function load() {
    if (loaded === latest.version) return;
    const version = latest.version;
    try {
      const answer = await fetch(`/api/decisions/${encodeURIComponent(latest.id)}`);
      if (!answer.ok) throw new Error((await answer.json()).error ?? answer.statusText);
      more.replaceChildren(...details(await answer.json()));
      loaded = version;
    } catch (problem) {
      more.replaceChildren(el("p", { class: "error", text: `not available: ${problem.message}` }));
    }
  }

  function update(d, now) {
    latest = d;
    const waits = d.state === "pending";
    attr(node, "class", `item${waits ? " waits" : ["regressed", "failed"].includes(d.state) ? " bad" : ""}`);
    text(chip, SHOWN[d.state] ?? d.state);
    attr(chip, "class", `chip ${STATES[d.state] ?? ""}`);
    text(title, d.action.type === "scale" ? action(d) : d.decision_kind);
    text(when, waits ? `lapses in ${span(Math.max(0, d.expires_s - now))}` : ago(now - d.changed_s));
    attr(when, "title", `${clock(d.changed_s)} UTC of fleet time`);
    const undoes = d.reverts ? ` · undoes ${d.reverts.slice(0, 8)}` : d.reverted_by ? ` · undone by ${d.reverted_by.slice(0, 8)}` : "";
    text(target, `${d.pool}${d.action.type === "scale" ? "" : `: ${action(d)}`} · ${d.mode}${undoes}`);
    text(reason, d.reason);
    showEffect(d);
    showSteps(d);
    show(buttons.approve, waits);
    show(buttons.reject, waits);
    show(buttons.revert, UNDOABLE.includes(d.state) && d.undo !== null && !d.reverted_by);
    attr(buttons.approve, "aria-label", `Approve ${d.decision_kind} of ${d.pool}`);
    attr(buttons.reject, "aria-label", `Reject ${d.decision_kind} of ${d.pool}`);
    attr(buttons.revert, "aria-label", `Revert ${d.decision_kind} of ${d.pool}`);
    if (open) load();
  }

  function showEffect(d) {
    const want = d.expected;
    const parts = [];
    if (want.slo_attainment !== null) parts.push(`SLO ${pct(want.slo_attainment)}${want.slo_attainment_low !== null ? ` (at least ${pct(want.slo_attainment_low)})` : ""}`);
    if (want.usd_per_hour !== null) parts.push(`${signedUsd(want.usd_per_hour)}/h`);
    if (want.ttft_s_p99 !== null) parts.push(`TTFT p99 ${dur(want.ttft_s_p99)}`);
    const rows = parts.length ? [["Expected", parts.join(", ")]] : [];
    if (d.verdict) rows.push(["Measured", d.verdict.text]);
    if (d.constraints.length) rows.push(["Held by", d.constraints.join("; ")]);
    once(effect, JSON.stringify(rows), () => rows.flatMap(([label, shown]) => [el("dt", { text: label }), el("dd", { text: shown })]));
  }

  function showSteps(d) {
    once(steps, JSON.stringify(d.history), () =>
      d.history.map((h, i) =>
        el(
          "li",
          { title: `${clock(h.at_s)} · ${h.actor} · ${h.cause}` },
          el("b", { text: h.state }),
          after(h.at_s - d.history[0].at_s),
        ),
      ),
    );
  }

  return { node, update };
}

/** Time since the proposal, where it is not the same moment. */
function after(s) {
  return s < 0.05 ? null : el("span", { class: "after", text: `+${num(s, s < 10 ? 1 : 0)} s` });
}

function details(d) {
  const p = d.proposal;
  const blocks = [];
  const block = (label, ...content) => blocks.push(el("div", {}, el("h4", { text: label }), ...content));
  const pairs = (object) =>
    el("dl", {}, ...Object.entries(object).flatMap(([k, v]) => [el("dt", { text: words(k) }), el("dd", { text: typeof v === "object" ? JSON.stringify(v) : String(v) })]));
  if (Object.keys(p.evidence).length) block("It rests on", pairs(p.evidence));
  if (p.alternatives.length)
    block("Also considered", el("ul", {}, ...p.alternatives.map((a) => el("li", {}, `${a.action}: `, el("span", { text: a.why_not })))));
  block("What happened", el("ul", {}, ...d.history.map((h) => el("li", {}, `${clock(h.at_s)} ${h.state}: `, el("span", { text: [h.cause, h.actor].filter(Boolean).join(" · ") })))));
  if (d.verdict && Object.keys(d.verdict.measured).length) block("Measured", pairs(d.verdict.measured));
  if (d.result) block("The executor says", pairs({ outcome: d.result.outcome, by: d.result.executor, dry_run: d.result.dry_run, took_s: d.result.took_s, ...(d.result.detail ? { detail: d.result.detail } : {}) }));
  if (p.undo) block("Undo", el("p", { text: p.undo.type === "scale" ? `back to ${p.undo.replicas} replicas` : `weights ${JSON.stringify(p.undo.weights)}` }));
  block("", el("p", { class: "hint", text: `${d.id} · confidence ${pct(p.confidence, 0)} · policy revision ${p.policy_revision} · from evidence to proposal ${dur(Math.max(0, p.at_s - p.trigger_s))}` }));
  return blocks;
}

export function findingItem() {
  const chip = el("span", { class: "chip" });
  const title = el("span", { class: "title" });
  const when = el("span", { class: "when" });
  const target = el("p", { class: "target" });
  const body = el("p", { class: "reason" });
  const node = el("article", { class: "item" }, el("div", { class: "item-head" }, chip, title, when), target, body);
  return {
    node,
    update(f, now) {
      attr(node, "class", `item${f.open ? "" : " over"}`);
      const cost = f.usd_per_hour;
      text(chip, !f.open ? "over" : cost ? `${usd(cost)}/h` : "open");
      attr(chip, "class", `chip ${!f.open ? "" : cost ? "bad" : "warn"}`);
      text(title, words(f.finding));
      text(when, f.open ? `for ${span(Math.max(0, now - f.since_s))}` : `ended ${ago(now - f.at_s)}`);
      text(target, f.subject === f.pool ? f.pool : `${f.subject} · ${f.pool}`);
      text(body, f.text);
    },
  };
}
