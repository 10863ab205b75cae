// What each call cost: reused and computed tokens, time, and what a plain LoRA would have had to compute.

import { byId, count, duration, el, plural } from "./dom.js";
import { ownerClass } from "./owners.js";

const KEPT = 60;

let hooks;
let groups = [];
let shown = null;
let rate = null;
let totals = { calls: 0, prompt: 0, computed: 0 };

/** `hooks`: chosen(group, latest) when a group of calls is to be drawn. */
export function startCalls(given) {
  hooks = given;
}

/** Note calls that were made together, and show them. */
export function addCalls(calls, seconds) {
  const group = { calls, seconds, ...sums(calls) };
  group.row = makeRow(group);
  groups.unshift(group);
  for (const old of groups.splice(KEPT)) old.row.root.remove();
  totals = {
    calls: totals.calls + calls.length,
    prompt: totals.prompt + group.prompt,
    computed: totals.computed + group.computed,
  };
  byId("calls").prepend(group.row.root);
  choose(group);
}

export function clearCalls() {
  groups = [];
  shown = null;
  totals = { calls: 0, prompt: 0, computed: 0 };
  byId("calls").replaceChildren();
  byId("figures").replaceChildren();
  byId("sum").textContent = "What each call cost is listed here.";
  byId("estimate").hidden = true;
}

/** Seconds that the server needs to compute one token of a prompt, or null while it does not know. */
export function setRate(secondsPerToken) {
  if (secondsPerToken === rate) return;
  rate = secondsPerToken;
  redraw();
}

export const shownGroup = () => shown;

function choose(group) {
  shown = group;
  redraw();
  hooks.chosen(group, group === groups[0]);
}

function redraw() {
  for (const group of groups) {
    group.row.saved.textContent = savedText(group);
    group.row.root.setAttribute("aria-current", String(group === shown));
  }
  if (!shown) return;
  byId("figures").replaceChildren(figures(shown));
  const saved = totals.prompt - totals.computed;
  byId("sum").textContent =
    `${plural(totals.calls, "call")} so far: ${plural(totals.computed, "token")} computed, ` +
    `${count(saved)} saved${aboutTime(saved)}. Choose one to see its tokens.`;
  byId("estimate").hidden = false;
  byId("estimate").textContent = explanation();
}

function explanation() {
  const tokens =
    "A plain LoRA changes the keys and values of every token, so its first call on a conversation computes the whole " +
    "prompt. Saved is the prompt less what was computed. ";
  return rate === null
    ? `${tokens}The server has not measured its speed yet, so no time is estimated.`
    : `${tokens}The time saved is an estimate: tokens saved times ${perToken(rate)} per token, the server's own recent average.`;
}

const perToken = (seconds) => `${(seconds * 1000).toPrecision(2)} ms`;

function sums(calls) {
  const sum = (value) => calls.reduce((all, call) => all + value(call), 0);
  return {
    prompt: sum((call) => call.usage.prompt_tokens),
    computed: sum((call) => call.usage.computed_tokens),
    reused: sum((call) => call.usage.prompt_tokens_details.cached_tokens),
  };
}

/** What calls made together are called. */
export function titleOf({ calls }) {
  return calls.length === 1 ? calls[0].label : `${calls.length} intrinsics at once`;
}

const savedOf = (group) => group.prompt - group.computed;

function savedText(group) {
  return savedOf(group) ? `saved ${count(savedOf(group))}${aboutTime(savedOf(group))}` : "nothing saved";
}

function aboutTime(tokens) {
  return rate === null || tokens <= 0 ? "" : `, about ${duration(tokens * rate)}`;
}

function makeRow(group) {
  const saved = el("span", { class: "saved" });
  const dots = group.calls.map((call) => el("span", { class: `dot ${ownerClass(call.owner)}` }));
  const button = el(
    "button",
    { type: "button", class: "call", onclick: () => choose(group) },
    el("span", { class: "call-name" }, ...dots, titleOf(group)),
    proportion(group),
    el(
      "span",
      { class: "call-cost" },
      `${count(group.reused)} reused, ${count(group.computed)} computed, ${duration(group.seconds)}`,
    ),
    saved,
  );
  return { root: el("li", {}, button), saved };
}

/** A bar of the whole prompt with the computed part full. */
function proportion(group) {
  const owner = group.calls.length === 1 ? group.calls[0].owner : null;
  const full = el("span", { class: "computed" });
  full.style.setProperty("--share", group.computed / group.prompt);
  return el("span", { class: `proportion ${ownerClass(owner)}`, "aria-hidden": "true" }, full);
}

function figures(group) {
  const first = group.calls[0];
  const plain = group.calls.every((call) => call.kind === "alora")
    ? `${group.calls.length === 1 ? "A plain LoRA" : "Plain LoRAs"} would compute`
    : "Without the cache";
  const wait = first.firstToken === null ? null : `first token after ${duration(first.firstToken)}`;
  const seconds = aboutTime(savedOf(group)).slice(2);
  return el(
    "dl",
    { class: "figures" },
    figure("Prompt", count(group.prompt), "tokens", "prompt"),
    figure("Reused", count(group.reused), "tokens", "reused"),
    figure("Computed", count(group.computed), "tokens", "computed"),
    figure("Time", duration(group.seconds), wait, "time"),
    figure(plain, count(group.prompt), "tokens", "plain"),
    figure("Saved", count(savedOf(group)), seconds ? `tokens, ${seconds}` : "tokens", "saved"),
  );
}

function figure(name, value, unit, key) {
  return el(
    "div",
    { class: "figure", "data-figure": key },
    el("dt", {}, name),
    el("dd", {}, el("strong", {}, value), unit ? el("span", { class: "muted" }, unit) : null),
  );
}
