// The cache as it is now: memory, hit rate, requests, and the tree of nodes.

import { getJson } from "./api.js";
import { byId, bytes, count, el, percent, plural } from "./dom.js";
import { ownerClass, ownerName } from "./owners.js";
import { layout } from "./tree.js";

const EVERY_MS = 2000;

let hooks;
let timer = null;
let allowed = false;
let view = null;
let asking = null;
const bars = new Map();

/** `hooks`: measured(secondsPerToken) with each reading; failed(error) where the server cannot be asked. */
export function startCache(given) {
  hooks = given;
  document.addEventListener("visibilitychange", poll);
}

/** Begin to poll, or begin again after the server refused. */
export function resume() {
  allowed = true;
  poll();
}

function poll() {
  clearInterval(timer);
  if (document.hidden || !allowed) return;
  refresh();
  timer = setInterval(refresh, EVERY_MS);
}

/** Read the cache now. Readings never overlap: a call while one is under way shares it. */
export async function refresh() {
  if (!allowed) return;
  asking ??= read().finally(() => (asking = null));
  await asking;
}

async function read() {
  try {
    draw(await getJson("v1/cache"));
  } catch (error) {
    if (error.status !== 0) refused();
    hide(error);
    if (error.status !== 403) hooks.failed(error);
  }
}

/** Asking again would bring the same answer. */
function refused() {
  allowed = false;
  poll();
}

function hide(error) {
  byId("cache").hidden = true;
  byId("cache-note").hidden = false;
  byId("cache-note").textContent =
    error.status === 403 ? "This server does not show its cache to this API key." : error.message;
}

function draw(cache) {
  view ??= makeView();
  byId("cache").hidden = false;
  byId("cache-note").hidden = true;
  drawMemory(cache);
  view.hits.textContent = cache.hit_rate === null ? "none yet" : percent(cache.hit_rate);
  view.hitsNote.textContent = `${count(cache.prefix_cache_hits)} of ${count(cache.prefix_cache_queries)} tokens`;
  view.running.textContent = count(cache.running);
  view.waiting.textContent = `${count(cache.waiting)} waiting`;
  drawTree(cache);
  hooks.measured(cache.prefill_seconds_per_token);
}

function makeView() {
  const made = {
    meter: el("div", { class: "meter", role: "meter", "aria-label": "Memory of the cache", "aria-valuemin": 0 }),
    fill: el("span", { class: "fill" }),
    memory: el("strong", {}),
    memoryNote: el("span", { class: "muted" }),
    hits: el("strong", {}),
    hitsNote: el("span", { class: "muted" }),
    running: el("strong", {}),
    waiting: el("span", { class: "muted" }),
    tree: el("div", { class: "tree", role: "img" }),
    treeBox: el("div", { class: "tree-box", tabindex: 0, "aria-label": "Tree of the cache", role: "group" }),
    treeNote: el("p", { class: "note" }),
  };
  made.meter.append(made.fill);
  made.treeBox.append(made.tree);
  const figures = el(
    "dl",
    { class: "figures three" },
    pair("Memory", made.memory, made.memoryNote),
    pair("Hit rate", made.hits, made.hitsNote),
    pair("Running", made.running, made.waiting),
  );
  byId("cache").replaceChildren(figures, made.meter, made.treeBox, made.treeNote);
  return made;
}

function pair(name, ...value) {
  return el("div", { class: "figure" }, el("dt", {}, name), el("dd", {}, ...value));
}

function drawMemory({ kv_used_bytes: used, kv_total_bytes: total }) {
  view.memory.textContent = bytes(used);
  view.memoryNote.textContent = `of ${bytes(total)}`;
  view.meter.setAttribute("aria-valuemax", total);
  view.meter.setAttribute("aria-valuenow", used);
  view.meter.setAttribute("aria-valuetext", `${bytes(used)} of ${bytes(total)}`);
  view.fill.style.setProperty("--share", total ? used / total : 0);
}

function drawTree({ nodes, truncated }) {
  const { placed, rows, width } = layout(nodes);
  const present = new Set();
  for (const place of placed) {
    const key = keyOf(place, present);
    present.add(key);
    drawNode(key, place, width);
  }
  for (const [key, bar] of bars) {
    if (present.has(key)) continue;
    bar.remove();
    bars.delete(key);
  }
  view.tree.style.setProperty("--rows", rows);
  view.treeBox.hidden = !rows;
  view.tree.setAttribute("aria-label", treeText(nodes));
  view.treeNote.textContent = treeText(nodes) + (truncated ? " Not all nodes are shown." : "");
}

/** Which bar is which from reading to reading. Ids are of one reading only: the tree is numbered anew each time. */
function keyOf({ node, start }, taken) {
  for (let nth = 0; ; nth += 1) {
    const key = `${start} ${nth} ${node.owner ?? ""}`;
    if (!taken.has(key)) return key;
  }
}

/** Bars keep their element from reading to reading, so that the style sheet can let them move. */
function drawNode(key, { node, start, row, from }, width) {
  const bar = bars.get(key) ?? makeBar(key);
  bar.className = `node ${ownerClass(node.owner)}${node.held ? " held" : ""}${from === null ? "" : " hangs"}`;
  bar.title = `${ownerName(node.owner)}: ${plural(node.tokens, "token")}${node.held ? ", held by a request" : ""}`;
  const place = { "--at": start / width, "--wide": node.tokens / width, "--row": row, "--drop": row - (from ?? row) };
  for (const [name, value] of Object.entries(place)) bar.style.setProperty(name, value);
}

function makeBar(key) {
  const bar = el("div");
  bars.set(key, bar);
  view.tree.append(bar);
  return bar;
}

function treeText(nodes) {
  if (!nodes.length) return "The tree is empty.";
  const tokens = (some) => some.reduce((sum, node) => sum + node.tokens, 0);
  const base = nodes.filter((node) => node.owner === null);
  const held = nodes.filter((node) => node.held).length;
  const own = tokens(nodes) - tokens(base);
  return (
    `${plural(nodes.length, "node")}: ${plural(tokens(base), "token")} of the base model, ${count(own)} of adapters` +
    `${held ? `; ${count(held)} held by running requests` : ""}.`
  );
}
