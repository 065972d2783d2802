// Numbers and times as people read them. Unknown is a dash, never 0.

export const DASH = "–";
const known = (x) => x !== null && x !== undefined && Number.isFinite(x);

export function num(x, digits) {
  if (!known(x)) return DASH;
  const places = digits ?? (Math.abs(x) >= 100 ? 0 : Math.abs(x) >= 10 ? 1 : 2);
  return x.toLocaleString("en", { minimumFractionDigits: digits === undefined ? 0 : places, maximumFractionDigits: places });
}

export function usd(x) {
  if (!known(x)) return DASH;
  const size = Math.abs(x);
  const digits = size >= 1000 ? 0 : size >= 0.1 || size === 0 ? 2 : 4;
  return `${x < 0 ? "−" : ""}$${size.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })}`;
}

export function signedUsd(x) {
  return known(x) ? (x > 0 ? `+${usd(x)}` : usd(x)) : DASH;
}

/** A share as a percentage; 99.95 % is not 100 %. */
export function pct(x, digits = 1) {
  if (!known(x)) return DASH;
  const factor = 10 ** digits;
  return `${(Math.floor(x * 100 * factor + 1e-6) / factor).toFixed(digits)} %`;
}

/** Seconds as ms below one second. */
export function dur(s) {
  if (!known(s)) return DASH;
  return s < 1 ? `${num(s * 1000, s < 0.1 ? 1 : 0).replace(/\.0$/, "")} ms` : `${num(s)} s`;
}

export function count(x) {
  if (!known(x)) return DASH;
  if (x >= 1e6) return `${num(x / 1e6, 1)} M`;
  if (x >= 1e4) return `${num(x / 1e3, 0)} k`;
  return num(x, Number.isInteger(x) ? 0 : 1);
}

/** How long ago in log time. */
export function ago(s) {
  if (!known(s)) return DASH;
  if (s < 1) return "now";
  return `${span(s)} ago`;
}

export function span(s) {
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} days`;
}

/** HH:MM:SS or HH:MM of fleet time, UTC. */
export function clock(s, seconds = true) {
  return new Date(s * 1000).toISOString().slice(11, seconds ? 19 : 16);
}

/** What an action does, in words. `from`: replicas before. */
export function action(decision) {
  const act = decision.action;
  if (act.type === "scale") {
    const from = decision.replicas_from;
    return from === null ? `${act.replicas} replicas` : `${from} → ${act.replicas} replicas`;
  }
  const weights = Object.entries(act.weights).map(([name, weight]) => `${name} ${pct(weight, 0)}`);
  return weights.length > 3 ? `${weights.slice(0, 3).join(", ")} and ${weights.length - 3} more` : weights.join(", ");
}

export function words(name) {
  return name.replaceAll("_", " ");
}
