// The playground: puts the parts together.

import { getJson, getKey, setKey } from "./api.js";
import { refresh, resume, startCache } from "./cache.js";
import { addCalls, clearCalls, setRate, shownGroup, startCalls, titleOf } from "./calls.js";
import { clearChat, startChat } from "./chat.js";
import { startDocuments } from "./documents.js";
import { byId, count } from "./dom.js";
import { clearIntrinsics, setIntrinsics, startIntrinsics, updateIntrinsics } from "./intrinsics.js";
import { setOwners } from "./owners.js";
import { cellsOf, planOf } from "./prompt.js";
import { clearStrip, drawStrip, startStrip, stripProblem } from "./strip.js";

const RETRY_MS = 3000;

let baseModel = null;
let lost = false;

async function load() {
  try {
    const [models, intrinsics] = await Promise.all([getJson("v1/models"), getJson("v1/intrinsics")]);
    const base = models.data[0];
    baseModel = base.id;
    byId("model").textContent = `${base.id}, context of ${count(base.max_model_len)} tokens`;
    const [plain, activated] = [(info) => info.kind === "lora", (info) => info.kind !== "lora"];
    setOwners([...intrinsics.data.filter(activated), ...intrinsics.data.filter(plain)].map((info) => info.name));
    setIntrinsics(intrinsics.data);
    notice(null);
    resume();
  } catch (error) {
    byId("model").textContent = "not connected";
    failed(error);
    if (error.status === 0) setTimeout(load, RETRY_MS);
  }
}

/** Trouble that concerns the whole page; the place where it happened says so itself. */
function failed(error) {
  if (error.status === 401) {
    notice(error.message);
    byId("settings").open = true;
    byId("key").focus();
  } else if (error.status === 0 || baseModel === null) {
    lost = error.status === 0;
    notice(error.message);
  }
}

/** The server answered: what was said about losing it no longer holds. */
function measured(secondsPerToken) {
  setRate(secondsPerToken);
  if (lost) notice(null);
  lost = false;
}

function notice(message) {
  byId("notice").hidden = !message;
  byId("notice").textContent = message ?? "";
}

async function called(calls, seconds) {
  addCalls(calls, seconds);
  await refresh();
}

async function drawGroup(group, latest) {
  byId("tokens-empty").hidden = true;
  byId("tokens-title").textContent = `Tokens of ${latest ? "the latest" : "an earlier"} call: ${titleOf(group)}`;
  try {
    const sequences = await Promise.all(group.calls.map((call) => cellsOf(call, baseModel)));
    if (shownGroup() === group) drawStrip(planOf(group.calls, sequences));
  } catch (error) {
    if (shownGroup() === group) stripProblem(`The tokens cannot be shown. ${error.message}`);
    failed(error);
  }
}

function startAfresh() {
  clearChat();
  clearIntrinsics();
  clearCalls();
  clearStrip();
  byId("tokens-title").textContent = "Tokens of the latest call";
  byId("tokens-empty").hidden = false;
}

function startSettings() {
  byId("key").value = getKey();
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(byId("key").value);
    byId("settings").open = false;
    byId("message").focus();
    load();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!byId("settings").contains(event.target)) byId("settings").open = false;
  });
  byId("settings").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    byId("settings").open = false;
    byId("settings").querySelector("summary").focus();
  });
}

startSettings();
startDocuments();
startStrip();
startCalls({ chosen: drawGroup });
startCache({ measured, failed });
startIntrinsics({ called, failed });
startChat({
  model: () => baseModel,
  changed: updateIntrinsics,
  called: (call) => called([call], call.seconds),
  failed,
});
byId("fresh").addEventListener("click", startAfresh);
load();
