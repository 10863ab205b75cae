// The documents of the next message: samples, files, or pasted text.

import { byId, count, el } from "./dom.js";
import { PASSAGES } from "./samples.js";

const MAX_FILE_BYTES = 2 * 1024 * 1024;
let attached = [];
let given = 0;

export function startDocuments() {
  byId("samples").append(...PASSAGES.map(sampleButton));
  byId("doc-add").addEventListener("click", addPasted);
  byId("files").addEventListener("change", addFiles);
}

export function attachSamples(indices) {
  attached = [];
  for (const index of indices) add(PASSAGES[index]);
  draw();
}

/** Put documents back that were taken for a message that failed. */
export function restore(documents) {
  attached = [...documents, ...attached];
  draw();
}

/** The documents for the message that is sent now; a text left in the field counts as added. */
export function takeDocuments() {
  if (byId("doc-text").value.trim()) addPasted();
  const taken = attached;
  attached = [];
  byId("doc-note").textContent = "";
  byId("add").open = false;
  draw();
  return taken;
}

function sampleButton(passage) {
  return el("button", { type: "button", onclick: () => addAndSay(passage) }, passage.title);
}

function addAndSay(passage) {
  add(passage);
  say(`Added “${passage.title}”.`);
  draw();
}

function add({ title, text }) {
  given += 1;
  attached.push({ doc_id: `document-${given}`, title, text });
}

function addPasted() {
  const [title, text] = [byId("doc-title"), byId("doc-text")];
  if (!text.value.trim()) {
    say("Paste a text first.");
    text.focus();
    return;
  }
  addAndSay({ title: title.value.trim(), text: text.value.trim() });
  title.value = "";
  text.value = "";
}

async function addFiles() {
  const input = byId("files");
  const problems = [];
  for (const file of input.files) {
    const problem = await addFile(file);
    if (problem) problems.push(problem);
  }
  input.value = "";
  say(problems.join(" "));
  draw();
}

async function addFile(file) {
  if (!/\.(txt|md)$/i.test(file.name)) return `${file.name} is not a .txt or .md file.`;
  if (file.size > MAX_FILE_BYTES) return `${file.name} is larger than 2 MiB.`;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()).trim();
    if (!text) return `${file.name} is empty.`;
    add({ title: file.name.replace(/\.(txt|md)$/i, ""), text });
    return null;
  } catch {
    return `${file.name} could not be read as UTF-8 text.`;
  }
}

function say(text) {
  byId("doc-note").textContent = text;
}

function draw() {
  byId("attached").replaceChildren(...attached.map(chip));
}

function chip(document) {
  const name = document.title || "Untitled text";
  const remove = () => {
    attached = attached.filter((other) => other !== document);
    draw();
    byId("message").focus();
  };
  return el(
    "li",
    { class: "chip" },
    el("span", { class: "chip-name" }, name),
    el("span", { class: "muted" }, `${count(document.text.split(/\s+/).length)} words`),
    el("button", { type: "button", class: "bare", "aria-label": `Remove ${name}`, onclick: remove }, "×"),
  );
}
