// What a person orders. The token is asked for once and kept in this tab's session storage, never in a cookie.

import { show, text } from "./dom.js";

const TOKEN = "fleetloop-token";
const NAME = "fleetloop-name";
const find = (id) => document.getElementById(id);
const dialog = find("order");
let pending = null;
let remedy = "";

export const unlocked = () => sessionStorage.getItem(TOKEN) !== null;

export function lock() {
  sessionStorage.removeItem(TOKEN);
}

/** Why nobody may act through this page now; empty when one may. */
export function setRemedy(value) {
  remedy = value ?? "";
}

/**
 * Asks, sends, tells. `order`: {title, text, button, path, danger}. Without `path` only the token is asked for.
 * `done` is called after the order has reached the log.
 */
export function ask(order, done = () => {}) {
  pending = { order, done };
  text(find("order-title"), order.title);
  text(find("order-text"), order.text);
  text(find("order-go"), order.button);
  find("order-go").className = order.danger ? "danger" : "primary";
  text(find("order-remedy"), remedy ? `Actions are off: ${remedy}.` : "");
  show(find("order-remedy"), Boolean(remedy));
  show(find("order-fields"), !remedy);
  show(find("order-go"), !remedy);
  show(find("order-comment-label"), Boolean(order.path));
  show(find("order-token-label"), !unlocked());
  find("order-name").value = sessionStorage.getItem(NAME) ?? "";
  find("order-comment").value = "";
  find("order-token").value = "";
  fail("");
  dialog.showModal();
  const first = unlocked() ? "order-comment" : "order-token";
  find(remedy ? "order-cancel" : first).focus();
}

function fail(message) {
  text(find("order-error"), message);
  show(find("order-error"), Boolean(message));
}

async function send(event) {
  event.preventDefault();
  const { order, done } = pending;
  const token = unlocked() ? sessionStorage.getItem(TOKEN) : find("order-token").value.trim();
  if (!token) return fail("Enter the access token.");
  if (!/^[\x21-\x7e]+$/.test(token)) return fail("A token has no spaces and only plain characters.");
  const name = find("order-name").value.trim();
  const go = find("order-go");
  go.disabled = true;
  try {
    const answer = await fetch(order.path ?? "/api/token", {
      method: "POST",
      headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
      body: JSON.stringify({ name, comment: find("order-comment").value }),
    });
    const told = await answer.json();
    if (!answer.ok) {
      if (answer.status === 401) {
        lock();
        show(find("order-token-label"), true);
        return fail("That token is not the one of this service.");
      }
      return fail(told.error ?? answer.statusText);
    }
    sessionStorage.setItem(TOKEN, token);
    sessionStorage.setItem(NAME, name);
    dialog.close();
    done(told);
  } catch (problem) {
    fail(`The service could not be reached (${problem.message}). Try again.`);
  } finally {
    go.disabled = false;
  }
}

find("order-form").addEventListener("submit", send);
find("order-cancel").addEventListener("click", () => dialog.close());
