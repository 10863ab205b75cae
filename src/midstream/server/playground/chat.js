// Talking to the base model: the messages as shown, the composer, the streamed answer.

import { isAbort, postStream } from "./api.js";
import { turns, wire } from "./conversation.js";
import { attachSamples, restore, takeDocuments } from "./documents.js";
import { announce, byId, el, plural } from "./dom.js";
import { OPENINGS } from "./samples.js";

let hooks;
let running = null;
let epoch = 0;

/** `hooks`: model() is the base model's name; changed() after each turn; called(call) with what an answer cost. */
export function startChat(given) {
  hooks = given;
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  byId("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  clearChat();
}

export function clearChat() {
  stop();
  epoch += 1;
  turns.length = 0;
  byId("log").replaceChildren(openings());
  byId("message").focus({ preventScroll: true });
}

function stop() {
  running?.abort();
}

async function submit() {
  const content = byId("message").value.trim();
  if (!content || running || !hooks.model()) return;
  const turn = { role: "user", content, documents: takeDocuments() };
  const shown = userBubble(turn);
  const answer = answerBubble();
  if (!turns.length) byId("log").replaceChildren();
  dropProblems();
  turns.push(turn);
  byId("log").append(shown, answer.root);
  byId("message").value = "";
  toBottom();
  setBusy(new AbortController());
  hooks.changed();
  const mine = epoch;
  const problem = await converse(running.signal, answer);
  setBusy(null);
  if (mine === epoch) settle(turn, shown, answer, problem);
}

function settle(turn, shown, answer, problem) {
  answer.root.classList.remove("writing");
  if (answer.complete || answer.text) keep(answer);
  else takeBack(turn, shown, answer);
  if (problem) byId("log").append(el("p", { class: "problem" }, problem));
  toBottom();
  hooks.changed();
}

/** Fills `answer`; returns what went wrong, in words, or null. */
async function converse(signal, answer) {
  const sent = turns.slice();
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  let firstToken = null;
  try {
    for await (const chunk of postStream("v1/chat/completions", request(), signal)) {
      const choice = chunk.choices[0];
      if (choice?.delta?.content) {
        firstToken ??= since();
        grow(answer, choice.delta.content);
      }
      if (choice?.finish_reason) answer.reason = choice.finish_reason;
      if (chunk.usage) report(answer, { turns: sent, usage: chunk.usage, seconds: since(), firstToken });
    }
    answer.complete = true;
    return null;
  } catch (error) {
    if (isAbort(error)) {
      answer.reason = "stopped";
      announce("Stopped.");
      return null;
    }
    hooks.failed(error);
    return error.message;
  }
}

function request() {
  return {
    model: hooks.model(),
    messages: wire(),
    temperature: numberIn("temperature", 0),
    max_tokens: numberIn("max-tokens", 120),
    stream: true,
    stream_options: { include_usage: true },
  };
}

function report(answer, cost) {
  const { usage } = cost;
  announce(
    `Answer of ${plural(usage.completion_tokens, "token")}. ` +
      `${usage.prompt_tokens_details.cached_tokens} tokens of the prompt reused, ${usage.computed_tokens} computed.`,
  );
  hooks.called({ ...cost, label: "answer", owner: null, kind: "base", activation: null });
}

function keep(answer) {
  turns.push({ role: "assistant", content: answer.text });
  if (!answer.text) answer.body.append(el("em", { class: "muted" }, "An empty answer."));
  const notes = { stopped: "Stopped here.", length: "Cut off at the longest answer that Settings allow." };
  if (notes[answer.reason]) answer.root.append(el("p", { class: "note" }, notes[answer.reason]));
}

/** Nothing was answered: the message goes back to where it was written. */
function takeBack(turn, shown, answer) {
  turns.pop();
  shown.remove();
  answer.root.remove();
  restore(turn.documents);
  byId("message").value = turn.content;
  if (!turns.length) byId("log").replaceChildren(openings());
}

function grow(answer, text) {
  const follow = nearBottom();
  answer.text += text;
  answer.body.append(text);
  if (follow) toBottom();
}

function setBusy(controller) {
  running = controller;
  const focused = document.activeElement === byId("stop") || document.activeElement === byId("send");
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  byId("log").setAttribute("aria-busy", String(Boolean(controller)));
  if (focused) byId("message").focus();
}

function userBubble(turn) {
  return el("article", { class: "turn user" }, el("h3", {}, "You"), ...turn.documents.map(passage), said(turn.content));
}

function answerBubble() {
  const body = said("");
  const root = el("article", { class: "turn assistant writing" }, el("h3", {}, "Base model"), body);
  return { root, body, text: "", complete: false, reason: null };
}

const said = (text) => el("div", { class: "said" }, text);

function passage({ title, text }) {
  return el(
    "details",
    { class: "passage" },
    el("summary", {}, title || "Untitled text"),
    el("p", { class: "said" }, text),
  );
}

function openings() {
  const choose = ({ message, passages }) => {
    byId("message").value = message;
    attachSamples(passages);
    byId("message").focus();
  };
  const buttons = OPENINGS.map((opening) =>
    el("button", { type: "button", class: "opening", onclick: () => choose(opening) }, opening.message),
  );
  return el("div", { class: "openings" }, el("p", {}, "Write a message, or start from one of these:"), ...buttons);
}

function dropProblems() {
  for (const old of byId("log").querySelectorAll(".problem")) old.remove();
}

function numberIn(id, otherwise) {
  const field = byId(id);
  return field.value !== "" && field.checkValidity() ? field.valueAsNumber : otherwise;
}

function nearBottom() {
  const log = byId("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function toBottom() {
  byId("log").scrollTop = byId("log").scrollHeight;
}
