// The strip: one cell per token, coloured by owner, pale where reused and full where computed.

import { byId, count, el, plural } from "./dom.js";
import { ownerClass, ownerName } from "./owners.js";

// Up to how many tokens cells have this size.
const SIZES = [[300, "large"], [1200, "medium"], [Infinity, "small"]];

let cells = [];
let selected = null;
let asText = false;

export function startStrip() {
  byId("as-text").addEventListener("click", () => {
    asText = !asText;
    byId("as-text").setAttribute("aria-pressed", String(asText));
    byId("as-text").textContent = asText ? "Show as cells" : "Show as text";
    const drawing = byId("strip").querySelector(".drawing");
    drawing?.classList.toggle("as-text", asText);
    showEnd(drawing);
  });
}

export function clearStrip() {
  cells = [];
  selected = null;
  byId("strip").replaceChildren();
  byId("as-text").hidden = true;
}

export function stripProblem(message) {
  clearStrip();
  byId("strip").append(el("p", { class: "problem" }, message));
}

export function drawStrip(plan) {
  clearStrip();
  byId("as-text").hidden = false;
  const drawing = el("div", { class: `drawing ${sizeOf(plan)}${asText ? " as-text" : ""}`, role: "img" });
  drawing.append(row(plan.cells, 0), ...branches(plan, 0));
  drawing.setAttribute("aria-label", summary(plan));
  drawing.addEventListener("pointerover", pick);
  drawing.addEventListener("pointerdown", pick);
  byId("strip").append(drawing, inspector(), legend());
  showEnd(drawing);
}

/** As text, a prompt is higher than its box; what was computed is usually at its end. */
function showEnd(drawing) {
  if (asText && drawing) drawing.scrollTop = drawing.scrollHeight;
}

function row(some, start) {
  return el("div", { class: "cells" }, ...some.map((token, i) => cell(token, start + i)));
}

function branches(segment, start) {
  const end = start + segment.cells.length;
  const drawn = segment.children.filter(({ cells: own }) => own.length);
  drawn.sort((a, b) => a.calls.length - b.calls.length);
  return drawn.map((child) => branch(child, end));
}

function branch(segment, start) {
  const { calls, cells: own } = segment;
  const [call] = calls;
  if (calls.length === 1) {
    const name = el("span", { class: "branch-name" }, call.label);
    return el("div", { class: `branch ${ownerClass(call.owner)}` }, name, row(own, start));
  }
  const name = el("p", { class: "note" }, `${calls.length} of them go on together`);
  return el("div", { class: "shared" }, name, row(own, start), ...branches(segment, start));
}

function cell(token, position) {
  const state = token.reused ? "reused" : "computed";
  const node = el(
    "span",
    { class: `cell ${ownerClass(token.owner)} ${state}`, title: visible(token.text), "data-i": cells.length },
    token.text ?? "▢",
  );
  cells.push({ token, position, node });
  return node;
}

const sizeOf = (plan) => SIZES.find(([most]) => lengthOf(plan) <= most)[1];

const lengthOf = ({ cells: own, children }) => children.reduce((sum, child) => sum + lengthOf(child), own.length);

function pick(event) {
  const index = event.target.dataset?.i;
  if (index !== undefined) select(Number(index));
}

function select(index) {
  const { token, position, node } = cells[index];
  selected?.classList.remove("selected");
  selected = node;
  node.classList.add("selected");
  const slider = byId("inspect");
  const state = token.reused ? "reused" : "computed";
  slider.value = index;
  const words = `Token ${count(position + 1)}: ${visible(token.text)}, ${ownerName(token.owner)}, ${state}`;
  slider.setAttribute("aria-valuetext", words);
  byId("readout").replaceChildren(
    el("span", { class: "muted" }, `Token ${count(position + 1)}`),
    el("code", {}, visible(token.text)),
    el("span", {}, `${ownerName(token.owner)}, ${state}`),
  );
}

/** A slider walks through the tokens with the arrow keys; the pointer does the same on the cells. */
function inspector() {
  const slider = el("input", { id: "inspect", type: "range", min: 0, max: cells.length - 1, value: 0 });
  slider.addEventListener("input", () => {
    select(slider.valueAsNumber);
    selected.scrollIntoView({ block: "nearest" });
  });
  return el(
    "div",
    { class: "inspector" },
    el("label", { for: "inspect", class: "unseen" }, "Look at one token"),
    slider,
    el("p", { id: "readout", class: "readout" }, el("span", { class: "muted" }, "Point at a cell to read its token.")),
  );
}

function legend() {
  const owners = [...new Set(cells.map(({ token }) => token.owner))];
  const meaning = el("li", {}, "Pale: reused. Full: computed.");
  return el("ul", { class: "legend", "aria-label": "Legend" }, ...owners.map(legendEntry), meaning);
}

function legendEntry(owner) {
  const swatch = (state) => el("span", { class: `cell ${ownerClass(owner)} ${state}`, "aria-hidden": "true" });
  return el("li", {}, swatch("reused"), swatch("computed"), ownerName(owner));
}

function summary(plan) {
  const reused = plan.cells.filter((token) => token.reused).length;
  const tokens = `${plural(plan.cells.length, "token")}, ${count(reused)} of them reused`;
  if (!plan.children.length) return tokens;
  return `${tokens}, shared by ${plan.calls.length} calls: ${plan.calls.map((call) => call.label).join(", ")}`;
}

/** A token's text with its white space made visible. */
function visible(text) {
  if (text === null) return "part of the intrinsic's instruction";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "(no text)";
}
