// A row per intrinsic: its button, its arguments, its result. And all of them at once.

import { postJson } from "./api.js";
import { judged, turns, wire } from "./conversation.js";
import { announce, byId, count, duration, el } from "./dom.js";
import { ownerClass } from "./owners.js";

const READS = { user: "Reads the last message", assistant: "Reads the last answer", any: "Reads the conversation" };
const NEEDS = { user: "Needs a message first", assistant: "Needs an answer first", any: "Needs a conversation first" };

// What the fields of arguments hold at first.
const EXAMPLES = { requirement: "The answer is at most three sentences long." };

let hooks;
let rows = [];
let epoch = 0;

/** `hooks`: called([call, ...], seconds) with what calls made together cost; failed(error). */
export function startIntrinsics(given) {
  hooks = given;
  byId("run-all").addEventListener("click", runAll);
}

/** Show these, as GET /v1/intrinsics lists them. */
export function setIntrinsics(infos) {
  rows = infos.map(makeRow);
  const [plain, activated] = [rows.filter(isPlain), rows.filter((row) => !isPlain(row))];
  const none = el("li", { class: "note" }, "No adapter is loaded on this server.");
  byId("intrinsics").replaceChildren(...(rows.length ? activated.map((row) => row.root) : [none]));
  byId("twin-list").replaceChildren(...plain.map((row) => row.root));
  byId("twins").hidden = !plain.length;
  updateIntrinsics();
}

export function clearIntrinsics() {
  epoch += 1;
  for (const row of rows) row.output.replaceChildren();
  updateIntrinsics();
}

/** After a turn: which can be called now, and which results are about an earlier turn. */
export function updateIntrinsics() {
  for (const row of rows) {
    const about = judged(row.info.reads);
    row.button.disabled = !about || row.busy;
    row.button.title = about ? "" : NEEDS[row.info.reads];
    row.about.textContent = about ? READS[row.info.reads] : NEEDS[row.info.reads];
    const stale = Boolean(about && row.length !== null && row.length !== about.length);
    row.output.classList.toggle("stale", stale);
  }
  byId("run-all").disabled = !rows.some((row) => !isPlain(row) && !row.button.disabled);
  byId("run-all").title = turns.length ? "" : "Needs a message first";
}

const isPlain = (row) => row.info.kind === "lora";

function makeRow(info) {
  const id = `intrinsic-${info.name}`;
  const row = { info, busy: false, length: null };
  row.about = el("p", { class: "note", id: `${id}-about` });
  row.button = el(
    "button",
    { type: "button", "aria-label": `Run ${info.name}`, "aria-describedby": row.about.id, onclick: () => runOne(row) },
    "Run",
  );
  row.fields = info.arguments.map((name) => argumentField(row, name));
  row.output = el("div", { class: "output", "aria-live": "polite" });
  row.root = el(
    "li",
    { class: `intrinsic ${ownerClass(info.name)}`, "data-name": info.name },
    el("div", { class: "headline" }, el("div", {}, heading(info.name), row.about), row.button),
    ...row.fields.flatMap((field) => [field.label, field.input]),
    row.output,
  );
  return row;
}

const heading = (name) => el("h4", {}, el("span", { class: "dot" }), name);

function argumentField(row, name) {
  const id = `argument-${row.info.name}-${name}`;
  const input = el("input", { id, type: "text", autocomplete: "off", value: EXAMPLES[name] });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || row.button.disabled) return;
    event.preventDefault();
    runOne(row);
  });
  return { name, input, label: el("label", { for: id }, name.replaceAll("_", " ")) };
}

const argumentsOf = (row) => Object.fromEntries(row.fields.map(({ name, input }) => [name, input.value.trim()]));

const missing = (row) => row.fields.find(({ input }) => !input.value.trim());

async function runOne(row) {
  const lacking = missing(row);
  if (lacking) {
    showProblem(row, `Fill in the ${lacking.name.replaceAll("_", " ")} first.`);
    lacking.input.focus();
    return;
  }
  const path = `v1/intrinsics/${encodeURIComponent(row.info.name)}`;
  const about = judged(row.info.reads);
  await guarded([row], async (current) => {
    const body = { messages: wire(), arguments: argumentsOf(row) };
    const result = await postJson(path, body);
    if (!current()) return;
    showResult(row, result, about);
    announce(`${row.info.name}: ${textOf(result.result)}`);
    hooks.called([callOf(row, result, about)], result.seconds);
  });
}

