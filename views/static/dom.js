// The few helpers that the page needs instead of a framework. Text is only ever set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with properties, attributes and children. `class`, `text`, `on*` and attributes. */
export function el(name, props = {}, ...children) {
  return fill(document.createElement(name), props, children);
}

/** The same in SVG. */
export function svg(name, props = {}, ...children) {
  return fill(document.createElementNS(SVG, name), props, children);
}

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets text only where it differs, so that selections and focus live through a refresh. */
export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function attr(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/** Replaces children only where the signature of what they show has changed. */
export function once(node, signature, make) {
  if (node.dataset.shows === signature) return;
  node.dataset.shows = signature;
  node.replaceChildren(...make());
}

/**
 * Keeps one child per item, by key, in the items' order. `create(item)` gives {node, update(item)}.
 * Children stay the same nodes between refreshes: what is open stays open, what has focus keeps it.
 */
export function keyed(container, items, keyOf, create) {
  const kept = (container.kept ??= new Map());
  const seen = new Set();
  let place = container.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    seen.add(key);
    let entry = kept.get(key);
    if (!entry) kept.set(key, (entry = create(item)));
    entry.update(item);
    if (entry.node === place) place = place.nextSibling;
    else container.insertBefore(entry.node, place);
  }
  for (const [key, entry] of kept) {
    if (!seen.has(key)) {
      entry.node.remove();
      kept.delete(key);
    }
  }
}

/** A labelled meter from 0 to 1. */
export function bar(label) {
  const fillNode = el("span");
  const node = el("div", { class: "bar", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, fillNode);
  return {
    node,
    set(ratio, kind = "") {
      const percent = ratio === null || ratio === undefined ? 0 : Math.max(0, Math.min(1, ratio)) * 100;
      fillNode.style.width = `${percent.toFixed(1)}%`;
      if (fillNode.className !== kind) fillNode.className = kind;
      attr(node, "aria-valuenow", percent.toFixed(0));
    },
  };
}