async function runAll() {
  const activated = rows.filter((row) => !isPlain(row));
  const chosen = activated.filter((row) => judged(row.info.reads) && !missing(row) && !row.busy);
  for (const row of activated.filter((row) => !row.busy && missing(row))) {
    showProblem(row, `Left out: it has no ${missing(row).name.replaceAll("_", " ")}.`);
  }
  if (!chosen.length) return;
  const abouts = chosen.map((row) => judged(row.info.reads));
  const withArguments = chosen.filter((row) => row.fields.length);
  const body = {
    names: chosen.map((row) => row.info.name),
    messages: wire(),
    arguments: Object.fromEntries(withArguments.map((row) => [row.info.name, argumentsOf(row)])),
  };
  byId("run-all").textContent = "Running…";
  await guarded(chosen, async (current) => {
    const { data, seconds } = await postJson("v1/intrinsics", body);
    if (!current()) return;
    const calls = chosen.map((row, i) => settle(row, data[i], abouts[i])).filter(Boolean);
    announce(`${calls.length} of ${chosen.length} intrinsics answered in ${duration(seconds)}.`);
    if (calls.length) hooks.called(calls, seconds);
  });
  byId("run-all").textContent = "Run all";
}

/** Show one result of several; returns its call, or nothing where it failed. */
function settle(row, result, about) {
  if (result.error) {
    showProblem(row, result.error.message);
    return null;
  }
  showResult(row, result, about);
  return callOf(row, result, about);
}

/** Run with these rows marked as busy, and a failure shown in each of them. `current()`: the conversation is still on. */
async function guarded(busy, work) {
  const mine = epoch;
  const current = () => mine === epoch;
  mark(busy, true);
  try {
    await work(current);
  } catch (error) {
    if (current()) for (const row of busy) showProblem(row, error.message);
    hooks.failed(error);
  } finally {
    mark(busy, false);
  }
}

function mark(some, busy) {
  for (const row of some) {
    row.busy = busy;
    row.root.classList.toggle("busy", busy);
    row.button.textContent = busy ? "Running…" : "Run";
  }
  updateIntrinsics();
}

function callOf(row, result, about) {
  return {
    label: row.info.name,
    owner: row.info.name,
    kind: row.info.kind,
    turns: about,
    usage: result.usage,
    activation: result.activation_index,
    seconds: result.seconds,
    firstToken: null,
  };
}

function showProblem(row, message) {
  row.length = null;
  row.output.replaceChildren(el("p", { class: "problem" }, message));
}

function showResult(row, result, about) {
  row.length = about.length;
  const number = about.filter((turn) => turn.role === "user").length;
  const { usage } = result;
  const reused = usage.prompt_tokens_details.cached_tokens;
  row.output.replaceChildren(
    valueOf(result.result),
    ...(result.probabilities ? [bars(result.probabilities, String(result.result))] : []),
    el(
      "p",
      { class: "note" },
      `Turn ${number}: ${count(reused)} reused, ${count(usage.computed_tokens)} computed, ${duration(result.seconds)}`,
    ),
  );
}

function valueOf(result) {
  if (result === null || typeof result !== "object") return el("p", { class: "value" }, textOf(result));
  if (Array.isArray(result)) return el("pre", { class: "value" }, textOf(result));
  const pairs = Object.entries(result).map(([name, value]) =>
    el("div", {}, el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, textOf(value))),
  );
  return el("dl", { class: "value" }, ...pairs);
}

const textOf = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

function bars(probabilities, chosen) {
  const labels = Object.entries(probabilities);
  return el("ul", { class: labels.length > 4 ? "bars many" : "bars" }, ...labels.map((pair) => bar(pair, chosen)));
}

function bar([label, share], chosen) {
  const fill = el("span", { class: "fill" });
  fill.style.setProperty("--share", share);
  return el(
    "li",
    { class: label === chosen ? "bar chosen" : "bar" },
    el("span", { class: "bar-label" }, label),
    el("span", { class: "track", "aria-hidden": "true" }, fill),
    el("span", { class: "bar-number" }, share.toFixed(2)),
  );
}
